"""Rollouts to the numbers a table shows. Which numbers apply follows from the keys of the annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rft import geometry, parsing
from rft.types import Rollout, Sample

RECALL_AT = (0.3, 0.5, 0.7)


def measure(samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the samples whose annotation has the key; an answer that cannot be read scores 0 and stays counted.

    span, spans   `miou`, and `r1@t`: the share of samples with IoU >= t
    box           `box_iou`, `box@0.5`
    choice        `accuracy`
    any           `format`: the share that ends in one answer block, with something readable in it
    """
    readings = [read_answer(s, r) for s, r in zip(samples, rollouts, strict=True)]
    ious = [_span_score(s, p) for s, p in zip(samples, readings, strict=True) if {"span", "spans"} & s.answer.keys()]
    boxes = [geometry.box_iou(p, s.answer["box"]) if p else 0.0 for s, p in zip(samples, readings) if "box" in s.answer]
    letters = [float(p == s.answer["choice"]) for s, p in zip(samples, readings) if "choice" in s.answer]
    metrics = {}
    if ious:
        metrics["miou"] = fmean(ious)
        metrics |= {f"r1@{t}": fmean(iou >= t for iou in ious) for t in RECALL_AT}
    if boxes:
        metrics |= {"box_iou": fmean(boxes), "box@0.5": fmean(b >= 0.5 for b in boxes)}
    if letters:
        metrics["accuracy"] = fmean(letters)
    if rollouts:
        metrics["format"] = fmean(_well_formed(r, p) for r, p in zip(rollouts, readings))
    return metrics


def read_answer(sample: Sample, rollout: Rollout) -> Any | None:
    """The answer in the form of the sample's annotation, or None when it cannot be read."""
    for key, parse in READERS.items():
        if key in sample.answer:
            return parse(rollout.answer, sample)
    return rollout.answer or None


def letters(sample: Sample) -> str:
    """The capital letters of the row's options; A to D when the row does not list them."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(sample.row.get("options", "ABCD"))]


def _only_box(text: str | None, sample: Sample) -> Any | None:
    found = parsing.boxes(text)
    return found[0] if found and len(found) == 1 else None


READERS: Mapping[str, Callable[[str | None, Sample], Any]] = {
    "span": lambda text, sample: parsing.time_span(text),
    "spans": lambda text, sample: parsing.time_spans(text) or None,
    "box": _only_box,
    "choice": lambda text, sample: parsing.choice(text, letters(sample)),
}


def _span_score(sample: Sample, reading: Any) -> float:
    if not reading:
        return 0.0
    if "span" in sample.answer:
        return geometry.span_iou(reading, sample.answer["span"])
    return geometry.spans_iou(reading, sample.answer["spans"])


def _well_formed(rollout: Rollout, reading: Any) -> bool:
    text = rollout.text.strip()
    return text.endswith("</answer>") and text.count("<answer>") == text.count("</answer>") == 1 and reading is not None
