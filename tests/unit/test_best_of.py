"""The best of several answers: in hindsight, and by how sure the policy was."""

from __future__ import annotations

import math

import pytest

from rft.evaluation.best_of import agreement, best, confidence, picked, surest
from rft.evaluation.metrics import measure
from rft.types import Rollout, Sample, Segment


def letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def said(text: str, logprobs: list[float] | float | None = -1.0, sample: str = "s") -> Rollout:
    """A token per character; `logprobs` per character, or one for all."""
    ids = tuple(map(ord, text))
    given = tuple(logprobs if isinstance(logprobs, list) else [logprobs] * len(ids)) if logprobs is not None else None
    prompt = Segment(author="world", text="?", ids=(63,))
    return Rollout(sample_id=sample, segments=(prompt, Segment(author="policy", text=text, ids=ids, logprobs=given)))


def spans(*answers: tuple[float, float]) -> list[Sample]:
    return [Sample(id="s", answer={"span": span}) for span in answers]


def test_confidence_is_the_mean_over_the_tokens_inside_the_last_block() -> None:
    text = "<think>1 to 2</think><answer>9</answer> or <answer>34</answer>."
    inside = [-9.0] * len(text)
    at = text.rfind("34")
    inside[at], inside[at + 1] = -0.25, -0.75
    assert confidence(said(text, inside), letters) == -0.5
    inside[at - 1] = inside[at + 2] = 0.0  # the tags are not the answer
    assert confidence(said(text, inside), letters) == -0.5
    inside[at] = -4.25
    assert confidence(said(text, inside), letters) == -2.5


def test_a_token_that_reaches_into_the_answer_counts() -> None:
    """`>3` and `4<` are one token each: both wrote a part of the answer."""
    words = ["<answer", ">3", "4<", "/answer", ">"]
    rollout = Rollout(
        sample_id="s",
        segments=(Segment(author="policy", text="".join(words), ids=(0, 1, 2, 3, 4), logprobs=(-8.0, -1.0, -3.0, -8.0, -8.0)),),
    )
    assert confidence(rollout, lambda ids: "".join(words[i] for i in ids)) == -2.0


@pytest.mark.parametrize(
    "rollout",
    [said("no idea"), said("<answer></answer>"), said("<answer>1 to 2"), said("<answer>1 to 2</answer>", None)],
    ids=["no answer", "empty", "cut", "nobody sampled it"],
)
def test_an_answer_that_is_not_there_is_never_the_surest(rollout: Rollout) -> None:
    assert confidence(rollout, letters) == -math.inf
    assert surest({"a": [rollout], "b": [said("<answer>x</answer>", -99.0)]}, letters) == ["b"]


def test_the_oracle_looks_at_the_annotation_and_the_selector_does_not() -> None:
    """Four samples: each prompt is right on two of them, and the policy is surer of the right one on one."""
    samples = spans((0, 4), (0, 4), (0, 4), (0, 4))
    right, half = "<answer>0 to 4</answer>", "<answer>0 to 2</answer>"
    rollouts = {
        "direct": [said(right, -2.0), said(half, -1.0), said(half, -3.0), said(right, -1.0)],
        "think": [said(half, -1.0), said(right, -2.0), said(right, -1.0), said(right, -1.0)],
    }
    assert best(samples, rollouts) == ["direct", "think", "think", "direct"]
    assert surest(rollouts, letters) == ["think", "direct", "think", "direct"]  # the last is a tie: the first prompt
    iou = {name: measure(samples, answers)["miou"] for name, answers in rollouts.items()}
    assert iou == {"direct": 0.75, "think": 0.875}
    assert measure(samples, picked(rollouts, best(samples, rollouts)))["miou"] == 1.0
    assert measure(samples, picked(rollouts, surest(rollouts, letters)))["miou"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    backwards = dict(reversed(rollouts.items()))
    assert best(samples, backwards)[3] == surest(backwards, letters)[3] == "think"


def test_all_metrics_follow_what_was_picked() -> None:
    samples = spans((0, 10), (0, 10))
    rollouts = {
        "a": [said("<answer>0 to 6</answer>"), said("<answer>0 to 2</answer>")],
        "b": [said("it is <answer>0 to 4</answer>!"), said("it is <answer>0 to 8</answer>!")],
    }
    metrics = measure(samples, picked(rollouts, best(samples, rollouts)))
    assert metrics == {"miou": pytest.approx(0.7), "r1@0.3": 1.0, "r1@0.5": 1.0, "r1@0.7": 0.5, "format": 0.5}


def test_agreement_is_by_the_metric_of_the_annotation() -> None:
    assert agreement(Sample(id="s", answer={"choice": "B"}), said("<answer>B</answer>")) == 1.0
    assert agreement(Sample(id="s", answer={"box": (0, 0, 10, 10)}), said("<answer>[0, 0, 10, 5]</answer>")) == 0.5
    windows = Sample(id="s", answer={"windows": [(0.0, 4.0)]})
    assert agreement(windows, said("<answer>[(0, 4)]</answer>")) == 1.0
    assert agreement(windows, said("<answer>[(6, 8)]</answer>")) == 0.0
    assert agreement(Sample(id="s", answer={"text": "hm"}), said("<answer>hm</answer>")) == 0.0
