"""A sentence and when it happens: what Charades-STA and ActivityNet Captions have in common."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.data import media
from rft.data.importers.folder import Folder
from rft.data.importers.mend import Reversed, mend_span, mend_text
from rft.data.importers.outcome import Note, Outcome, is_dropped
from rft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One annotation as the file has it; seconds. `index` counts the sentences of the video."""

    video: str
    index: int
    start: float
    end: float
    sentence: str
    duration: float | None = None


def read_text(path: Path) -> str:
    """The file as UTF-8. Raises DataError with the line that is not."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "give the annotation file as --annotations") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}", f"not UTF-8: {error.reason}", "save the file as UTF-8") from error


def read_keyed(path: Path) -> list[Moment]:
    """`{VIDEO: {"duration": s, "timestamps": [[s, e], ..], "sentences": [..]}}`; `duration` may be left out, other keys
    are passed over. Raises DataError with file and line."""
    text = read_text(path)
    try:
        videos = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, text, path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"not JSON: {error.msg}", "give the file as it was published") from error
    except RecursionError as error:
        raise DataError(
            f"{path}:1", "not the published layout: nested too deep", "give the file as it was published"
        ) from error
    if not isinstance(videos, Mapping):
        raise DataError(f"{path}:1", f"a {type(videos).__name__} and no object keyed by video id", "give the file as published")
    moments: list[Moment] = []
    for video, entry in videos.items():
        moments += _moments(video, entry, f"{path}:{_line(text, video)}, {video}")
    return moments


def _unique(pairs: Sequence[tuple[str, Any]], text: str, path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        what = f"{twice!r} is there twice, and a reader of JSON would keep the last alone"
        raise DataError(f"{path}:{_line(text, twice, -1)}", what, "merge the two entries")
    return found


def _line(text: str, key: str, which: int = 0) -> int:
    """The line on which a key of the file stands; 1 where it is written with escapes."""
    found = [match.start() for match in re.finditer(rf'"{re.escape(key)}"\s*:', text)]
    return text.count("\n", 0, found[which]) + 1 if found else 1


def _moments(video: str, entry: Any, at: str) -> Iterable[Moment]:
    do = "an entry has duration, timestamps [[start, end], ..] and as many sentences"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("timestamps"), list):
        raise DataError(at, "has no list of timestamps", do)
    spans, sentences = entry["timestamps"], entry.get("sentences")
    if not isinstance(sentences, list) or len(sentences) != len(spans):
        count = len(sentences) if isinstance(sentences, list) else "no list of"
        raise DataError(at, f"{len(spans)} timestamps and {count} sentences", do)
    duration = entry.get("duration")
    if duration is not None and not (is_number(duration) and duration > 0):
        raise DataError(at, f"duration is {duration!r}", "it is the length of the video in seconds")
    for index, (span, sentence) in enumerate(zip(spans, sentences)):
        if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
            raise DataError(at, f"timestamp {index} is {span!r}", "a timestamp is [start, end] in seconds")
        if not isinstance(sentence, str):
            raise DataError(at, f"sentence {index} is {sentence!r}", "a sentence is a text")
        start, end = map(float, span)
        yield Moment(video=video, index=index, start=start, end=end, sentence=sentence, duration=duration and float(duration))


def is_number(value: Any) -> bool:
    """A finite int or float; JSON readers let NaN through."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def outcomes_of(moments: Iterable[Moment], folder: Folder, reversed: Reversed) -> list[Outcome]:
    """Rows `{"answer": {"span": [s, e]}, "task": "grounding"}`, or why not.

    Where the annotation has no duration the file is asked; without a file nothing is known about the end of the video.
    Drops beyond those of a span: `media_missing`, and `media_unreadable` where the file had to be asked.
    """
    return [_outcome(moment, folder, reversed) for moment in moments]


def _outcome(moment: Moment, folder: Folder, reversed: Reversed) -> Outcome:
    name = f"{moment.video}#{moment.index}"
    video, duration, media_notes = located(moment.video, moment.duration, folder)
    question, notes = mend_text(moment.sentence)
    span, span_notes = mend_span(moment.start, moment.end, duration, reversed)
    notes = first_drop(notes, span_notes, media_notes)
    if is_dropped(notes):
        return Outcome(id=name, row=None, notes=notes)
    row = {
        "id": name,
        "video": video,
        "question": question,
        "answer": {"span": list(span)},
        "task": "grounding",
        "duration": duration,
    }
    return Outcome(id=name, row=row, notes=notes)


def first_drop(*groups: Sequence[Note]) -> tuple[Note, ...]:
    """All notes up to the first drop: an annotation is dropped once, so that drops and rows add up to what was read."""
    kept: list[Note] = []
    for note in (note for group in groups for note in group):
        kept.append(note)
        if note[0] == "dropped":
            break
    return tuple(kept)


def located(name: str, duration: float | None, folder: Folder) -> tuple[str | None, float | None, tuple[Note, ...]]:
    """(how the row calls its file, duration in seconds, notes); the file is opened only for a duration that is missing."""
    video = folder.find(name)
    if video is None:
        return None, duration, (("dropped", "media_missing"),)
    if duration is None:
        try:
            duration = media.probe(os.path.join(folder.base, video)).duration
        except DataError:
            return video, None, (("dropped", "media_unreadable"),)
    return video, duration, ()
