"""Examples of a group to a pack: every example laid out on the family's clock, as a root-to-leaf path of its own.

This is the expanded layout, one copy of the prompt per example: the oracle that any shared layout is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

from rft.data.clock import modalities, rope_positions
from rft.families import Family
from rft.types import Example, Pack


def pack(examples: Sequence[Example], *, family: Family, image_pad_id: int, video_pad_id: int) -> Pack:
    """Lay out the examples of one group. Shapes: positions [3, T], modalities [T], per example.

    Raises:
        RolloutError: an example's placeholders and its views disagree.
    """
    kinds = tuple(modalities(e.ids_T, image_pad_id, video_pad_id) for e in examples)
    positions = tuple(rope_positions(m, e.views, family) for m, e in zip(kinds, examples, strict=True))
    return Pack(examples=tuple(examples), positions=positions, modalities=kinds)
