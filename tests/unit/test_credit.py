"""Groups to examples: authorship becomes columns, silence becomes zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rft.algo.advantages import grpo
from rft.algo.credit import credit, example
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
    row = example(member("ab", 1.0).rollout, 0.5)
    assert row.ids_T.tolist() == [1, 2, 3, 10, 11]
    assert row.authors_T.tolist() == [WORLD, WORLD, WORLD, POLICY, POLICY]
    assert row.advantages_T.tolist() == [0, 0, 0, 0.5, 0.5]
    assert np.isnan(row.sampler_T[:3]).all() and row.sampler_T[3:].tolist() == pytest.approx([0.0, -0.1])


def test_a_reference_has_no_sampler_log_probs_and_the_type_refuses_them() -> None:
    row = example(member("ab", 1.0, author="reference").rollout, 1.0)
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


def test_turns_are_what_was_said_between_two_words_of_the_world() -> None:
    """A hint by the annotation that the policy continues is one turn."""
    hint = Segment(author="reference", text="<answer>3 ", ids=(1,))
    rest = Segment(author="policy", text="to 5</answer>", ids=(2,))
    rollout = Rollout(sample_id="s", segments=(PROMPT, hint, rest, PROMPT, rest), stop="answered")
    assert rollout.turns == ("<answer>3 to 5</answer>", "to 5</answer>")
    assert Rollout(sample_id="s", segments=(PROMPT, hint, rest), stop="answered").answer == "3 to 5"
