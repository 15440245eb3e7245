"""A sample as the text and tokens of a prompt, and an annotation as the text and tokens of an answer.

The tokenizer is handed in. Media pads are expanded here, by the family's row, and counted against the views before any
forward sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rft.data import media
from rft.data.budget import Budget
from rft.data.samples import check_inside
from rft.data.views import longest
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
    budget: Budget = field(default_factory=Budget)
    max_prompt_tokens: int = 8192

    def prompt(self, sample: Sample) -> Segment:
        """The world's first segment: chat scaffolding, question and media.

        A prompt over `max_prompt_tokens` gets smaller media (fewer frames first, the largest media first), never a cut.

        Raises:
            DataError: the media cannot be read or do not hold the annotated span, the text holds special tokens, or
                the prompt is over the budget with every media at its smallest.
        """
        views = [self.view(sample, i) for i in range(len(sample.media))]
        self.check_inside(sample, views)
        segment = self._segment(sample, views)
        if len(segment.ids) <= self.max_prompt_tokens:
            return segment
        text = len(segment.ids) - sum(map(self._cost, views))
        return self._segment(sample, self._shrunk(sample, views, text))

    def check_inside(self, sample: Sample, views: Sequence[View]) -> None:
        """Raises DataError when the annotation does not lie inside the longest of the videos that are shown."""
        if film := longest(views):
            check_inside(sample.answer, film.duration, f"{_at(sample)}, {sample.media[film.media].name}")

    def view(self, sample: Sample, index: int, max_tokens: int | None = None) -> View:
        """What is shown of one of the sample's media. Raises DataError with the sample's name."""
        try:
            return media.view(sample.media[index], index, family=self.family, budget=self.budget, max_tokens=max_tokens)
        except DataError as error:
            where = error.where if error.where != "budget" else sample.media[index].name
            raise DataError(f"{_at(sample)}, {where}", error.what, error.do) from error

    def question(self, sample: Sample) -> str:
        """What the sample's own prompt asks last, in words."""
        return "\n".join(_texts([m for m in self.messages(sample) if m["role"] == "user"][-1:]))

    def anew(self, sample: Sample, views: Sequence[View], text: str) -> Segment:
        """A new prompt: what the sample's own says before its question, then `views` and `text`.

        Raises DataError when the text holds special tokens.
        """
        *before, _ = self.messages(sample)
        told = [{"role": m["role"], "content": _parts((), "\n".join(_texts([m])))} for m in before]
        asked = {"role": "user", "content": _parts(views, text)}
        self._refuse_specials(_texts([*told, asked]), sample)
        text = self.tokenizer.apply_chat_template([*told, asked], tokenize=False, add_generation_prompt=True)
        return self._world(_expand(text, views, self.family, sample), views, sample, is_fresh=True)

    def next_turn(self, sample: Sample, views: Sequence[View], text: str) -> Segment:
        """What stands between a reply that has ended and the next one: `views` and `text` as a message of the user."""
        mark = "(here the reply stands)"
        said = (("user", _parts((), "?")), ("assistant", _parts((), mark)), ("user", _parts(views, text)))
        talk = [{"role": role, "content": content} for role, content in said]
        whole = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        behind = whole.partition(mark)[2].removeprefix(self.tokenizer.eos_token)
        return self._world(_expand(behind, views, self.family, sample), views, sample)

    def inline(self, sample: Sample, views: Sequence[View]) -> Segment:
        """`views` in the middle of a reply, between the family's marks and nothing else."""
        start, end = self.family.vision_start, self.family.vision_end
        shown = [start + self.family.placeholder_text(v.kind, v.grid, v.pair_seconds) + end for v in views]
        return self._world("".join(shown), views, sample)

    def harmless(self, text: str) -> str:
        """The text without special tokens, which would be read as media or as the end of a turn."""
        specials = (*self.tokenizer.all_special_tokens, *self.family.placeholders)
        while any(special in text for special in specials):  # taking one out may join the halves of another
            for special in specials:
                text = text.replace(special, "")
        return text

    def _shrunk(self, sample: Sample, views: Sequence[View], text: int) -> list[View]:
        """Views that fit beside `text` tokens: all media above one level come down to it, as far as they can."""
        views, able = list(views), set(range(len(views)))
        costs = [self._cost(v) for v in views]
        while text + sum(costs) > self.max_prompt_tokens:
            if not able:
                smallest = f" and {sum(costs)} of media at their smallest" if views else ""
                raise DataError(
                    _at(sample), f"its prompt takes {text} tokens of text{smallest}, of {self.max_prompt_tokens}",
                    "raise max_prompt_tokens" + (" or lower media.min_pixels" if views else ""),
                )  # fmt: skip
            stuck = sum(cost for i, cost in enumerate(costs) if i not in able)
            level = _level([costs[i] for i in able], self.max_prompt_tokens - text - stuck)
            for i in [i for i in able if costs[i] > level]:
                smaller = self._smaller(sample, views[i], views[i].tokens * level // costs[i])
                if smaller is None:
                    able.remove(i)
                else:
                    views[i], costs[i] = smaller, self._cost(smaller)
        return views

    def _smaller(self, sample: Sample, view: View, tokens: int) -> View | None:
        """The media in `tokens`, or in fewer than now if that is all it can; None when it cannot get smaller."""
        tokens = max(tokens, 1)
        while tokens < view.tokens:
            try:
                return self.view(sample, view.media, tokens)
            except DataError:
                tokens = (tokens + view.tokens + 1) // 2
        return None

    def _cost(self, view: View) -> int:
        """Tokens that a view takes in a prompt, the seconds printed between its pairs included."""
        if self.family.clock == "axis" or view.kind == "image":
            return view.tokens
        return len(self.encode(self.family.placeholder_text(view.kind, view.grid, view.pair_seconds)))

    def answer_text(self, sample: Sample) -> str:
        """The annotation written with the task's answer template.

        Raises:
            DataError: the row has no answer, or not the keys that the template names.
        """
        template = self._task(sample).answer
        if not template:
            do = "set `answer` of its prompt in the recipe"
            raise DataError(_at(sample), f"task {sample.task!r} has no answer template", do)
        if not sample.answer:
            raise DataError(_at(sample), "the row has no answer", "add an answer or drop the row")
        text = fill(template, {**sample.row, **sample.answer}, sample)
        self._refuse_specials([text], sample)
        return text

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
                _at(sample), f"no prompt is known for task {sample.task!r}",
                f"known: {', '.join(sorted(self.prompts)) or 'none'}; add it or a default to the recipe's prompts",
            )  # fmt: skip
        return prompt

    def messages(self, sample: Sample) -> list[dict[str, Any]]:
        """Chat messages: the row's own, or the media followed by the task's question.

        The task's system text stands before both, unless the row brings its own.
        """
        if sample.messages:
            known = self.prompts.get(sample.task) or self.prompts.get("default") or Prompt()
            is_led = any(m["role"] == "system" for m in sample.messages)
            return [*([] if is_led else _system(known)), *(dict(m) for m in sample.messages)]
        prompt = self._task(sample)
        parts = [{"type": "image" if m.kind == "image" else "video"} for m in sample.media]
        parts.append({"type": "text", "text": fill(prompt.question, sample.row, sample)})
        return [*_system(prompt), {"role": "user", "content": parts}]

    def _refuse_specials(self, texts: Sequence[str], sample: Sample) -> None:
        for special in (*self.tokenizer.all_special_tokens, *self.family.placeholders):
            if any(special in text for text in texts):
                raise DataError(
                    _at(sample), f"its text holds the special token {special}",
                    "take it out of the row: it would be read as media or as the end of a turn",
                )  # fmt: skip

    def _segment(self, sample: Sample, views: Sequence[View]) -> Segment:
        messages = self.messages(sample)
        self._refuse_specials(_texts(messages), sample)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = _expand(text, views, self.family, sample)
        return self._world(text, views, sample)

    def _world(self, text: str, views: Sequence[View], sample: Sample, *, is_fresh: bool = False) -> Segment:
        ids = tuple(self.encode(text))
        segment = Segment(author="world", text=text, ids=ids, views=tuple(views), is_fresh=is_fresh)
        pads = {self.tokenizer.convert_tokens_to_ids(p) for p in (self.family.image_pad, self.family.video_pad)}
        placed, wanted = sum(i in pads for i in segment.ids), sum(v.tokens for v in views)
        if placed != wanted:
            raise RolloutError(
                _at(sample), f"{placed} placeholder tokens for {wanted} features",
                "the tokenizer does not keep the media pads whole",
            )  # fmt: skip
        return segment


