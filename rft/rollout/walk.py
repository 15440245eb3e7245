"""One rollout on its way: what its perception asks for, what the world shows of it, and what the policy made of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from traceback import extract_tb
from typing import Any

from rft import parsing
from rft.data.views import Look, Refused, look
from rft.errors import DataError, RftError, RolloutError
from rft.rollout.perceive import Fetch, Final, Looking, Perception, State, Turn
from rft.rollout.policy import Context, stream_key
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment, Stop, View

QUOTED = 400  # characters of its own words that a model is shown again at most


class Walk:
    """It becomes a `Rollout` when nothing more is said."""

    def __init__(
        self, sample: Sample, prompt: Segment, *, renderer: Renderer, looking: Looking, draw: Sequence[object]
    ) -> None:
        self.sample, self.draw, self.fetch = sample, draw, looking.fetch
        self.perception = looking.make()
        self.media = media_of(sample, renderer, looking)
        self.refused: list[str] = []
        self.written: list[Segment] = []  # by the annotation, behind which the policy goes on
        self.is_open = True
        self._renderer, self._looking = renderer, looking
        self._turn = started(self.perception, sample, self.media)
        self._segments = [prompt]
        self._replies: list[str] = []
        self._looks = self._weights = 0
        self._stop: Stop = "answered"

    @property
    def context(self) -> Context:
        """What the policy continues now."""
        begin = max(i for i, s in enumerate(self._segments) if s.is_fresh or i == 0)
        key = stream_key(*self.draw, *(("round", len(self._replies)) if self._replies else ()))
        return Context(segments=(*self._segments[begin:], *self.written), key=key)

    @property
    def rollout(self) -> Rollout:
        """What has happened."""
        return Rollout(
            sample_id=self.sample.id,
            segments=tuple(self._segments),
            stop=self._stop,
            weights=self._weights,
            refused=tuple(self.refused),
        )

    @property
    def state(self) -> State:
        """As the perception sees it."""
        return State(
            sample=self.sample,
            family=self._renderer.family,
            round=len(self._replies),
            rounds=self._looking.budget.rounds,
            replies=tuple(self._replies),
            shown=next((s.views for s in reversed(self._segments) if s.views), ()),
            views=self.rollout.views,
            refused=tuple(self.refused),
            seed=stream_key(*self.draw, "perception", len(self._replies)),
            is_fresh=self._looking.context == "fresh",
        )

    def take(self, segment: Segment, stop: Stop, *, weights: int, room: int) -> None:
        """A reply; `is_open` afterwards says whether the perception has something to show. `room` is for another one."""
        self._segments += [*self.written, segment]
        self._replies.append("".join(s.text for s in (*self.written, segment)))
        self.written, self._weights, self._stop = [], weights, stop
        self.is_open = False
        if stop != "answered":
            return
        turn = ask(self.perception, "observe", self.sample, self._replies[-1], self.media, self.state)
        if isinstance(turn, Final):
            return
        known = self.rollout.views
        if not isinstance(turn, Turn) or not all(isinstance(one, Look) or one in known for one in turn.looks or ()):
            what = f"{type(self.perception).__name__}.observe returned {str(turn)[:200]}"
            do = "return a Final, or a Turn whose looks are Look objects, or views of `state.views`"
            raise RolloutError(f"sample {self.sample.id}", what, do)
        budget = self._looking.budget
        is_over = len(self._replies) >= budget.rounds
        if turn.inline and segment.ids[-1:] == (self._renderer.eos,) and not (is_over and turn.looks):
            self.refused += [*turn.refused, *["unread"] * len(turn.looks or ())]  # nothing goes on in words that have ended
            return
        written = sum(len(s.ids) for s in self._segments if s.author == "policy")
        self._turn, self.is_open = turn, True
        if is_over:
            self._end("rounds")
        elif 0 < budget.text_tokens < written + room:
            self._end("text_tokens")

    def views(self) -> list[View | Refused]:
        """What the looks of the turn show, each within what the recipe's budget gives one."""
        return [_view(self.sample, one, self._renderer) for one in self._turn.looks or ()]

    def show(self, views: Sequence[View | Refused], *, late: bool) -> None:
        """The world's next segment, or the end where nothing can be shown any more."""
        if late:
            self._end("seconds")
            return
        found = [v for v in views if isinstance(v, View)]
        refusals = [v for v in views if isinstance(v, Refused)]
        self.refused += [*self._turn.refused, *(r.why for r in refusals)]
        words = [f"Not shown: {r.what}." for r in refusals]
        segment = self._segment(found, words)
        if broken := self._broken_by(segment, len(found)):
            self.refused += [broken] * max(len(found), 1)
            words.append(f"Not shown: that would be more {broken.replace('_', ' ')} than there may be.")
            found, segment = [], self._segment([], words)
            if self._broken_by(segment, 0):
                self._stopped()
                return
        if not found and any(failure(v, self.fetch) for v in segment.views):  # what is to be shown again is gone
            self.refused.append("unreadable")
            self._stopped()
            return
        self._looks += len(found)
        if segment.ids:
            self._segments.append(segment)

    def _broken_by(self, segment: Segment, looks: int) -> str:
        """What the world would break by saying this; "" when nothing. Words alone spend none of what is for looks."""
        views = [*self.rollout.views, *segment.views]
        broken = self._looking.budget.broken_by(views, self._looks + looks) if segment.views else ""
        before = () if segment.is_fresh else self.context.segments
        is_long = sum(len(s.ids) for s in (*before, segment)) > self._renderer.max_prompt_tokens
        return broken or ("context" if is_long else "")

    def _segment(self, views: Sequence[View], words: Sequence[str]) -> Segment:
        renderer, turn, last = self._renderer, self._turn, self._segments[-1]
        if turn.inline:
            return renderer.inline(self.sample, views)
        is_fresh = self._looking.context == "fresh"
        if not views and is_fresh:  # a prompt without pictures would be asked blindly
            views = self.state.shown
        is_own = turn.text is None or (is_fresh and not turn.text)
        question = renderer.question(self.sample) if is_own else turn.text
        said = [*words, turn.note, *(self._history() if is_fresh else ()), question]
        text = renderer.harmless("\n".join(filter(None, said)))
        if is_fresh:
            return renderer.anew(self.sample, views, text)
        segment = renderer.next_turn(self.sample, views, text)
        if last.ids[-1:] == (renderer.eos,):
            return segment
        end = renderer.tokenizer.eos_token  # of a reply that was cut
        return replace(segment, text=end + segment.text, ids=(renderer.eos, *segment.ids))

    def _history(self) -> list[str]:
        last = self._replies[-1]
        if self._looking.history == "answer" and (said := parsing.tagged(last, "answer")):
            return [f"Your last answer: {said[:QUOTED]}"]
        if self._looking.history == "clue" and (found := parsing.blocks(last, ("clue", "glue"))) and found[-1][1]:
            return [f"Your last clue: {found[-1][1][:QUOTED]}"]
        return []

    def _end(self, limit: str) -> None:
        """The turn that the perception wants does not come: it would break this limit, and so would all of its looks."""
        self.refused += [*self._turn.refused, *[limit] * max(len(self._turn.looks or ()), 1)]
        self._stopped()

    def _stopped(self) -> None:
        """It is over although the perception would have gone on."""
        self.is_open = False
        if self.rollout.answer is None:
            self._stop = "turns"


