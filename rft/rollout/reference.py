"""The annotation in the policy's place: one more rollout of the same sample, which nobody sampled.

Where guidance wants other spans than the annotated one, the sample is retold with them first; rewards see the sample as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from rft import geometry, parsing
from rft.algo.guidance import Fill, Guidance, drawn_index
from rft.data.readings import readings, retold
from rft.errors import DataError
from rft.rollout.loop import opening, taught
from rft.rollout.perceive import ONCE, Looking
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment

TRIES = 64  # of a jitter that is not read back well enough; a span from 0 to the end of its video takes 5 on average
Uniform = Callable[..., float]  # in [0, 1), by what it is for


def reference_rollout(
    sample: Sample,
    renderer: Renderer,
    prompt: Segment | None = None,
    *,
    looking: Looking = ONCE,
    fill: Fill = "answer_only",
    field: str = "",
    best: Rollout | None = None,
) -> Rollout:
    """The prompt, then the annotation by the task's answer template, ending in the policy's end-of-turn token.

    Where rollouts look, the annotation does too: its clue is the look, and its answer the last turn (`Perception.teach`).
    `fill` says what stands before the answer. With `splice_think` it is what the policy's `best` rollout wrote before its
    own answer, still the policy's, token for token; where that did not think, or had seen something else by then, the
    answer stands alone.

    Raises:
        DataError: the row has no answer or no column `field`, its media cannot be read, or its look cannot be shown.
    """

    def write(text: str, *, is_last: bool, is_cut: bool) -> list[Segment]:
        taken, text = _filled(text, sample, renderer, fill, field, best) if is_last else (None, text)
        ids = (*renderer.encode(text), *(() if is_cut else (renderer.eos,)))
        return [*([taken] if taken else []), renderer.reply("reference", ids)]

    prompt = prompt or opening(sample, renderer, looking)
    rollout = taught(sample, prompt, renderer, looking, write)
    if fill == "splice_think" and best is not None and _behind(best) != _behind(rollout):
        best = None  # what it thought was about something else than the annotation is shown
        rollout = taught(sample, prompt, renderer, looking, write)
    return rollout


def _behind(rollout: Rollout) -> tuple[Segment, ...]:
    """All that stands before the last turn."""
    worlds = [i for i, s in enumerate(rollout.segments) if s.author == "world"]
    return rollout.segments[: worlds[-1] + 1]


def _filled(
    answer: str, sample: Sample, renderer: Renderer, fill: Fill, field: str, best: Rollout | None
) -> tuple[Segment | None, str]:
    """What the policy wrote before the answer, if it is to stand there, and the text that the annotation adds."""
    if fill == "empty_think":
        answer = f"<think></think>{answer}"
    elif fill == "from_field":
        if not isinstance(thought := sample.row.get(field), str) or not thought.strip():
            do = "add it, or choose another guidance.fill"
            raise DataError(f"sample {sample.id}", f"column {field!r} holds no rationale", do)
        answer = f"<think>{thought}</think>{answer}"
    if fill == "splice_think" and best is not None:
        taken, rest = _thought(best, renderer)
        return taken, rest + answer
    return None, answer


def variants(sample: Sample, guidance: Guidance) -> tuple[Sample, ...]:
    """The sample as told by every annotation that has to earn the maximum before it may join a group.

    A jittered one owes no maximum; the annotated one does, which stands in where no jitter can be read back.
    """
    return readings(sample) if guidance.spans == "valid" else (sample,)


def drawn_variant(sample: Sample, guidance: Guidance, renderer: Renderer, prompt: Segment, uniform: Uniform) -> Sample:
    """The sample as told by the annotation that joins this group: `guidance.spans`, drawn by `uniform`.

    A jittered span keeps IoU >= `guidance.jitter` and stays inside the longest video that `prompt` shows (without one, inside
    the row's `duration`), as read back from the completion; one that has no such neighbours stays as annotated.
    """
    if guidance.spans == "valid":
        told = readings(sample)
        return told[drawn_index(len(told), uniform("valid"))]
    key = next((key for key in ("span", "spans") if key in sample.answer), None)
    if guidance.spans == "annotated" or key is None:
        return sample

    annotated, end = sample.answer["spans"] if key == "spans" else (sample.answer["span"],), _end(sample, prompt)

    def told_with(spans: Sequence[tuple[float, float]]) -> Sample:
        return retold(sample, {**sample.answer, key: tuple(spans) if key == "spans" else spans[0]})

    def is_near(read: tuple[float, float], span: tuple[float, float]) -> bool:
        return read[1] <= end and geometry.span_iou(read, span) >= guidance.jitter

    spans, far = list(annotated), list(range(len(annotated)))
    for attempt in range(TRIES):
        for i in far:
            u, v = (uniform("jitter", attempt, i, side) for side in ("start", "end"))
            spans[i] = geometry.near_span(annotated[i], guidance.jitter, u, v)
        told = told_with(spans)
        read = _read_spans(renderer.answer_text(told), key)
        far = [i for i, span in enumerate(annotated) if len(read) != len(spans) or not is_near(read[i], span)]
        if not far:
            return told
    return told_with([annotated[i] if i in far else span for i, span in enumerate(spans)])


def _end(sample: Sample, prompt: Segment) -> float:
    """The second after which nothing happens, as far as it is known."""
    shown = [view.duration for view in prompt.views if view.kind == "video"]
    return max(shown) if shown else float(sample.row.get("duration") or inf)


def _read_spans(text: str, key: str) -> Sequence[tuple[float, float]]:
    """The spans that a completion answers with, none when they cannot be read. A time below 0 cannot."""
    answer = parsing.tagged(text, "answer")
    if key == "spans":
        return parsing.time_spans(answer) or ()
    return (span,) if (span := parsing.time_span(answer)) else ()


def _thought(best: Rollout, renderer: Renderer) -> tuple[Segment | None, str]:
    """What a rollout wrote in its last turn before its answer: whole tokens of the policy's, and the text that is left of it.

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
