"""Packs to token log-probs: one forward of the public model for all packs of a micro-step.

Shapes: `B` rows (examples), `T` tokens of the longest row, `N` trained tokens of all rows, flat and in row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rft.data.frames import FrameStore
from rft.families import Family
from rft.hf.pixels import patchify
from rft.types import WORLD, Pack, View

MEDIA_INPUTS = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """What a forward needs to know besides the pack: how pixels are found, and which ids no policy may write.

    The suppressed ids get probability 0 in every forward, as at sampling, so that the trained and the sampled
    distribution are the same one.
    """

    family: Family
    frames: FrameStore
    pad_id: int
    image_pad_id: int
    video_pad_id: int
    suppressed: tuple[int, ...]
    temperature: float = 1.0

    def media_inputs(
        self, views: Sequence[View], device: torch.device, dtype: torch.dtype, fillers: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """pixel_values*, *_grid_thw for the views of all rows, in order; a view shown twice is patchified once.

        Each filler kind gets the smallest grey picture at the end, for a filler row.
        """
        patches = {v: patchify(torch.tensor(self.frames.get(v)).to(device), v, self.family) for v in set(views)}
        grey = torch.zeros(self.family.merge**2, 3 * self.family.temporal_patch * self.family.patch**2, device=device)
        inputs = {}
        for kind, pixels, grid in MEDIA_INPUTS:
            shown = [v for v in views if v.kind == kind]
            blocks, grids = [patches[v] for v in shown], [v.grid for v in shown]
            if kind in fillers:
                blocks.append(grey)
                grids.append((1, self.family.merge, self.family.merge))
            if blocks:
                inputs[pixels] = torch.cat(blocks).to(dtype)
                inputs[grid] = torch.tensor(grids, device=device)
        return inputs


def token_logprobs(
    model: torch.nn.Module,
    packs: Sequence[Pack],
    lens: Lens,
    *,
    temperature: float | None = None,
    kinds: frozenset[str] = frozenset(),
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of every trained token of `packs`, float32 [N] each; the entropy carries no gradient.

    One wrapped forward, whatever the number of packs: ranks that run different numbers of forwards hang. So do ranks that
    run different modules: a kind of media in `kinds` that no pack shows gets a filler row, with weight 0 in the result.
    """
    examples = [e for p in packs for e in p.examples]
    views = [v for e in examples for v in e.views]
    fillers = sorted(kinds - {v.kind for v in views})
    device, dtype = placement(model)
    lengths = [len(e.ids_T) for e in examples]
    width = max(lengths)
    ids_BT = np.full((len(examples) + len(fillers), width), lens.pad_id, dtype=np.int64)
    mask_BT = np.zeros(ids_BT.shape, dtype=np.int64)
    kinds_BT = np.zeros(ids_BT.shape, dtype=np.int32)
    positions_3BT = np.zeros((3, *ids_BT.shape), dtype=np.int64)
    for row, kind in enumerate(fillers, len(examples)):
        ids_BT[row, 0] = lens.image_pad_id if kind == "image" else lens.video_pad_id
        mask_BT[row, 0], kinds_BT[row, 0] = 1, 1 if kind == "image" else 2
    rows_N, columns_N = [], []
    for row, (example, kinds_T, positions_3T) in enumerate(
        zip(examples, (k for p in packs for k in p.modalities), (x for p in packs for x in p.positions), strict=True)
    ):
        stop = lengths[row]
        ids_BT[row, :stop], mask_BT[row, :stop] = example.ids_T, 1
        kinds_BT[row, :stop], positions_3BT[:, row, :stop] = kinds_T, positions_3T
        trained = np.flatnonzero(example.authors_T != WORLD)
        rows_N.append(np.full(len(trained), row))
        columns_N.append(trained)
    rows_N, columns_N = np.concatenate(rows_N), np.concatenate(columns_N)
    first = int(columns_N.min()) - 1  # the token before the first trained one predicts it
    ids = torch.from_numpy(ids_BT).to(device)
    outputs = model(
        input_ids=ids,
        attention_mask=torch.from_numpy(mask_BT).to(device),
        position_ids=torch.from_numpy(positions_3BT).to(device),
        mm_token_type_ids=torch.from_numpy(kinds_BT).to(device),
        logits_to_keep=torch.arange(first, width - 1, device=device),
        use_cache=False,
        **lens.media_inputs(views, device, dtype, fillers),
    )
    rows = torch.from_numpy(rows_N).to(device)
    columns = torch.from_numpy(columns_N).to(device)
    logits_NV = outputs.logits[rows, columns - 1 - first]
    logprobs_N, entropy_N = _select(
        logits_NV, ids[rows, columns], lens.suppressed, lens.temperature if temperature is None else temperature
    )
    if fillers:
        logprobs_N = logprobs_N + 0.0 * outputs.logits[len(examples) :].float().sum()
    return logprobs_N, entropy_N


def policy_logits(logits: Tensor, suppressed: Sequence[int], temperature: float) -> Tensor:
    """Logits of the distribution that is sampled and trained: float32, suppressed ids at -inf, over the temperature."""
    logits = logits.float() / temperature
    if suppressed:
        ids = torch.tensor(suppressed, device=logits.device)
        logits = logits.index_fill(-1, ids, float("-inf"))
    return logits


CHUNK = 1024  # rows of [N, V] held in float32 at a time, besides what autograd keeps


def _select(logits_NV: Tensor, ids_N: Tensor, suppressed: Sequence[int], temperature: float) -> tuple[Tensor, Tensor]:
    logprobs, entropies = [], []
    for logits_CV, ids_C in zip(logits_NV.split(CHUNK), ids_N.split(CHUNK), strict=True):
        full_CV = policy_logits(logits_CV, suppressed, temperature).log_softmax(-1)
        logprobs.append(full_CV.gather(-1, ids_C[:, None])[:, 0])
        with torch.no_grad():
            entropies.append(-torch.special.xlogy(full_CV.exp(), full_CV.exp()).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def placement(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where inputs go, and the dtype of pixels. ZeRO-3 leaves empty parameters, but their device and dtype are right."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
