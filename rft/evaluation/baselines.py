"""What no model is needed for. A method that does not beat these has not looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rft.evaluation.metrics import measure
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment

MAX_CANDIDATES = 512


def random_answer(samples: Sequence[Sample], train: Sequence[Sample], renderer: Renderer, seed: int) -> dict[str, float]:
    """Each sample answered with the annotation of a random training sample of the same task, scaled to its length."""
    rng = np.random.default_rng((seed, 0x5EED))
    answers = []
    for sample in samples:
        pool = [t for t in train if t.answer.keys() == sample.answer.keys()] or [sample]
        answers.append(borrowed(sample, pool[rng.integers(len(pool))], renderer))
    return measure(samples, answers)


def best_constant(samples: Sequence[Sample], train: Sequence[Sample], renderer: Renderer) -> dict[str, float]:
    """The one training annotation that scores best on these very samples when it is given to all of them.

    Chosen in hindsight, so that it bounds what any constant answer can reach; spans are relative to the length.
    """
    distinct = {str(sorted(relative(t).items())): t for t in train}
    candidates = list(distinct.values())[:MAX_CANDIDATES]
    scores = [measure(samples, [borrowed(s, c, renderer) for s in samples]) for c in candidates]
    main = next((k for k in ("miou", "box_iou", "accuracy") if any(k in s for s in scores)), "format")
    return max(scores, key=lambda s: s.get(main, 0.0))


def relative(sample: Sample) -> dict[str, Any]:
    """The annotation with spans in fractions of the duration, when the row states it."""
    duration = float(sample.row.get("duration") or 0.0)
    answer = dict(sample.answer)
    if duration and "span" in answer:
        answer["span"] = tuple(round(t / duration, 3) for t in answer["span"])
    return answer


def borrowed(sample: Sample, lender: Sample, renderer: Renderer) -> Rollout:
    """A rollout for `sample` that answers with the lender's annotation; only its text exists."""
    answer = dict(lender.answer)
    lengths = [float(s.row.get("duration") or 0.0) for s in (sample, lender)]
    if all(lengths) and "span" in answer:
        answer["span"] = tuple(t * lengths[0] / lengths[1] for t in answer["span"])
    text = renderer.answer_text(replace(sample, answer=answer))
    segment = Segment(author="reference", text=text, ids=())
    return Rollout(sample_id=sample.id, segments=(segment,), stop="answered")
