"""Examples to prefix trees, trees to rows: every expectation here is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rft.data.clock import modalities, rope_positions
from rft.data.pack import forest, lay_out, pack, split, sweeps, trained
from rft.data.tree import grow
from rft.errors import RolloutError
from rft.families import FAMILIES, Family
from rft.types import AUTHOR_CODES, Example, Pack, View

IMAGE_PAD, VIDEO_PAD = 900, 901
PADS = {"image_pad_id": IMAGE_PAD, "video_pad_id": VIDEO_PAD}
QWEN2, QWEN3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]

Part = tuple[str, list[int]]  # author, ids


def example(*parts: Part, views: Sequence[View] = (), name: str = "s") -> Example:
    ids = [i for _, some in parts for i in some]
    authors = np.array([AUTHOR_CODES[author] for author, some in parts for _ in some], np.int8)
    return Example(
        sample_id=name, ids_T=np.array(ids, np.int64), authors_T=authors, advantages_T=np.arange(len(ids), dtype=np.float32),
        sampler_T=np.full(len(ids), np.nan, np.float32), views=tuple(views),
    )  # fmt: skip


def world(*ids: int) -> Part:
    return "world", list(ids)


def policy(*ids: int) -> Part:
    return "policy", list(ids)


def packed(*examples: Example, family: Family = QWEN2) -> Pack:
    return pack(examples, family=family, **PADS)


def ids_of(whole: Pack) -> list[list[int]]:
    return [n.ids_T.tolist() for n in whole.nodes]


def parents_of(whole: Pack) -> list[int]:
    return [n.parent for n in whole.nodes]


def clip(family: Family, first: float = 0.0) -> View:
    """Two pairs of 1 x 2 tokens; frames a second apart from `first` on."""
    seconds = tuple(first + i for i in range(4))
    size = (family.unit, 2 * family.unit)
    grid = family.grid(4, size)
    return View(
        media=0, kind="video", source="clip.mp4", frames=(0, 1, 2, 3), seconds=seconds,
        pair_seconds=family.pair_seconds(seconds), size=size, original=size, grid=grid, tokens=family.tokens(grid),
    )  # fmt: skip


def picture(family: Family, source: str = "a.png") -> View:
    """An image of 3 x 1 tokens."""
    size = (3 * family.unit, family.unit)
    grid = family.grid(1, size)
    return View(
        media=1, kind="image", source=source, frames=(0,), seconds=(), pair_seconds=(), size=size, original=size, grid=grid,
        tokens=family.tokens(grid),
    )  # fmt: skip


def clip_ids(family: Family) -> list[int]:
    """Its placeholders; Qwen3-VL writes each pair's second before it (50, 51 here)."""
    return [VIDEO_PAD] * 4 if family is QWEN2 else [50, VIDEO_PAD, VIDEO_PAD, 51, VIDEO_PAD, VIDEO_PAD]


def test_a_group_is_its_prompt_and_its_different_answers() -> None:
    prompt = world(1, 2, 3)
    whole = packed(*(example(prompt, policy(*a)) for a in ((4, 5), (6,), (4, 5))))
    assert ids_of(whole) == [[1, 2, 3], [4, 5], [6]]
    assert parents_of(whole) == [-1, 0, 0]
    assert whole.paths == ((0, 1), (0, 2), (0, 1))  # the third answer is the first one
    assert (whole.num_tokens, whole.num_trained) == (6, 5)


def test_equal_branches_share_everything_and_chains_are_one_node() -> None:
    one = [world(1, 2), policy(3), world(4), policy(5)]
    whole = packed(example(*one), example(*one))
    assert ids_of(whole) == [[1, 2, 3, 4, 5]] and whole.paths == ((0,), (0,))
    assert ids_of(packed(example(*one))) == [[1, 2, 3, 4, 5]]


