"""The `rft data` commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.options import add_actions

DATASETS = ("charades_sta", "activitynet", "qvhighlights")
NAMED = 6  # ids of a reason that are printed


def add(commands: Any) -> None:
    """Adds `data` to the subcommands of a parser."""
    action = add_actions(commands, "data", "Make rows out of published annotations.")
    about = "Read a dataset's annotation file, repair what can be repaired, and report every repair, clamp and drop."
    sub = action("import", _import, about)
    sub.add_argument("dataset", choices=DATASETS)
    sub.add_argument("--annotations", required=True, metavar="FILE", help="the annotation file as it was published")
    sub.add_argument("--media", required=True, metavar="DIR", help="its videos, found by id with any usual extension")
    sub.add_argument("--out", required=True, metavar="FILE.jsonl", help="the rows; the report is FILE.jsonl.report.json")
    sub.add_argument("--reversed", default="swap", choices=("swap", "drop"), help="spans that end before they start")


def _import(options: argparse.Namespace) -> None:
    from rft.data.importers import import_annotations
    from rft.data.importers.outcome import report_path

    out = Path(options.out)
    found = import_annotations(options.dataset, Path(options.annotations), Path(options.media), out, reversed=options.reversed)
    print(f"{out}: {found['written']} rows of {found['read']} annotations")
    for line in _told(found):
        print(f"  {line}")
    print(f"every id is in {report_path(out)}")


def _told(found: Mapping[str, Any]) -> list[str]:
    """A line per reason, with the first ids."""
    lines = []
    for kind in ("repaired", "clamped", "dropped"):
        for reason, count in found[kind].items():
            ids = found["ids"][reason]
            lines.append(f"{kind:<8} {count:>6}  {reason}: {', '.join(ids[:NAMED])}{', ...' if len(ids) > NAMED else ''}")
    return lines
