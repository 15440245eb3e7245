"""Attention over trees against attention under a written-out mask, kernel by kernel, in values and in all gradients.

Shapes as in `kernels.py`: `H` heads (queries), `K` heads of keys and values, `T` tokens, `D` head size, `B` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rft.data.pack import Sweep, sweeps
from rft.families import FAMILIES
from rft.hf import kernels, stretches
from rft.hf.kernels import Plan
from rft.hf.stretches import Lengths
from tests.stages import opened, phase_of, relative

D = 16
SCALE = D**-0.5
HEADS = [(4, 4), (4, 2), (4, 1)]
CPU = torch.device("cpu")
# (parents, lengths): one chain link; a group; several prompts, one alone; depth 3 with long and short nodes; equal siblings
TREES = {
    "one": ([-1], [7]),
    "group": ([-1, 0, 0, 0], [70, 5, 1, 9]),
    "roots": ([-1, 0, 0, -1, -1, 4, 4], [12, 3, 3, 40, 1, 2, 6]),
    "deep": ([-1, 0, 1, 2, 2, 1, 0, -1, 7, 8, 8], [33, 4, 90, 2, 5, 1, 150, 3, 3, 1, 8]),
    "even": ([-1, 0, 0, 0, 0], [6, 6, 6, 6, 6]),
}


def row_of(name: str, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Plan, list[int], np.ndarray, list[Tensor]]:
    """Plan, parents, stops, and q, k, v, grad [1, H or K, T, D]."""
    parents, lengths = TREES[name]
    stops = np.cumsum(lengths)
    draw = torch.Generator().manual_seed(len(name) + heads[1])
    sizes = [heads[0], heads[1], heads[1], heads[0]]
    tensors = [2 * torch.randn(1, h, int(stops[-1]), D, dtype=dtype, generator=draw) for h in sizes]
    return Plan(sweeps(parents, stops), CPU), parents, stops, tensors


def allowed_TT(parents: Sequence[int], stops: np.ndarray) -> Tensor:
    """True where the query's node is the key's or below it, and the key does not come later."""
    node_T = np.repeat(np.arange(len(parents)), np.diff(stops, prepend=0))
    above = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            above[node] |= above[parent]
    later = np.arange(len(node_T))
    return torch.from_numpy(above[node_T][:, node_T] & (later <= later[:, None]))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)


def results(attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k, v."""
    *leaves, grad = (t.clone().requires_grad_(i < 3) for i, t in enumerate(tensors))
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for mine, other, name in zip(ours, theirs, ("out", "dq", "dk", "dv"), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype, name
        assert relative(mine, other) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TREES)
def test_a_tree_attends_as_its_mask_says(
    name: str, heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, parents, stops, tensors = row_of(name, heads, dtype)
    mask = allowed_TT(parents, stops)
    theirs = results(lambda q, k, v: masked(q, k, v, mask), tensors)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_same(results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), tensors), theirs, tolerance)
    monkeypatch.setattr(stretches, "LONG", 8)  # stretches from here on have a call of their own
    plan = Plan(plan.sweeps, CPU)
    assert_same(results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), tensors), theirs, tolerance)


def test_the_comparison_sees_one_key_too_many() -> None:
    """One answer sees one token of its sibling: far outside the tolerance."""
    plan, parents, stops, tensors = row_of("deep", (4, 2), torch.float32)
    mask = allowed_TT(parents, stops)
    assert not mask[-1, -9]
    mask[-1, -9] = True
    theirs = results(lambda q, k, v: masked(q, k, v, mask), tensors)
    ours = results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), tensors)
    assert all(relative(a, b) > 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_loud_scores_do_not_spoil_what_is_padded(heads: tuple[int, int]) -> None:
    """Two prompts of 5 and 9 tokens, one call. Every query scores 0 on the first key and 100 on all others: where the
    shorter one is filled up with its first query, exp(100 - 0) is beyond float32, and infinity times zero is no zero.
    """
    stops = np.array([5, 14])
    draw = torch.Generator().manual_seed(1)
    q, k = torch.full((1, heads[0], 14, D), 5.0), torch.full((1, heads[1], 14, D), 100 / (5 * D * SCALE))
    k[:, :, [0, 5]] = 0
    v, grad = (torch.randn(1, h, 14, D, generator=draw) for h in (heads[1], heads[0]))
    plan, mask = Plan(sweeps([-1, -1], stops), CPU), allowed_TT([-1, -1], stops)
    ours = results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), [q, k, v, grad])
    theirs = results(lambda q, k, v: masked(q, k, v, mask), [q, k, v, grad])
    assert len(plan.calls[0]) == 1
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-4


class Place(str):
    """A device that is no CPU to whoever asks for its type, and one to torch."""

    type = "elsewhere"


