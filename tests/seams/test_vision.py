"""The tower's work, kept and shared: the same numbers and the same gradients as pixels in every forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from rft.data.frames import FrameStore
from rft.errors import RolloutError
from rft.families import FAMILIES as ROWS
from rft.families import Family
from rft.hf import vision
from rft.hf.models import LoadedModel, open_policy
from rft.hf.pixels import patchify
from rft.hf.vision import VisionMemory, mergers_of, plain_model, shared_level
from rft.recipe import Lora, Trainable
from rft.types import View
from tests.stages import opened, phase_of, recipe_of, relative
from tests.videos import spaced, write_video

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
ORIGINAL = {"video": (128, 192), "image": (96, 128)}
LANGUAGE, PROJECTOR, TOWER = (Trainable(vision=v, projector=p) for v, p in ((False, False), (False, True), (True, True)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A clip of twenty different frames and a picture."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "clip.mp4", spaced(4, 20), size=ORIGINAL["video"])
    noise = np.random.default_rng(0).integers(0, 255, (*ORIGINAL["image"], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    return {"video": str(folder / "clip.mp4"), "image": str(folder / "picture.png")}


def view_of(files: dict[str, str], family: Family, frames: Sequence[int] = (0,), tokens: tuple[int, int] = (3, 5)) -> View:
    """Some frames of the clip, or the picture if there is one frame number 0 only; `tokens` high and wide."""
    kind = "image" if tuple(frames) == (0,) else "video"
    size = (tokens[0] * family.unit, tokens[1] * family.unit)
    grid = family.grid(len(frames), size)
    seconds = () if kind == "image" else tuple(f / 4 for f in frames)
    return View(
        media=0, kind=kind, source=files[kind], frames=tuple(frames), seconds=seconds,
        pair_seconds=family.pair_seconds(seconds), size=size, original=ORIGINAL[kind], grid=grid, tokens=family.tokens(grid),
    )  # fmt: skip


def opened_at(folder: Path, trainable: Trainable, **changes: Any) -> LoadedModel:
    return opened(folder, phase_of(), trainable=trainable, **changes)


def pixel_inputs(views: Sequence[View], family: Family, frames: FrameStore, fillers: Sequence[str] = ()) -> dict[str, Any]:
    inputs = {}
    for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        shown = [v for v in views if v.kind == kind]
        blocks = [patchify(torch.tensor(frames.get(v)), v, family) for v in shown]
        grids = [v.grid for v in shown]
        if kind in fillers:
            blocks.append(torch.zeros(family.merge**2, 3 * family.temporal_patch * family.patch**2))
            grids.append((1, family.merge, family.merge))
        if blocks:
            inputs |= {pixels: torch.cat(blocks), grid: torch.tensor(grids)}
    return inputs


def memory_inputs(memory: VisionMemory, model: Any, views: Sequence[View], fillers: Sequence[str] = ()) -> dict[str, Any]:
    made = {}
    for kind in ("image", "video"):
        shown = [v for v in views if v.kind == kind]
        if shown or kind in fillers:
            made[kind] = memory.outputs(model, shown, filler=kind in fillers)
    return {"mm_encoder_outputs": made}


def logits_of(policy: LoadedModel, views: Sequence[View], media: dict[str, Any], fillers: Sequence[str] = ()) -> torch.Tensor:
    """Of one row that shows the views between words, then the fillers; positions are plain counts."""
    ids: list[int] = [5, 6, 7]
    pads = {kind: policy.tokenizer.convert_tokens_to_ids(getattr(policy.family, f"{kind}_pad")) for kind in ("image", "video")}
    for view in views:
        ids += [pads[view.kind]] * view.tokens + [8, 9, 10, 11]
    ids += [pads[kind] for kind in fillers] + [12, 13, 14]
    ids_BT = torch.tensor([ids])
    types_BT = sum((ids_BT == pads[kind]).int() * (i + 1) for i, kind in enumerate(("image", "video")))
    return policy.model(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), mm_token_type_ids=types_BT, use_cache=False,
        position_ids=torch.arange(len(ids)).expand(3, 1, -1), **media,
    ).logits  # fmt: skip


def gradients_of(policy: LoadedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that every logit moves in its own way."""
    policy.model.zero_grad()
    weights = torch.sin(torch.arange(logits.numel(), dtype=torch.float32)).view(logits.shape)
    (logits.float() * weights).mean().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def flat(gradients: dict[str, torch.Tensor], part: str = "") -> torch.Tensor:
    return torch.cat([g.flatten() for n, g in sorted(gradients.items()) if part in n])


