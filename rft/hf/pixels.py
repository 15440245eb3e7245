"""Frames to what a vision tower takes. Shapes: `F` frames, `H`, `W` pixels, `P` patches."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.families import Family
from rft.types import View


def patchify(frames_FHWC: Tensor, view: View, family: Family) -> Tensor:
    """uint8 frames [F, H, W, 3] to normalised patches [P, 3 * temporal_patch * patch * patch], float32: of all the frames,
    whatever the view shows of what is made of them.

    Same layout as the library's Qwen2-VL processors: patches of one merged token are neighbours. The last frame of an
    odd number, or an image, is repeated to fill its temporal patch.
    """
    pixels = frames_FHWC.permute(0, 3, 1, 2).float()
    mean = torch.tensor(family.mean, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(family.std, device=pixels.device).view(1, 3, 1, 1) * 255
    pixels = (pixels - mean) / std
    if missing := -len(pixels) % family.temporal_patch:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    t, h, w = family.grid(len(pixels), view.size)
    merge, patch = family.merge, family.patch
    pixels = pixels.view(t, family.temporal_patch, 3, h // merge, merge, patch, w // merge, merge, patch)
    return pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
