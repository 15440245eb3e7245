"""Packs to token log-probs: one forward of the public model for all packs of a micro-step.

Two layouts, one result. *Packed*: the prefix trees of all packs end to end in one row, what branches share once. *Expanded*:
every example a padded row of its own, as every other trainer does it; the oracle, and the way out where trees cannot go.
Shapes: `B` rows, `T` tokens of a row, `N` trained tokens of all examples, flat and in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rft.data.cells import whole
from rft.data.frames import FrameStore
from rft.data.pack import forest, lay_out, trained
from rft.families import Family
from rft.hf.head import plain, scoring
from rft.hf.kernels import Plan
from rft.hf.pixels import patchify
from rft.hf.replay import through_tower
from rft.hf.vision import VisionMemory, plain_model
from rft.types import WORLD, Node, Pack, View

MEDIA_INPUTS = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """What a forward needs to know besides the pack: how pixels are found, and which ids no policy may write.

    The suppressed ids get probability 0 in every forward, as at sampling, so that the trained and the sampled
    distribution are the same one. With a `memory` the vision tower is not asked: what it made of the views is there.
    """

    family: Family
    frames: FrameStore
    pad_id: int
    image_pad_id: int
    video_pad_id: int
    suppressed: tuple[int, ...]
    temperature: float = 1.0
    sharing: Literal["packed", "expanded"] = "expanded"
    memory: VisionMemory | None = None

    def media_inputs(self, model: Any, views: Sequence[View], fillers: Sequence[str] = ()) -> dict[str, Any]:
        """What the public forward takes for the views of all rows, in order: pixels, or what the tower made of them.

        A picture shown twice is patchified once. Each filler kind gets the smallest grey picture at the end. Where the tower
        learns and a view shows a pooled or gathered part, the forward runs the tower itself when it asks for the features.
        """
        device, dtype = placement(model)
        kinds = {kind: [v for v in views if v.kind == kind] for kind, _, _ in MEDIA_INPUTS}
        if self.memory is not None:
            shown = {k: self.memory.outputs(plain(model), v, k in fillers) for k, v in kinds.items() if v or k in fillers}
            return {"mm_encoder_outputs": shown}
        full = {v: whole(v, self.family) for v in views}
        patches = {v: patchify(torch.tensor(self.frames.get(v)).to(device), v, self.family) for v in set(full.values())}
        grey = torch.zeros(self.family.merge**2, 3 * self.family.temporal_patch * self.family.patch**2, device=device)
        if any(v != shown for v, shown in full.items()):  # the library's forward shows whole pictures only
            patches = {v: block.to(dtype) for v, block in patches.items()}
            greys = {k: grey.to(dtype) if k in fillers else None for k in kinds}
            own, asked = plain_model(plain(model)), {k: v for k, v in kinds.items() if v or k in fillers}
            return {"mm_encoder_outputs": {k: through_tower(own, v, patches, greys[k], self.family) for k, v in asked.items()}}
        inputs = {}
        for kind, pixels, grid in MEDIA_INPUTS:
            blocks, grids = [patches[v] for v in kinds[kind]], [v.grid for v in kinds[kind]]
            if kind in fillers:
                blocks.append(grey)
                grids.append((1, self.family.merge, self.family.merge))
            if blocks:
                inputs[pixels] = torch.cat(blocks).to(dtype)
                inputs[grid] = torch.tensor(grids, device=device)
        return inputs

    def filler(self, kind: str) -> Node:
        """One token that nobody trains: a picture's or a video's placeholder, or (`text`) padding."""
        ids = {"image": self.image_pad_id, "video": self.video_pad_id, "text": self.pad_id}
        return Node(
            parent=-1,
            ids_T=np.array([ids[kind]]),
            modality_T=np.array([{"text": 0, "image": 1, "video": 2}[kind]], np.int8),
            positions_3T=np.zeros((3, 1), np.int64),
        )


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
    run different modules: a kind of media in `kinds` that no pack shows gets a filler token, and so does a forward without
    any pack. What is returned is a slice of what the forward made, empty or not: its backward reaches every module.
    """
    views = {v for p in packs for n in p.nodes for v in n.views}
    fillers = sorted(kinds - {v.kind for v in views})
    if not packs and not fillers:
        fillers = ["text"]
    lay = _packed if lens.sharing == "packed" else _expanded
    inputs, rows_N, columns_N, ids_N = lay(model, packs, lens, fillers)
    device = inputs["input_ids"].device
    where = [torch.from_numpy(x).to(device) for x in (rows_N, columns_N, ids_N)]
    with scoring(model, *where, lens.suppressed, lens.temperature if temperature is None else temperature):
        scored_N2 = model(use_cache=False, **inputs).logits[0]
    num = len(ids_N) - len(fillers)
    return scored_N2[:num, 0], scored_N2[:num, 1].detach()