class Elsewhere(Tensor):
    """A tensor on a device without any flash kernel, where attention is written out."""

    device = Place("cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_written_out_attention_equals_the_flash_kernel(heads: tuple[int, int], causal: bool) -> None:
    """Given the out and the log-sum-exp of a larger whole too: what a part's backward gets when parts are merged."""
    draw = torch.Generator().manual_seed(3)
    q, k, v, grad, wider = (torch.randn(3, h, 9, D, generator=draw) for h in (heads[0], heads[1], heads[1], heads[0], heads[1]))
    flash = kernels.dense(q, k, v, causal, SCALE)
    q_, k_, v_ = (x.as_subclass(Elsewhere) for x in (q, k, v))
    written = kernels.dense(q_, k_, v_, causal, SCALE)
    assert isinstance(written[0], Elsewhere) and not isinstance(flash[0], Elsewhere)
    for mine, other in zip(written, flash, strict=True):
        assert relative(mine.as_subclass(Tensor), other) <= 1e-6
    if not causal:
        flash = kernels.dense(q, torch.cat([k, wider], dim=2), torch.cat([v, wider], dim=2), False, SCALE)
    ours = kernels.dense_backward(grad, q_, k_, v_, *flash, causal, SCALE)
    theirs = kernels.dense_backward(grad, q, k, v, *flash, causal, SCALE)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine.as_subclass(Tensor), other) <= 1e-6


def slices(given: Lengths) -> list[tuple[slice, slice]]:
    edges = [cu.tolist() for cu in (given.cu_q, given.cu_k)]
    assert given.max_q == max(np.diff(edges[0])) and given.max_k == max(np.diff(edges[1]))
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(edges[0], edges[0][1:], edges[1], edges[1][1:], strict=False)]


