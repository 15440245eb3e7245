"""JSONL rows to samples.

A row has messages or a question; media (`video`, `image`, or a list of them; paths relative to the file); an `answer`
(a mapping such as {"span": [3.0, 5.0]}, or plain text); a `task`; and any further columns, which all reach the rewards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.errors import DataError
from rft.types import Media, Sample

BUDGET_KEYS = (
    "fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "video_start", "video_end",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used, and why."""

    id: str
    reason: str


def read_samples(path: Path) -> tuple[list[Sample], list[BadRow]]:
    """All rows of a JSONL file: those that can be used, in order, and those that cannot.

    Raises:
        DataError: the file is missing or holds no row, or two rows share an id.
    """
    if not path.is_file():
        raise DataError(str(path), "there is no such file", "set data.train, data.validation or data.test to a JSONL file")
    samples, bad, seen = [], [], {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            sample = parse_row(line, where, path)
        except DataError as error:
            bad.append(BadRow(id=error.where, reason=f"{error.what}; {error.do}" if error.do else error.what))
            continue
        if sample.id in seen:
            raise DataError(where, f"id {sample.id!r} is already at {seen[sample.id]}", "give every row an id of its own")
        seen[sample.id] = where
        samples.append(sample)
    if not samples and not bad:
        raise DataError(str(path), "the file holds no rows", "a data set needs at least one JSON object per line")
    return samples, bad


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def parse_row(line: str, where: str, path: Path) -> Sample:
    """One line of JSON to a sample.

    Raises:
        DataError: not JSON, no question, no answer, or an answer that cannot be true.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(where, f"a row is a JSON object, this is {type(row).__name__}")
    name = str(row.get("id", f"{path.stem}:{where.rpartition(':')[2]}"))
    where = f"sample {name} ({where})"
    messages, inline = _messages(row, where)
    if not messages and not isinstance(row.get("question"), str):
        raise DataError(where, "neither messages nor a question", "add a question column")
    media = (*_media(row, where, path), *(_one_media(part, where, path) for part in inline))
    return Sample(
        id=name,
        messages=messages,
        media=media,
        answer=_answer(row, where),
        task=str(row.get("task", "default")),
        row=row,
        origin=where,
    )


def _messages(row: Mapping[str, Any], where: str) -> tuple[tuple[Mapping[str, Any], ...], list[Mapping[str, Any]]]:
    """Messages with bare media parts, and the media elements that were inside them (qwen-vl-utils layout)."""
    messages, inline = [], []
    for message in row.get("messages", ()):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DataError(where, "a message needs a role and content")
        if message["role"] == "assistant" and message is row["messages"][-1]:
            raise DataError(where, "the messages end with the assistant's turn", "put the answer in the answer column")
        content = message["content"]
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": [{"type": "text", "text": content}]})
            continue
        parts = []
        for part in content:
            kind = part.get("type")
            if kind == "text":
                parts.append({"type": "text", "text": str(part["text"])})
            elif kind in ("video", "image"):
                parts.append({"type": kind})
                if part.get(kind) is not None:
                    inline.append(part)
            else:
                raise DataError(where, f"unknown message part {kind!r}", "parts are text, image or video")
        messages.append({"role": message["role"], "content": parts})
    return tuple(messages), inline


def _media(row: Mapping[str, Any], where: str, path: Path) -> list[Media]:
    out = []
    for key, kind in (
        ("video", "video"),
        ("videos", "video"),
        ("image", "image"),
        ("images", "image"),
        ("frames", "video"),
    ):
        value = row.get(key)
        if value is None:
            continue
        if key == "frames":
            value = [{"video": value, **{k: row[k] for k in ("seconds", "sample_fps") if k in row}}]
        for item in value if isinstance(value, list) else [value]:
            part = item if isinstance(item, Mapping) else {kind: item}
            out.append(_one_media({"type": kind, **part}, where, path))
    return out


def _one_media(part: Mapping[str, Any], where: str, path: Path) -> Media:
    kind = part["type"]
    source = part.get(kind)
    budget = {k: part[k] for k in BUDGET_KEYS if part.get(k) is not None}
    if isinstance(source, list):
        if "seconds" in part:
            seconds = tuple(float(s) for s in part["seconds"])
        elif "sample_fps" in part:
            seconds = tuple(i / float(part["sample_fps"]) for i in range(len(source)))
        else:
            raise DataError(where, "a list of frames has no clock", "add seconds (one per frame) or sample_fps")
        if len(seconds) != len(source) or any(b <= a for a, b in zip(seconds, seconds[1:], strict=False)):
            raise DataError(where, f"{len(source)} frames need as many ascending seconds, got {seconds}")
        return Media(kind="frames", source=tuple(_path(s, path) for s in source), seconds=seconds, budget=budget)
    if not isinstance(source, str):
        raise DataError(where, f"{kind} is {type(source).__name__}", "give a path, or a list of paths for frames")
    return Media(kind=kind, source=_path(source, path), budget=budget)


def _path(name: str, file: Path) -> str:
    return str((file.parent / name.removeprefix("file://")).resolve())


def _answer(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    answer = row.get("answer")
    if answer is None:
        raise DataError(where, "the row has no answer", 'add answer, e.g. {"span": [3.0, 5.0]}')
    if isinstance(answer, str):
        return {"text": answer}
    if not isinstance(answer, Mapping):
        raise DataError(where, f"answer is {type(answer).__name__}", 'write it as a mapping, e.g. {"span": [3.0, 5.0]}')
    answer = dict(answer)
    duration = row.get("duration")
    if "span" in answer:
        answer["span"] = check_span(answer["span"], duration, where)
    if "spans" in answer:
        answer["spans"] = tuple(check_span(s, duration, where) for s in answer["spans"])
    if "box" in answer:
        answer["box"] = check_box(answer["box"], where)
    return answer


def check_span(span: Any, duration: float | None, where: str) -> tuple[float, float]:
    """(start, end) in seconds. Raises DataError when it is not a positive length of time inside the video."""
    numbers = _numbers(span, 2, where, "span")
    start, end = numbers
    if start > end:
        raise DataError(where, f"the annotated span {start:g} to {end:g} is reversed", "swap its ends or drop the row")
    if start == end:
        raise DataError(where, f"the annotated span {start:g} to {end:g} has no length", "drop the row")
    if start < 0:
        raise DataError(where, f"the annotated span starts at {start:g}", "times are seconds from the first frame")
    if duration is not None and start >= float(duration):
        raise DataError(where, f"the annotated span {start:g} to {end:g} starts after the video ({duration} s)", "drop the row")
    return (start, end)


def check_box(box: Any, where: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1). Raises DataError when it has no area."""
    x0, y0, x1, y1 = _numbers(box, 4, where, "box")
    if x1 <= x0 or y1 <= y0:
        raise DataError(where, f"the annotated box {list(box)} is reversed or has no area", "boxes are [x0, y0, x1, y1]")
    return (x0, y0, x1, y1)


def _numbers(value: Any, count: int, where: str, name: str) -> tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count:
        if all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value):
            return tuple(float(v) for v in value)
    raise DataError(where, f"{name} is {value!r}", f"it needs {count} numbers")
