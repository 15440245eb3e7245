"""Decoding a tree: keys and values of the contexts are there once, every row holds its own besides. The library's caches
are not used: a forward is told what to attend to by `tree=`.

On a GPU a step of a large model is thousands of short kernels, and starting them takes longer than running them: the step
is captured as a CUDA graph and replayed, one graph per (rows, length) bucket. Shapes: `B` rows, `H` key heads, `T` tokens
of all contexts, `R` of them that a forward runs over, `L` tokens a row has room for, `D` head size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft.data.pack import Sweep
from rft.hf.kernels import Plan, attend_prefix

BUCKET = 64  # the least a row has room for; it doubles
CLOSE = 0.05  # of the spread of the logits: how far a replayed step may be from a plain one
Layer = tuple[Tensor, Tensor]  # keys, values: [H, T, D] of nodes, [B, H, L, D] of rows


class Prefix:
    """Keys and values of all nodes of a wave, which lie at `spans`: those of their `known` leading tokens are taken out of
    `held`, the others are written as forwards meet them."""

    def __init__(self, held: dict[int, Layer], known: Sequence[np.ndarray], spans: np.ndarray, device: torch.device) -> None:
        self._held, self._length = held, int(spans[-1, 1])
        targets = np.concatenate([np.arange(start, start + len(k)) for k, (start, _) in zip(known, spans, strict=True)])
        self._sources, self._targets = (torch.from_numpy(x).to(device) for x in (np.concatenate(known), targets))
        self._layers: dict[int, Layer] = {}

    def layer(self, number: int, like_HRD: Tensor) -> Layer:
        """[H, T, D] each, to be written to."""
        if number not in self._layers:  # there once at any time: what was held of a layer goes as it is copied
            made = tuple(like_HRD.new_empty(like_HRD.shape[0], self._length, like_HRD.shape[2]) for _ in range(2))
            for new, old in zip(made, self._held.pop(number, ()), strict=False):
                new.index_copy_(1, self._targets, old.index_select(1, self._sources))
            self._layers[number] = made
        return self._layers[number]

    @property
    def layers(self) -> list[Layer]:
        """In the order of the model."""
        return [self._layers[number] for number in sorted(self._layers)]


class Keeper:
    """A plan that writes down the keys and values it meets: a forward of the prefill. Its queries are the row's tokens, its
    keys all tokens `begin` to `stop` of the prefix, among which the row's stand at `places_R`."""

    def __init__(self, plan: Plan, prefix: Prefix, begin: int, stop: int, places_R: np.ndarray) -> None:
        self._plan, self._prefix, self._begin, self._stop = plan, prefix, begin, stop
        self._places_R = torch.from_numpy(places_R).to(plan.device)

    def attend(self, layer: int, q_1HRD: Tensor, k_1HRD: Tensor, v_1HRD: Tensor, scale: float) -> Tensor:
        """As the plan attends."""
        parts = [x[:, self._begin : self._stop] for x in self._prefix.layer(layer, k_1HRD[0])]
        for part, new in zip(parts, (k_1HRD, v_1HRD), strict=True):
            part.index_copy_(1, self._places_R, new[0])
        return self._plan.attend(layer, q_1HRD, parts[0][None], parts[1][None], scale)


