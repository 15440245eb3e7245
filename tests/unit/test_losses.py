"""Losses by hand. Two rows of 1 and 3 tokens unless said: row 0 = [a], row 1 = [b, c, d]."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rft.algo import OBJECTIVES
from rft.algo.losses import KL, Columns, Normaliser, k3, token_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tempsamp_vectors.json").read_text())
ROWS = torch.tensor([0, 1, 1, 1])
NORM = Normaliser(rows=2, tokens=4, seen=4, forwards=1, max_tokens=5)


def columns(logprobs: list[float], advantages: list[float], **more: object) -> Columns:
    return Columns(
        logprobs_N=torch.tensor(logprobs, dtype=torch.float64, requires_grad=True),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        row_N=ROWS[: len(logprobs)],
        weight_R=more.pop("weight_R", torch.ones(2, dtype=torch.float64)),
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in more.items()},
    )


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("grpo", [1 / 4, 1 / 12, 1 / 12, 1 / 12]),  # 1 / (length x 4 rows of the step)
        ("dapo", [1 / 10] * 4),  # 1 / 10 tokens of the step
        ("bnpo", [1 / 8] * 4),  # 1 / (4 tokens of this forward x 2 forwards)
        ("dr_grpo", [1 / 20] * 4),  # 1 / (4 rows x limit 5)
    ],
)
def test_token_weights(aggregation: str, weights: list[float]) -> None:
    step = Normaliser(rows=4, tokens=10, seen=10, forwards=2, max_tokens=5)
    assert token_weights(columns([0.0] * 4, [0.0] * 4), step, aggregation).tolist() == pytest.approx(weights)


def test_a_row_left_out_has_no_weight_and_keeps_its_place_in_the_mean() -> None:
    left = columns([0.0] * 4, [0.0] * 4, weight_R=torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert token_weights(left, NORM, "grpo").tolist() == [0.5, 0, 0, 0]
    assert token_weights(left, Normaliser(rows=2, tokens=1, seen=1, forwards=1, max_tokens=5), "dapo").tolist() == [1, 0, 0, 0]


def test_nll_is_the_mean_over_tokens() -> None:
    loss, _ = OBJECTIVES["nll"](columns([-1.0, -2.0, -3.0, -4.0], [0.0] * 4), NORM, kl=None, clip_low=0.2, clip_high=0.2)
    assert float(loss) == pytest.approx(2.5)


def test_on_policy_value_and_gradient() -> None:
    """Without old log-probs the ratio is 1: loss = -sum of weight x advantage, d loss / d logp the same."""
    c = columns([-1.0, -2.0, -3.0, -4.0], [2.0, -1.0, -1.0, -1.0])
    loss, metrics = OBJECTIVES["grpo"](c, NORM)
    loss.backward()
    assert float(loss) == pytest.approx(-0.5)  # -(2/2 - 1/6 x 3)
    assert c.logprobs_N.grad.tolist() == pytest.approx([-1.0, 1 / 6, 1 / 6, 1 / 6])
    assert float(metrics["clipped"]) == 0 and float(metrics["ratio"]) == pytest.approx(1)


def test_clip_is_asymmetric_and_stops_the_gradient() -> None:
    """Ratios e^0.3 = 1.35 with A > 0 (above 1.28: clipped), with A < 0 (not clipped), e^-0.3 = 0.74 with A < 0 (clipped)."""
    c = columns([-1.0] * 4, [1.0, -1.0, -1.0, 1.0], old_N=[-1.3, -1.3, -0.7, -0.7])
    loss, metrics = OBJECTIVES["dapo"](c, NORM, clip_low=0.2, clip_high=0.28)
    loss.backward()
    up, down = math.exp(0.3), math.exp(-0.3)
    assert float(loss) == pytest.approx((-1.28 + up + 0.8 - down) / 4)
    assert c.logprobs_N.grad.tolist() == pytest.approx([0.0, up / 4, 0.0, -down / 4])
    assert float(metrics["clipped"]) == pytest.approx(0.5)


def test_sequence_ratio_is_the_rows_geometric_mean() -> None:
    """GSPO: row 1 has log ratios 0.1, 0.2, 0.3, so s = e^0.2 for all of it; its gradient spreads evenly."""
    c = columns([0.0, -1.0, -1.0, -1.0], [0.0, 1.0, 1.0, 1.0], old_N=[0.0, -1.1, -1.2, -1.3])
    loss, _ = OBJECTIVES["gspo"](c, NORM, clip_low=0.5, clip_high=0.5)
    loss.backward()
    assert float(loss) == pytest.approx(-math.exp(0.2) / 2)
    assert c.logprobs_N.grad.tolist() == pytest.approx([0.0] + [-math.exp(0.2) / 6] * 3)


def test_k3_golden_and_gradient() -> None:
    golden = GOLDEN["kl_k3"]
    logp, ref = (torch.tensor(golden[k], dtype=torch.float64) for k in ("logp", "ref_logp"))
    assert torch.allclose(k3(logp, ref), torch.tensor(golden["k3"], dtype=torch.float64), atol=2e-6)
    c = columns([-1.0] * 4, [0.0] * 4, ref_N=[-1.0, -2.0, -1.0, -1.0])
    loss, metrics = OBJECTIVES["dapo"](c, NORM, kl=KL(weight=0.1))
    loss.backward()
    value = math.exp(-1) + 1 - 1  # exp(d) - d - 1 at d = -1
    assert float(metrics["kl"]) == pytest.approx(value / 4)
    assert float(loss) == pytest.approx(0.1 * value / 4)
    assert c.logprobs_N.grad.tolist() == pytest.approx([0.0, 0.1 * (1 - math.exp(-1)) / 4, 0.0, 0.0])


def test_k1_is_taken_off_the_advantage() -> None:
    """As a loss term its gradient would be the constant weight, 0 in expectation; as a penalty it is -(A - w k1)."""
    c = columns([-1.0] * 4, [1.0] * 4, ref_N=[-1.0, -2.0, -1.0, -1.0])
    loss, metrics = OBJECTIVES["dapo"](c, NORM, kl=KL(weight=0.1, estimator="k1"))
    loss.backward()
    assert float(metrics["kl"]) == pytest.approx(1 / 4)
    assert c.logprobs_N.grad.tolist() == pytest.approx([-0.25, -0.9 / 4, -0.25, -0.25])


def test_golden_policy_loss() -> None:
    """The toy of two rows, the second off policy: ratio one, and clipped against stale log-probs."""
    g = GOLDEN["policy_loss"]
    logp = g["on_logp"] + g["off_logp"]
    rows = torch.tensor([0] * len(g["on_logp"]) + [1] * len(g["off_logp"]))
    advantages = [g["A_on"]] * len(g["on_logp"]) + [g["A_off"]] * len(g["off_logp"])
    norm = Normaliser(rows=2, tokens=len(logp), seen=len(logp), forwards=1, max_tokens=9)
    stale = torch.tensor(g["on_logp"] + g["off_old_logp"], dtype=torch.float64)
    for name, old in zip(g["variants"], (None, stale)):
        c = Columns(
            logprobs_N=torch.tensor(logp, dtype=torch.float64),
            advantages_N=torch.tensor(advantages, dtype=torch.float64),
            row_N=rows,
            weight_R=torch.ones(2, dtype=torch.float64),
            old_N=old,
        )
        for objective, key in (("grpo", "loss_seq_mean"), ("dapo", "loss_token_mean")):
            assert float(OBJECTIVES[objective](c, norm)[0]) == pytest.approx(g["variants"][name][key], abs=2e-6)
