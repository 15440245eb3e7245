"""Branches to a prefix tree: what several token sequences have in common is there once.

A branch is a list of runs; two branches share a run when ids and views are equal and all runs before it are shared. Nothing
here knows what a prompt is: a second look after a first answer is a run like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rft.data.clock import modalities, rope_positions
from rft.families import Family
from rft.types import Node, View

Run = tuple[np.ndarray, tuple[View, ...]]  # ids [T], and the views whose placeholders are among them


@dataclass(slots=True, eq=False)
class _Twig:
    runs: list[Run]
    below: dict[tuple, _Twig] = field(default_factory=dict)
    is_end: bool = False
    node: int = -1


def grow(
    branches: Sequence[Sequence[Run]], *, family: Family, image_pad_id: int, video_pad_id: int
) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
    """(nodes in depth-first order, path of every branch). Equal branches have one path; runs without a fork are one node.

    Raises:
        RolloutError: placeholders and views of a branch disagree.
    """
    top = _Twig([])
    ends = []
    for branch in branches:
        twig = top
        for ids_T, views in branch:
            twig = twig.below.setdefault((ids_T.tobytes(), views), _Twig([(ids_T, views)]))
        twig.is_end = True
        ends.append(twig)
    twigs: list[_Twig] = []
    parents: list[int] = []

    def visit(twig: _Twig, parent: int) -> None:
        runs, merged = list(twig.runs), [twig]
        while len(twig.below) == 1 and not twig.is_end:
            (twig,) = twig.below.values()
            runs += twig.runs
            merged.append(twig)
        for one in merged:
            one.node = len(twigs)
        twigs.append(_Twig(runs))
        parents.append(parent)
        for child in twig.below.values():
            visit(child, merged[0].node)

    for twig in top.below.values():
        visit(twig, -1)
    ids = [np.concatenate([i for i, _ in t.runs]) for t in twigs]
    views = [tuple(v for _, shown in t.runs for v in shown) for t in twigs]
    kinds = [modalities(i, image_pad_id, video_pad_id) for i in ids]

    def path_to(node: int) -> tuple[int, ...]:
        return () if node < 0 else (*path_to(parents[node]), node)

    paths = [path_to(end.node) for end in ends]
    positions: list[np.ndarray | None] = [None] * len(twigs)
    for path in paths:
        if positions[path[-1]] is not None:
            continue
        whole = rope_positions(np.concatenate([kinds[n] for n in path]), [v for n in path for v in views[n]], family)
        begin = 0
        for node in path:
            stop = begin + len(ids[node])
            if positions[node] is None:
                positions[node] = whole[:, begin:stop]
            begin = stop
    nodes = tuple(
        Node(parent=p, ids_T=i, modality_T=k, positions_3T=x, views=v)
        for p, i, k, x, v in zip(parents, ids, kinds, positions, views, strict=True)
    )
    return nodes, tuple(paths)
