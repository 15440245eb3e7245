"""Groups to examples: authorship becomes columns, silence becomes zeros."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rft.algo import ESTIMATORS
from rft.algo.advantages import grpo, nonlinear, shape
from rft.algo.credit import (
    accuracy_of,
    batch_std,
    by_rollout,
    compared,
    credit,
    examples,
    is_annotation,
    turn_advantages,
)
from rft.algo.diagnostics import describe
from rft.algo.filters import mute, why_no_signal
from rft.errors import RolloutError
from rft.types import POLICY, REFERENCE, WORLD, Group, Rollout, Sample, Scored, Segment

SAMPLE = Sample(id="s", messages=(), media=(), answer={}, task="t", row={})
PROMPT = Segment(author="world", text="?", ids=(1, 2, 3))


def member(text: str, reward: float, *, stop: str = "answered", author: str = "policy") -> Scored:
    ids = tuple(range(10, 10 + len(text)))
    logprobs = tuple(-0.1 * i for i in range(len(ids))) if author == "policy" else None
    spoken = Segment(author=author, text=text, ids=ids, logprobs=logprobs)
    return Scored(rollout=Rollout(sample_id="s", segments=(PROMPT, spoken), stop=stop), reward=reward, parts={"r": reward})


def group(*members: Scored, muted: str = "") -> Group:
    return Group(sample=SAMPLE, members=members, muted=muted)


def test_columns_follow_authorship() -> None:
    (row,) = examples(member("ab", 1.0).rollout, [0.5])
    assert row.ids_T.tolist() == [1, 2, 3, 10, 11]
    assert row.authors_T.tolist() == [WORLD, WORLD, WORLD, POLICY, POLICY]
    assert row.advantages_T.tolist() == [0, 0, 0, 0.5, 0.5]
    assert np.isnan(row.sampler_T[:3]).all() and row.sampler_T[3:].tolist() == pytest.approx([0.0, -0.1])


def test_a_reference_has_no_sampler_log_probs_and_the_type_refuses_them() -> None:
    (row,) = examples(member("ab", 1.0, author="reference").rollout, [1.0])
    assert row.authors_T.tolist()[3:] == [REFERENCE, REFERENCE]
    assert np.isnan(row.sampler_T).all()
    for author in ("reference", "world"):
        with pytest.raises(RolloutError, match="nobody sampled"):
            Segment(author=author, text="x", ids=(1,), logprobs=(0.0,))
    with pytest.raises(RolloutError, match="2 ids but 1"):
        Segment(author="policy", text="x", ids=(1, 2), logprobs=(0.0,))


def test_a_truncated_rollout_counts_in_the_group_and_not_in_the_loss() -> None:
    """Rewards 1, 0, 0: the cut one has weight 0, and the others' advantages still see its reward."""
    rows = credit(
        group(member("a", 1.0, stop="length"), member("b", 0.0), member("c", 0.0)), grpo, mask_truncated=True, eps=0.0
    )
    assert [r.weight for r in rows] == [0.0, 1.0, 1.0]
    assert rows[1].advantages_T[-1] == pytest.approx(-1 / math.sqrt(3))
    assert [r.weight for r in credit(group(member("a", 1.0, stop="length"), member("b", 0.0)), grpo)] == [1.0, 1.0]


def test_mute_says_why_and_keeps_earlier_reasons() -> None:
    told = group(member("<answer>x</answer>", 1.0), member("<answer>y</answer>", 0.0))
    silent = group(member("a", 0.0), member("b", 0.0))
    saturated = group(member("<answer>x</answer>", 1.0), member("<answer>y</answer>", 1.0))
    failed = group(member("a", 1.0), member("b", 0.0), muted="reward judge failed")
    reasons = [g.muted for g in mute([told, silent, saturated, failed])]
    assert reasons[0] == "" and "no member has an answer" in reasons[1]
    assert "every member earns 1" in reasons[2] and reasons[3] == "reward judge failed"
    assert "earns nothing" in why_no_signal(group(member("<answer>x</answer>", 0.0)))
    assert not any(r.advantages_T.any() for r in credit(mute([failed])[0], grpo))


def test_the_log_describes_the_policy_only() -> None:
    values = describe([group(member("abc", 1.0), member("a", 0.0), member("xxxxx", 9.0, author="reference"))])
    assert values["reward"] == [0.5] and values["completion_tokens"] == [3.0, 1.0]
    assert values["reward_std"] == [0.5] and values["reward/r/coverage"] == [1.0, 1.0]
    assert not any(name.startswith("reference/") for name in values)


