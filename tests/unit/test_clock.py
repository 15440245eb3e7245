"""Rotary positions: the library's where it has an answer, hand-computed where it has none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.data.budget import Budget
from rft.data.clock import modalities, rope_positions
from rft.data.media import view as view_of
from rft.errors import RolloutError
from rft.families import FAMILIES, Family
from rft.types import Media, View
from tests import videos

QWEN25, QWEN3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
TEXT, START, END, IMAGE, VIDEO = 10, 5, 6, 7, 8  # token ids
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TEXT_CONFIG = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 1, "vocab_size": 16}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@pytest.fixture(scope="module")
def qwen25():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
              "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0], "tokens_per_second": 2}  # fmt: skip
    text = {**TEXT_CONFIG, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)).model


@pytest.fixture(scope="module")
def qwen3():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
              "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT_CONFIG, "head_dim": 16, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)).model


def made(family: Family, seconds: list[float], tokens: tuple[int, int], kind: str = "video") -> View:
    """A view of `tokens` (height, width) per pair; an image when there are no seconds."""
    size = (tokens[0] * family.unit, tokens[1] * family.unit)
    num = len(seconds) or 1
    grid = family.grid(num, size)
    return View(
        media=0, kind="video" if seconds else "image", source="", frames=tuple(range(num)), seconds=tuple(seconds),
        pair_seconds=family.pair_seconds(seconds), size=size, original=size, grid=grid, tokens=family.tokens(grid),
    )  # fmt: skip


def prompt(views: list[View], family: Family) -> np.ndarray:
    """Ids as a chat template would write them, with some text around and between."""
    ids = [TEXT] * 3
    for v in views:
        pad = VIDEO if v.kind == "video" else IMAGE
        if v.kind == "video" and family.clock == "printed":
            each = [TEXT] * 4 + [START] + [pad] * (v.tokens // v.grid[0]) + [END]
            ids += [START, *each * v.grid[0], END]
        else:
            ids += [START, *[pad] * v.tokens, END]
        ids += [TEXT] * 2
    return np.array([*ids, TEXT, TEXT])


def library(model, ids: np.ndarray, views: list[View], intervals: list[float]) -> np.ndarray:
    grids = {kind: torch.tensor([v.grid for v in views if v.kind == kind]) for kind in ("image", "video")}
    types = torch.from_numpy((ids == IMAGE) + 2 * (ids == VIDEO))[None]
    extra = {"second_per_grid_ts": torch.tensor(intervals)} if intervals else {}
    images, clips = (grids[kind] if len(grids[kind]) else None for kind in ("image", "video"))
    positions, _ = model.get_rope_index(
        torch.from_numpy(ids)[None], types, image_grid_thw=images, video_grid_thw=clips, **extra
    )
    return positions[:, 0].numpy()


def ours(ids: np.ndarray, views: list[View], family: Family) -> np.ndarray:
    return rope_positions(modalities(ids, IMAGE, VIDEO), views, family)


def test_modalities_are_the_librarys_token_types() -> None:
    types = modalities(np.array([TEXT, START, IMAGE, IMAGE, END, VIDEO]), IMAGE, VIDEO)
    assert types.tolist() == [0, 0, 1, 1, 0, 2] and types.dtype == np.int8


def rates() -> list[Fraction]:
    named = ("0.3", "0.1", "1.998", "2.002", "3", "7", "12.5", "23.976", "29.97", "59.94")
    plain = [Fraction(a, b) for a in range(1, 61) for b in (1, 2, 3, 5, 7, 9, 11)]
    return sorted({*map(Fraction, named), Fraction(30000, 1001), Fraction(24000, 1001), *plain})


def test_uniform_frames_have_the_librarys_positions_at_every_rate(qwen25) -> None:
    num_frames = 384
    ids = prompt([made(QWEN25, [float(k) for k in range(num_frames)], (1, 1))], QWEN25)
    for rate in rates():
        views = [made(QWEN25, [float(k / rate) for k in range(num_frames)], (1, 1))]
        expected = library(qwen25, ids, views, [2 / float(rate)])
        np.testing.assert_array_equal(ours(ids, views, QWEN25), expected, err_msg=f"{rate} fps")


def test_the_librarys_truncation_is_followed_from_zero_only() -> None:
    # 3/7 fps: pair 27 stands at 27 x 2 x 7/3 = 126 s, tick 252; in float32 9.333333 x 27 is 251.99998, truncated to 251.
    seconds = [float(Fraction(7 * k, 3)) for k in range(64)]
    ids = prompt([made(QWEN25, seconds, (1, 1))], QWEN25)
    tick = ours(ids, [made(QWEN25, seconds, (1, 1))], QWEN25)[0, 4 + 27] - 4
    assert (seconds[54], tick) == (126.0, 251)
    later = ours(ids, [made(QWEN25, [s + 1 for s in seconds], (1, 1))], QWEN25)[0, 4 + 27] - 4
    assert later == 254


@pytest.mark.parametrize("num_frames", [2, 4, 5, 16])
def test_several_media_have_the_librarys_positions(qwen25, qwen3, num_frames: int) -> None:
    for family, model in ((QWEN25, qwen25), (QWEN3, qwen3)):
        views = [
            made(family, [], (3, 5)),
            made(family, [k / 2 for k in range(num_frames)], (2, 3)),
            made(family, [], (1, 1)),
            made(family, [k / 7 for k in range(2 * num_frames)], (4, 2)),
        ]
        ids = prompt(views, family)
        intervals = [1.0, 2 / 7] if family.clock == "axis" else []
        np.testing.assert_array_equal(ours(ids, views, family), library(model, ids, views, intervals))


def test_text_alone_counts(qwen25) -> None:
    ids = np.full(5, TEXT)
    assert ours(ids, [], QWEN25).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_uneven_frames_stand_at_their_own_seconds() -> None:
    # floor(2 s) of the first frame of each pair: 12.4 -> 24, 12.6 -> 25, 18.0 -> 36, 29.99 -> 59
    shown = made(QWEN25, [12.4, 12.5, 12.6, 17.0, 18.0, 18.1, 29.99, 30.0], (1, 2))
    positions = ours(prompt([shown], QWEN25), [shown], QWEN25)
    assert (positions[0, 4:12] - 4).tolist() == [24, 24, 25, 25, 36, 36, 59, 59]
    assert (positions[2, 4:12] - 4).tolist() == [0, 1] * 4
    assert positions[:, 12].tolist() == [4 + 2] * 3  # text goes on after max(1, 2), wherever time has come to


def test_the_axis_is_steady_where_the_nearest_frame_is_early(tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(rate, 1200))
    budget = Budget(min_pixels=28 * 28, max_pixels=28 * 28)
    shown = view_of(Media(kind="video", source=str(path)), 0, family=QWEN25, budget=budget)
    assert shown.pair_seconds[17] == pytest.approx(509 / rate, abs=1e-6) and shown.pair_seconds[17] < 17
    positions = ours(prompt([shown], QWEN25), [shown], QWEN25)
    assert (positions[0, 4:44] - 4).tolist() == list(range(0, 80, 2))  # what 2 fps from 0 has in the library


def test_disagreement_is_told_in_numbers() -> None:
    clip, picture = made(QWEN25, [0.0, 0.5], (2, 2)), made(QWEN25, [], (1, 2))
    ids = prompt([clip, picture], QWEN25)
    with pytest.raises(RolloutError, match=r"2 image, 4 video placeholder tokens, but 1 views take 0 image, 4 video"):
        ours(ids, [clip], QWEN25)
    with pytest.raises(RolloutError, match="part at token 4"):
        ours(ids, [picture, clip], QWEN25)
    with pytest.raises(RolloutError, match="but 3 views take 4 image, 4 video"):
        ours(ids, [clip, picture, picture], QWEN25)
    with pytest.raises(RolloutError, match="part at token 4"):
        ours(np.delete(ids, 5), [clip, picture], QWEN25)
