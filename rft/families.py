"""What differs between families of vision-language models, as a table.

A row says how a family writes media into the prompt, how it tells time, and what its parts are called. Adding a family is
adding a row; code elsewhere asks the row and never the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rft.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. Pixel sizes are in pixels, `*_prefixes` are parameter-name prefixes on the live model."""

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json
    patch: int
    merge: int = 2
    temporal_patch: int = 2
    clock: Literal["axis", "printed"]  # how a pair's second reaches the model
    tokens_per_second: float = 0.0  # clock == "axis": positions per second on the temporal axis
    boxes: Literal["pixels", "thousandths"] = "pixels"  # of the resized picture, or of its sides: how the model writes boxes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    vision_prefixes: tuple[str, ...] = ("model.visual.",)
    projector_prefixes: tuple[str, ...]  # inside the vision prefixes, taken out of them
    language_prefixes: tuple[str, ...] = ("model.language_model.", "lm_head.")
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"
    other_specials: tuple[str, ...] = ("<|vision_pad|>",)

    @property
    def unit(self) -> int:
        """Pixels per side of one placeholder token."""
        return self.patch * self.merge

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Token strings that stand for media: no policy may write them."""
        return (self.vision_start, self.vision_end, self.image_pad, self.video_pad, *self.other_specials)

    def grid(self, num_frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """(temporal, height, width) in patches of `num_frames` frames of (height, width) pixels."""
        pairs = -(-num_frames // self.temporal_patch)
        return (pairs, size[0] // self.patch, size[1] // self.patch)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Placeholder tokens of a grid, without the text around them."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def box_extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """(x, y) of the lower right corner of a picture shown at (height, width), in the coordinates of the model's boxes."""
        return (1000, 1000) if self.boxes == "thousandths" else (size[1], size[0])

    def pair_seconds(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """The second stated for each temporal patch, by the convention the family was pre-trained with.

        On the temporal axis a pair stands at its first frame (so that uniform frames give the library's rope index); in
        print it stands at the mean of its first and last frame. A short last pair repeats its last frame.
        """
        pairs = []
        for i in range(0, len(seconds), self.temporal_patch):
            pair = seconds[i : i + self.temporal_patch]
            pairs.append(pair[0] if self.clock == "axis" else (pair[0] + pair[-1]) / 2)
        return tuple(pairs)

    def placeholder_text(self, kind: str, grid: tuple[int, int, int], pair_seconds: Sequence[float]) -> str:
        """What replaces one media pad of the chat template, the pad's own start and end marks not included.

        `clock == "printed"` (Qwen3-VL, transformers >= 5.10): every pair is preceded by its second and framed by marks of
        its own, inside the marks that the template wrote around the video.
        """
        if kind == "image":
            return self.image_pad * self.tokens(grid)
        if self.clock == "axis":
            return self.video_pad * self.tokens(grid)
        per_pair = self.video_pad * self.tokens((1, grid[1], grid[2]))
        return "".join(f"<{s:.1f} seconds>{self.vision_start}{per_pair}{self.vision_end}" for s in pair_seconds)


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        name="qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        patch=14,
        clock="axis",
        tokens_per_second=2.0,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        projector_prefixes=("model.visual.merger.",),
    ),
    "qwen3_vl": Family(
        name="qwen3_vl",
        model_types=("qwen3_vl",),
        patch=16,
        clock="printed",
        boxes="thousandths",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        projector_prefixes=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    ),
}


def family_of(model_type: str) -> Family:
    """The row for a `model_type` of config.json, or a RecipeError that lists what is supported."""
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    raise RecipeError("model", f"no family is known for model_type {model_type!r}", f"supported: {', '.join(sorted(FAMILIES))}")
