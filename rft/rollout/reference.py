"""The annotation in the policy's place: one more rollout of the same sample, which nobody sampled."""

from __future__ import annotations

from rft import parsing
from rft.algo.guidance import Fill
from rft.errors import DataError
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment


def reference_rollout(
    sample: Sample,
    renderer: Renderer,
    prompt: Segment | None = None,
    *,
    fill: Fill = "answer_only",
    field: str = "",
    best: Rollout | None = None,
) -> Rollout:
    """The prompt, then the annotation by the task's answer template, ending in the policy's end-of-turn token.

    `fill` says what stands before the answer. With `splice_think` it is what the policy's `best` rollout wrote before its
    own answer, still the policy's, token for token; where that did not think, the answer stands alone.

    Raises:
        DataError: the row has no answer or no column `field`, or its media cannot be read.
    """
    prompt = prompt or renderer.prompt(sample)
    answer = renderer.answer_text(sample)
    if fill == "empty_think":
        answer = f"<think></think>{answer}"
    elif fill == "from_field":
        if not isinstance(thought := sample.row.get(field), str) or not thought.strip():
            do = "add it, or choose another guidance.fill"
            raise DataError(f"sample {sample.id}", f"column {field!r} holds no rationale", do)
        answer = f"<think>{thought}</think>{answer}"
    segments = [prompt]
    if fill == "splice_think" and best is not None:
        taken, rest = _thought(best, renderer)
        segments += [taken] if taken else []
        answer = rest + answer
    ids = (*renderer.encode(answer), renderer.eos)
    return Rollout(sample_id=sample.id, segments=(*segments, renderer.reply("reference", ids)), stop="answered")


def _thought(best: Rollout, renderer: Renderer) -> tuple[Segment | None, str]:
    """What a single-turn rollout wrote before its answer: whole tokens of the policy's, and the text that is left of it.

    A token may reach over the place where the answer begins (`><` is one, often): it is left to whoever goes on.
    """
    written = best.segments[-1]
    before, _, _ = written.text.rpartition("<answer>")
    if written.author != "policy" or parsing.tagged(before, "think") is None:
        return None, ""
    low, high = 0, len(written.ids)
    while low < high:  # the longest run of tokens that stays inside
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before.startswith(renderer.text(written.ids[:middle])) else (low, middle - 1)
    logprobs = None if written.logprobs is None else written.logprobs[:low]
    taken = renderer.reply("policy", written.ids[:low], logprobs=logprobs)
    return taken, before[len(taken.text) :]