def test_the_annotation_has_curves_of_its_own() -> None:
    told = group(member("abc", 1.0), member("xxxxx", 9.0, author="reference"))
    values = describe([told, group(member("a", 0.0))], guided=True)
    assert values["reference/seats"] == [1.0, 0.0]  # per group, those without one included
    assert values["reference/reward"] == [9.0] and values["reference/tokens"] == [5.0]
    assert values["reward"] == [1.0, 0.0]


HINT = Segment(author="reference", text="<answer>3 ", ids=(1,))
REST = Segment(author="policy", text="to 5</answer>", ids=(2,), logprobs=(-0.5,))


def answered(*segments: Segment, **parts: float | None) -> Scored:
    reward = 2 * (parts.get("iou") or 0.0) + (parts.get("format") or 0.0)
    return Scored(rollout=Rollout(sample_id="s", segments=(PROMPT, *segments), stop="answered"), reward=reward, parts=parts)


def test_who_answered_decides_whose_row_it_is() -> None:
    """Anchoring normalises the policy's rows among themselves: a row that it finished after a hint is one of them."""
    assert not is_annotation(answered(HINT, REST).rollout) and is_annotation(answered(REST, HINT).rollout)
    assert is_annotation(answered(REST, HINT, PROMPT).rollout) and not is_annotation(answered().rollout)
    rows = credit(
        group(answered(REST, iou=0.0), answered(HINT, REST, iou=0.5), answered(HINT, iou=1.0)), ESTIMATORS["anchor"], eps=0.0
    )
    half = 0.5**0.5  # of rewards 0 and 1, the sample std is 1 / sqrt 2
    assert [float(r.advantages_T[-1]) for r in rows] == pytest.approx([-half, half, 1.2 * half])
    assert rows[1].authors_T.tolist()[3:] == [REFERENCE, POLICY] and np.isnan(rows[1].sampler_T[3])
    assert rows[1].sampler_T[4] == -0.5


ACCURACY = {"iou": 2.0}


def test_only_the_named_part_is_shaped() -> None:
    """Total = 2 iou + format; shaped, it is 2 shape(iou) + format, for every member alike."""
    members = [answered(REST, iou=0.2, format=1.0), answered(REST, iou=0.6, format=0.0), answered(HINT, iou=1.0, format=1.0)]
    rows = credit(group(*members), nonlinear, accuracy=ACCURACY, std="none")
    values = [2 * shape(0.2) + 1, 2 * shape(0.6), 2 * shape(1.0) + 1]
    assert compared(group(*members), nonlinear, accuracy=ACCURACY, std="none") == pytest.approx(values)
    mean = sum(values) / 3
    assert [float(r.advantages_T[-1]) for r in rows] == pytest.approx([v - mean for v in values])
    total = credit(group(*members), nonlinear, std="none")
    values = [shape(1.4), shape(1.2), shape(3.0)]
    assert [float(r.advantages_T[-1]) for r in total] == pytest.approx([v - sum(values) / 3 for v in values])
    plain = credit(group(*members), grpo, accuracy=ACCURACY)  # nothing to reshape
    assert [r.advantages_T.tolist() for r in plain] == [r.advantages_T.tolist() for r in credit(group(*members), grpo)]


def test_downscaling_a_part_leaves_unguided_groups_to_the_last_bit() -> None:
    members = [answered(REST, iou=x, format=f) for x, f in ((0.1, 0.7), (1 / 3, 0.1), (0.9, 0.3))]
    downscaled = credit(group(*members), ESTIMATORS["downscale"], accuracy=ACCURACY)
    plain = credit(group(*members), grpo)
    assert [r.advantages_T.tolist() for r in downscaled] == [r.advantages_T.tolist() for r in plain]
    assert compared(group(*members), ESTIMATORS["downscale"], accuracy=ACCURACY) == [m.reward for m in members]


def test_accuracy_is_the_mean_of_what_applies() -> None:
    one = answered(REST, iou=0.5, choice=1.0, format=1.0, box=None)
    assert accuracy_of(one, {"iou": 1.0, "choice": 3.0}) == (pytest.approx(3.5 / 4), 4.0)
    assert accuracy_of(one, {"iou": 2.0, "box": 1.0}) == (0.5, 2.0)
    assert accuracy_of(one, {"box": 1.0}) == (0.0, 0.0) and accuracy_of(one, None) == (2.0, 1.0)


