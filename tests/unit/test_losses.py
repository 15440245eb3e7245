"""Losses by hand. Two rows of 1 and 3 tokens unless said: row 0 = [a], row 1 = [b, c, d]."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rft.algo import OBJECTIVES
from rft.algo.diagnostics import shares
from rft.algo.losses import KL, Columns, Normaliser, OffPolicy, k3, policy_share, token_weights
from rft.errors import RftError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tempsamp_vectors.json").read_text())
ROWS = torch.tensor([0, 1, 1, 1])
NORM = Normaliser(rows=2, tokens=4, seen=4, forwards=1, max_tokens=5)


def columns(logprobs: list[float], advantages: list[float], **more: object) -> Columns:
    return Columns(
        logprobs_N=torch.tensor(logprobs, dtype=torch.float64, requires_grad=True),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        row_N=ROWS[: len(logprobs)],
        weight_R=more.pop("weight_R", torch.ones(2, dtype=torch.float64)),
        is_reference_N=torch.tensor(more.pop("reference")) if "reference" in more else None,
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


P, OLD = [math.log(0.5), math.log(0.2)], [math.log(0.4), math.log(2 / 9)]  # ratios 1.25 and 0.9
TWO = Normaliser(rows=2, tokens=2, seen=2, forwards=1, max_tokens=5, reference=2)


@pytest.mark.parametrize(
    ("off_policy", "values", "slopes"),
    [
        (OffPolicy(), [1, 1], [1, 1]),
        (OffPolicy(ratio="recomputed"), [1.25, 0.9], [1.25, 0.9]),
        (OffPolicy(ratio="recomputed", clip=True), [1.2, 0.9], [0, 0.9]),
        (OffPolicy(ratio="behaviour_one"), [0.5, 0.2], [0.5, 0.2]),
        (OffPolicy(ratio="luffy"), [0.5 / 0.6, 0.2 / 0.3], [0.05 / 0.36, 0.02 / 0.09]),
        (OffPolicy(ratio="luffy", gamma=0.5), [0.5, 0.2 / 0.7], [0.25, 0.1 / 0.49]),
    ],
)
def test_ratio_modes_of_two_tokens(off_policy: OffPolicy, values: list[float], slopes: list[float]) -> None:
    """A = 2 and each token weighs 1/2, so the loss is -(w1 + w2) and its gradient -dw/dlogp, after a stale `old_N`."""
    c = columns(P, [2.0, 2.0], old_N=OLD, reference=[True, True])
    loss, metrics = OBJECTIVES["dapo"](c, TWO, off_policy=off_policy)
    loss.backward()
    assert float(loss) == pytest.approx(-sum(values))
    assert c.logprobs_N.grad.tolist() == pytest.approx([-slope for slope in slopes])
    assert float(metrics["reference/pull"]) == pytest.approx(sum(slopes)) and metrics["pull"] == metrics["reference/pull"]
    assert float(metrics["reference/logprob"]) == pytest.approx(sum(P) / 2)
    assert float(metrics["clipped"]) == 0 and float(metrics["ratio"]) == 0  # the policy wrote nothing


@pytest.mark.parametrize("mode", ["one", "recomputed"])
def test_the_first_update_is_the_advantage_in_gradient(mode: str) -> None:
    """Without old log-probs, or with those of the same weights."""
    for old in ({}, {"old_N": P}):
        c = columns(P, [2.0, -1.0], reference=[True, True], **old)
        OBJECTIVES["dapo"](c, TWO, off_policy=OffPolicy(ratio=mode, clip=mode == "recomputed"))[0].backward()
        assert c.logprobs_N.grad.tolist() == pytest.approx([-1.0, 0.5])


def mixed(**more: object) -> Columns:
    """Row 0 = [a] by the policy; row 1 = [b, c, d] in which the annotation wrote b and c."""
    return columns(
        [-1.0, -2.0, -0.5, -1.5],
        [1.0, 2.0, 2.0, 2.0],
        old_N=[-1.3, -2.4, -0.4, -1.4],
        reference=[False, True, True, False],
        **more,
    )


STEP = Normaliser(rows=2, tokens=4, seen=4, forwards=1, max_tokens=5, reference=2)


def test_each_author_has_its_own_ratio_and_its_own_curves() -> None:
    """The policy: ratios e^0.3 (clipped at 1.2) and e^-0.1; the annotation: 1, whatever `old_N` says."""
    c = mixed()
    loss, metrics = OBJECTIVES["dapo"](c, STEP)
    loss.backward()
    own = math.exp(-0.1)
    assert float(loss) == pytest.approx(-(1.2 + 2 + 2 + 2 * own) / 4)
    assert c.logprobs_N.grad.tolist() == pytest.approx([0, -2 / 4, -2 / 4, -2 * own / 4])
    assert float(metrics["clipped"]) == pytest.approx(1 / 2)  # of the policy's two tokens
    assert float(metrics["ratio"]) == pytest.approx((math.exp(0.3) + own) / 2)
    assert float(metrics["reference/ratio"]) == 1 and float(metrics["reference/logprob"]) == -1.25
    share = shares({name: float(value) for name, value in metrics.items()})["reference/gradient_share"]
    assert share == pytest.approx(4 / (4 + 2 * own))
    assert policy_share(c, STEP).tolist() == [0.5, 0, 0, 0.5]


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("mode", ["one", "recomputed", "behaviour_one", "luffy"])
def test_pull_is_the_size_of_the_gradient(objective: str, mode: str) -> None:
    c = mixed(sampler_N=[-1.5, float("nan"), float("nan"), -1.3])
    loss, metrics = OBJECTIVES[objective](c, STEP, off_policy=OffPolicy(ratio=mode), importance_cap=2.0)
    loss.backward()
    sizes = c.logprobs_N.grad.abs()
    assert float(metrics["pull"]) == pytest.approx(float(sizes.sum()))
    assert float(metrics["reference/pull"]) == pytest.approx(float(sizes[1:3].sum()))


def test_the_logged_numbers_add_up_over_forwards() -> None:
    """Row by row, with the normaliser of the whole step, as in one forward."""
    whole = OBJECTIVES["dapo"](mixed(), STEP)[1]
    c, sums = mixed(), {}
    for row in (0, 1):
        at = c.row_N == row
        names = ("logprobs_N", "advantages_N", "old_N", "is_reference_N")
        part = Columns(
            row_N=torch.zeros(int(at.sum()), dtype=torch.int64), weight_R=torch.ones(1), **{n: getattr(c, n)[at] for n in names}
        )
        for name, value in OBJECTIVES["dapo"](part, STEP)[1].items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert sums == pytest.approx({name: float(value) for name, value in whole.items()})


def test_a_step_without_an_annotation_is_what_it_was_bit_for_bit() -> None:
    stale = {"old_N": [-1.3, -2.4, -0.4, -1.4], "ref_N": [-1.1, -2.0, -0.9, -1.0], "sampler_N": [-1.2, -2.5, -0.4, -1.3]}
    for name in ("grpo", "dapo", "gspo"):
        grads = []
        for more in ({}, {"reference": [False] * 4}):
            c = columns([-1.0, -2.0, -0.5, -1.5], [1.0, 2.0, -2.0, 2.0], **stale, **more)
            off = OffPolicy(ratio="luffy", kl=False)
            loss, metrics = OBJECTIVES[name](c, NORM, kl=KL(weight=0.1), importance_cap=2.0, off_policy=off)
            loss.backward()
            grads.append((c.logprobs_N.grad, loss, metrics))
        assert torch.equal(grads[0][0], grads[1][0]) and grads[0][1] == grads[1][1] and grads[0][2] == grads[1][2]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_switch(estimator: str) -> None:
    """Off, the annotation's tokens are as without a penalty, and the policy's are not; the logged KL is the policy's."""
    ref = {"ref_N": [-1.2, -1.0, -1.0, -1.0]}
    grads = {}
    for name, kl, off in (
        ("none", KL(), True),
        ("on", KL(weight=0.1, estimator=estimator), True),
        ("off", KL(weight=0.1, estimator=estimator), False),
    ):
        c = mixed(**ref)
        loss, metrics = OBJECTIVES["dapo"](c, STEP, kl=kl, off_policy=OffPolicy(kl=off), clip_high=1.0)
        loss.backward()
        grads[name] = c.logprobs_N.grad
        if name != "none":
            differences = [0.2, -0.5] if estimator == "k1" else [math.exp(-0.2) + 0.2 - 1, math.exp(0.5) - 0.5 - 1]
            assert float(metrics["kl"]) == pytest.approx(sum(differences) / 2)
    assert torch.equal(grads["off"][1:3], grads["none"][1:3]) and not torch.isclose(grads["on"][1:3], grads["none"][1:3]).any()
    assert torch.equal(grads["off"][[0, 3]], grads["on"][[0, 3]])


