"""The annotation in the policy's place: one more rollout of the same sample, which nobody sampled."""

from __future__ import annotations

from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment


def reference_rollout(sample: Sample, renderer: Renderer, prompt: Segment | None = None) -> Rollout:
    """The prompt, then the annotation by the task's answer template, ending in the policy's end-of-turn token.

    Raises:
        DataError: the row has no answer, or its media cannot be read.
    """
    ids = (*renderer.encode(renderer.answer_text(sample)), renderer.eos)
    answer = renderer.reply("reference", ids)
    return Rollout(sample_id=sample.id, segments=(prompt or renderer.prompt(sample), answer), stop="answered")