def test_branches_part_only_where_an_author_begins() -> None:
    """A common first token of two answers, or of two prompts, is not shared; nor is what another author wrote."""
    assert ids_of(packed(example(world(1), policy(4, 5)), example(world(1), policy(4, 6)))) == [[1], [4, 5], [4, 6]]
    two = packed(example(world(1, 2), policy(5)), example(world(1, 3), policy(5)))
    assert (ids_of(two), parents_of(two)) == ([[1, 2, 5], [1, 3, 5]], [-1, -1])
    two = packed(example(world(1, 2), policy(3)), example(world(1), policy(2, 3)))
    assert (ids_of(two), parents_of(two)) == ([[1, 2, 3], [1, 2, 3]], [-1, -1])


def test_a_branch_may_end_where_another_goes_on() -> None:
    short, long = [world(1, 2), policy(3, 4)], [world(1, 2), policy(3, 4), world(5), policy(6)]
    for order in ((short, long), (long, short)):
        whole = packed(*(example(*parts) for parts in order))
        assert (ids_of(whole), parents_of(whole)) == ([[1, 2, 3, 4], [5, 6]], [-1, 0])
        assert whole.paths == tuple((0,) if parts is short else (0, 1) for parts in order)


def test_a_deep_tree_is_laid_out_depth_first_and_swept_once_per_depth() -> None:
    """Branches come in an order of their own; the tree's is depth first.

    [1 2] - [3] - [4 5]        tokens   0 1 | 2 | 3 4 | 5 | 6 7 8 | 9
          \\     \\ [6]
           \\ [7 8 9]           [10] is another tree
    """
    branches = [[[1, 2], [3], [4, 5]], [[1, 2], [7, 8, 9]], [[10]], [[1, 2], [3], [6]]]
    nodes, paths = grow([[(np.array(ids), ()) for ids in branch] for branch in branches], family=QWEN2, **PADS)
    assert [n.ids_T.tolist() for n in nodes] == [[1, 2], [3], [4, 5], [6], [7, 8, 9], [10]]
    assert [n.parent for n in nodes] == [-1, 0, 1, 1, 0, -1]
    assert paths == ((0, 1, 2), (0, 4), (5,), (0, 1, 3))
    assert [n.positions_3T[0].tolist() for n in nodes] == [[0, 1], [2], [3, 4], [3], [2, 3, 4], [0]]
    row = lay_out(nodes)
    assert row.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert row.stops.tolist() == [2, 3, 5, 6, 9, 10]
    own, roots, second = row.sweeps
    assert own.queries_S2.tolist() == own.keys_S2.tolist() == [[0, 2], [2, 3], [3, 5], [5, 6], [6, 9], [9, 10]]
    assert own.causal and not roots.causal and not second.causal
    assert (roots.queries_S2.tolist(), roots.keys_S2.tolist()) == ([[2, 9]], [[0, 2]])
    assert (second.queries_S2.tolist(), second.keys_S2.tolist()) == ([[3, 6]], [[2, 3]])


@pytest.mark.parametrize("seed", range(20))
def test_sweeps_reach_every_ancestor_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, int(rng.integers(1, 12)))
    stops = np.cumsum(rng.integers(1, 4, len(parents)))
    node_T = np.repeat(np.arange(len(parents)), np.diff(stops, prepend=0))
    met_TT = np.zeros((len(node_T), len(node_T)), int)
    for sweep in sweeps(parents, stops):
        busy_T = np.zeros(len(node_T), int)
        for (a, b), (c, d) in zip(sweep.queries_S2, sweep.keys_S2, strict=True):
            met_TT[a:b, c:d] += np.tri(b - a, d - c, dtype=int) if sweep.causal else 1
            busy_T[a:b] += 1
        assert busy_T.max() == 1
    expected_TT = np.zeros_like(met_TT)
    for query, node in enumerate(node_T):
        line = []
        while node >= 0:
            line.append(node)
            node = parents[node]
        expected_TT[query] = np.isin(node_T, line) & (np.arange(len(node_T)) <= query)
    assert (met_TT == expected_TT).all()


def random_parents(rng: np.random.Generator, num: int) -> list[int]:
    """Depth first: each node hangs below the last one or one of its ancestors, or is a root."""
    parents = [-1]
    while len(parents) < num:
        line = [-1, len(parents) - 1]
        while parents[line[-1]] >= 0:
            line.append(parents[line[-1]])
        parents.append(int(rng.choice(line)))
    return parents


