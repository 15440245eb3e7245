"""Published annotation files to JSONL rows, with a report of every repair, clamp and drop by name.

One file per dataset; `IMPORTERS` is the list. A row is `{"id", "video", "question", "answer", "task", "duration", ..}`, its
id is `VIDEO#k`: the k-th query of the video in the file (from 0; the published `qid` for QVHighlights), whatever else was
dropped. An annotation that is imported is what its completion will say: spans are rounded to two decimals, here and not later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rft.data.importers import activitynet, charades_sta, qvhighlights
from rft.data.importers.folder import Folder
from rft.data.importers.mend import Reversed
from rft.data.importers.outcome import Outcome, report, write
from rft.errors import DataError
from rft.strict import nearest

IMPORTERS: Mapping[str, Callable[[Path, Folder, Reversed], list[Outcome]]] = {
    "charades_sta": charades_sta.read,
    "activitynet": activitynet.read,
    "qvhighlights": qvhighlights.read,
}


def import_annotations(
    dataset: str, annotations: Path, media: Path, out: Path, *, reversed: Reversed = "swap"
) -> dict[str, Any]:
    """Write the rows of `annotations` to `out` and what happened to `OUT.report.json`; returns the report.

    Media are looked for by id under `media`. A span whose ends are `reversed` is swapped or dropped.

    Raises:
        DataError: the file is missing or malformed (with file and line: nothing is written), two media files have one
            id, or no row is left (the report is written and says why).
    """
    if dataset not in IMPORTERS:
        raise DataError(dataset, "there is no importer for this dataset", nearest(dataset, IMPORTERS))
    outcomes = IMPORTERS[dataset](annotations, Folder.open(media, out.parent), reversed)
    found = report(outcomes)
    write(outcomes, found, out)
    if not found["written"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in found["dropped"].items()) or "the file holds none"
        raise DataError(str(annotations), f"no annotation is left ({reasons})", "check --media; OUT.report.json names the ids")
    return found