def test_nobody_sampled_the_annotation_so_nothing_corrects_it() -> None:
    """p_old / p_sampler: e^0.2 and e^-0.1 for the policy's tokens, 1 for the annotation's NaN."""
    c = mixed(sampler_N=[-1.5, float("nan"), float("nan"), -1.3])
    loss, metrics = OBJECTIVES["dapo"](c, STEP, importance_cap=2.0)
    loss.backward()
    assert c.logprobs_N.grad.tolist() == pytest.approx([0, -0.5, -0.5, -0.5 * math.exp(-0.2)])
    assert float(metrics["correction"]) == pytest.approx((math.exp(0.2) + math.exp(-0.1)) / 2)


def test_a_sequence_ratio_is_each_authors_own() -> None:
    """Row 1: the policy wrote d alone (e^-0.1), the annotation b and c, log ratios 0.4 and -0.1, so e^0.15 for both."""
    for mode, mean, bent in (
        ("one", 1.0, 1.0),
        ("recomputed", math.exp(0.15), math.exp(0.15)),
        ("luffy", math.exp(-1.25), None),
    ):
        c = mixed()
        loss, metrics = OBJECTIVES["gspo"](c, STEP, clip_low=0.9, clip_high=0.9, off_policy=OffPolicy(ratio=mode))
        loss.backward()
        value = bent or mean / (mean + 0.1)
        assert float(metrics["reference/ratio"]) == pytest.approx(value)
        slope = mean if bent else value * (1 - value)
        assert c.logprobs_N.grad[1:3].tolist() == pytest.approx([-2 * slope / 6] * 2)
        assert float(c.logprobs_N.grad[3]) == pytest.approx(-2 * math.exp(-0.1) / 6)


def test_a_clip_that_would_not_apply_is_refused() -> None:
    with pytest.raises(RftError, match="has no clip"):
        OffPolicy(ratio="luffy", clip=True)
    with pytest.raises(RftError, match="gamma"):
        OffPolicy(ratio="luffy", gamma=0.0)


def test_shares_leave_a_step_without_guidance_alone() -> None:
    assert shares({"clipped": 0.1}) == {"clipped": 0.1}
    assert shares({"ratio": 1.0, "pull": 4.0, "reference/pull": 1.0}) == {"ratio": 1.0, "reference/gradient_share": 0.25}
    assert shares({"pull": 0.0, "reference/pull": 0.0}) == {}
