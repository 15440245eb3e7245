"""Pooled maps and regions out of one encoding: the features, their gradients, their positions, and how often the tower runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rft.algo.credit import examples
from rft.data.cells import part
from rft.data.clock import modalities, rope_positions
from rft.data.frames import FrameStore
from rft.data.pack import pack
from rft.errors import RolloutError
from rft.families import FAMILIES as ROWS
from rft.families import Family
from rft.hf.logprobs import Lens, token_logprobs
from rft.hf.models import LoadedModel
from rft.hf.pixels import patchify
from rft.hf.replay import cut
from rft.hf.vision import VisionMemory, plain_model, shared_level
from rft.recipe import Lora
from rft.rollout.policy import Context, Limits
from rft.types import Pack, Rollout, Segment, View
from tests.equivalence.test_packed import answer, assert_packed_is_expanded, assert_same_words
from tests.seams.test_vision import (
    FAMILIES,
    LANGUAGE,
    PROJECTOR,
    TOWER,
    files,
    flat,
    gradients_of,
    logits_of,
    opened_at,
    pixel_inputs,
    randomised,
    view_of,
)
from tests.stages import flat_gradient, relative

__all__ = ["files"]  # a fixture
LEVELS = pytest.mark.parametrize("trainable", [LANGUAGE, PROJECTOR, TOWER], ids=["features", "states", "tower"])
BOTH = pytest.mark.parametrize("family", FAMILIES)
SIDES = (5, 7)  # cells, which neither 2 nor 3 divides


def views_of(files: dict[str, str], family: Family) -> dict[str, View]:
    """Of a picture and of three pairs of a clip: the whole, its map, regions of it."""
    found = {}
    for kind, frames in (("image", (0,)), ("video", range(6))):
        full = view_of(files, family, frames, SIDES)
        found |= {
            kind: full,
            f"{kind} map": part(full, family, pool=2),
            f"{kind} region": part(full, family, region=(1, 2, 5, 6)),
            f"{kind} other": part(full, family, region=(0, 0, 3, 1)),
            f"{kind} pooled region": part(full, family, region=(1, 2, 5, 7), pool=3),
        }
    return found


def lens_of(policy: LoadedModel, views: Sequence[View]) -> Lens:
    """The lens of training: with what the tower made of the views, where it does not learn."""
    frames = FrameStore(2**28)
    level = shared_level(policy.model, policy.family)
    memory = VisionMemory(policy.family, frames, level, 2**28) if level else None
    if memory:
        memory.encode(policy.model, views)
    return policy.lens(frames, memory=memory)


def by_hand(tokens_SD: Tensor, view: View, family: Family) -> Tensor:
    """What a view shows, token by token, of all that was encoded."""
    rows, columns = SIDES
    r0, c0, r1, c1 = view.region or (0, 0, rows, columns)
    shown = []
    for pair in range(len(tokens_SD) // (rows * columns)):
        for top in range(r0, r1, view.pool):
            for left in range(c0, c1, view.pool):
                inside = [
                    tokens_SD[pair * rows * columns + r * columns + c]
                    for r in range(top, min(top + view.pool, r1))
                    for c in range(left, min(left + view.pool, c1))
                ]
                shown.append(sum(inside) / len(inside))
    return torch.stack(shown)


@contextmanager
def counting(policy: LoadedModel) -> Iterator[list[int]]:
    """Patches of each call of the tower."""
    calls: list[int] = []
    embed = plain_model(policy.model).model.visual.patch_embed
    hook = embed.register_forward_hook(lambda module, given, made: calls.append(len(made)))
    try:
        yield calls
    finally:
        hook.remove()


@LEVELS
@BOTH
def test_maps_and_regions_are_made_of_the_features_of_the_whole(
    family: str, trainable: Any, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], trainable)
    row, named = policy.family, views_of(files, policy.family)
    views = [named[k] for k in ("image map", "video map", "image region", "video region", "video pooled region")]
    views += [named["image region"], named["image"], named["video other"]]
    with counting(policy) as calls:
        lens = lens_of(policy, views)
        inputs = lens.media_inputs(policy.model, views, ("video",))["mm_encoder_outputs"]
        assert lens.memory is None or (lens.memory.misses, lens.memory.hits) == (1 + 3, 0)  # each pair of each whole once
        before = len(calls)
        assert before == (0 if trainable is TOWER else 2)  # nothing of what learns ran outside of a forward
        with torch.no_grad():
            found = {kind: [made.pooler_output, *made.deepstack_features] for kind, made in inputs.items()}
        if family == "qwen3_vl":
            assert len(calls) - before == (2 if trainable is TOWER else 0)  # a call for each kind
    for kind, levels in found.items():
        with torch.no_grad():
            full = named[kind]
            made = plain_model(policy.model).model.get_video_features(
                patchify(torch.tensor(lens.frames.get(full)), full, row), torch.tensor([full.grid])
            )
        expected = [made.pooler_output, *getattr(made, "deepstack_features", ())]
        own = [v for v in views if v.kind == kind]
        assert len(levels) == (2 if family == "qwen3_vl" else 1)
        for level, (tokens_SD,) in zip(levels, expected, strict=False):
            assert len(level) == len(own) + (kind == "video") and (kind == "image" or level[-1].shape == (1, 64))
            for view, shown in zip(own, level, strict=False):
                assert shown.shape == (view.tokens, 64)
                assert (shown - by_hand(tokens_SD, view, row)).abs().max() < 1e-6
            assert tokens_SD.std() > 1e-3


def test_gradients_of_parts_are_those_by_hand(files: dict[str, str]) -> None:
    row = ROWS["qwen3_vl"]
    for name, view in views_of(files, row).items():
        given = torch.randn(view.grid[0] * SIDES[0] * SIDES[1], 8, generator=torch.Generator().manual_seed(0))
        found = []
        for shown in (cut, by_hand):
            leaf = given.clone().requires_grad_()
            (shown(leaf, view, row) * torch.arange(view.tokens * 8).view(-1, 8).cos()).sum().backward()
            found.append(leaf.grad)
        assert (found[0] - found[1]).abs().max() < 1e-6, name
        assert bool((found[0] == 0).all(-1).any()) == (view.region is not None)  # cells that are not shown


@pytest.mark.parametrize("trainable", [LANGUAGE, TOWER], ids=["features", "tower"])
@BOTH
def test_what_is_replayed_changes_what_follows_and_nothing_before(
    family: str, trainable: Any, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], trainable)
    named = views_of(files, policy.family)
    views = [named["image map"], named["image region"]]
    media = lens_of(policy, views).media_inputs(policy.model, views)
    made = media["mm_encoder_outputs"]["image"]
    with torch.no_grad():
        zeroed = SimpleNamespace(
            pooler_output=[made.pooler_output[0], made.pooler_output[1] * 0],
            deepstack_features=[[level[0], level[1] * 0] for level in made.deepstack_features],
        )
        logits = logits_of(policy, views, media)[0]
        without = logits_of(policy, views, {"mm_encoder_outputs": {"image": zeroed}})[0]
    begin = 3 + views[0].tokens + 4
    assert torch.equal(logits[:begin], without[:begin])
    assert ((logits[begin:] - without[begin:]).abs().amax(-1) > 1e-5).all()


@BOTH
def test_the_tower_learns_through_replayed_tokens_alone(
    family: str, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], TOWER)
    named = views_of(files, policy.family)
    views = [named["image map"], named["image region"]]
    made = lens_of(policy, views).media_inputs(policy.model, views)["mm_encoder_outputs"]["image"]

    def gradients(*cut: int) -> dict[str, Tensor]:
        def kept(level: list[Tensor]) -> list[Tensor]:
            return [t.detach() if i in cut else t for i, t in enumerate(level)]

        first, deep = made.pooler_output, made.deepstack_features
        one = SimpleNamespace(pooler_output=kept(first), deepstack_features=[kept(level) for level in deep])
        return gradients_of(policy, logits_of(policy, views, {"mm_encoder_outputs": {"image": one}}))

    region, both, nothing = gradients(0), gradients(), gradients(0, 1)
    assert not any("visual" in n for n in nothing)
    tower = [n for n, p in policy.model.named_parameters() if "visual" in n and p.requires_grad]
    assert set(tower) <= set(region) and flat(region, "visual").norm() > 1e-3
    assert flat(region, "patch_embed").norm() > 1e-5 and relative(flat(region, "visual"), flat(both, "visual")) > 1e-2


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)], ids=["whole", "adapters"])
@BOTH
def test_the_tower_inside_the_forward_is_the_route_of_pixels(
    family: str, lora: Lora | None, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    """All cells of a picture are its region, which pixels can show as well; a clip beside it, and pictures twice."""
    policy = opened_at(tiny_folders[family], TOWER, lora=lora)
    policy = randomised(policy) if lora else policy
    named, frames = views_of(files, policy.family), FrameStore(2**28)
    plain = [named["image"], named["video"], named["image"]]
    views = [part(plain[0], policy.family, region=(0, 0, *SIDES)), plain[1], plain[0]]
    lens = policy.lens(frames)
    for fillers in ((), ("image", "video")):
        inputs = lens.media_inputs(policy.model, views, fillers)
        pixels = pixel_inputs(plain, policy.family, frames, fillers)
        assert set(inputs) == {"mm_encoder_outputs"}
        with policy.model.disable_adapter() if lora else nullcontext(), torch.no_grad():
            bare = [logits_of(policy, plain, m, fillers) for m in (inputs, pixels)]
        assert relative(*bare) < 1e-6
        theirs = logits_of(policy, plain, pixels, fillers)
        expected = gradients_of(policy, theirs)
        for _ in range(2):  # one object, two forwards: no graph is kept between them
            ours = logits_of(policy, plain, inputs, fillers)
            found = gradients_of(policy, ours)
            assert relative(ours.detach(), theirs.detach()) < 1e-6 and found.keys() == expected.keys()
            assert relative(flat(found), flat(expected)) < 1e-6
            assert relative(flat(found, "visual"), flat(expected, "visual")) < 1e-6
        assert not lora or (bare[0] - ours).abs().max() > 1e-3


def said(policy: LoadedModel, *parts: str | View) -> Segment:
    """The world's words, and views among them."""
    row, views = policy.family, tuple(p for p in parts if isinstance(p, View))
    texts = [
        p if isinstance(p, str)
        else f"{row.vision_start}{row.placeholder_text(p.kind, p.grid, p.pair_seconds)}{row.vision_end}"
        for p in parts
    ]  # fmt: skip
    ids = policy.tokenizer.encode("".join(texts), add_special_tokens=False)
    return Segment(author="world", text="".join(texts), ids=tuple(ids), views=views)


