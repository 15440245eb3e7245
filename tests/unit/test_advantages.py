"""Advantages by hand, and what must hold for any rewards; golden groups are in `tests/golden/test_golden_tempsamp.py`."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from rft.algo import ESTIMATORS
from rft.algo.advantages import compared, shape
from rft.algo.credit import batch_std

JOINED = ("mixed", "downscale", "anchor", "nonlinear", "policy_stats")


def none(rewards: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(rewards), dtype=torch.bool)


def last(rewards: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(rewards)) == len(rewards) - 1


def draws(num: int = 20) -> list[torch.Tensor]:
    """Groups of 2 to 9 rewards in [0, 1], some rounded so that rows tie."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.rand(2 + i % 8, generator=generator, dtype=torch.float64) for i in range(num)]
    return [g if i % 3 else (g * 4).round() / 4 for i, g in enumerate(groups)]


def test_by_hand() -> None:
    """Rewards 0, 0, 0, 1: mean 1/4, sample variance (3/16 + 9/16)/3 = 1/4, so std 1/2; population variance 3/16."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    sample = ESTIMATORS["grpo"](rewards, none(rewards), eps=0.0)
    assert sample.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    population = ESTIMATORS["grpo"](rewards, none(rewards), std="population", eps=0.0)
    assert population.tolist() == pytest.approx([-1 / 3**0.5] * 3 + [3**0.5])
    batch = ESTIMATORS["grpo"](rewards, none(rewards), std="batch", batch_std=0.25, eps=0.0)
    assert batch.tolist() == pytest.approx([-1.0, -1.0, -1.0, 3.0])
    # leave one out: the others' means are 1/3, 1/3, 1/3 and 0
    assert ESTIMATORS["leave_one_out"](rewards, none(rewards)).tolist() == pytest.approx([-1 / 3] * 3 + [1.0])


def test_rewards_may_be_integers_or_a_list() -> None:
    floats = ESTIMATORS["grpo"](torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), none([0, 1, 1]))
    for rewards in (torch.tensor([0, 1, 1]), [0, 1, 1]):
        assert torch.allclose(ESTIMATORS["grpo"](rewards, none(rewards)), floats)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 1e-30, 1e30])
def test_equal_rewards_give_exactly_zero(name: str, value: float) -> None:
    for size in (1, 3, 8):
        rewards = torch.full((size,), value)
        assert torch.equal(ESTIMATORS[name](rewards, none(rewards)), torch.zeros(size))


def test_wrong_std_is_named() -> None:
    rewards = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="sample, population, batch or none"):
        ESTIMATORS["grpo"](rewards, none(rewards), std="median")
    with pytest.raises(ValueError, match="batch_std"):
        ESTIMATORS["grpo"](rewards, none(rewards), std="batch")


def test_batch_std_is_over_all_rewards() -> None:
    """0, 1 and 1, 2: mean 1, squares 1 + 0 + 0 + 1 over 3."""
    assert batch_std([[0.0, 1.0], [1.0, 2.0]]) == pytest.approx((2 / 3) ** 0.5)
    assert batch_std([[1.0]]) == 0.0


def test_anchor_by_hand() -> None:
    """The policy's 0, 0.5, 1 have mean 1/2 and sample std 1/2: -1, 0, 1; the annotation gets 1.2 x 1."""
    rewards = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    advantages = ESTIMATORS["anchor"](rewards, last(rewards), eps=0.0)
    assert advantages.tolist() == pytest.approx([-1.0, 0.0, 1.0, 1.2])
    assert ESTIMATORS["anchor"](rewards, last(rewards), scale=2.0, eps=0.0)[-1] == pytest.approx(2.0)


def test_anchor_is_silent_where_all_fail_unless_there_is_a_floor() -> None:
    failed = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert ESTIMATORS["anchor"](failed, last(failed)).tolist() == [0, 0, 0, 0]
    assert ESTIMATORS["anchor"](failed, last(failed), floor=0.5).tolist() == [0, 0, 0, 0.5]
    told = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    assert ESTIMATORS["anchor"](told, last(told), floor=0.5, eps=0.0)[-1] == pytest.approx(1.2)  # already above it
    perfect = torch.ones(4, dtype=torch.float64)
    assert ESTIMATORS["anchor"](perfect, last(perfect), floor=0.5).tolist() == [0, 0, 0, 0]


