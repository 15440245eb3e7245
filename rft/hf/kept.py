"""Keys and values that outlive a call: what goes on from an earlier context is run over behind it, and not again.

The tree of the new contexts is the one it always is; here is only which of its tokens are known. Held keys are found by
whole segments, and by a reply up to its last token, whose keys nobody has made: it was sampled and never read. The leading
tokens of a node that are known stay out of the prefill, as queries and not as keys.

Shapes: `T` tokens of all nodes, `R` of them that are run over, `N` nodes, `B` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rft.data.pack import Row, Sweep, lay_out
from rft.data.tree import Run
from rft.hf.decode import Branches, Layer
from rft.types import Node, View


class Kept:
    """What one call leaves for the next: keys and values, and where the segments of its contexts lie among them.

    The `layers` are given away one by one as they are read.
    """

    def __init__(self, layers: Sequence[Layer] = ()) -> None:
        self.layers = dict(enumerate(layers))
        self._runs: dict[tuple[int, bytes, tuple[View, ...]], tuple[int, int]] = {}  # (above, ids, views) -> number, start
        self._replies: dict[tuple[int, bytes], int] = {}  # (above, ids but the last) -> start

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return sum(x.nbytes for layer in self.layers.values() for x in layer)

    def add(self, runs: Sequence[Run], place_T: np.ndarray, reply: Sequence[int], start: int) -> None:
        """The keys of a context lie at `place_T`, those of its reply but the last from `start` on."""
        above, begin = -1, 0
        for ids_T, views in runs:
            above, _ = self._runs.setdefault((above, ids_T.tobytes(), views), (len(self._runs), int(place_T[begin])))
            begin += len(ids_T)
        self._replies.setdefault((above, np.asarray(reply[:-1], np.int64).tobytes()), start)

    def find(self, runs: Sequence[Run]) -> np.ndarray:
        """int64: where the keys of the leading tokens of a context lie, as many as are here."""
        above, places = -1, [np.zeros(0, np.int64)]
        for ids_T, views in runs:
            met = self._runs.get((above, ids_T.tobytes(), views))
            if met is None:
                start = self._replies.get((above, ids_T[:-1].tobytes()))
                if start is not None:
                    places.append(np.arange(start, start + len(ids_T) - 1))
                break
            above, start = met
            places.append(np.arange(start, start + len(ids_T)))
        return np.concatenate(places)

    def known(self, nodes: Sequence[Node], runs_B: Sequence[Sequence[Run]], paths: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of every node, where the keys of its leading tokens lie. The last token of a path is never known: it has logits
        to give. One that stands for pixels cannot be shown alone: then its node is run over whole."""
        found: dict[int, np.ndarray] = {}
        for runs, path in zip(runs_B, paths, strict=True):
            places = self.find(runs)
            for node in path:
                mine, places = np.split(places, [len(nodes[node].ids_T)])
                if node == path[-1] and len(mine) == len(nodes[node].ids_T):
                    mine = mine[:-1] if nodes[node].modality_T[-1] == 0 else mine[:0]
                if node not in found or len(mine) < len(found[node]):
                    found[node] = mine
        return [found[node] for node in range(len(nodes))]


def hold(
    branches: Branches, runs_B: Sequence[Sequence[Run]], paths_B: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> Kept:
    """What a wave leaves: its contexts and its replies but for their last tokens. Equal rows are held once."""
    firsts = {
        (path[-1], tuple(reply[:-1])): row for row, (path, reply) in reversed([*enumerate(zip(paths_B, replies, strict=True))])
    }
    lengths_B = np.zeros(len(replies), np.int64)
    for (_, reply), row in firsts.items():
        lengths_B[row] = len(reply)
    kept, spans = Kept(branches.hand_on(lengths_B)), branches.spans
    starts_B = np.diff(spans, axis=1).sum() + np.cumsum(lengths_B) - lengths_B
    for runs, path, reply, start in zip(runs_B, paths_B, replies, starts_B, strict=True):
        kept.add(runs, np.concatenate([np.arange(*spans[n]) for n in path]), reply, int(start))
    return kept


def remainder(nodes: Sequence[Node], known_N: Sequence[int]) -> tuple[Row, np.ndarray]:
    """(row, places [R]): what of the trees is not known, and where it stands among all their tokens.

    The row's queries are its own tokens, the keys of its sweeps those of the whole trees; `stops` is for the given nodes.
    """
    parts: list[Node] = []
    is_new: list[bool] = []
    ends: list[int] = []
    for node, known in zip(nodes, known_N, strict=True):
        above = ends[node.parent] if node.parent >= 0 else -1
        marks = int((node.modality_T[:known] != 0).sum())
        shown = int(np.searchsorted(np.cumsum([v.tokens for v in node.views]), marks, side="right"))
        for begin, stop, views in ((0, known, node.views[:shown]), (known, len(node.ids_T), node.views[shown:])):
            if begin == stop:
                continue
            parts.append(
                replace(
                    node,
                    parent=above,
                    ids_T=node.ids_T[begin:stop],
                    modality_T=node.modality_T[begin:stop],
                    positions_3T=node.positions_3T[:, begin:stop],
                    views=views,
                )
            )
            is_new.append(begin == known)
            above = len(parts) - 1
        ends.append(above)
    whole = lay_out(parts)
    new_T = np.repeat(is_new, [len(p.ids_T) for p in parts])
    before = np.concatenate([[0], np.cumsum(new_T)])  # new tokens before each token of the trees
    row = Row(
        ids_T=whole.ids_T[new_T],
        modality_T=whole.modality_T[new_T],
        positions_3T=whole.positions_3T[:, new_T],
        views=tuple(v for part, fresh in zip(parts, is_new, strict=True) if fresh for v in part.views),
        stops=before[whole.stops[ends]],
        sweeps=tuple(sweep for given in whole.sweeps if (sweep := _asked(given, before)) is not None),
    )
    return row, np.flatnonzero(new_T)


def _asked(sweep: Sweep, before: np.ndarray) -> Sweep | None:
    """The sweep for those of its queries that are new, by their places among them."""
    queries_S2 = before[sweep.queries_S2]
    some = queries_S2[:, 0] < queries_S2[:, 1]
    if not some.any():
        return None
    return Sweep(queries_S2=queries_S2[some], keys_S2=sweep.keys_S2[some], causal=sweep.causal)
