"""Stretches of a row of tokens as operands of attention calls: where they are, and which of them share a call.

`take` gives the operand of a call, [B, H, L, D]; `flat` turns a result of that shape into [H, n, D] over the real tokens, in
the order in which `read`, `write` and `add` see them in the row. Shapes: `H` heads, `T` tokens of the row, `D` head size, `B`
stretches of one call, `L` their length, `S` stretches of a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rft.data.pack import Sweep

LONG = 512  # from here on a stretch is worth a call of its own, without a copy


@dataclass(frozen=True, slots=True)
class Even:
    """`count` adjacent stretches of one length: a view, no copy."""

    start: int
    count: int
    length: int

    def take(self, x_HTD: Tensor) -> Tensor:
        stop = self.start + self.count * self.length
        return x_HTD[:, self.start : stop].unflatten(1, (self.count, self.length)).transpose(0, 1)

    def read(self, x_HTD: Tensor) -> Tensor:
        return x_HTD[:, self.start : self.start + self.count * self.length]

    def write(self, x_HTD: Tensor, values: Tensor) -> None:
        x_HTD[:, self.start : self.start + self.count * self.length] = values

    def add(self, x_HTD: Tensor, values: Tensor) -> None:
        x_HTD[:, self.start : self.start + self.count * self.length] += values

    def flat(self, x_BHLD: Tensor) -> Tensor:
        return x_BHLD.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Stretches of any lengths, one after the other."""

    tokens: Tensor

    def read(self, x_HTD: Tensor) -> Tensor:
        return x_HTD.index_select(1, self.tokens)

    def write(self, x_HTD: Tensor, values: Tensor) -> None:
        x_HTD.index_copy_(1, self.tokens, values)

    def add(self, x_HTD: Tensor, values: Tensor) -> None:
        x_HTD.index_add_(1, self.tokens, values)


@dataclass(frozen=True, slots=True, eq=False)
class Ragged(Rows):
    """Rows padded to [B, L] by repeating the first token: their results are dropped, their gradients are zero."""

    padded: Tensor  # [B x L] tokens of the row
    shape: tuple[int, int]
    places: Tensor  # [n] where the real tokens stand in B x L

    def take(self, x_HTD: Tensor) -> Tensor:
        return x_HTD.index_select(1, self.padded).unflatten(1, self.shape).transpose(0, 1)

    def flat(self, x_BHLD: Tensor) -> Tensor:
        return x_BHLD.transpose(0, 1).flatten(1, 2).index_select(1, self.places)

    def silence(self, lse_BHL: Tensor) -> Tensor:
        """Infinity where there is padding: its weights are exp(score - infinity) = 0, however loud the scores."""
        padding = torch.ones(self.shape, dtype=torch.bool, device=lse_BHL.device)
        padding.view(-1)[self.places] = False
        return lse_BHL.masked_fill(padding[:, None], float("inf"))


def where_of(stretches_S2: np.ndarray, device: torch.device) -> Even | Ragged:
    """Without a copy where the stretches are adjacent and of one length."""
    starts, lengths = stretches_S2[:, 0], stretches_S2[:, 1] - stretches_S2[:, 0]
    longest = int(lengths.max())
    if (lengths == longest).all() and (np.diff(starts) == longest).all():
        return Even(int(starts[0]), len(starts), longest)
    offsets = np.arange(longest)
    real = offsets < lengths[:, None]
    padded = np.where(real, starts[:, None] + offsets, starts[:, None]).reshape(-1)
    places = np.flatnonzero(real)
    tokens, padded, places = (torch.from_numpy(x).to(device) for x in (padded[places], padded, places))
    return Ragged(tokens, padded, (len(starts), longest), places)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Dense attention of stretches on stretches, one to one."""

    queries: Even | Ragged
    keys: Even | Ragged
    causal: bool


def bundles_of(sweep: Sweep) -> list[np.ndarray]:
    """Indices of stretches that share a call. Keys are never padded unless causality hides the padding."""
    lengths = sweep.keys_S2[:, 1] - sweep.keys_S2[:, 0]
    bundles: list[list[int]] = []
    longest = -1
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        near = length == longest or (sweep.causal and (length >= longest // 2 or longest <= 64))
        if not (bundles and longest < LONG and near):
            bundles.append([])
            longest = length
        bundles[-1].append(int(i))
    return [np.sort(b) for b in bundles]


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """A sweep for kernels that take stretches of any lengths: where they begin and end in the operands, int32 [S + 1]."""

    queries: Even | Rows
    keys: Even | Rows
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool

    @classmethod
    def of(cls, sweep: Sweep, device: torch.device) -> Lengths:
        found = []
        for stretches_S2 in (sweep.queries_S2, sweep.keys_S2):
            lengths = stretches_S2[:, 1] - stretches_S2[:, 0]
            tokens = np.concatenate([np.arange(a, b) for a, b in stretches_S2])
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            is_one = np.array_equal(tokens, np.arange(tokens[0], tokens[0] + len(tokens)))
            where = Even(int(tokens[0]), 1, len(tokens)) if is_one else Rows(torch.from_numpy(tokens).to(device))
            found.append((where, torch.from_numpy(ends).to(device), int(lengths.max())))
        (queries, cu_q, max_q), (keys, cu_k, max_k) = found
        return cls(queries, keys, cu_q, cu_k, max_q, max_k, sweep.causal)
