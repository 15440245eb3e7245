"""QVHighlights (Lei et al. 2021): one JSON object per line, with windows, and three annotators' scores per 2-s clip.

Clip c is the video from second 2c to 2c + 2, and the second that names it is 2c. Its score is the mean of the three
annotators, to one decimal. Rows say both as the completion will: `answer.highlights` is [[second, score], ..],
`answer.timestamps` and `answer.scores` are the same as text for an answer template, `answer.windows` are the moments. The
published columns that the metrics read (`relevant_clip_ids`, `saliency_scores`) stand beside the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rft.data.importers.folder import Folder
from rft.data.importers.mend import Reversed, mend_span, mend_text
from rft.data.importers.moments import first_drop, is_number, located, read_text
from rft.data.importers.outcome import Note, Outcome, is_dropped
from rft.errors import DataError

CLIP = 2  # seconds
LABELS = ("relevant_windows", "relevant_clip_ids", "saliency_scores")
Scored = tuple[int, Sequence[int]]  # a clip and its three scores


def read(path: Path, folder: Folder, reversed: Reversed) -> list[Outcome]:
    """Every query of the file. Raises DataError with file and line for a line of another layout."""
    outcomes: list[Outcome] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        at = f"{path}:{number}"
        record = _record(line, at)
        name = f"{record['vid']}#{record['qid']}"
        if name in seen:
            raise DataError(at, f"qid {record['qid']} of {record['vid']} is already at {seen[name]}", "drop one of the two")
        seen[name] = at
        outcomes.append(_outcome(name, record, at, folder, reversed))
    return outcomes


def _record(line: str, at: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(at, f"not JSON: {error}", "one JSON object per line, as published") from error
    do = 'a line has "qid", "query", "vid" and "duration"'
    if not isinstance(record, Mapping) or not {"qid", "query", "vid", "duration"} <= record.keys():
        raise DataError(at, "not a query with its video", do)
    if not all(isinstance(record[key], str) for key in ("query", "vid")):
        raise DataError(at, "query and vid are no texts", do)
    if not is_number(record["duration"]) or record["duration"] <= 0:
        raise DataError(at, f"duration is {record['duration']!r}", "it is the length of the video in seconds")
    return record


def _outcome(name: str, record: Mapping[str, Any], at: str, folder: Folder, reversed: Reversed) -> Outcome:
    """Drops beyond those of a span: `no_labels` (the test split has none), `no_windows`, `no_highlights`, `media_missing`."""
    question, text_notes = mend_text(record["query"])
    if not any(key in record for key in LABELS):
        return Outcome(id=name, row=None, notes=first_drop(text_notes, [("dropped", "no_labels")]))
    windows, window_notes = _windows(record, at, reversed)
    clips, clip_notes = _clips(record, at)
    video, duration, media_notes = located(record["vid"], float(record["duration"]), folder)
    notes = first_drop(text_notes, window_notes, clip_notes, media_notes)
    if is_dropped(notes):
        return Outcome(id=name, row=None, notes=notes)
    highlights = [[float(CLIP * clip), round(fmean(scores), 1)] for clip, scores in clips]
    row = {
        "id": name,
        "video": video,
        "question": question,
        "answer": {
            "highlights": highlights,
            "windows": windows,
            "timestamps": ", ".join(f"{second:.0f}" for second, _ in highlights),
            "scores": ", ".join(f"{score:.1f}" for _, score in highlights),
        },
        "task": "highlights",
        "duration": duration,
        "relevant_clip_ids": [clip for clip, _ in clips],
        "saliency_scores": [list(scores) for _, scores in clips],
    }
    return Outcome(id=name, row=row, notes=notes)


def _windows(record: Mapping[str, Any], at: str, reversed: Reversed) -> tuple[list[list[float]], list[Note]]:
    """The windows that can be used. One of several that cannot is taken out: a repair, named `window_` and the reason."""
    given = record.get("relevant_windows")
    is_list = isinstance(given, list) and all(isinstance(w, list) and len(w) == 2 and all(map(is_number, w)) for w in given)
    if not is_list:
        raise DataError(at, f"relevant_windows is {given!r}", "write a list of [start, end]")
    windows, notes = [], []
    for start, end in given:
        window, found = mend_span(float(start), float(end), float(record["duration"]), reversed)
        notes += [("repaired", f"window_{reason}") if kind == "dropped" else (kind, reason) for kind, reason in found]
        windows += [] if is_dropped(found) else [list(window)]
    return windows, notes if windows else [*notes, ("dropped", "no_windows")]


def _clips(record: Mapping[str, Any], at: str) -> tuple[list[Scored], list[Note]]:
    """The scored clips in order of time; those after the last whole clip of the video are left out (`clip_after_video`)."""
    ids, scores = record.get("relevant_clip_ids"), record.get("saliency_scores")
    if not isinstance(ids, list) or not isinstance(scores, list) or len(ids) != len(scores):
        raise DataError(at, "relevant_clip_ids and saliency_scores are no lists of one length", "give the file as published")
    if not all(isinstance(clip, int) and clip >= 0 for clip in ids) or len(set(ids)) < len(ids):
        raise DataError(at, f"relevant_clip_ids is {ids!r}", "clips are counted from 0, and each is there once")
    for three in scores:
        if not isinstance(three, list) or len(three) != 3 or not all(is_number(score) and 0 <= score <= 4 for score in three):
            raise DataError(at, f"the scores of a clip are {three!r}", "three annotators give 0 to 4 each")
    clips = sorted(zip(ids, scores), key=lambda clip: clip[0])
    inside = [clip for clip in clips if clip[0] < int(record["duration"] / CLIP)]
    notes: list[Note] = []
    if [clip for clip, _ in clips] != ids:
        notes.append(("repaired", "clips_out_of_order"))
    if len(inside) < len(clips):
        notes.append(("clamped", "clip_after_video"))
    return inside, notes if inside else [*notes, ("dropped", "no_highlights")]