def test_downscale_pushes_the_annotation_below_a_perfect_policy() -> None:
    """Rewards 1, 1, 1 and 0.8: the mean is 0.95, the sample std 0.1. Where all rows are equal, `mute` has spoken before."""
    perfect = torch.ones(4, dtype=torch.float64)
    assert ESTIMATORS["downscale"](perfect, last(perfect), eps=0.0).tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5])
    tied = torch.tensor([0.6, 0.6, 0.6, 1.0], dtype=torch.float64)
    assert ESTIMATORS["downscale"](tied, last(tied), factor=0.3, max_reward=2.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_order_does_not_matter(name: str, std: str) -> None:
    for i, rewards in enumerate(draws()):
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(i))
        advantages = ESTIMATORS[name](rewards, last(rewards), std=std)
        assert torch.allclose(ESTIMATORS[name](rewards[order], last(rewards)[order], std=std), advantages[order], atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "leave_one_out", "mixed", "downscale", "nonlinear"])
def test_a_joint_normalisation_sums_to_zero(name: str) -> None:
    for rewards in draws():
        assert float(ESTIMATORS[name](rewards, last(rewards)).sum()) == pytest.approx(0, abs=1e-9)
    told = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    assert float(ESTIMATORS["anchor"](told, last(told)).sum()) > 1  # the control: anchored groups do not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_annotation_it_is_plain_grpo_bit_for_bit(dtype: torch.dtype) -> None:
    for rewards in draws():
        rewards = rewards.to(dtype)
        plain = ESTIMATORS["grpo"](rewards, none(rewards))
        for name in ("mixed", "downscale", "anchor", "policy_stats"):
            assert torch.equal(ESTIMATORS[name](rewards, none(rewards)), plain), name
        assert torch.equal(ESTIMATORS["nonlinear"](rewards, none(rewards), shape_groups="guided"), plain)
        by_hand = torch.tensor([shape(r) for r in rewards.tolist()], dtype=dtype)
        assert torch.equal(ESTIMATORS["nonlinear"](rewards, none(rewards)), ESTIMATORS["grpo"](by_hand, none(rewards)))


def test_guided_shapes_the_groups_that_have_an_annotation() -> None:
    rewards = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    everywhere = ESTIMATORS["nonlinear"](rewards, last(rewards))
    assert torch.equal(ESTIMATORS["nonlinear"](rewards, last(rewards), shape_groups="guided"), everywhere)
    assert not torch.allclose(everywhere, ESTIMATORS["grpo"](rewards, last(rewards)))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 0.7])
def test_equal_rewards_with_an_annotation_give_exactly_zero(value: float) -> None:
    for size in (2, 5, 16):
        rewards = torch.full((size,), value, dtype=torch.float64)
        for name in ("mixed", "anchor", "nonlinear", "policy_stats"):
            assert torch.equal(ESTIMATORS[name](rewards, last(rewards)), torch.zeros(size, dtype=torch.float64))


def test_shaping_keeps_ranks_and_its_limits() -> None:
    rewards = [i / 200 for i in range(-100, 301)]
    for params in ({}, {"alpha1": 0.1, "alpha2": 3.0}, {"tau": 0.5, "alpha2": -2.0}):
        values = [shape(r, **params) for r in rewards]
        assert all(a < b for a, b in pairwise(values))
    assert shape(0.8) == 0.8 and shape(0.8 - 1e-12) == pytest.approx(0.8)
    assert shape(1.0) == pytest.approx(0.8 + 0.01 * math.log(1.2))
    assert shape(0.3) == pytest.approx(0.8 - (math.exp(0.5) - 1) / (math.e - 1))
    assert [shape(r, tau=1.5, alpha2=0.0) for r in rewards[:101]] == rewards[:101]  # the identity
    assert shape(0.3, alpha2=1e-9) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="alpha1"):
        shape(0.9, alpha1=-0.01)


