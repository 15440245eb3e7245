"""A sample as the text and tokens of a prompt, and an annotation as the text and tokens of an answer.

The tokenizer is handed in. Media pads are expanded here, by the family's row, and counted against the views before any
forward sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rft.data import media
from rft.errors import DataError, RolloutError
from rft.families import Family
from rft.types import Sample, Segment, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How a task asks and how its answer is written. Format strings over the row's columns and the answer's keys."""

    question: str = "{question}"
    answer: str = ""
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """Samples and annotations to segments, for one family, tokenizer and media budget."""

    tokenizer: Any
    family: Family
    prompts: Mapping[str, Prompt]  # by task; "default" for the rest
    budget: media.Budget = field(default_factory=media.Budget)
    max_prompt_tokens: int = 8192

    def prompt(self, sample: Sample) -> Segment:
        """The world's first segment: chat scaffolding, question and media.

        A prompt over `max_prompt_tokens` gets smaller media (fewer frames first), never a cut.

        Raises:
            DataError: the media cannot be read, the text holds special tokens, or nothing fits the budget.
        """
        views = [self.view(sample, i) for i in range(len(sample.media))]
        segment = self._segment(sample, views)
        shown = sum(v.tokens for v in views)
        allowed = shown
        while len(segment.ids) > self.max_prompt_tokens:
            if not views:
                raise DataError(
                    f"sample {sample.id}", f"the text takes {len(segment.ids)} tokens of {self.max_prompt_tokens}",
                    "raise max_prompt_tokens or shorten the question",
                )  # fmt: skip
            allowed = min(allowed - (len(segment.ids) - self.max_prompt_tokens), int(allowed * 0.95))
            if allowed < 1:
                raise DataError(
                    f"sample {sample.id}",
                    f"the text alone leaves no room for media in {self.max_prompt_tokens} tokens",
                    "raise max_prompt_tokens",
                )
            views = [self.view(sample, i, max(1, v.tokens * allowed // shown)) for i, v in enumerate(views)]
            segment = self._segment(sample, views)
            shown = sum(v.tokens for v in views)
            allowed = min(allowed, shown)
        return segment

    def view(self, sample: Sample, index: int, max_tokens: int | None = None) -> View:
        """What is shown of one of the sample's media; checks the annotation against the media's own length."""
        try:
            view = media.view(sample.media[index], index, family=self.family, budget=self.budget, max_tokens=max_tokens)
        except DataError as error:
            raise DataError(f"sample {sample.id}, {error.where}", error.what, error.do) from error
        spans = [sample.answer["span"]] if "span" in sample.answer else sample.answer.get("spans", ())
        for start, end in spans:
            if view.kind == "video" and end > view.duration + OVERSHOOT:
                raise DataError(
                    f"sample {sample.id}, {sample.media[index].name}",
                    f"the annotated span {start:g} to {end:g} ends after the video ({view.duration:.3f} s)",
                    "clamp or drop this annotation",
                )
        return view

    def answer_text(self, sample: Sample) -> str:
        """The annotation written with the task's answer template.

        Raises:
            DataError: the row has no answer, or not the keys that the template names.
        """
        template = self._task(sample).answer
        if not template:
            raise DataError(f"sample {sample.id}", f"task {sample.task!r} has no answer template", "set it in the recipe")
        if not sample.answer:
            raise DataError(f"sample {sample.id}", "the row has no answer", "add an answer or drop the row")
        return _fill(template, {**sample.row, **sample.answer}, sample)

    def reply(self, author: str, ids: Sequence[int], **kwargs: Any) -> Segment:
        """A segment for ids written by `author`; the text leaves the end-of-turn token out."""
        return Segment(author=author, text=self.text(ids), ids=tuple(ids), **kwargs)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids, without a closing end-of-turn token."""
        ids = list(ids)
        if ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def eos(self) -> int:
        """The token that ends a turn."""
        return self.tokenizer.eos_token_id

    def _task(self, sample: Sample) -> Prompt:
        prompt = self.prompts.get(sample.task) or self.prompts.get("default")
        if prompt is None:
            raise DataError(
                f"sample {sample.id}", f"no prompt is known for task {sample.task!r}",
                f"known: {', '.join(sorted(self.prompts))}; add it or a default to the recipe",
            )  # fmt: skip
        return prompt

    def messages(self, sample: Sample) -> list[dict[str, Any]]:
        """Chat messages: the row's own, or the media followed by the task's question."""
        if sample.messages:
            return [dict(m) for m in sample.messages]
        prompt = self._task(sample)
        parts = [{"type": "image" if m.kind == "image" else "video"} for m in sample.media]
        parts.append({"type": "text", "text": _fill(prompt.question, sample.row, sample)})
        system = [{"role": "system", "content": [{"type": "text", "text": prompt.system}]}] if prompt.system else []
        return [*system, {"role": "user", "content": parts}]

    def _segment(self, sample: Sample, views: Sequence[View]) -> Segment:
        messages = self.messages(sample)
        specials = set(self.tokenizer.all_special_tokens) | set(self.family.placeholders)
        for text in _texts(messages):
            if found := next((s for s in specials if s in text), None):
                raise DataError(
                    f"sample {sample.id}", f"its text holds the special token {found}",
                    "take it out of the row: it would be read as media or as the end of a turn",
                )  # fmt: skip
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = _expand(text, views, self.family, sample)
        segment = Segment(author="world", text=text, ids=tuple(self.encode(text)), views=tuple(views))
        pads = {self.tokenizer.convert_tokens_to_ids(p) for p in (self.family.image_pad, self.family.video_pad)}
        placed, wanted = sum(i in pads for i in segment.ids), sum(v.tokens for v in views)
        if placed != wanted:
            raise RolloutError(
                f"sample {sample.id}", f"{placed} placeholder tokens for {wanted} features",
                "the tokenizer does not keep the media pads whole",
            )  # fmt: skip
        return segment


OVERSHOOT = 2.0  # seconds by which an annotation may end after the last frame; published ones do by up to 1.5 s


def _expand(text: str, views: Sequence[View], family: Family, sample: Sample) -> str:
    out, rest = [], text
    for view in views:
        pad = family.image_pad if view.kind == "image" else family.video_pad
        before, found, rest = rest.partition(pad)
        if not found:
            raise DataError(
                f"sample {sample.id}", f"{len(views)} media but the chat template placed fewer",
                'each media needs its own {"type": "video"} or {"type": "image"} part, in order',
            )  # fmt: skip
        out += [before, family.placeholder_text(view.kind, view.grid, view.pair_seconds)]
    if family.image_pad in rest or family.video_pad in rest:
        raise DataError(f"sample {sample.id}", f"more media parts in its messages than media ({len(views)})")
    return "".join([*out, rest])


def _fill(template: str, columns: Mapping[str, Any], sample: Sample) -> str:
    try:
        return template.format_map(columns)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"sample {sample.id}", f"cannot fill the template {template!r}: {type(error).__name__} {error}",
            f"the row has: {', '.join(sorted(map(str, columns)))}",
        ) from error  # fmt: skip


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p.get("type") == "text"]
    return texts