def slow_varlen(q: Tensor, k: Tensor, v: Tensor, given: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """What a varlen kernel computes, stretch by stretch: out [T, H, D], lse [H, T]."""
    outs, lses = [], []
    for rows, cols in slices(given):
        one = (x.transpose(0, 1)[None] for x in (q[rows], k[cols], v[cols]))
        out, lse = kernels.dense(*one, given.causal, scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def slow_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, given: Lengths, scale: float
) -> list[Tensor]:
    found = []
    for rows, cols in slices(given):
        one = (x.transpose(0, 1)[None] for x in (grad[rows], q[rows], k[cols], v[cols], out[rows]))
        parts = kernels.dense_backward(*one, lse_HT[None, :, rows], given.causal, scale)
        found.append([x[0].transpose(0, 1) for x in parts])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of a GPU, over slow kernels."""
    monkeypatch.setattr(kernels, "takes_varlen", lambda q: True)
    monkeypatch.setattr(kernels, "_varlen", slow_varlen)
    monkeypatch.setattr(kernels, "_varlen_backward", slow_varlen_backward)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TREES)
def test_one_call_per_sweep_gives_the_same(name: str, heads: tuple[int, int], varlen: None) -> None:
    plan, parents, stops, tensors = row_of(name, heads, torch.float32)
    mask = allowed_TT(parents, stops)
    theirs = results(lambda q, k, v: masked(q, k, v, mask), tensors)
    assert_same(results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), tensors), theirs, 1e-6)
    assert "lengths" in vars(plan) and "calls" not in vars(plan)  # nothing went by the dense way


@pytest.mark.parametrize("way", ["dense", "varlen"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_new_tokens_attend_to_ragged_and_nested_prefixes(
    heads: tuple[int, int], way: str, request: pytest.FixtureRequest
) -> None:
    """Rows below nodes of any depth, numbers of rows that differ, a node that is both an end and a parent; and own keys of
    which the last are not written yet."""
    if way == "varlen":
        request.getfixturevalue("varlen")
    spans = np.array([[0, 40], [40, 43], [43, 52], [52, 53], [53, 93], [93, 98]])  # nodes 0 - 1, 0 - 2 - 3; 4 - 5
    paths = [(0,), (0, 1), (0, 1), (0, 2), (0, 2, 3), (4,), (4, 5), (4, 5), (4, 5)]
    rows = ([[0, 5], [5, 9]], [[1, 3], [3, 5], [6, 9]], [[4, 5]])  # by depth: rows that pass a node
    nodes = ([0, 4], [1, 2, 5], [3])
    plan = Plan([Sweep(queries_S2=np.array(r), keys_S2=spans[n], causal=False) for r, n in zip(rows, nodes, strict=True)], CPU)
    draw = torch.Generator().manual_seed(5)
    prefix = tuple(torch.randn(heads[1], 98, D, generator=draw) for _ in range(2))
    for own, unwritten in ((1, 0), (4, 0), (4, 3)):
        q = torch.randn(len(paths), heads[0], 1, D, generator=draw)
        k, v = (torch.randn(len(paths), heads[1], own + unwritten, D, generator=draw) for _ in range(2))
        hidden = torch.arange(own + unwritten) >= own if unwritten else None
        ours = kernels.attend_prefix(q, k, v, prefix, plan, SCALE, hidden)
        for b, path in enumerate(paths):
            seen = np.concatenate([np.arange(*spans[n]) for n in path])
            keys, values = (torch.cat([x[:, seen], y[b, :, :own]], dim=1)[None] for x, y in zip(prefix, (k, v), strict=True))
            theirs = masked(q[b : b + 1], keys, values, torch.ones(1, len(seen) + own, dtype=torch.bool))
            assert relative(ours[b : b + 1], theirs) <= 1e-6


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes [B, H, L, D] of the queries of every call of the forward kernel."""
    met: list[tuple[int, ...]] = []
    plain = kernels._dense
    monkeypatch.setattr(kernels, "_dense", lambda q, *rest: met.append(tuple(q.shape)) or plain(q, *rest))
    return met


def test_equal_stretches_are_one_call(dense_calls: list[tuple[int, ...]]) -> None:
    edges = np.arange(0, 61, 5)
    own = np.stack([edges[:-1], edges[1:]], axis=1)
    q, k, v = (torch.randn(1, 4, 60, D) for _ in range(3))
    Plan((Sweep(queries_S2=own, keys_S2=own, causal=False),), CPU).attend(0, q, k, v, SCALE)
    assert dense_calls == [(12, 4, 5, D)]
    del dense_calls[:]
    parents, stops = [-1, *[0] * 8], np.cumsum([70, *[6] * 8])
    q, k, v = (torch.randn(1, 4, 118, D) for _ in range(3))
    Plan(sweeps(parents, stops), CPU).attend(0, q, k, v, SCALE)
    assert sorted(dense_calls) == [(1, 4, 48, D), (1, 4, 70, D), (8, 4, 6, D)]  # all answers on the prompt; each on itself


# Grids in patches: windows of 4 x 4 patches that fill the first, and that the second and third cut at their edges.
@pytest.mark.parametrize("grids", [[(3, 8, 8)], [(2, 6, 10)], [(3, 8, 8), (1, 4, 6), (2, 6, 10), (1, 2, 2)]], ids=str)
def test_windows_of_a_real_tower_equal_the_library(
    grids: list[tuple[int, int, int]], tiny_folders: dict[str, Path], dense_calls: list[tuple[int, ...]]
) -> None:
    policy = opened(tiny_folders["qwen2_5_vl"], phase_of())
    tower, config = policy.model.model.visual, policy.model.config.vision_config
    grid = torch.tensor(grids)
    family = FAMILIES["qwen2_5_vl"]
    patches = torch.randn(int(grid.prod(1).sum()), 3 * family.temporal_patch * family.patch**2)
    weights = torch.randn(len(patches) // family.merge**2, 64)

    def run() -> tuple[Tensor, Tensor]:
        policy.model.zero_grad()
        out = tower(patches, grid_thw=grid).pooler_output
        (out * weights).sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])

    ours = run()
    num_ours = len(dense_calls)
    config._attn_implementation = "sdpa"
    theirs = run()
    assert len(dense_calls) == num_ours > 0  # the library's own way this time
    assert (ours[0] - theirs[0]).abs().max() <= 1e-6 * theirs[0].abs().max()
    assert relative(ours[1], theirs[1]) <= 1e-5
    if grids == [(3, 8, 8)]:
        assert [c[0] for c in dense_calls] == [12, 3]  # a layer of windows, a layer of whole pairs: one call each


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("name", TREES)
def test_bfloat16_on_a_gpu_is_within_rounding_of_float32(name: str, heads: tuple[int, int]) -> None:
    """Varlen flash forward and backward, merged over sweeps, against the written-out mask in float32 on the CPU."""
    plan, parents, stops, _ = row_of(name, heads, torch.float32)
    draw = torch.Generator().manual_seed(7)
    tensors = [
        torch.randn(1, h, int(stops[-1]), 64, generator=draw).bfloat16() for h in (heads[0], heads[1], heads[1], heads[0])
    ]
    mask = allowed_TT(parents, stops)
    theirs = results(lambda q, k, v: masked(q, k, v, mask), [t.float() for t in tensors])
    plan = Plan(plan.sweeps, torch.device("cuda"))
    ours = results(lambda q, k, v: plan.attend(0, q, k, v, SCALE), [t.cuda() for t in tensors])
    assert "lengths" in vars(plan)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative(mine.float().cpu(), other) <= 2e-2