def test_positions_after_a_video_go_on_from_the_clock_and_not_from_the_count() -> None:
    """Qwen2.5-VL: text 0; the clip begins at 1, its pairs at ticks 0 and 4, two tokens wide, so that text goes on at 3.

    The answer's first token is the seventh of its row (place 6) and stands at 4: rope_delta is -2.
    """
    prompt = world(1, *clip_ids(QWEN2), 2)
    first, second = (example(prompt, policy(*ids), views=[clip(QWEN2)]) for ids in ((3, 4), (5,)))
    whole = packed(first, second)
    assert whole.nodes[0].positions_3T.tolist() == [[0, 1, 1, 5, 5, 3], [0, 1, 1, 1, 1, 3], [0, 1, 2, 1, 2, 3]]
    assert whole.nodes[1].positions_3T.tolist() == [[4, 5]] * 3
    assert whole.nodes[2].positions_3T.tolist() == [[4]] * 3


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=lambda f: f.name)
def test_positions_on_every_path_are_those_of_the_whole_row(family: Family) -> None:
    """A clip in the prompt, an image in some branches: what a branch shows moves what follows it there and nowhere else."""
    prompt, look = world(1, *clip_ids(family), 2), world(6, *[IMAGE_PAD] * 3, 7)
    shown, image, other = clip(family), picture(family), picture(family, "b.png")
    examples = [
        example(prompt, policy(3, 4), look, policy(8), views=[shown, image]),
        example(prompt, policy(5), views=[shown]),
        example(prompt, policy(3, 4), look, policy(9, 9), views=[shown, image]),
        example(prompt, policy(3, 4), look, policy(8), views=[shown, other]),
        example(prompt, policy(3, 4), world(6, 7), policy(8), views=[shown]),
    ]
    whole = packed(*examples, family=family)
    assert [n.views for n in whole.nodes] == [(shown,), (), (image,), (), (), (other,), (), ()]
    assert parents_of(whole) == [-1, 0, 1, 2, 2, 1, 1, 0]
    assert whole.paths == ((0, 1, 2, 3), (0, 7), (0, 1, 2, 4), (0, 1, 5), (0, 1, 6))
    for i, one in enumerate(examples):
        kinds_T = modalities(one.ids_T, IMAGE_PAD, VIDEO_PAD)
        assert np.concatenate([whole.nodes[n].ids_T for n in whole.paths[i]]).tolist() == one.ids_T.tolist()
        assert (whole.column("modality_T", i) == kinds_T).all()
        assert (whole.column("positions_3T", i) == rope_positions(kinds_T, one.views, family)).all()
    after_image, without = whole.nodes[5].positions_3T[0, -1], whole.nodes[6].positions_3T[0, -1]
    assert after_image - without == 3  # an image of 3 x 1 advances the clock by 3
    assert lay_out(whole.nodes).views == (shown, image, other)


def test_same_ids_with_other_pixels_are_not_shared() -> None:
    prompt = world(1, *clip_ids(QWEN2), 2)
    whole = packed(*(example(prompt, policy(3), views=[clip(QWEN2, first)]) for first in (0.0, 4.0)))
    assert parents_of(whole) == [-1, -1]
    assert [n.views[0].seconds[0] for n in whole.nodes] == [0.0, 4.0]


def test_views_and_placeholders_have_to_agree() -> None:
    prompt, shown = world(1, *clip_ids(QWEN2), 2), clip(QWEN2)
    with pytest.raises(RolloutError, match="1 views are left over when all placeholders of s are counted"):
        packed(example(prompt, policy(3), views=[shown, picture(QWEN2)]))
    with pytest.raises(RolloutError, match="positions"):
        packed(example(prompt, policy(3)))
    with pytest.raises(RolloutError, match="positions"):
        packed(example(world(1, *[VIDEO_PAD] * 3), policy(3), views=[shown]))
    with pytest.raises(RolloutError, match="positions"):
        packed(example(world(1, *[IMAGE_PAD] * 4), policy(3), views=[shown]))