def test_the_batch_is_measured_after_shaping_over_all_groups() -> None:
    """Two groups, one of them guided, in one generation: the std is that of the six values that are compared."""
    guided = group(answered(REST, iou=0.2), answered(REST, iou=0.6), answered(HINT, iou=1.0))
    alone = group(answered(REST, iou=0.1), answered(REST, iou=0.9), answered(REST, iou=0.5))
    values = [compared(g, nonlinear, accuracy=ACCURACY, std="batch", eps=0.0) for g in (guided, alone)]
    spread = batch_std(values)
    rows = credit(alone, nonlinear, accuracy=ACCURACY, std="batch", batch_std=spread, eps=0.0)
    shaped = [2 * shape(x) for x in (0.1, 0.9, 0.5)]
    flat = [2 * shape(x) for x in (0.2, 0.6, 1.0)] + shaped
    mean = sum(flat) / 6
    by_hand = (sum((v - mean) ** 2 for v in flat) / 5) ** 0.5
    assert [float(r.advantages_T[-1]) for r in rows] == pytest.approx([(v - sum(shaped) / 3) / by_hand for v in shaped])


def test_turns_are_what_was_said_between_two_words_of_the_world() -> None:
    """A hint by the annotation that the policy continues is one turn."""
    hint = Segment(author="reference", text="<answer>3 ", ids=(1,))
    rest = Segment(author="policy", text="to 5</answer>", ids=(2,))
    rollout = Rollout(sample_id="s", segments=(PROMPT, hint, rest, PROMPT, rest), stop="answered")
    assert rollout.turns == ("<answer>3 to 5</answer>", "to 5</answer>")
    assert Rollout(sample_id="s", segments=(PROMPT, hint, rest), stop="answered").answer == "3 to 5"


AGAIN = Segment(author="world", text="again", ids=(7, 7, 7), is_fresh=True)


def looked(*turns: float, reward: float) -> Scored:
    """A rollout of as many fresh prompts as turns; turn k writes k + 1 tokens."""
    segments = [part for k in range(len(turns)) for part in ((AGAIN if k else PROMPT), said(k + 1))]
    return Scored(rollout=Rollout(sample_id="s", segments=tuple(segments)), reward=reward, parts={"r": reward}, turns=turns)


def said(num: int) -> Segment:
    return Segment(author="policy", text="x" * num, ids=(5,) * num, logprobs=(-1.0,) * num)


def test_a_rollout_of_several_prompts_is_several_examples_of_one_row() -> None:
    rows = credit(group(looked(0, 0, reward=1.0), looked(0, reward=0.0)), ESTIMATORS["grpo"], std="none")
    assert [r.continues for r in rows] == [False, True, False] and [len(p) for p in by_rollout(rows)] == [2, 1]
    assert [r.ids_T.tolist() for r in rows] == [[1, 2, 3, 5], [7, 7, 7, 5, 5], [1, 2, 3, 5]]
    assert [r.advantages_T[r.authors_T == POLICY].tolist() for r in rows] == [[0.5], [0.5, 0.5], [-0.5]]


def test_turns_are_compared_with_the_same_turns_of_the_others() -> None:
    """First turns 1, 0, 0: minus their mean 2/3, -1/3, -1/3. Second turns 0.2 and 0.6: -0.2, 0.2. A third one is alone: 0."""
    members = group(looked(1, 0.2, reward=0.2), looked(0, 0.6, 0.9, reward=0.9), looked(0, reward=0.0))
    given = turn_advantages(members, ESTIMATORS["grpo"], per="turn", std="none")
    assert [pytest.approx(a) for a in given] == [[2 / 3, -0.2], [-1 / 3, 0.2, 0.0], [-1 / 3]]
    rows = credit(members, ESTIMATORS["grpo"], per="turn", std="none")
    assert [float(r.advantages_T[-1]) for r in rows] == pytest.approx([2 / 3, -0.2, -1 / 3, 0.2, 0.0, -1 / 3])
    shared = turn_advantages(members, ESTIMATORS["grpo"], std="none")
    assert all(len(set(a)) == 1 for a in shared)  # by default a rollout earns as a whole


def test_rollouts_that_would_look_further_are_left_out_and_stay_in_the_statistics() -> None:
    over = looked(0, 0, reward=0.0)
    over = replace(over, rollout=replace(over.rollout, stop="turns"))
    rows = credit(group(looked(0, reward=1.0), over), ESTIMATORS["grpo"], mask_over_turns=True, std="none")
    assert [r.weight for r in rows] == [1.0, 0.0, 0.0]
    assert [float(r.advantages_T[-1]) for r in rows] == [0.5, -0.5, -0.5]
    assert [r.weight for r in credit(group(over), ESTIMATORS["grpo"], mask_truncated=True)] == [1.0, 1.0]


def test_what_was_looked_at_is_logged_where_anybody_looked() -> None:
    over = looked(0, 0, reward=0.0)
    refused = replace(over, rollout=replace(over.rollout, refused=("outside", "looks")))
    values = describe([group(refused, looked(0, reward=1.0))])
    assert values["turns"] == [2.0, 1.0] and values["refused"] == [2.0, 0.0] and values["visual_tokens"] == [0.0, 0.0]
    assert "turns" not in describe([group(looked(0, reward=1.0))])