def media_of(sample: Sample, renderer: Renderer, looking: Looking) -> tuple[View, ...]:
    """The sample's media as the budget shows them, for whoever may look at them."""
    return () if looking.is_single else tuple(renderer.view(sample, i) for i in range(len(sample.media)))


def started(perception: Perception, sample: Sample, media: tuple[View, ...]) -> Turn:
    """The first turn. Raises RolloutError where the perception does not give one."""
    turn = ask(perception, "start", sample, sample, media)
    if not isinstance(turn, Turn):
        what = f"{type(perception).__name__}.start returned {type(turn).__name__}"
        raise RolloutError(f"sample {sample.id}", what, "return a Turn")
    return turn


def ask(perception: Perception, method: str, sample: Sample, *given: Any) -> Any:
    """What a perception says. An error that is none of ours becomes one that names the sample."""
    try:
        return getattr(perception, method)(*given)
    except RftError:
        raise
    except Exception as error:  # the code is its author's: whatever it raises is told in one line
        at = extract_tb(error.__traceback__)[-1]
        what = f"{type(perception).__name__}.{method} failed: {type(error).__name__}: {error} at {at.filename}:{at.lineno}"
        kind = DataError if method == "teach" else RolloutError
        raise kind(f"sample {sample.id}", what, "mend that line; a reply may hold any text") from error


def opened(turn: Turn, sample: Sample, renderer: Renderer) -> Segment:
    """The prompt of a first turn.

    Raises:
        DataError: the media cannot be read, the looks cannot be shown, or the prompt is too long.
    """
    if turn.looks is None and turn.text is None and not turn.note:
        return renderer.prompt(sample)
    views = []
    for one in turn.looks or ():
        view = _view(sample, one, renderer)
        if isinstance(view, Refused):
            raise view.error
        views.append(view)
    if turn.looks is None:
        views = [renderer.view(sample, i) for i in range(len(sample.media))]
    renderer.check_inside(sample, views)
    question = renderer.question(sample) if turn.text is None else turn.text
    segment = renderer.anew(sample, views, "\n".join(filter(None, (turn.note, question))))
    if len(segment.ids) > renderer.max_prompt_tokens:
        what = f"its first prompt takes {len(segment.ids)} tokens, of {renderer.max_prompt_tokens}"
        raise DataError(f"sample {sample.id}", what, "raise max_prompt_tokens, or show less at first")
    return replace(segment, is_fresh=False)


def failure(view: View, fetch: Fetch) -> str:
    """Why a view cannot be decoded; "" when it can."""
    try:
        fetch(view)
    except DataError as error:
        return str(error)
    return ""


def _view(sample: Sample, one: Look | View, renderer: Renderer) -> View | Refused:
    """What a look shows; a view is shown again as it was."""
    return one if isinstance(one, View) else look(sample, one, family=renderer.family, budget=renderer.budget)