class Branches:
    """What the rows of a wave attend to: the nodes on their paths, and what they have written themselves.

    `prefix` holds (keys, values) [H, T, D] per layer over all nodes, `spans` where each node lies in T, `paths` the nodes of
    each row, rows in the tree's order. `position` counts the tokens that every row has written. With `keeps`, what no row
    sees any more stays here, to be handed on at the end.
    """

    def __init__(
        self, prefix: Sequence[Layer], spans: np.ndarray, paths: Sequence[Sequence[int]], most: int, *, keeps: bool = False
    ) -> None:
        self._prefix, self.spans, self._paths, self._most, self._keeps = list(prefix), spans, paths, most, keeps
        self._laid: list[int] = list(range(len(spans)))  # nodes, in the order in which their keys lie
        self.position = 0
        self._clock: Tensor | None = None
        self._own: list[Layer] = []
        self._gone: list[tuple[np.ndarray, list[Layer]]] = []  # rows that left, and what they had written
        self.rows = np.arange(len(paths))
        self._plan = self._planned()

    @property
    def num_rows(self) -> int:
        """Rows that are left."""
        return len(self.rows)

    @property
    def room(self) -> int:
        """Tokens that a row has room for now."""
        return self._own[0][0].shape[2] if self._own else 0

    def keep(self, rows: np.ndarray) -> None:
        """Only these rows go on, by their first number."""
        places = torch.from_numpy(np.searchsorted(self.rows, rows)).to(self._prefix[0][0].device)
        if self._keeps:
            gone = np.setdiff1d(self.rows, rows)
            index = torch.from_numpy(np.searchsorted(self.rows, gone)).to(places.device)
            written = [tuple(x[:, :, : self.position].index_select(0, index) for x in layer) for layer in self._own]
            self._gone.append((gone, written))
        self._own = [(k.index_select(0, places), v.index_select(0, places)) for k, v in self._own]
        self.rows = rows
        self._plan = self._planned()

    def hand_on(self, lengths_B: np.ndarray) -> list[Layer]:
        """Keys and values [H, T, D] per layer: of the nodes, where `spans` says, then the first `lengths_B` tokens of every
        row there was. Nothing can be decoded behind this."""
        parts = [*self._gone, (self.rows, self._own)]
        places = {row: (part, i) for part, (rows, _) in enumerate(parts) for i, row in enumerate(rows)}
        wanted = [(*places[row], int(length)) for row, length in enumerate(lengths_B) if length]
        layers = []
        while self._prefix:  # layer by layer: not everything twice
            nodes, own = self._prefix.pop(0), [written.pop(0) if written else () for _, written in parts]
            layers.append(
                tuple(torch.cat([x, *(own[part][kind][i, :, :n] for part, i, n in wanted)], 1) for kind, x in enumerate(nodes))
            )
        return layers

    def make_room(self) -> None:
        """Room for one more token of every row."""
        if self.position < self.room:
            return
        length = min(max(2 * self.room, BUCKET), self._most)
        own = []
        for layer, (keys, values) in enumerate(self._prefix):
            new = [x.new_zeros(self.num_rows, x.shape[0], length, x.shape[2]) for x in (keys, values)]
            for old, fresh in zip(self._own[layer] if self._own else (), new, strict=False):
                fresh[:, :, : old.shape[2]] = old
            own.append(tuple(new))
        self._own = own

    def _lay(self) -> None:
        """Keys and values of the nodes that are still seen, level by level: a sweep's are one run, and are not copied."""
        paths = [self._paths[r] for r in self.rows]
        wanted = list(dict.fromkeys(p[level] for level in range(max(map(len, paths))) for p in paths if level < len(p)))
        if self._keeps:
            wanted = list(dict.fromkeys([*wanted, *self._laid]))
        if wanted == self._laid:
            return
        tokens = np.concatenate([np.arange(*self.spans[node]) for node in wanted])
        index = torch.from_numpy(tokens).to(self._prefix[0][0].device)
        for layer, (keys, values) in enumerate(self._prefix):
            self._prefix[layer] = (keys.index_select(1, index), values.index_select(1, index))
        lengths = np.diff(self.spans[wanted], axis=1)[:, 0]
        stops = np.cumsum(lengths)
        self.spans = self.spans.copy()
        self.spans[wanted] = np.stack([stops - lengths, stops], axis=1)
        self._laid = wanted

    def _planned(self) -> Plan:
        self._lay()
        device, sweeps = self._prefix[0][0].device, []
        for level in range(max(len(self._paths[r]) for r in self.rows)):
            node_B = np.array([self._paths[r][level] if level < len(self._paths[r]) else -1 for r in self.rows])
            edges = np.flatnonzero(np.diff(node_B, prepend=-2, append=-2))
            queries_S2, nodes = np.stack([edges[:-1], edges[1:]], axis=1), node_B[edges[:-1]]
            sweeps.append(Sweep(queries_S2=queries_S2[nodes >= 0], keys_S2=self.spans[nodes[nodes >= 0]], causal=False))
        return Plan(tuple(sweeps), device)

    @contextmanager
    def by_clock(self, clock: Tensor) -> Iterator[None]:
        """Inside, steps read their position from the device, int64 [1], and have the same shapes whatever it is."""
        self._clock = clock
        try:
            yield
        finally:
            self._clock = None

    def attend(self, layer: int, q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, scale: float) -> Tensor:
        """[B, H, 1, D]; what is new is written down first."""
        keys, values = self._own[layer]
        if self._clock is None:
            keys[:, :, self.position] = k_BH1D[:, :, 0]
            values[:, :, self.position] = v_BH1D[:, :, 0]
            keys, values, hidden_L = keys[:, :, : self.position + 1], values[:, :, : self.position + 1], None
        else:
            keys.index_copy_(2, self._clock, k_BH1D)
            values.index_copy_(2, self._clock, v_BH1D)
            hidden_L = torch.arange(keys.shape[2], device=keys.device) > self._clock
        return attend_prefix(q_BH1D, keys, values, self._prefix[layer], self._plan, scale, hidden_L)


