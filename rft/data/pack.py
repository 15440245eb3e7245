"""Examples of a group to a pack, and packs to one row of tokens. Shapes: `T` tokens, `N` trained tokens, `S` stretches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from rft.data.tree import Run, grow
from rft.errors import RolloutError
from rft.families import Family
from rft.types import WORLD, Example, Node, Pack, View


def pack(examples: Sequence[Example], *, family: Family, image_pad_id: int, video_pad_id: int) -> Pack:
    """The prefix tree of one group's examples. Branches part where the world begins or ends, never inside an answer.

    Raises:
        RolloutError: an example's placeholders and its views disagree.
    """
    nodes, paths = grow(
        [list(_runs(e, (image_pad_id, video_pad_id), family)) for e in examples],
        family=family,
        image_pad_id=image_pad_id,
        video_pad_id=video_pad_id,
    )
    return Pack(examples=tuple(examples), nodes=nodes, paths=paths)


def _runs(example: Example, pads: Sequence[int], family: Family) -> Iterator[Run]:
    """The example, cut where the world begins or ends; every view goes with its placeholders."""
    is_world_T = example.authors_T == WORLD
    views = list(example.views)
    edges = [0, *(np.flatnonzero(np.diff(is_world_T)) + 1), len(is_world_T)]
    for begin, stop in pairwise(edges):
        ids_T = example.ids_T[begin:stop]
        marks, shown = int(np.isin(ids_T, pads).sum()), []
        while marks > 0 and views:
            shown.append(views.pop(0))
            marks -= shown[-1].tokens
        yield ids_T, tuple(shown)
    if views:
        what = f"{len(views)} views are left over when all placeholders of {example.sample_id} are counted"
        raise RolloutError("pack", what, "tokenise the text of Family.placeholder_text for exactly these views")


def split(whole: Pack, max_tokens: int) -> tuple[Pack, ...]:
    """Packs of consecutive examples, each within `max_tokens` where one example alone is; every pack has its own prefix."""
    if whole.num_tokens <= max_tokens:
        return (whole,)
    packs: list[Pack] = []
    begin = 0
    for end in range(1, len(whole.examples) + 1):
        if end == len(whole.examples) or _part(whole, begin, end + 1).num_tokens > max_tokens:
            packs.append(_part(whole, begin, end))
            begin = end
    return tuple(packs)


def _part(whole: Pack, begin: int, end: int) -> Pack:
    kept = sorted({n for path in whole.paths[begin:end] for n in path})
    place = {-1: -1, **{old: new for new, old in enumerate(kept)}}
    nodes = tuple(replace(whole.nodes[i], parent=place[whole.nodes[i].parent]) for i in kept)
    paths = tuple(tuple(place[n] for n in path) for path in whole.paths[begin:end])
    return Pack(examples=whole.examples[begin:end], nodes=nodes, paths=paths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """Stretches of tokens and what they attend to: queries[s] to keys[s], all at once. No query stands in two stretches."""

    queries_S2: np.ndarray  # int64, start and stop
    keys_S2: np.ndarray
    causal: bool  # stretches of queries and keys are the same ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """The nodes of several packs laid end to end: no padding, whatever the lengths."""

    ids_T: np.ndarray
    modality_T: np.ndarray
    positions_3T: np.ndarray
    views: tuple[View, ...]
    stops: np.ndarray  # int64, end of every node
    sweeps: tuple[Sweep, ...]


def lay_out(nodes: Sequence[Node]) -> Row:
    """One row of the trees of `nodes` (parents are indices in it, trees one after the other, each depth first)."""
    stops = np.cumsum([len(n.ids_T) for n in nodes])
    return Row(
        ids_T=np.concatenate([n.ids_T for n in nodes]),
        modality_T=np.concatenate([n.modality_T for n in nodes]),
        positions_3T=np.concatenate([n.positions_3T for n in nodes], axis=1),
        views=tuple(v for n in nodes for v in n.views),
        stops=stops,
        sweeps=sweeps([n.parent for n in nodes], stops),
    )


def sweeps(parents: Sequence[int], stops: np.ndarray) -> tuple[Sweep, ...]:
    """Attention over ancestors, in as many sweeps as the tree is deep: each node on itself, then every descendant of the
    nodes of one depth on those nodes. In depth-first order the descendants of a node are one stretch.
    """
    starts = np.concatenate([[0], stops[:-1]])
    own = np.stack([starts, stops], axis=1)
    last = np.arange(len(parents))  # the last node below each
    depth = np.zeros(len(parents), np.int64)
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            last[parents[node]] = max(last[parents[node]], last[node])
    for node, parent in enumerate(parents):
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    found = [Sweep(queries_S2=own, keys_S2=own, causal=True)]
    for level in range(int(depth.max())):
        above = np.flatnonzero((depth == level) & (last > np.arange(len(parents))))
        below = np.stack([stops[above], stops[last[above]]], axis=1)
        found.append(Sweep(queries_S2=below, keys_S2=own[above], causal=False))
    return tuple(found)


def forest(packs: Sequence[Pack]) -> tuple[Node, ...]:
    """The nodes of several packs, one after the other, with parents as indices among them."""
    nodes: list[Node] = []
    for one in packs:
        offset = len(nodes)
        nodes += [replace(n, parent=n.parent + offset if n.parent >= 0 else -1) for n in one.nodes]
    return tuple(nodes)


def trained(packs: Sequence[Pack]) -> tuple[np.ndarray, np.ndarray]:
    """(before_N, ids_N): for every trained token of every example, its id and the place in the row of `forest(packs)` of the
    token before it on its path. A path forks behind a token that all branches share: it predicts the first of each.
    """
    before, ids, begin = [], [], 0
    for one in packs:
        stops = np.cumsum([len(n.ids_T) for n in one.nodes])
        for example, path in zip(one.examples, one.paths, strict=True):
            places_T = np.concatenate([np.arange(stops[n] - len(one.nodes[n].ids_T), stops[n]) for n in path])
            marks = np.flatnonzero(example.authors_T != WORLD)
            before.append(begin + places_T[marks - 1])
            ids.append(example.ids_T[marks])
        begin += int(stops[-1])
    empty = np.zeros(0, np.int64)
    return np.concatenate([*before, empty]), np.concatenate([*ids, empty])