Layout = tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]


def _packed(model: torch.nn.Module, packs: Sequence[Pack], lens: Lens, fillers: Sequence[str]) -> Layout:
    """One row of all trees, fillers at its end."""
    nodes = (*forest(packs), *map(lens.filler, fillers))
    row = lay_out(nodes)
    before_N, ids_N = trained(packs)
    ends = row.stops[len(nodes) - len(fillers) :] - 1
    before_N, ids_N = np.concatenate([before_N, ends]), np.concatenate([ids_N, np.zeros(len(fillers), np.int64)])
    kept = np.unique(before_N)
    inputs = row_inputs(model, row, lens, fillers) | {"logits_to_keep": torch.from_numpy(kept).to(placement(model)[0])}
    return inputs, np.zeros(len(ids_N), np.int64), np.searchsorted(kept, before_N), ids_N


def row_inputs(model: torch.nn.Module, row: Any, lens: Lens, fillers: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of a public forward over one row of trees."""
    device, _ = placement(model)
    return {
        "input_ids": torch.from_numpy(row.ids_T[None]).to(device),
        "position_ids": torch.from_numpy(row.positions_3T[:, None]).to(device),
        "mm_token_type_ids": torch.from_numpy(row.modality_T[None].astype(np.int32)).to(device),
        "tree": Plan(row.sweeps, device),
        **lens.media_inputs(model, row.views, fillers),
    }


def _expanded(model: torch.nn.Module, packs: Sequence[Pack], lens: Lens, fillers: Sequence[str]) -> Layout:
    """A row per example, padded on the right; a filler is a row of one token."""
    device, _ = placement(model)
    nodes = [lens.filler(kind) for kind in fillers]
    rows = [(e.ids_T, p.column("modality_T", i), p.column("positions_3T", i)) for p in packs for i, e in enumerate(p.examples)]
    rows += [(n.ids_T, n.modality_T, n.positions_3T) for n in nodes]
    marks = [np.flatnonzero(e.authors_T != WORLD) for p in packs for e in p.examples] + [np.ones(1, np.int64)] * len(nodes)
    width = max([len(ids_T) for ids_T, _, _ in rows] + [2])
    ids_BT = np.full((len(rows), width), lens.pad_id, dtype=np.int64)
    mask_BT = np.zeros(ids_BT.shape, dtype=np.int64)
    kinds_BT = np.zeros(ids_BT.shape, dtype=np.int32)
    positions_3BT = np.zeros((3, *ids_BT.shape), dtype=np.int64)
    for b, (ids_T, kinds_T, positions_3T) in enumerate(rows):
        stop = len(ids_T)
        ids_BT[b, :stop], mask_BT[b, :stop] = ids_T, 1
        kinds_BT[b, :stop], positions_3BT[:, b, :stop] = kinds_T, positions_3T
    rows_N = np.concatenate([np.full(len(m), b) for b, m in enumerate(marks)])
    marks_N = np.concatenate(marks)
    first = int(marks_N.min()) - 1  # the token before the first trained one predicts it
    inputs = {
        "input_ids": torch.from_numpy(ids_BT).to(device),
        "attention_mask": torch.from_numpy(mask_BT).to(device),
        "position_ids": torch.from_numpy(positions_3BT).to(device),
        "mm_token_type_ids": torch.from_numpy(kinds_BT).to(device),
        "logits_to_keep": torch.arange(first, width - 1, device=device),
        **lens.media_inputs(model, [v for p in packs for e in p.examples for v in e.views], fillers),
    }
    return inputs, rows_N, marks_N - 1 - first, ids_BT[rows_N, marks_N]


def placement(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where inputs go, and the dtype of pixels. ZeRO-3 leaves empty parameters, but their device and dtype are right."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
