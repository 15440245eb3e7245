"""Attention of stretches of one row on other stretches, forward and backward, on whatever the machine has.

A call returns outputs and their log-sum-exp; calls over disjoint keys are merged by it:

    lse = log(exp(lse_1) + exp(lse_2));   out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

The backward of a part is the flash backward of that part with the *merged* out and lse (as in ring attention, Liu et al.
2023, arXiv:2310.01889): the softmax weights come out as those of the whole. Shapes: `H` heads (keys and values may have
fewer: grouped queries), `T` tokens of the row, `D` head size, `B` stretches of one call, `L` their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from rft.data.pack import Sweep
from rft.hf.stretches import Call, Even, Lengths, Ragged, Rows, bundles_of, where_of

aten = torch.ops.aten


class Plan:
    """The sweeps of one row, prepared once for all layers. `attend` is differentiable in queries, keys and values."""

    def __init__(self, sweeps: Sequence[Sweep], device: torch.device) -> None:
        self.sweeps, self.device = sweeps, device

    def attend(self, layer: int, q_1HTD: Tensor, k_1HTD: Tensor, v_1HTD: Tensor, scale: float) -> Tensor:
        """[1, H, T, D]; the layer does not matter here."""
        return _Attention.apply(q_1HTD[0], k_1HTD[0], v_1HTD[0], self, scale)[None]

    @cached_property
    def calls(self) -> list[list[Call]]:
        """Per sweep, stretches bundled into dense calls."""
        return [
            [
                Call(
                    where_of(sweep.queries_S2[bundle], self.device), where_of(sweep.keys_S2[bundle], self.device), sweep.causal
                )
                for bundle in bundles_of(sweep)
            ]
            for sweep in self.sweeps
        ]

    @cached_property
    def lengths(self) -> list[Lengths]:
        """Per sweep, cumulative lengths for kernels that take stretches of any length in one call."""
        return [Lengths.of(sweep, self.device) for sweep in self.sweeps]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, plan: Plan, scale: float) -> Tensor:
        parts = varlen_parts if takes_varlen(q_HTD) else dense_parts
        exact = torch.float64 if q_HTD.dtype == torch.float64 else torch.float32
        out_THD = q_HTD.new_empty(q_HTD.transpose(0, 1).shape, dtype=exact if len(plan.sweeps) > 1 else None)
        out_HTD = out_THD.transpose(0, 1)
        lse_HT1 = q_HTD.new_empty((*q_HTD.shape[:2], 1), dtype=exact)
        for first, where, part_HnD, lse_Hn1 in parts(q_HTD, k_HTD, v_HTD, plan, scale):
            if first:
                where.write(out_HTD, part_HnD.to(out_HTD.dtype))
                where.write(lse_HT1, lse_Hn1)
            else:
                _merge(out_HTD, lse_HT1, where, part_HnD, lse_Hn1)
        out_HTD = out_HTD.to(q_HTD.dtype)
        ctx.save_for_backward(q_HTD, k_HTD, v_HTD, out_HTD, lse_HT1)
        ctx.plan, ctx.scale = plan, scale
        return out_HTD

    @staticmethod
    def backward(ctx, grad_HTD: Tensor):
        q_HTD, k_HTD, v_HTD, out_HTD, lse_HT1 = ctx.saved_tensors
        parts = varlen_gradients if takes_varlen(q_HTD) else dense_gradients
        exact = torch.float64 if q_HTD.dtype == torch.float64 else torch.float32
        sums = [torch.zeros_like(x, dtype=exact) for x in (q_HTD, k_HTD, v_HTD)]
        for queries, keys, dq, dk, dv in parts(grad_HTD, q_HTD, k_HTD, v_HTD, out_HTD, lse_HT1, ctx.plan, ctx.scale):
            for total, where, part in zip(sums, (queries, keys, keys), (dq, dk, dv), strict=True):
                where.add(total, part.to(exact))
        return *(total.to(x.dtype) for total, x in zip(sums, (q_HTD, k_HTD, v_HTD), strict=True)), None, None


def _merge(out_HTD: Tensor, lse_HT1: Tensor, where: Even | Ragged | Rows, part_HnD: Tensor, part_Hn1: Tensor) -> None:
    """Attention over further keys joins what is there, in place."""
    before = where.read(lse_HT1)
    after = torch.logaddexp(before, part_Hn1)
    merged = where.read(out_HTD) * (before - after).exp() + part_HnD * (part_Hn1 - after).exp()
    where.write(out_HTD, merged.to(out_HTD.dtype))
    where.write(lse_HT1, after)


def attend_prefix(
    q_BH1D: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    prefix_HTD: tuple[Tensor, Tensor],
    plan: Plan,
    scale: float,
    hidden_T: Tensor | None = None,
) -> Tensor:
    """One new token per row: [B, H, 1, D] over the row's own keys and over the shared prefixes that `plan` gives to rows.

    No gradient. A prefix is there once, however many rows see it. `hidden_T` leaves own keys out, by a mask on the device.
    """
    if hidden_T is None:
        out_BH1D, lse_BH1 = dense(q_BH1D, k_BHTD, v_BHTD, False, scale)
    else:
        out_BH1D, lse_BH1 = _masked(q_BH1D, k_BHTD, v_BHTD, hidden_T, scale)
    q_HBD, out_HBD = q_BH1D[:, :, 0].transpose(0, 1), out_BH1D[:, :, 0].transpose(0, 1).float()
    lse_HB1 = lse_BH1.transpose(0, 1).contiguous()
    parts = varlen_parts if takes_varlen(q_HBD) else dense_parts
    for _, where, part_HnD, part_Hn1 in parts(q_HBD, *prefix_HTD, plan, scale):
        _merge(out_HBD, lse_HB1, where, part_HnD, part_Hn1)
    return out_HBD.transpose(0, 1)[:, :, None].to(q_BH1D.dtype)


def dense_parts(q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, plan: Plan, scale: float):
    """(is the first sweep, where, out, lse) of every dense call."""
    for number, calls in enumerate(plan.calls):
        for call in calls:
            k_BHLD, v_BHLD = call.keys.take(k_HTD), call.keys.take(v_HTD)
            out_BHLD, lse_BHL = dense(call.queries.take(q_HTD), k_BHLD, v_BHLD, call.causal, scale)
            yield number == 0, call.queries, call.queries.flat(out_BHLD), call.queries.flat(lse_BHL[..., None])


def dense_gradients(
    grad_HTD: Tensor, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, out_HTD: Tensor, lse_HT1: Tensor, plan: Plan, scale: float
):
    """(where queries, where keys, dq, dk, dv) of every dense call."""
    for calls in plan.calls:
        for call in calls:
            lse_BHL = call.queries.take(lse_HT1)[..., 0]
            if isinstance(call.queries, Ragged):
                lse_BHL = call.queries.silence(lse_BHL)
            dq, dk, dv = dense_backward(
                call.queries.take(grad_HTD),
                call.queries.take(q_HTD),
                call.keys.take(k_HTD),
                call.keys.take(v_HTD),
                call.queries.take(out_HTD),
                lse_BHL,
                call.causal,
                scale,
            )
            yield call.queries, call.keys, call.queries.flat(dq), call.keys.flat(dk), call.keys.flat(dv)


def dense(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Out [B, H, L, D] and lse [B, H, L]; `causal` wants as many keys as queries. Not differentiable.

    Grouped queries: without causality the queries of a key head stand in one line, and no key is copied.
    """
    B, H, L, D = q_BHLD.shape
    share = H // k_BHLD.shape[1]
    if share > 1 and not causal:
        out, lse = _dense(q_BHLD.reshape(B, H // share, share * L, D), k_BHLD, v_BHLD, False, scale)
        return out.reshape(B, H, L, D), lse.reshape(B, H, L)
    if share > 1:
        k_BHLD, v_BHLD = (x.repeat_interleave(share, dim=1) for x in (k_BHLD, v_BHLD))
    return _dense(q_BHLD, k_BHLD, v_BHLD, causal, scale)


def dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_BHL: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given the merged out and lse."""
    B, H, L, D = q.shape
    share = H // k.shape[1]
    if share > 1 and not causal:
        grad, q, out = (x.reshape(B, H // share, share * L, D) for x in (grad, q, out))
        dq, dk, dv = _dense_backward(grad, q, k, v, out, lse_BHL.reshape(B, H // share, share * L), False, scale)
        return dq.reshape(B, H, L, D), dk, dv
    if share > 1:
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    dq, dk, dv = _dense_backward(grad, q, k, v, out, lse_BHL, causal, scale)
    if share > 1:
        dk, dv = (x.unflatten(1, (H // share, share)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if _has_flash(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    if _has_flash(q):
        none = torch.empty(2, dtype=torch.uint64, device=q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none[:0], scale=scale
        )[:3]
    weights = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    dscores = weights * (grad.float() @ v.float().transpose(-1, -2) - delta) * scale
    return (
        (dscores @ k.float()).to(q.dtype),
        (dscores.transpose(-1, -2) @ q.float()).to(k.dtype),
        (weights.transpose(-1, -2) @ grad.float()).to(v.dtype),
    )


def _masked(q_BH1D: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, hidden_T: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `dense`, over the keys that are not hidden: shapes do not depend on how many they are."""
    B, H, _, D = q_BH1D.shape
    heads = k_BHTD.shape[1]
    q = q_BH1D.reshape(B, heads, H // heads, D)
    with torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False):  # it would take the product back to bfloat16
        scores = ((q.float() @ k_BHTD.float().transpose(-1, -2)) * scale).masked_fill(hidden_T, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(v_BHTD.dtype) @ v_BHTD
    return out.reshape(B, H, 1, D), lse.reshape(B, H, 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Written out, where there is no flash kernel: float32 on a GPU."""
    with torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False):
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _has_flash(q: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device)[0] >= 8
    )


def takes_varlen(q_HTD: Tensor) -> bool:
    """One call for stretches of any lengths: a flash kernel on a GPU."""
    return _has_flash(q_HTD)


def varlen_parts(q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, plan: Plan, scale: float):
    """As `dense_parts`, one call per sweep."""
    for number, given in enumerate(plan.lengths):
        q = given.queries.read(q_HTD).transpose(0, 1)
        k, v = (given.keys.read(x).transpose(0, 1) for x in (k_HTD, v_HTD))
        out_THD, lse_HT = _varlen(q, k, v, given, scale)
        yield number == 0, given.queries, out_THD.transpose(0, 1), lse_HT[..., None]


def varlen_gradients(
    grad_HTD: Tensor, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, out_HTD: Tensor, lse_HT1: Tensor, plan: Plan, scale: float
):
    """As `dense_gradients`, one call per sweep."""
    for given in plan.lengths:
        queries, keys = given.queries, given.keys
        grad, q, out = (queries.read(x).transpose(0, 1).contiguous() for x in (grad_HTD, q_HTD, out_HTD))
        k, v = (keys.read(x).transpose(0, 1).contiguous() for x in (k_HTD, v_HTD))
        lse_HT = queries.read(lse_HT1)[..., 0].contiguous()
        dq, dk, dv = _varlen_backward(grad, q, k, v, out, lse_HT, given, scale)
        yield queries, keys, dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


@cache
def _flash_package():
    """flash-attn, where it is installed."""
    try:
        from flash_attn import flash_attn_interface

        return flash_attn_interface
    except ImportError:
        return None


def _varlen(q: Tensor, k: Tensor, v: Tensor, given: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """Out [T, H, D] and lse [H, T]."""
    lengths = (given.cu_q, given.cu_k, given.max_q, given.max_k)
    if package := _flash_package():
        out, lse, _ = package.flash_attn_varlen_func(
            q, k, v, *lengths, softmax_scale=scale, causal=given.causal, return_attn_probs=True
        )
        return out, lse
    return aten._flash_attention_forward(q, k, v, *lengths, 0.0, given.causal, False, scale=scale)[:2]


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, given: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)
    lengths = (given.cu_q, given.cu_k, given.max_q, given.max_k)
    return aten._flash_attention_backward(grad, q, k, v, out, lse_HT, *lengths, 0.0, given.causal, none, none[:0], scale=scale)[
        :3
    ]
