"""Rollouts to the numbers a table shows. Which numbers apply follows from the keys of the annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rft import geometry, parsing
from rft.data.samples import letters_of
from rft.evaluation import highlights
from rft.types import Rollout, Sample

RECALL_AT = (0.3, 0.5, 0.7)
AGREEMENT: Mapping[str, Callable[[Any, Mapping[str, Any]], float]] = {  # of what was read, with the whole annotation
    "span": geometry.right_span_iou,
    "spans": lambda read, answer: geometry.spans_iou(read, answer["spans"]),
    "box": lambda read, answer: geometry.box_iou(read, answer["box"]),
    "choice": lambda read, answer: read == answer["choice"],
}


def measure(samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the samples whose annotation has the key; an answer that cannot be read scores 0 and stays counted.

    span, spans   `miou`, and `r1@t`: the share of samples with IoU >= t; of a span and `valid_spans` the best fit counts
    box           `box_iou`, `box@0.5`
    choice        `accuracy`
    windows       `mr_map`, `mr_map@t`, `mr_r1@t`: moment retrieval, of a list of windows or of the runs of highlights
    highlights    `hl_map`, `hit@1`, where the row has duration, relevant_clip_ids and saliency_scores
    any           `format`: the share that ends in one answer block, with everything readable that is annotated
    """
    pairs = list(zip(samples, rollouts, strict=True))
    scores = {key: [_agreement(s, r, key) for s, r in pairs if key in s.answer] for key in AGREEMENT}
    ious, boxes = scores["span"] + scores["spans"], scores["box"]
    metrics = {}
    if ious:
        metrics["miou"] = fmean(ious)
        metrics |= {f"r1@{t}": fmean(iou >= t for iou in ious) for t in RECALL_AT}
    if boxes:
        metrics |= {"box_iou": fmean(boxes), "box@0.5": fmean(iou >= 0.5 for iou in boxes)}
    if scores["choice"]:
        metrics["accuracy"] = fmean(scores["choice"])
    if moments := [(_windows(s, r), s.answer["windows"]) for s, r in pairs if "windows" in s.answer]:
        metrics |= highlights.moment_retrieval(moments)
    if scored := [_clips(s, r) for s, r in pairs if "highlights" in s.answer and s.row.keys() >= highlights.LABELS]:
        metrics |= highlights.highlight_detection(scored)
    if pairs:
        metrics["format"] = fmean(_is_well_formed(s, r) for s, r in pairs)
    return metrics


def read_answer(sample: Sample, rollout: Rollout, key: str) -> Any | None:
    """The answer in the form of the annotation's `key` ("text" for none of them), or None when it cannot be read."""
    text = rollout.answer
    if key == "span":
        return parsing.time_span(text)
    if key == "spans":
        return parsing.time_spans(text) or None
    if key == "highlights":
        return parsing.highlights(text)
    if key == "windows":
        listed = parsing.highlights(text)
        return highlights.windows_of(listed) if listed else highlights.windows_in_order(parsing.time_spans(text) or ()) or None
    if key == "box":
        boxes = parsing.boxes(text)
        return boxes[0] if boxes and len(boxes) == 1 else None  # several are a spray, not an answer
    if key == "choice":
        return parsing.choice(text, letters_of(sample.row))
    return text or None


def _agreement(sample: Sample, rollout: Rollout, key: str) -> float:
    read = read_answer(sample, rollout, key)
    return 0.0 if read is None else float(AGREEMENT[key](read, sample.answer))


def _windows(sample: Sample, rollout: Rollout) -> list[highlights.Window]:
    return read_answer(sample, rollout, "windows") or []


def _clips(sample: Sample, rollout: Rollout) -> tuple[list[float] | None, list[Sequence[float]]]:
    labels, listed = highlights.clip_labels(sample.row), read_answer(sample, rollout, "highlights")
    return highlights.clip_saliency(listed, len(labels)) if listed else None, labels


def _is_well_formed(sample: Sample, rollout: Rollout) -> bool:
    text = rollout.text.strip()
    is_one_block = text.endswith("</answer>") and text.count("<answer>") == text.count("</answer>") == 1
    keys = [key for key in (*AGREEMENT, "highlights", "windows") if key in sample.answer] or ["text"]
    return is_one_block and all(read_answer(sample, rollout, key) is not None for key in keys)