Step = Callable[[Tensor, Tensor], Tensor]  # ids [B], positions [B] -> logits [B, V]


class Graphed:
    """A step that is replayed on a GPU. The first replay is held against a plain step; where they differ, or where
    nothing can be captured, decoding goes on without graphs and says so once."""

    is_trusted = True  # for the whole process: what failed once is not tried again

    def __init__(self, step: Step, branches: Branches) -> None:
        self._step, self._branches = step, branches
        self._shape: tuple[int, int] | None = None
        self._graph: Any = None
        self._given: tuple[Tensor, Tensor, Tensor] | None = None  # ids, positions, clock: what a replay reads
        self._logits_BV: Tensor | None = None

    def __call__(self, token_B: Tensor, next_B: Tensor) -> Tensor:
        """Logits [B, V] behind one more token of every row."""
        branches = self._branches
        branches.make_room()
        if token_B.device.type != "cuda" or not Graphed.is_trusted:
            logits_BV = self._step(token_B, next_B)
        else:
            logits_BV = self._replayed(token_B, next_B)
        branches.position += 1
        return logits_BV

    def _replayed(self, token_B: Tensor, next_B: Tensor) -> Tensor:
        shape = (self._branches.num_rows, self._branches.room)
        if shape != self._shape:
            plain_BV = self._step(token_B, next_B)
            try:
                self._capture(token_B, next_B)
                self._graph.replay()
                error = float((self._logits_BV - plain_BV).abs().max() / plain_BV.float().std().clamp(min=1e-6))
            except RuntimeError as failure:
                error, why = float("inf"), str(failure).splitlines()[0]
            else:
                why = f"a replayed step differs by {error:.2g} of the spread of the logits"
            if not error < CLOSE:
                Graphed.is_trusted = False
                print(f"decoding without CUDA graphs: {why}", flush=True)
            else:
                self._shape = shape
            return plain_BV
        for held, new in zip(self._given, (token_B, next_B, self._branches.position), strict=True):
            held.copy_(new) if isinstance(new, Tensor) else held.fill_(new)
        self._graph.replay()
        return self._logits_BV.clone()

    def _capture(self, token_B: Tensor, next_B: Tensor) -> None:
        clock = torch.full((1,), self._branches.position, dtype=torch.int64, device=token_B.device)
        self._given = (token_B.clone(), next_B.clone(), clock)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with self._branches.by_clock(clock):
            with torch.cuda.stream(side):  # libraries set themselves up in a first call, which a graph must not hold
                self._step(token_B, next_B)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._logits_BV = self._step(*self._given[:2])
