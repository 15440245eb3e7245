"""What a forward is given in the place of pixels: features of encoded pictures, whole, pooled or gathered.

Both objects here are lazy: nothing is computed before a forward reads an attribute, so that what learns (the mergers, or the
whole tower) runs inside that forward and whatever wraps it. Pooling and gathering (VGR, arXiv:2506.11991) come after the
mergers, of each deepstack level alike, with gradient.

Shapes: `S` placeholder tokens of whole pictures, `D` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rft.data.cells import cells, whole
from rft.errors import RolloutError
from rft.families import Family
from rft.types import View

Levels = Sequence[Sequence[Tensor]]  # the merger's, then each deepstack merger's: [S, D] of every whole picture
Shown = tuple[int, View | None]  # which of the whole pictures, and what of it; None is all


class EncoderOutputs:
    """What a model's forward takes as `mm_encoder_outputs[kind]`: each view of `shown`, in order, out of what `encoded` gives.

    `encoded` is asked once per forward, when it reads `pooler_output`; the deepstack levels wait until they are read, and
    nothing is kept behind that. One object serves any number of forwards, one after the other. It is no dataclass, because
    wrappers (DDP, accelerate) rebuild those field by field.
    """

    def __init__(self, shown: Sequence[Shown], encoded: Callable[[], Levels], family: Family) -> None:
        self._shown, self._encoded, self._family = tuple(shown), encoded, family
        self._deep: Levels | None = None

    @property
    def pooler_output(self) -> list[Tensor]:
        """[tokens, D] of every view, in the order asked for."""
        first, *deep = self._encoded()
        self._deep = deep or None
        return self._cut(first)

    @property
    def deepstack_features(self) -> list[list[Tensor]]:
        """The same of every deepstack level; empty where the family has none."""
        deep, self._deep = self._deep or self._encoded()[1:], None
        return [self._cut(level) for level in deep]

    def _cut(self, level: Sequence[Tensor]) -> list[Tensor]:
        parts = {one: cut(level[one[0]], one[1], self._family) for one in dict.fromkeys(self._shown)}
        return [parts[one] for one in self._shown]


def cut(tokens_SD: Tensor, view: View | None, family: Family) -> Tensor:
    """[tokens, D] that a view shows of the tokens of its whole, row by row within each pair; None shows all.

    Raises:
        RolloutError: the view counts its tokens differently.
    """
    if view is None or (view.pool == 1 and view.region is None):
        return tokens_SD
    rows, columns = cells(view, family)
    r0, c0, r1, c1 = view.region or (0, 0, rows, columns)
    part_TRCD = tokens_SD.unflatten(0, (-1, rows, columns))[:, r0:r1, c0:c1]  # temporal patches, rows, columns
    if view.pool > 1:
        pooled = avg_pool2d(part_TRCD.permute(0, 3, 1, 2), view.pool, ceil_mode=True, count_include_pad=False)
        part_TRCD = pooled.permute(0, 2, 3, 1)
    if part_TRCD[..., 0].numel() != view.tokens:
        what = f"{tuple(part_TRCD.shape[:3])} tokens are shown of {rows} x {columns} a pair, and the view counts {view.tokens}"
        raise RolloutError(f"view of media {view.media}", what, "make it with `rft.data.views.look`")
    return part_TRCD.flatten(0, 2)


def wholes_of(views: Sequence[View], family: Family) -> tuple[list[View], list[Shown]]:
    """The different whole pictures of some views, and each view as one of them or a part of it."""
    places: dict[View, int] = {}
    shown = [(places.setdefault(whole(v, family), len(places)), v) for v in views]
    return list(places), shown


def through_tower(
    model: Any, views: Sequence[View], patches: Mapping[View, Tensor], grey_PD: Tensor | None, family: Family
) -> EncoderOutputs:
    """`mm_encoder_outputs` of views of one kind, where the tower learns: the forward that reads it runs the tower, once.

    `model` is the library's own, inside any wrapper; `patches` has those of every whole picture. With `grey_PD`, the
    patches of one grey token, its features come last.
    """
    full, shown = wholes_of(views, family)
    blocks, grids = [patches[v] for v in full], [v.grid for v in full]
    if grey_PD is not None:
        blocks.append(grey_PD)
        grids.append((1, family.merge, family.merge))
        shown.append((len(full), None))

    def encoded() -> Levels:
        grid = torch.tensor(grids, device=blocks[0].device)
        made = model.model.get_image_features(torch.cat(blocks), grid, return_dict=True)  # in both families of videos as well
        return [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())]

    return EncoderOutputs(shown, encoded, family)
