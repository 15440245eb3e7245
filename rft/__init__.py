"""Reinforcement fine-tuning for multimodal LLMs, video first.

A reward file needs nothing but this: `from rft import Rollout, Sample, geometry, parsing`.
"""

from rft import geometry, parsing
from rft.types import Rollout, Sample, Score, Segment

__version__ = "0.1.0"
__all__ = ["Rollout", "Sample", "Score", "Segment", "geometry", "parsing"]