def randomised(policy: LoadedModel) -> LoadedModel:
    """Adapters start at zero, and then agree with no adapter."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_the_level_follows_what_learns_and_what_is_adapted(family: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, row, lora = tiny_folders[family], ROWS[family], Lora(rank=2, alpha=4)
    assert shared_level(opened_at(folder, LANGUAGE).model, row) == "features"
    assert shared_level(opened_at(folder, PROJECTOR).model, row) == "states"
    assert shared_level(opened_at(folder, Trainable(vision=False, projector=True, language=False)).model, row) == "states"
    assert shared_level(opened_at(folder, TOWER).model, row) is None
    assert shared_level(opened_at(folder, LANGUAGE, lora=lora).model, row) == "features"
    assert shared_level(opened_at(folder, PROJECTOR, lora=lora).model, row) == "states"
    assert shared_level(opened_at(folder, TOWER, lora=lora).model, row) is None
    for trainable, level in ((LANGUAGE, "features"), (PROJECTOR, "states"), (TOWER, None)):  # loaded, nothing learns
        saved = tmp_path / str(level)
        opened_at(folder, trainable, lora=lora).model.save_pretrained(saved)
        loaded = open_policy(str(saved), recipe_of(phase_of()), train=False).model
        assert isinstance(loaded, PeftModel) and not any(p.requires_grad for p in loaded.parameters())
        assert shared_level(loaded, row) == level
    one = opened_at(folder, LANGUAGE).model
    next(p for n, p in one.named_parameters() if n.endswith("visual.blocks.1.norm1.weight")).requires_grad_(True)
    assert shared_level(one, row) is None


@pytest.mark.parametrize("level", ["features", "states"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_alone_are_what_the_tower_makes_of_whole_views(
    family: str, level: str, tiny_folders: dict[str, Path], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video, another size, an odd number of frames, a picture, one view twice; in one call, and in calls of one pair."""
    policy = opened_at(tiny_folders[family], LANGUAGE)
    row, frames = policy.family, FrameStore(2**28)
    views = [view_of(files, row, range(6)), view_of(files, row, range(8), (2, 4)), view_of(files, row, (9, 12, 15))]
    views += [view_of(files, row), views[0]]
    for patches in (vision.PATCHES, 1):
        monkeypatch.setattr(vision, "PATCHES", patches)
        memory = VisionMemory(row, frames, level, 2**28)
        memory.encode(policy.model, views)
        made = memory.outputs(policy.model, views)
        levels = [made.pooler_output, *made.deepstack_features]
        assert len(levels) == (2 if family == "qwen3_vl" else 1)
        for i, view in enumerate(views):
            pixels, grid = patchify(torch.tensor(frames.get(view)), view, row), torch.tensor([view.grid])
            get = policy.model.get_image_features if view.kind == "image" else policy.model.get_video_features
            with torch.no_grad():
                whole = get(pixels, grid)
            for ours, theirs in zip(levels, [whole.pooler_output, *getattr(whole, "deepstack_features", [])], strict=True):
                assert ours[i].shape == (view.tokens, 64) and theirs[0].std() > 1e-3
                assert (ours[i] - theirs[0]).abs().max() < 1e-6
        assert memory.misses == 3 + 4 + 2 + 1 and memory.hits == 0
    assert not torch.equal(levels[0][0][:15], levels[0][0][15:30])  # pairs differ, so order was tested


