"""What no model is needed for. A method that does not beat these has not looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rft.data.readings import readings
from rft.evaluation.metrics import measure
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment

MAX_CANDIDATES = 512


def random_answer(samples: Sequence[Sample], train: Sequence[Sample], renderer: Renderer, seed: int) -> dict[str, float]:
    """Each sample answered with the annotation of a random training sample of its kind, scaled to its length.

    A training sample with several valid spans has as many annotations. Without one of its kind there is nothing to say, and
    nothing is said.
    """
    rng = np.random.default_rng((seed, 0x5EED))
    lenders = _by_kind(_lent(train))
    answers = []
    for sample in samples:
        pool = lenders.get(kind(sample))
        answers.append(borrowed(sample, pool[rng.integers(len(pool))], renderer) if pool else _says(sample, ""))
    return measure(samples, answers)


def best_constant(samples: Sequence[Sample], train: Sequence[Sample], renderer: Renderer) -> dict[str, float]:
    """Per kind of sample, the one training annotation that scores best on these very samples when all are given it.

    Chosen in hindsight among the first `MAX_CANDIDATES` distinct ones, so that it shows what a constant answer can reach;
    spans are relative to the length where rows state it.
    """
    lenders, answers = _by_kind(_lent(train)), {}
    for name, alike in _by_kind(samples).items():
        distinct = {repr(sorted(relative(t).items())): t for t in lenders.get(name, ())}
        told = [[borrowed(s, lender, renderer) for s in alike] for lender in list(distinct.values())[:MAX_CANDIDATES]]
        best = max(told, key=lambda rollouts: _main(measure(alike, rollouts)), default=[_says(s, "") for s in alike])
        answers |= {s.id: r for s, r in zip(alike, best)}
    return measure(samples, [answers[s.id] for s in samples])


def kind(sample: Sample) -> tuple[str, ...]:
    """Samples of one kind can lend each other their annotations: the same task with the same keys, `valid_spans` aside."""
    return (sample.task, *sorted(sample.answer.keys() - {"valid_spans"}))


def relative(sample: Sample) -> dict[str, Any]:
    """The annotation with spans in fractions of the duration, when the row states it."""
    duration = _duration(sample)
    return _scaled(sample.answer, 1 / duration) if duration else dict(sample.answer)


def borrowed(sample: Sample, lender: Sample, renderer: Renderer) -> Rollout:
    """A rollout for `sample` that answers with the lender's annotation; only its text exists."""
    own, its = _duration(sample), _duration(lender)
    answer = _scaled(lender.answer, own / its) if own and its else dict(lender.answer)
    row = {**sample.row, "answer": lender.row.get("answer")}  # a template may name the column itself
    return _says(sample, renderer.answer_text(replace(sample, answer=answer, row=row)))


def _lent(train: Sequence[Sample]) -> list[Sample]:
    return [reading for sample in train for reading in readings(sample)]


def _by_kind(samples: Sequence[Sample]) -> dict[tuple[str, ...], list[Sample]]:
    found: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        found.setdefault(kind(sample), []).append(sample)
    return found


def _main(metrics: Mapping[str, float]) -> float:
    return next(metrics[name] for name in ("miou", "box_iou", "accuracy", "hl_map", "mr_map", "format") if name in metrics)


def _duration(sample: Sample) -> float:
    return float(sample.row.get("duration") or 0.0)


def _scaled(answer: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The annotation with its seconds multiplied, to 1 ms."""
    scaled = dict(answer)
    if "span" in answer:
        scaled["span"] = tuple(round(t * factor, 3) for t in answer["span"])
    for key in answer.keys() & {"spans", "valid_spans"}:
        scaled[key] = tuple(tuple(round(t * factor, 3) for t in span) for span in answer[key])
    return scaled


def _says(sample: Sample, text: str) -> Rollout:
    return Rollout(sample_id=sample.id, segments=(Segment(author="reference", text=text, ids=()),), stop="answered")