def test_split_keeps_order_prefix_and_columns() -> None:
    """Prompt 3; answers 2, 1, 4, 2 (the first again), 3. At 8 tokens: 3+2+1 | 3+4 | 3+2+3; the next would not have fitted."""
    answers = [(4, 5), (6,), (7, 7, 7, 7), (4, 5), (8, 8, 8)]
    whole = packed(*(example(world(1, 2, 3), policy(*a), name=str(i)) for i, a in enumerate(answers)))
    assert whole.num_tokens == 13
    parts = split(whole, 8)
    assert [[e.sample_id for e in p.examples] for p in parts] == [["0", "1"], ["2"], ["3", "4"]]
    assert [ids_of(p) for p in parts] == [
        [[1, 2, 3], [4, 5], [6]], [[1, 2, 3], [7, 7, 7, 7]], [[1, 2, 3], [4, 5], [8, 8, 8]]
    ]  # fmt: skip
    assert [p.paths for p in parts] == [((0, 1), (0, 2)), ((0, 1),), ((0, 1), (0, 2))]
    assert all(parents_of(p)[0] == -1 and set(parents_of(p)[1:]) == {0} for p in parts)
    assert [e for p in parts for e in p.examples] == list(whole.examples)
    assert sum(p.num_trained for p in parts) == whole.num_trained == 12
    assert trained(parts)[1].tolist() == trained([whole])[1].tolist()
    places = [(p, i) for p in parts for i in range(len(p.examples))]
    for i, (part, j) in enumerate(places):
        assert (part.column("positions_3T", j) == whole.column("positions_3T", i)).all()
    assert split(whole, 13) == (whole,)
    assert [len(p.examples) for p in split(whole, 1)] == [1] * 5  # one example is never cut


def test_split_of_a_deep_tree_keeps_the_nodes_on_its_paths() -> None:
    first, second = [world(1), policy(2)], [world(1), policy(3)]
    whole = packed(
        *(example(*begin, world(4), policy(end)) for begin, end in ((first, 5), (first, 6), (second, 5), (second, 6)))
    )
    assert (ids_of(whole), parents_of(whole)) == ([[1], [2, 4], [5], [6], [3, 4], [5], [6]], [-1, 0, 1, 1, 0, 4, 4])
    left, right = split(whole, 5)
    for part, middle in ((left, [2, 4]), (right, [3, 4])):
        assert (ids_of(part), parents_of(part), part.paths) == ([[1], middle, [5], [6]], [-1, 0, 1, 1], ((0, 1, 2), (0, 1, 3)))


def test_every_trained_token_is_predicted_by_the_one_before_it_on_its_path() -> None:
    """First pack: row 1 2 3 | 4 5 | 6. The first token of each answer is predicted by the prompt's last, place 2.

    Second pack, from place 6 on: 1 2 3 4 | 5 6, where the shorter example ends in the first node. Policy 3 4 6 is trained.
    """
    one = packed(*(example(world(1, 2, 3), policy(*a)) for a in ((4, 5), (6,), (4, 5))))
    two = packed(example(world(1, 2), policy(3, 4)), example(world(1, 2), policy(3, 4), world(5), policy(6)))
    before_N, ids_N = trained([one, two])
    assert ids_N.tolist() == [4, 5, 6, 4, 5, 3, 4, 3, 4, 6]
    assert before_N.tolist() == [2, 3, 2, 2, 3, 7, 8, 7, 8, 10]
    assert [len(x) for x in trained([])] == [0, 0]


def test_a_forest_is_trees_end_to_end() -> None:
    one = packed(*(example(world(1, 2, 3), policy(*a)) for a in ((4, 5), (6,))))
    nodes = forest([one, one, replace(one, nodes=one.nodes[:1], paths=((0,), (0,)))])
    assert [n.parent for n in nodes] == [-1, 0, 0, -1, 3, 3, -1]
    row = lay_out(nodes)
    assert row.stops.tolist() == [3, 5, 6, 9, 11, 12, 15]
    assert row.sweeps[1].queries_S2.tolist() == [[3, 6], [9, 12]]
    assert row.sweeps[1].keys_S2.tolist() == [[0, 3], [6, 9]]
