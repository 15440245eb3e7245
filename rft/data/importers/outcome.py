"""What became of one annotation, and the report over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft.files import write_whole

Kind = Literal["repaired", "clamped", "dropped"]
Note = tuple[Kind, str]  # and the reason
KINDS: tuple[Kind, ...] = ("repaired", "clamped", "dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One annotation: its row, or None when it was dropped, and everything that was done to it, in order."""

    id: str
    row: Mapping[str, Any] | None
    notes: tuple[Note, ...] = ()


def is_dropped(notes: Sequence[Note]) -> bool:
    """True when one of the notes is a drop: the annotation has no row."""
    return any(kind == "dropped" for kind, _ in notes)


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by reason, and under `ids` the rows that each reason was about.

    `read` = `written` + the sum of `dropped`. What was repaired or clamped counts there even if it was dropped afterwards
    for another reason: a reversed span of the wrong video is still a reversed span.
    """
    written = sum(o.row is not None for o in outcomes)
    found: dict[str, Any] = {"read": len(outcomes), "written": written, **{kind: {} for kind in KINDS}, "ids": {}}
    for outcome in outcomes:
        for kind, reason in dict.fromkeys(outcome.notes):
            found[kind][reason] = found[kind].get(reason, 0) + 1
            found["ids"].setdefault(reason, []).append(outcome.id)
    return found


def write(outcomes: Sequence[Outcome], found: Mapping[str, Any], out: Path) -> None:
    """The rows to `out`, in the order of the annotations, and the report beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, "".join(json.dumps(o.row, ensure_ascii=False) + "\n" for o in outcomes if o.row is not None))
    write_whole(report_path(out), json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def report_path(out: Path) -> Path:
    """Where the report of `out` lies."""
    return out.with_name(f"{out.name}.report.json")