def replays(policy: LoadedModel, named: dict[str, View], kind: str, swapped: bool = False) -> list[Rollout]:
    """A prompt with a map, a reply, a region, a reply; the second with another region."""
    draw = np.random.default_rng(4)
    prompt, first = said(policy, "What is this? ", named[f"{kind} map"], " Think."), answer(draw, 5)
    regions = [named[f"{kind} region"], named[f"{kind} pooled region"]]
    replies = [answer(draw, 7), answer(draw, 3)]
    return [
        Rollout(sample_id="s", segments=(prompt, first, said(policy, region), reply))
        for region, reply in zip(regions[::-1] if swapped else regions, replies, strict=True)
    ]


def packed(lens: Lens, rollouts: Sequence[Rollout]) -> Pack:
    credited = [one for r, a in zip(rollouts, (1.0, -1.0), strict=True) for one in examples(r, [a, a])]
    return pack(credited, family=lens.family, image_pad_id=lens.image_pad_id, video_pad_id=lens.video_pad_id)


@pytest.mark.parametrize("kind", ["image", "video"])
@LEVELS
@BOTH
def test_replays_packed_are_replays_expanded(
    family: str, trainable: Any, kind: str, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    """Against rows of their own, from pixels; with one call of the tower for a map and the regions of a group."""
    policy = opened_at(tiny_folders[family], trainable)
    named = views_of(files, policy.family)
    rollouts = replays(policy, named, kind)
    lens = lens_of(policy, [v for r in rollouts for v in r.views])
    one = packed(lens, rollouts)
    assert [n.parent for n in one.nodes] == [-1, 0, 0]
    assert [len(n.views) for n in one.nodes] == [1, 1, 1]
    ours = assert_packed_is_expanded(policy.model, [one], lens)
    assert ours.gradients.keys() == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad(), counting(policy) as calls:
        swapped, _ = token_logprobs(policy.model, [packed(lens, replays(policy, named, kind, swapped=True))], lens)
    assert calls == ([140 * named[kind].grid[0]] if trainable is TOWER else [])  # 5 x 7 cells of 2 x 2 patches
    assert lens.memory is None or lens.memory.misses == named[kind].grid[0]
    regions = np.r_[5:12, 17:20]  # the last replies
    assert (swapped - ours.logprobs_N)[regions].abs().max() > 1e-3  # which region is which was tested


@pytest.mark.parametrize("trainable", [LANGUAGE, TOWER], ids=["features", "tower"])
@BOTH
def test_replies_after_a_region_are_the_same_packed_and_expanded(
    family: str, trainable: Any, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], trainable)
    rollouts = replays(policy, views_of(files, policy.family), "image")
    lens = lens_of(policy, [v for r in rollouts for v in r.views])
    contexts = [Context(segments=r.segments[:3], key=i) for i, r in enumerate(rollouts)]
    assert_same_words(policy, lens, contexts, Limits(max_tokens=6))


