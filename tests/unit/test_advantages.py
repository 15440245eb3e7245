"""Advantages by hand and against the golden groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rft.algo import ESTIMATORS
from rft.algo.credit import batch_std

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tempsamp_vectors.json").read_text())
STANDARDISATIONS = {
    "trl_ddof1_eps1e-4": {"std": "sample", "eps": 1e-4},
    "port_ddof1_eps1e-6": {"std": "sample", "eps": 1e-6},
    "pop_ddof0_eps1e-6": {"std": "population", "eps": 1e-6},
}


def none(rewards: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(rewards), dtype=torch.bool)


@pytest.mark.parametrize("group", GOLDEN["groups"], ids=lambda g: g["name"])
def test_grpo_over_all_members_is_the_golden_mixed(group: dict) -> None:
    rewards = torch.tensor(group["rewards"], dtype=torch.float64)
    for key, params in STANDARDISATIONS.items():
        expected = group["stats"][key]
        if "mixed" in expected:
            ours = ESTIMATORS["grpo"](rewards, none(rewards), **params)
            assert torch.allclose(ours, torch.tensor(expected["mixed"], dtype=torch.float64), atol=2e-6)
        if "mixed_no_std" in expected:
            ours = ESTIMATORS["grpo"](rewards, none(rewards), std="none")
            assert torch.allclose(ours, torch.tensor(expected["mixed_no_std"], dtype=torch.float64), atol=2e-6)


ON_POLICY = [g for g in GOLDEN["groups"] if "grpo_onpolicy" in g["stats"]["trl_ddof1_eps1e-4"] and len(g["rewards"]) > 2]


@pytest.mark.parametrize("group", ON_POLICY, ids=lambda g: g["name"])
def test_grpo_without_the_annotation_is_the_golden_on_policy(group: dict) -> None:
    rewards = torch.tensor([r for i, r in enumerate(group["rewards"]) if i != group["gt_index"]], dtype=torch.float64)
    expected = torch.tensor(group["stats"]["trl_ddof1_eps1e-4"]["grpo_onpolicy"], dtype=torch.float64)
    assert torch.allclose(ESTIMATORS["grpo"](rewards, none(rewards)), expected, atol=2e-6)


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