@pytest.mark.parametrize("trainable", [LANGUAGE, PROJECTOR], ids=["features", "states"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_and_gradients_equal_those_of_pixels(
    family: str, trainable: Trainable, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], trainable)
    row, frames, level = policy.family, FrameStore(2**28), shared_level(policy.model, policy.family)
    views = [view_of(files, row, range(5)), view_of(files, row), view_of(files, row, (7, 8), (2, 2)), view_of(files, row)]
    memory = VisionMemory(row, frames, level, 2**28)
    memory.encode(policy.model, views)
    theirs = logits_of(policy, views, pixel_inputs(views, row, frames))
    expected = gradients_of(policy, theirs)
    media = memory_inputs(memory, policy.model, views)
    for _ in range(2):  # one object, two forwards: no graph is kept between them
        ours = logits_of(policy, views, media)
        found = gradients_of(policy, ours)
        assert (ours - theirs).abs().max() < 1e-5
        assert found.keys() == expected.keys()
        assert relative(flat(found), flat(expected)) < 1e-5
    parts = [n.removesuffix(".") for n in row.projector_prefixes]
    assert all(any(part in n for n in found) == (level == "states") for part in parts)
    if level == "features":
        return
    for part in parts:
        assert flat(expected, part).norm() > 1e-4
        assert relative(flat(found, part), flat(expected, part)) < 1e-5
    cut = {k: SimpleNamespace(pooler_output=[t.detach() for t in m.pooler_output],
                              deepstack_features=[[t.detach() for t in ts] for ts in m.deepstack_features])
           for k, m in media["mm_encoder_outputs"].items()}  # fmt: skip
    logits = logits_of(policy, views, {"mm_encoder_outputs": cut})
    assert torch.equal(logits, ours) and not any(parts[0] in n for n in gradients_of(policy, logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", [LANGUAGE, PROJECTOR, TOWER], ids=["features", "states", "apart"])
def test_the_reference_without_adapters_may_share_what_the_level_says(
    family: str, trainable: Trainable, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    """One memory, adapters on and off; with adapters in the tower the same sharing is wrong, and there is no level for it."""
    policy = randomised(opened_at(tiny_folders[family], trainable, lora=Lora(rank=2, alpha=4)))
    row, frames, level = policy.family, FrameStore(2**28), shared_level(policy.model, policy.family)
    views = [view_of(files, row, range(4)), view_of(files, row)]
    memory = VisionMemory(row, frames, level or "states", 2**28)
    memory.encode(policy.model, views)
    media, pixels = memory_inputs(memory, policy.model, views), pixel_inputs(views, row, frames)

    def both(media: dict[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            with policy.model.disable_adapter():
                reference = logits_of(policy, views, media).log_softmax(-1)
            return [logits_of(policy, views, media).log_softmax(-1), reference]

    (policy_N, reference_N), (policy_M, reference_M) = both(media), both(pixels)
    kl, expected = ((a.exp() * (a - b)).sum(-1) for a, b in ((policy_N, reference_N), (policy_M, reference_M)))
    assert expected.max() > 1e-3
    assert (policy_N - policy_M).abs().max() < 1e-5
    assert ((kl - expected).abs().max() < 1e-5) == (level is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pair_is_encoded_once(family: str, tiny_folders: dict[str, Path], files: dict[str, str]) -> None:
    policy = opened_at(tiny_folders[family], LANGUAGE)
    row, rows, asked = policy.family, [], []

    class Counted(FrameStore):
        def get(self, view: View) -> np.ndarray:
            asked.append(view)
            return super().get(view)

    policy.model.model.visual.patch_embed.register_forward_hook(lambda m, i, out: rows.append(len(out)))
    memory = VisionMemory(row, Counted(2**28), "features", 2**28)
    whole, window, ahead = (view_of(files, row, range(*span), (2, 3)) for span in ((0, 8), (2, 6), (4, 10)))
    memory.encode(policy.model, [whole, window])
    grey, pair = row.merge**2, 6 * row.merge**2
    assert rows == [grey, 4 * pair]
    assert (memory.misses, memory.hits) == (4, 2)
    memory.encode(policy.model, [ahead])  # frames 4 to 9: two pairs are here
    assert rows[2:] == [pair] and (memory.misses, memory.hits) == (5, 4)
    del asked[:]
    memory.encode(policy.model, [ahead, whole, window])
    assert len(rows) == 3 and not asked  # no tower, no pixels, no hashing
    made = memory.outputs(policy.model, [whole, window, ahead]).pooler_output
    assert torch.equal(made[0][6:18], made[1]) and torch.equal(made[0][12:], made[2][:12])
    shifted = view_of(files, row, range(1, 5), (2, 3))  # off the lattice: other pairs of the same frames
    memory.encode(policy.model, [shifted])
    assert rows[3:] == [2 * pair]


def test_what_was_asked_for_last_is_held_and_the_rest_goes(tiny_folders: dict[str, Path], files: dict[str, str]) -> None:
    policy = opened_at(tiny_folders["qwen3_vl"], LANGUAGE)
    row = policy.family
    memory = VisionMemory(row, FrameStore(2**28), "features", 1)
    first, second, third = (view_of(files, row, span, (2, 3)) for span in ((2, 3, 4, 5), (8, 9), (10, 11)))
    memory.encode(policy.model, [first])
    before = memory.outputs(policy.model, [first])
    kept = [t.clone() for t in before.pooler_output]
    pair = 2 * 6 * 64 * 4  # merger and one deepstack level, 6 tokens, 64 wide, float32
    grey = pair // 6
    assert memory.bytes == 2 * pair + grey
    tensors = [t for levels in memory._kept.values() for t in levels]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # no window into a larger one that would outlive it
    memory.encode(policy.model, [second, third])
    assert memory.bytes == 2 * pair + grey
    assert [len(t) for t in memory.outputs(policy.model, [third, second]).pooler_output] == [6, 6]
    assert torch.equal(before.pooler_output[0], kept[0])  # what was handed out stays whole
    with pytest.raises(RolloutError, match=r"clip.mp4: 0 of 2 pairs .* 64x96"):
        memory.outputs(policy.model, [second, first])
    memory.max_bytes = 4 * pair + grey
    memory.encode(policy.model, [second])
    memory.encode(policy.model, [first])
    memory.encode(policy.model, [view_of(files, row, (14, 15), (2, 3))])  # a fifth pair: `third`, used longest ago, goes
    assert memory.bytes == memory.max_bytes
    memory.outputs(policy.model, [first, second])
    with pytest.raises(RolloutError, match="0 of 1 pairs"):
        memory.outputs(policy.model, [third])
    with pytest.raises(RolloutError, match="nothing was encoded"):
        VisionMemory(row, FrameStore(1), "features", 1).outputs(policy.model, [], filler=True)


def test_another_revision_and_other_pixels_are_new(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    policy = opened_at(tiny_folders["qwen2_5_vl"], LANGUAGE)
    row, path = policy.family, tmp_path / "picture.png"
    pixels = np.random.default_rng(1).integers(0, 255, (84, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    view = replace(view_of({"image": str(path)}, row), original=(84, 140))
    memory = VisionMemory(row, FrameStore(2**20), "features", 2**20, revision="a")

    def made() -> torch.Tensor:
        memory.encode(policy.model, [view])
        return memory.outputs(policy.model, [view]).pooler_output[0]

    old = made()
    pixels[40, 70, 1] ^= 1  # one bit of one pixel
    Image.fromarray(pixels).save(path)
    new = made()
    assert memory.misses == 2 and not torch.equal(old, new)
    with torch.no_grad():
        plain_model(policy.model).model.visual.patch_embed.proj.weight.mul_(1.5)
    assert torch.equal(made(), new)  # nobody said that the weights are others
    memory.revision = "b"
    with pytest.raises(RolloutError):
        memory.outputs(policy.model, [view])
    assert (made() - new).abs().max() > 1e-4 and memory.misses == 3


@pytest.mark.parametrize("trainable", [LANGUAGE, PROJECTOR], ids=["features", "states"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_filler_is_one_grey_token_with_or_without_views(
    family: str, trainable: Trainable, tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    policy = opened_at(tiny_folders[family], trainable)
    row, frames = policy.family, FrameStore(2**28)
    cases = [
        ([], ("image",)),
        ([], ("image", "video")),
        ([view_of(files, row)], ("video",)),
        ([view_of(files, row)], ("image",)),
    ]
    for views, fillers in cases:
        memory = VisionMemory(row, frames, shared_level(policy.model, row), 2**28)
        memory.encode(policy.model, views)
        theirs = logits_of(policy, views, pixel_inputs(views, row, frames, fillers), fillers)
        ours = logits_of(policy, views, memory_inputs(memory, policy.model, views, fillers), fillers)
        assert (ours - theirs).abs().max() < 1e-5
        assert relative(flat(gradients_of(policy, ours)), flat(gradients_of(policy, theirs))) < 1e-5
        assert memory.misses == len(views)


@pytest.mark.parametrize("cast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["plain", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_tower_under_a_float32_merger(
    family: str, cast: Callable[[], AbstractContextManager], tiny_folders: dict[str, Path], files: dict[str, str]
) -> None:
    """Encoded under the autocast of the forward: the same bits, and the merger learns. Encoded without: close."""
    policy = opened_at(tiny_folders[family], PROJECTOR, dtype="bfloat16")
    row, frames = policy.family, FrameStore(2**28)
    assert {p.dtype for m in mergers_of(policy.model, row) for p in m.parameters()} == {torch.float32}
    views = [view_of(files, row, range(4)), view_of(files, row)]
    memory = VisionMemory(row, frames, "states", 2**28)
    with cast():
        memory.encode(policy.model, views)
        made = memory.outputs(policy.model, views)
        with torch.autocast("cpu", torch.bfloat16):
            ours = logits_of(policy, views, memory_inputs(memory, policy.model, views))
            found = gradients_of(policy, ours)
    for part in row.projector_prefixes:
        assert flat(found, part).norm() > 0
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits_of(policy, views, pixel_inputs(views, row, frames))
        assert made.pooler_output[0].dtype == torch.bfloat16
    assert torch.equal(ours, theirs) or cast is nullcontext
    assert relative(ours, theirs) < 0.02


def test_encoding_leaves_the_model_as_it_was(tiny_folders: dict[str, Path], files: dict[str, str]) -> None:
    policy = opened_at(tiny_folders["qwen3_vl"], PROJECTOR)
    model, row = policy.model, policy.family
    model.train()
    model.model.visual.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model.model.visual.blocks[1].register_forward_hook(lambda m, i, o: seen.append((m.training, torch.is_grad_enabled())))
    forwards = [m.forward for m in mergers_of(model, row)]
    VisionMemory(row, FrameStore(2**28), "states", 2**28).encode(model, [view_of(files, row)])
    assert set(seen) == {(False, False)}
    assert [m.training for m in model.modules()] == modes
    assert [m.forward for m in mergers_of(model, row)] == forwards
    assert not any("forward" in vars(m) for m in mergers_of(model, row))