@BOTH
def test_positions_are_the_librarys_on_the_same_grids(
    family: str, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], LANGUAGE)
    lens, named = policy.lens(FrameStore(2**20)), views_of(files, policy.family)
    for kind in ("image", "video"):
        regions = [named[f"{kind} {name}"] for name in ("region", "pooled region", "other")]
        parts = [p for region in regions for p in (region, " and then")]
        segment = said(policy, "Look: ", named[f"{kind} map"], " So", *parts)
        ids_T = np.array(segment.ids)
        kinds_T = modalities(ids_T, lens.image_pad_id, lens.video_pad_id)
        grids = torch.tensor([v.grid for v in segment.views])
        given: dict[str, Any] = {f"{kind}_grid_thw": grids}
        if kind == "video" and family == "qwen2_5_vl":
            given["second_per_grid_ts"] = torch.full((len(grids),), 0.5)
        theirs, _ = policy.model.model.get_rope_index(torch.from_numpy(ids_T)[None], torch.from_numpy(kinds_T)[None], **given)
        np.testing.assert_array_equal(rope_positions(kinds_T, segment.views, policy.family), theirs[:, 0].numpy())


def test_a_view_that_miscounts_its_tokens_is_an_error(tiny_folders: dict[str, Path], files: dict[str, str]) -> None:
    policy = opened_at(tiny_folders["qwen3_vl"], LANGUAGE)
    full = view_of(files, policy.family, (0,), SIDES)
    for wrong in (replace(full, pool=2), replace(full, region=(3, 3, 9, 9)), replace(full, region=(0, 0, 2, 2), tokens=3)):
        lens = lens_of(policy, [wrong])
        with pytest.raises(RolloutError, match="media 0"):
            lens.media_inputs(policy.model, [wrong])["mm_encoder_outputs"]["image"].pooler_output  # noqa: B018


