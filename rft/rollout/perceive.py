"""What a rollout looks at: the protocol between the author of a perception and the loop that walks it (`loop.py`).

A *perception* decides what is looked at. It is a plain object, one per rollout, that names looks and never tensors:

    class Twice:
        def start(self, sample, media):                # media: each of the sample's as the recipe's budget shows it
            return Turn()                              # the sample's own prompt
        def observe(self, reply, media, state):
            if state.round == 2:
                return Final()
            return Turn(text="Look again.", looks=[Look(video=0, span=(2.0, 6.0), frames=16)])

The framework makes views of looks, keeps to the budget, stamps times, tokenises and decides who is trained on what. Two
context policies: `append` is one sequence that grows, `fresh` a new prompt each round (VideoChat-R1.5, arXiv:2509.21100).
A look that cannot be shown is refused: the model is told so in words, and `Rollout.refused` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rft.data.views import Look
from rft.families import Family
from rft.types import Sample, View

Ways = Literal["append", "fresh"]
History = Literal["none", "answer", "clue"]
Fetch = Callable[[View], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What one rollout may use. 0 is no limit; a rollout always has its first turn.

    What would go beyond `looks`, `frames` or `visual_tokens`, or make the prompt longer than the recipe's
    `max_prompt_tokens`, is refused as a whole. `rounds` are turns of the policy, `text_tokens` what it may write in all of
    them: a turn that might not fit is not begun. After `seconds` of a generation's rollouts no new turn is.
    """

    rounds: int = 2
    looks: int = 8
    frames: int = 0
    visual_tokens: int = 0
    text_tokens: int = 0
    seconds: float = 0.0

    def broken_by(self, views: Sequence[View], looks: int) -> str:
        """The first limit that so many looks at these views break; "" when none."""
        spent = {"looks": looks, "frames": sum(len(v.frames) for v in views), "visual_tokens": sum(v.tokens for v in views)}
        return next((name for name, n in spent.items() if 0 < getattr(self, name) < n), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the world says next: `note` and `text`, behind what `looks` show.

    Without `text` the sample's own question is asked; where it is "", nothing is, but a new prompt always asks. Without
    `looks` the first turn shows the sample's media, and a new prompt what was shown last; a view among them is shown again
    as it was. `refused` says what the perception itself could not make a look of. An `inline` turn goes on in the policy's
    own words: no new message begins, and nothing is said.
    """

    text: str | None = None
    note: str = ""
    looks: Sequence[Look | View] | None = None
    refused: Sequence[str] = ()
    inline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """Nothing more is shown: the last reply is the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a rollout has come when its perception is asked."""

    sample: Sample
    family: Family
    round: int  # turns that the policy has had
    rounds: int  # that it may have
    replies: tuple[str, ...]  # all of them, the last included
    shown: tuple[View, ...]  # what the last turn was about
    views: tuple[View, ...]  # everything shown so far
    refused: tuple[str, ...]  # why looks were refused so far
    seed: int  # for whoever draws: the same in every run
    is_fresh: bool = False  # what is shown next is all that will be seen

    @property
    def is_last(self) -> bool:
        """Whether no turn is left."""
        return self.round >= self.rounds


class Perception(Protocol):
    """What is looked at. One object per rollout, made anew for each.

    A class may also have `teach(answer, media, state) -> str`: what the annotation would write now, where `answer` is the
    annotation by the prompt's template, which it writes in its last turn; supervised phases and guidance need it. And
    `stops`, texts behind which a reply is cut for an inline turn; a rollout's last reply is not. An argument `budget` of its
    constructor gets the phase's `Allowance`.
    """

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        """The first turn: the same whenever the sample is met."""
        ...

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        """What follows a reply, whatever is written in it."""
        ...


class Single:
    """One look, one answer: the plain rollout."""

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        return Turn()

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        return Final()

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PerceptionSpec:
    """The key `perception` of a recipe: `use` is one of the shipped ones or path.py:Class, `args` its arguments.

    A phase's own takes the place of the recipe's, whole.
    """

    use: str
    args: Mapping[str, Any] = field(default_factory=dict)
    context: Ways = "append"
    history: History = "none"  # fresh: what of its own words a new prompt tells the model
    budget: Allowance = field(default_factory=Allowance)


def unread(view: View) -> None:
    """Decodes nothing: headers are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Looking:
    """How the rollouts of a phase look. `fetch` decodes a view, and raises DataError where it cannot."""

    make: Callable[[], Perception] = Single
    context: Ways = "append"
    history: History = "none"
    budget: Allowance = field(default_factory=lambda: Allowance(rounds=1))
    fetch: Fetch = unread

    @property
    def is_single(self) -> bool:
        """Whether a rollout is one prompt and one answer, whatever is answered."""
        return self.make is Single

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts behind which a reply is cut."""
        return tuple(getattr(self.make(), "stops", ()))

    @property
    def is_teachable(self) -> bool:
        """Whether it knows what the annotation would write."""
        return callable(getattr(self.make(), "teach", None))

    @property
    def goes_on(self) -> bool:
        """Whether later turns continue what the policy has read."""
        return not self.is_single and self.context == "append"


ONCE = Looking()