def test_only_the_accuracy_is_shaped() -> None:
    """Totals in [0, 2]: shaped whole, all of them lie on the flat branch and the order of accuracies is lost."""
    accuracy = torch.tensor([0.62, 0.31, 1.0], dtype=torch.float64)
    totals = accuracy + 1.0
    part = ESTIMATORS["nonlinear"](totals, last(totals), accuracy_G=accuracy, std="none")
    assert part.tolist() == pytest.approx(ESTIMATORS["nonlinear"](accuracy, last(accuracy), std="none").tolist())
    whole = ESTIMATORS["nonlinear"](totals, last(totals), std="none")
    assert float(whole[0] - whole[1]) < 0.01 < 0.2 < float(part[0] - part[1])
    # weights 2 and 1: total = 2 x accuracy + 0.5
    doubled = ESTIMATORS["nonlinear"](
        2 * accuracy + 0.5, last(totals), accuracy_G=accuracy, weight_G=torch.full((3,), 2.0), std="none"
    )
    assert doubled.tolist() == pytest.approx((2 * part).tolist())
    down = ESTIMATORS["downscale"](totals, last(totals), accuracy_G=accuracy, std="none")
    assert down.tolist() == pytest.approx([1.62 - 4.73 / 3, 1.31 - 4.73 / 3, 1.8 - 4.73 / 3])


def test_the_batch_is_measured_on_what_is_compared() -> None:
    rewards = torch.tensor([0.2, 0.9, 1.0], dtype=torch.float64)
    values = {name: compared(ESTIMATORS[name], rewards, last(rewards), std="batch", eps=0.0) for name in JOINED}
    assert values["mixed"].tolist() == [0.2, 0.9, 1.0]
    assert values["anchor"].tolist() == values["policy_stats"].tolist() == [0.2, 0.9]
    assert values["downscale"].tolist() == [0.2, 0.9, 0.8]
    assert values["nonlinear"].tolist() == [shape(0.2), shape(0.9), shape(1.0)]
    # a group alone in its batch: its own standard deviation, in two steps or in one
    for name in JOINED:
        spread = batch_std([values[name].tolist()])
        two = ESTIMATORS[name](rewards, last(rewards), std="batch", batch_std=spread, eps=0.0)
        assert torch.allclose(two, ESTIMATORS[name](rewards, last(rewards), std="sample", eps=0.0))


def test_a_tied_group_is_scale_free_and_what_does_something_about_it() -> None:
    """Rows that are nearly right are pushed down as hard as rows that failed; shaping cannot change that."""
    failed, nearly = (torch.tensor([r, r, r, 1.0], dtype=torch.float64) for r in (0.0, 0.99))
    for name in ("mixed", "nonlinear"):
        for rewards in (failed, nearly):
            tied = ESTIMATORS[name](rewards, last(rewards), eps=0.0)
            assert tied.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    assert ESTIMATORS["mixed"](nearly, last(nearly), std="none")[-1] == pytest.approx(0.0075)
    assert ESTIMATORS["mixed"](nearly, last(nearly), std="batch", batch_std=0.3)[-1] < 0.03
    assert ESTIMATORS["mixed"](failed, last(failed), cap=0.75, eps=0.0).tolist() == pytest.approx([-0.5, -0.5, -0.5, 0.75])


def test_cap_bounds_every_estimator() -> None:
    rewards = torch.tensor([0.0, 0.1, 0.0, 1.0], dtype=torch.float64)
    for name, estimator in ESTIMATORS.items():
        free, capped = estimator(rewards, last(rewards)), estimator(rewards, last(rewards), cap=0.3)
        assert torch.equal(capped, free.clamp(-0.3, 0.3)) and free.abs().max() > 0.3, name
        with pytest.raises(ValueError, match="cap"):
            estimator(rewards, last(rewards), cap=0.0)


def test_wrong_shape_groups_is_named() -> None:
    rewards = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="all or guided"):
        ESTIMATORS["nonlinear"](rewards, last(rewards), shape_groups="some")