def test_ranks_that_replay_and_ranks_that_do_not_make_one_gradient(
    tiny_folders: dict[str, Path], files: dict[str, str], tmp_path: Path
) -> None:
    """DDP: one rank's forward runs the tower for a map and regions, the other's for the grey pixels of a filler."""
    given = (tiny_folders["qwen3_vl"], files, tmp_path)
    other = torch.multiprocessing.spawn(_rank, args=given, nprocs=1, join=False)
    _rank(1, *given)
    other.join()
    for rank in range(2):
        alone, together, inside = torch.load(tmp_path / f"{rank}.pt")
        assert inside == [True] and together.norm() > 1e-3
        assert alone.shape == together.shape and relative(together, alone) < 1e-6


def _rank(rank: int, folder: Path, files: dict[str, str], out: Path) -> None:
    policy = opened_at(folder, TOWER)
    rollouts, lens = replays(policy, views_of(files, policy.family), "image"), policy.lens(FrameStore(2**28))
    words = Rollout(sample_id="t", segments=(said(policy, "only words"), answer(np.random.default_rng(7), 6)))
    packs, kinds = [packed(lens, rollouts), packed(lens, [words, words])], frozenset({"image"})
    for one in packs:
        (token_logprobs(policy.model, [one], lens, kinds=kinds)[0].sum() / 2).backward()
    alone = flat_gradient(policy.model).clone()
    policy.model.zero_grad()
    patience = timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2, timeout=patience)
    model, state, inside = DistributedDataParallel(policy.model), [], []
    model.register_forward_pre_hook(lambda *_: state.append("forward"))
    model.register_forward_hook(lambda *_: state.clear())
    policy.model.model.visual.register_forward_hook(lambda *_: inside.append(state == ["forward"]))
    token_logprobs(model, packs[rank : rank + 1], lens, kinds=kinds)[0].sum().backward()
    torch.save((alone, flat_gradient(policy.model), inside), out / f"{rank}.pt")
    dist.destroy_process_group()