def _at(sample: Sample) -> str:
    return f"sample {sample.id}" + (f" ({sample.origin})" if sample.origin else "")


def _system(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "system", "content": [{"type": "text", "text": prompt.system}]}] if prompt.system else []


def _parts(views: Sequence[View], text: str) -> list[dict[str, Any]]:
    return [*({"type": v.kind} for v in views), {"type": "text", "text": text}]


def _level(costs: Sequence[int], room: int) -> int:
    """The height at which costs that are cut to it sum to at most `room`; costs sum to more than that."""
    for left, cost in zip(range(len(costs), 0, -1), sorted(costs)):
        if cost > room // left:
            return max(room // left, 0)
        room -= cost
    raise AssertionError("costs fit the room")


def _expand(text: str, views: Sequence[View], family: Family, sample: Sample) -> str:
    out, rest = [], text
    for view in views:
        pad = family.image_pad if view.kind == "image" else family.video_pad
        before, found, rest = rest.partition(pad)
        if not found:
            raise DataError(
                _at(sample), f"{len(views)} media but the chat template placed fewer",
                'each media needs its own {"type": "video"} or {"type": "image"} part, in order',
            )  # fmt: skip
        out += [before, family.placeholder_text(view.kind, view.grid, view.pair_seconds)]
    if family.image_pad in rest or family.video_pad in rest:
        do = "name a media for each part"
        raise DataError(_at(sample), f"more media parts in its messages than media ({len(views)})", do)
    return "".join([*out, rest])


def fill(template: str, columns: Mapping[str, Any], sample: Sample) -> str:
    """A format string over some columns. Raises DataError, with the row's place, when they have not what it names."""
    try:
        return template.format_map(columns)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        what = f"cannot fill the template {template!r}: {type(error).__name__} {error}"
        do = f"the row has: {', '.join(sorted(map(str, columns)))}; a brace that is meant as text is written twice"
        raise DataError(_at(sample), what, do) from error


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p.get("type") == "text"]
    return texts
