"""The same sample, its annotation told in another way that is right as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rft.types import Sample, Span


def retold(sample: Sample, answer: Mapping[str, Any]) -> Sample:
    """The sample with another annotation, which a template finds where it found the first: by its keys or as the column."""
    row = {**sample.row, "answer": answer} if isinstance(sample.row.get("answer"), Mapping) else sample.row
    return replace(sample, answer=answer, row=row)


def readings(sample: Sample) -> tuple[Sample, ...]:
    """The sample once per span that is right, as its only `span`, the annotated one first; else the sample itself."""
    if not (valid := sample.answer.get("valid_spans")):
        return (sample,)
    alone = {key: value for key, value in sample.answer.items() if key != "valid_spans"}
    return tuple(retold(sample, {**alone, "span": span}) for span in (alone["span"], *valid))


def clued(answer: Mapping[str, Any]) -> tuple[Span, ...]:
    """The windows that a first look should find: the annotated `clue`, else `spans`, else the `span`; () without these."""
    return answer.get("clue") or answer.get("spans") or ((answer["span"],) if "span" in answer else ())
