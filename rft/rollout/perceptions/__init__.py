"""The perceptions that come with `rft`, by the name a recipe knows them by."""

from __future__ import annotations

from collections.abc import Mapping

from rft.rollout.perceive import Perception, Single
from rft.rollout.perceptions.frames import Frames
from rft.rollout.perceptions.iterative import Iterative
from rft.rollout.perceptions.replay import Replay
from rft.rollout.perceptions.zoom import Zoom

SHIPPED: Mapping[str, type[Perception]] = {
    "single": Single,
    "iterative": Iterative,
    "zoom": Zoom,
    "frames": Frames,
    "replay": Replay,
}
