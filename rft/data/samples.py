"""JSONL rows to samples.

A row has messages or a question; media (`video`, `image`, or a list of them; `frames`, a list of pictures with `seconds`
or `sample_fps`; paths relative to the file); an `answer` (a mapping such as {"span": [3.0, 5.0]}, or plain text); a
`task`; and any further columns, which all reach the rewards. A column that is null counts as absent.

Beside its `span` an answer may have `valid_spans`, a list of further ones that are right as well: an event with loose
bounds, or one that repeats when any of its times will do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from rft import parsing
from rft.data.budget import Budget
from rft.errors import DataError
from rft.strict import nearest
from rft.types import Media, Sample

OVERSHOOT = 2.0  # seconds by which an annotation may end after the video; published ones do by up to 1.5 s
COLUMNS = {"video": "video", "videos": "video", "image": "image", "images": "image", "frames": "video"}
BUDGET_KEYS = tuple(f.name for f in fields(Budget))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used, and why. `id` is file:line: a bad row's own id may be another row's as well."""

    id: str
    reason: DataError


def read_samples(path: Path) -> tuple[list[Sample], list[BadRow]]:
    """All rows of a JSONL file: those that can be used, in order, and those that cannot.

    Raises:
        DataError: the file is missing, is no JSONL or holds no row, or two rows share an id.
    """
    if not path.is_file():
        raise DataError(str(path), "there is no such file", "set data.train, data.validation or data.test to a JSONL file")
    samples, bad, seen = [], [], {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            sample = make_sample(_parse(line, where), where, path)
        except DataError as error:
            bad.append(BadRow(id=f"{path.name}:{number}", reason=error))
            continue
        if sample.id in seen:
            raise DataError(where, f"id {sample.id!r} is already at {seen[sample.id]}", "give every row an id of its own")
        seen[sample.id] = where
        samples.append(sample)
    if not samples and not bad:
        raise DataError(str(path), "the file holds no rows", "a data set needs at least one JSON object per line")
    return samples, bad


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith(b"["):
                raise DataError(str(path), "this is one JSON array", "write one JSON object per line, without commas between")
            if line.strip():
                yield number, line


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise DataError(where, f"not JSON: {error}", "write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(where, f"a row is a JSON object, this is {type(row).__name__}", "write {...} with named columns")
    return row


def make_sample(row: Mapping[str, Any], where: str, path: Path) -> Sample:
    """A row to a sample; `where` is file:line, and media lie relative to `path`. Without an id, file:line is its name.

    Raises:
        DataError: no question, no answer, an answer that cannot be true, or media that are not named as they should be.
    """
    name = Path(where).name if row.get("id") is None else str(row["id"])
    at = f"sample {name} ({where})"
    columns = _column_media(row, at, path)
    messages, media = _messages(row, columns, at, path)
    if not messages and not (isinstance(row.get("question"), str) and row["question"].strip()):
        raise DataError(at, "neither messages nor a question", "add a question column")
    return Sample(
        id=name,
        messages=messages,
        media=media if messages else tuple(columns),
        answer=_answer(row, at),
        task=str(row.get("task") or "default"),
        row=row,
        origin=where,
    )


def _messages(
    row: Mapping[str, Any], columns: Sequence[Media], at: str, path: Path
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Media, ...]]:
    """Messages with bare media parts, and the media in the order of those parts.

    A part names its media itself (qwen-vl-utils layout), or takes the next one of its kind from the row's columns.
    """
    waiting = {kind: [m for m in columns if (m.kind == "image") == (kind == "image")] for kind in ("video", "image")}
    messages, media = [], []
    given = row.get("messages") or []
    if not isinstance(given, list):
        raise DataError(at, f"messages is {type(given).__name__}", "write a list of {role, content}")
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(at, f"message {number} is not a role and its content", "write {role, content}")
        if message["role"] == "assistant" and number == len(given) - 1:
            raise DataError(at, "the messages end with the assistant's turn", "put the answer in the answer column")
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _listed(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind not in waiting:
                raise DataError(at, f"unknown message part {part!r}", "parts are text, image or video")
            parts.append({"type": kind})
            if part.get(kind) is not None:
                media.append(_one_media(part, kind, at, path))
            elif waiting[kind]:
                media.append(waiting[kind].pop(0))
            else:
                raise DataError(at, f"message {number} has a part of type {kind} that nothing names", f"add a column: {kind}")
        messages.append({"role": message["role"], "content": parts})
    if messages and (unused := sum(map(len, waiting.values()))):
        do = 'add a {"type": "video"} or {"type": "image"} part for each'
        raise DataError(at, f"{unused} media of its columns have no place in its messages", do)
    return tuple(messages), tuple(media)


def _column_media(row: Mapping[str, Any], at: str, path: Path) -> list[Media]:
    media = []
    for column, kind in COLUMNS.items():
        if row.get(column) is None:
            continue
        items = _listed(row[column])
        if column == "frames":
            items = [{"video": items, **{key: row[key] for key in ("seconds", "sample_fps") if key in row}}]
        named = [item if isinstance(item, Mapping) else {kind: item} for item in items]
        media += [_one_media(item, kind, at, path) for item in named]
    return media


def _one_media(part: Mapping[str, Any], kind: str, at: str, path: Path) -> Media:
    given = {key: value for key, value in part.items() if value is not None and key != "type"}
    for key in given:
        if key not in (kind, "seconds", "sample_fps", *BUDGET_KEYS):
            raise DataError(at, f"unknown key {key!r} of a {kind}", nearest(key, (kind, "seconds", "sample_fps", *BUDGET_KEYS)))
    source = given.get(kind)
    budget = {key: _budget(key, given[key], at) for key in BUDGET_KEYS if key in given}
    if kind == "image" or not isinstance(source, list):
        return Media(kind=kind, source=_path(source, kind, at, path), budget=budget)
    return Media(
        kind="frames",
        source=tuple(_path(name, "frame", at, path) for name in source),
        seconds=_clock(given, len(source), at),
        budget=budget,
    )


def _budget(key: str, value: Any, at: str) -> float:
    number = _numbers([value], 1, at, key)[0]
    if key in ("fps", "video_start", "video_end"):
        return number
    if not number.is_integer():
        raise DataError(at, f"{key} is {value!r}", "it needs a whole number")
    return int(number)


def _clock(part: Mapping[str, Any], count: int, at: str) -> tuple[float, ...]:
    """The second of each frame of a list."""
    if not count:
        raise DataError(at, "its list of frames is empty", "drop the row")
    if "seconds" in part:
        seconds = _numbers(part["seconds"], count, at, "seconds")
    elif "sample_fps" in part:
        rate = _numbers([part["sample_fps"]], 1, at, "sample_fps")[0]
        seconds = tuple(i / rate for i in range(count)) if rate > 0 else ()
    else:
        raise DataError(at, "a list of frames has no clock", "add seconds (one per frame) or sample_fps")
    if not seconds or any(b <= a for a, b in pairwise(seconds)):
        raise DataError(at, "the clock of its frames does not ascend", "sort the frames, and give sample_fps above 0")
    return seconds


def _path(name: Any, kind: str, at: str, file: Path) -> str:
    if not isinstance(name, str) or not name:
        raise DataError(at, f"{kind} is {name!r}", "give a path, or a list of paths for frames")
    if "://" in name and not name.startswith("file://"):
        raise DataError(at, f"{kind} {name} is not on this machine", "download it and give its path")
    return str((file.parent / name.removeprefix("file://")).resolve())


def _answer(row: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    answer = row.get("answer")
    if isinstance(answer, str):
        answer = {"text": answer} if answer.strip() else None
    if not answer and answer != 0:
        raise DataError(at, "the row has no answer", 'add answer, e.g. {"span": [3.0, 5.0]}, or drop the row')
    if not isinstance(answer, Mapping):
        raise DataError(at, f"answer is {answer!r}", 'write it as text or as a mapping, e.g. {"span": [3.0, 5.0]}')
    answer = dict(answer)
    duration = None if row.get("duration") is None else _numbers([row["duration"]], 1, at, "duration")[0]
    if "span" in answer:
        answer["span"] = check_span(answer["span"], at)
    if "valid_spans" in answer:
        answer |= _further(answer.pop("valid_spans"), answer, at)
    if "spans" in answer:
        if not isinstance(answer["spans"], list) or not answer["spans"]:
            raise DataError(at, f"spans is {answer['spans']!r}", "write a list of [start, end], or drop the row")
        answer["spans"] = tuple(check_span(s, at) for s in answer["spans"])
    if "box" in answer:
        answer["box"] = check_box(answer["box"], at)
    if "clue" in answer:
        if not isinstance(answer["clue"], list):
            raise DataError(at, f"clue is {answer['clue']!r}", "write a list of [start, end], or leave it out")
        answer["clue"] = tuple(check_span(s, at) for s in answer["clue"])
    if "clue_box" in answer:
        answer["clue_box"] = check_box(answer["clue_box"], at)
    if "clue_boxes" in answer:
        if not isinstance(answer["clue_boxes"], list):
            raise DataError(at, f"clue_boxes is {answer['clue_boxes']!r}", "write a list of boxes, or leave it out")
        answer["clue_boxes"] = tuple(check_box(b, at) for b in answer["clue_boxes"])
    if "choice" in answer:
        letters = letters_of(row, at)
        if (letter := parsing.choice(str(answer["choice"]), letters)) is None:
            raise DataError(at, f"choice {answer['choice']!r} is none of {', '.join(letters)}", "write the option's letter")
        answer["choice"] = letter
    if duration is not None:
        check_inside(answer, duration, at)
    return answer


def _further(valid: Any, answer: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Spans that are right beside `span`, each once; nothing when there are none."""
    if not isinstance(valid, list):
        raise DataError(at, f"valid_spans is {valid!r}", "write a list of [start, end]")
    if "span" not in answer:
        raise DataError(at, "valid_spans stand beside a span, and there is none", "name one of them span")
    further = dict.fromkeys(check_span(s, at) for s in valid)
    further.pop(answer["span"], None)
    return {"valid_spans": tuple(further)} if further else {}


def letters_of(row: Mapping[str, Any], at: str = "row") -> str:
    """The capital letters of a row's options; A to D when it does not list them."""
    options = row.get("options")
    if options is not None and not isinstance(options, list | Mapping):
        raise DataError(at, f"options is {options!r}", "write a list of the options' texts, in order")
    return LETTERS[:4] if options is None else LETTERS[: len(options)]


def check_span(span: Any, at: str) -> tuple[float, float]:
    """(start, end) in seconds. Raises DataError when it is not a positive length of time from 0 on."""
    start, end = _numbers(span, 2, at, "span")
    if start > end:
        raise DataError(at, f"the annotated span {start:g} to {end:g} is reversed", "swap its ends or drop the row")
    if start == end:
        raise DataError(at, f"the annotated span {start:g} to {end:g} has no length", "widen it or drop the row")
    if start < 0:
        raise DataError(at, f"the annotated span starts at {start:g}", "times are seconds from the first frame")
    return (start, end)


def check_inside(answer: Mapping[str, Any], duration: float, at: str) -> None:
    """Raises DataError when an annotated span does not lie in a video of `duration` seconds.

    It has to start inside and may end up to `OVERSHOOT` seconds after.
    """
    annotated = [answer["span"], *answer.get("valid_spans", ())] if "span" in answer else answer.get("spans", ())
    for start, end in annotated:
        if start >= duration or end > duration + OVERSHOOT:
            does = "starts" if start >= duration else f"ends more than {OVERSHOOT:g} s"
            what = f"the annotated span {start:g} to {end:g} {does} after the video ({duration:.3f} s)"
            raise DataError(at, what, "check that the annotation belongs to this file; clamp it or drop the row")


def check_box(box: Any, at: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1). Raises DataError when it has no area."""
    x0, y0, x1, y1 = _numbers(box, 4, at, "box")
    if x1 <= x0 or y1 <= y0:
        raise DataError(at, f"the annotated box {list(box)} is reversed or has no area", "boxes are [x0, y0, x1, y1]")
    return (x0, y0, x1, y1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _numbers(value: Any, count: int, at: str, name: str) -> tuple[float, ...]:
    is_list = isinstance(value, list | tuple) and len(value) == count
    if is_list and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value):
        return tuple(float(v) for v in value)
    shown = value[0] if is_list and count == 1 else value
    raise DataError(at, f"{name} is {shown!r}", f"it needs {count} finite number{'s' * (count > 1)}")
