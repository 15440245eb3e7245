"""Equations 2 to 4 of TempSamp-R1 and the weights of off-policy tokens, against `tempsamp_vectors.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algo import ESTIMATORS, OBJECTIVES
from rft.algo.advantages import shape
from rft.algo.losses import Columns, Normaliser, OffPolicy

GOLDEN = json.loads((Path(__file__).parent / "tempsamp_vectors.json").read_text())
STANDARDISATIONS = {
    "trl_ddof1_eps1e-4": {"std": "sample", "eps": 1e-4},
    "port_ddof1_eps1e-6": {"std": "sample", "eps": 1e-6},
    "pop_ddof0_eps1e-6": {"std": "population", "eps": 1e-6},
}
CASES = [(g, key, strategy) for g in GOLDEN["groups"] for key, of in g["stats"].items() for strategy in of]


def ours(strategy: str, group: dict[str, Any], params: dict[str, Any]) -> torch.Tensor:
    rewards = torch.tensor(group["rewards"], dtype=torch.float64)
    annotation = torch.arange(len(rewards)) == (-1 if group["gt_index"] is None else group["gt_index"])
    if strategy == "grpo_onpolicy":
        return ESTIMATORS["grpo"](rewards[~annotation], annotation[~annotation], **params)
    if strategy == "onpolicy_stats":
        return ESTIMATORS["policy_stats"](rewards, annotation, **params)
    if strategy == "port_total":  # the format reward is the rest, and stays as it is
        accuracy = torch.tensor(group["iou"], dtype=torch.float64)
        return ESTIMATORS["nonlinear"](rewards, annotation, accuracy_G=accuracy, **params)
    if strategy.endswith("_no_std"):
        return ESTIMATORS[strategy.removesuffix("_no_std")](rewards, annotation, std="none")
    more = {"factor": 0.8, "max_reward": group["r_max"]} if strategy == "downscale" else {}
    return ESTIMATORS[strategy](rewards, annotation, **more, **params)


@pytest.mark.parametrize(("group", "key", "strategy"), CASES, ids=lambda c: c["name"] if isinstance(c, dict) else c)
def test_groups(group: dict[str, Any], key: str, strategy: str) -> None:
    expected = torch.tensor(group["stats"][key][strategy], dtype=torch.float64)
    assert torch.allclose(ours(strategy, group, STANDARDISATIONS[key]), expected, rtol=0, atol=2e-6)


def test_every_strategy_of_the_file_is_compared() -> None:
    compared = {strategy for _, _, strategy in CASES}
    assert compared == {name.removeprefix("strategy.") for name in GOLDEN["fields"] if name.startswith("strategy.")}


def test_shaping() -> None:
    for case in GOLDEN["shaping_scalar"]:
        params = {name: case[name] for name in ("tau", "alpha1", "alpha2") if name in case}
        assert shape(case["r"], **params) == pytest.approx(case["r_shaped"], abs=2e-6)
        if "slope" in case:
            h = 1e-7
            assert (shape(case["r"] + h) - shape(case["r"] - h)) / (2 * h) == pytest.approx(case["slope"], abs=2e-6)
    for group in GOLDEN["groups"]:
        assert [shape(r) for r in group["rewards"]] == pytest.approx(group["shaped"], abs=2e-6)


@pytest.mark.parametrize("case", GOLDEN["closed_form_tied"], ids=lambda c: f"G={c['G']}")
@pytest.mark.parametrize("strategy", ["mixed", "nonlinear"])
def test_tied_groups_forget_the_gap(case: dict[str, Any], strategy: str) -> None:
    size = case["G"]
    annotation = torch.arange(size) == size - 1
    for policy in (0.0, 0.5, 0.99):
        rewards = torch.full((size,), policy, dtype=torch.float64).masked_fill(annotation, 1.0)
        for std, key in (("sample", "ddof1"), ("population", "ddof0")):
            advantages = ESTIMATORS[strategy](rewards, annotation, std=std, eps=0.0)
            assert float(advantages[-1]) == pytest.approx(case[f"A_gt_{key}"], abs=2e-6)
            assert float(advantages[0]) == pytest.approx(case[f"A_on_{key}"], abs=2e-6)


LOSSES = GOLDEN["policy_loss"]
MODES = dict(
    zip(
        LOSSES["variants"],
        (OffPolicy(), OffPolicy(ratio="recomputed", clip=True), OffPolicy(ratio="behaviour_one")),
        strict=True,
    )
)


@pytest.mark.parametrize("variant", MODES, ids=lambda v: v.partition(" ")[0])
def test_losses_and_gradients(variant: str) -> None:
    """A row by the policy at ratio 1 and a row by the annotation, whose `old_N` is stale."""
    on, off = LOSSES["on_logp"], LOSSES["off_logp"]
    expected = LOSSES["variants"][variant]
    norm = Normaliser(rows=2, tokens=len(on + off), seen=len(on + off), forwards=1, max_tokens=9, reference=len(off))
    for objective, key, weight in (
        ("grpo", "loss_seq_mean", 1 / (2 * len(off))),
        ("dapo", "loss_token_mean", 1 / len(on + off)),
    ):
        columns = Columns(
            logprobs_N=torch.tensor(on + off, dtype=torch.float64, requires_grad=True),
            advantages_N=torch.tensor([LOSSES["A_on"]] * len(on) + [LOSSES["A_off"]] * len(off), dtype=torch.float64),
            row_N=torch.tensor([0] * len(on) + [1] * len(off)),
            weight_R=torch.ones(2, dtype=torch.float64),
            old_N=torch.tensor(on + LOSSES["off_old_logp"], dtype=torch.float64),
            is_reference_N=torch.tensor([False] * len(on) + [True] * len(off)),
        )
        loss, _ = OBJECTIVES[objective](columns, norm, off_policy=MODES[variant])
        loss.backward()
        assert float(loss) == pytest.approx(expected[key], abs=2e-6)
        coefficients = -columns.logprobs_N.grad[len(on) :] / weight
        assert coefficients.tolist() == pytest.approx(expected["off_grad_coef"], abs=2e-6)
