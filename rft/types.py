"""The nouns of the river, in the order in which a datum meets them. Each is made in one place and never filled in later.

    Sample -> Rollout -> Scored -> Group -> Example -> Pack -> Batch

A rollout is a list of segments, and each segment has one author: `world` (prompt and media, never trained), `policy`
(sampled, trained with an importance ratio) or `reference` (the annotation in the policy's place, trained off-policy).
The loss mask, the number of turns and which pixels belong to which tokens all follow from authorship.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from rft import parsing
from rft.errors import RolloutError

Span = tuple[float, float]
Box = tuple[float, float, float, float]
Author = Literal["world", "policy", "reference"]
Stop = Literal["answered", "length", "turns", "malformed"]

WORLD, POLICY, REFERENCE = 0, 1, 2
AUTHOR_CODES: dict[str, int] = {"world": WORLD, "policy": POLICY, "reference": REFERENCE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A video, an image or a list of frames that a sample points at. Nothing has been opened yet."""

    kind: Literal["video", "image", "frames"]
    source: str | tuple[str, ...]  # absolute path, or one path per frame
    budget: Mapping[str, float] = field(default_factory=dict)  # qwen-vl-utils keys that the row itself sets
    seconds: tuple[float, ...] = ()  # frames only: the presentation second of each

    @property
    def name(self) -> str:
        """What an error message calls it."""
        return self.source if isinstance(self.source, str) else f"{self.source[0]} (+{len(self.source) - 1} frames)"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What was shown of one media: which frames, when, how large. It names pixels and holds none.

    A video's `pair_seconds` has one entry per `temporal_patch` frames: the second the model is told (DESIGN: the clock).
    """

    media: int  # index in `Sample.media`
    kind: Literal["video", "image"]
    source: str | tuple[str, ...]
    frames: tuple[int, ...]  # indices in presentation order; (0,) for an image
    seconds: tuple[float, ...]  # presentation second of each frame; () for an image
    pair_seconds: tuple[float, ...]
    size: tuple[int, int]  # height, width as the model sees it
    original: tuple[int, int]  # height, width in the file
    grid: tuple[int, int, int]  # temporal, height, width in patches
    tokens: int  # placeholder tokens it takes in the prompt
    duration: float = 0.0  # seconds of the whole media; 0 for an image
    crop: Box | None = None  # in original pixels
    pool: int = 1  # its tokens are means over pool x pool of those that the picture was encoded to; `grid` is what is left
    region: tuple[int, int, int, int] | None = None  # rows and columns r0, c0, r1, c1 of those tokens; None is all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens by one author, with the media whose placeholders are among them."""

    author: Author
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None  # the sampler's; only a policy segment can have them
    views: tuple[View, ...] = ()
    is_fresh: bool = False  # of the world: a new prompt, behind which nothing of what came before is seen

    def __post_init__(self) -> None:
        if self.author not in AUTHOR_CODES:
            raise RolloutError("segment", f"unknown author {self.author!r}", "use world, policy or reference")
        if self.logprobs is not None and self.author != "policy":
            raise RolloutError(
                "segment",
                f"a {self.author} segment was given sampler log-probs",
                "nobody sampled these tokens: leave logprobs out",
            )
        if self.logprobs is not None and len(self.logprobs) != len(self.ids):
            raise RolloutError("segment", f"{len(self.ids)} ids but {len(self.logprobs)} log-probs")
        if self.views and self.author != "world":
            raise RolloutError("segment", f"a {self.author} segment carries media", "only the world shows pixels")
        if self.is_fresh and self.author != "world":
            raise RolloutError("segment", f"a {self.author} segment begins anew", "only the world asks anew")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One dataset row: what to ask, what to show, what is true."""

    id: str
    messages: tuple[Mapping[str, Any], ...] = ()  # chat messages; media parts are {"type": "video" | "image"} in order
    media: tuple[Media, ...] = ()
    answer: Mapping[str, Any] = field(default_factory=dict)  # e.g. {"span": (3.0, 5.0)}
    task: str = "default"
    row: Mapping[str, Any] = field(default_factory=dict)  # the whole row, every further column included
    origin: str = ""  # file:line, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What happened between one sample and one answer."""

    sample_id: str
    segments: tuple[Segment, ...]
    stop: Stop = "answered"
    weights: int = 0  # version of the policy weights that sampled it
    refused: tuple[str, ...] = ()  # why a look was not shown, for every look that was not, in order

    @property
    def contexts(self) -> tuple[tuple[Segment, ...], ...]:
        """What the model saw at a time: all segments, or, where the world asked anew, those of each prompt."""
        contexts: list[list[Segment]] = [[]]
        for segment in self.segments:
            if segment.is_fresh and contexts[-1]:
                contexts.append([])
            contexts[-1].append(segment)
        return tuple(map(tuple, contexts))

    @property
    def turns(self) -> tuple[str, ...]:
        """What was answered each time the world gave the word, in order; a turn may have several authors."""
        runs = groupby(self.segments, key=lambda s: s.author == "world")
        return tuple("".join(s.text for s in run) for is_world, run in runs if not is_world)

    @property
    def text(self) -> str:
        """The last turn."""
        return self.turns[-1] if self.turns else ""

    @property
    def answer(self) -> str | None:
        """The inside of the last `<answer>` of the last turn, or None."""
        return parsing.tagged(self.text, "answer")

    @property
    def views(self) -> tuple[View, ...]:
        """Everything that was shown, in order."""
        return tuple(v for s in self.segments for v in s.views)

    @property
    def is_reference(self) -> bool:
        """True when the annotation wrote (a part of) it."""
        return any(s.author == "reference" for s in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens that were written by the policy or the reference."""
        return sum(len(s.ids) for s in self.segments if s.author != "world")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reward may return in place of a float: `parts` and `note` go to the rollout log.

    `turns` says what each turn was worth, where that is known; `value` is the trajectory's either way.
    """

    value: float
    turns: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout and what it was worth. `parts` holds each reward by name; None means that it did not apply.

    `turns` is what each turn was worth: a reward that knows turns apart counts with the turn's own value, the others with
    the trajectory's. () is the trajectory's reward for every turn.
    """

    rollout: Rollout
    reward: float
    parts: Mapping[str, float | None]
    turns: tuple[float, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one sample: the unit of work. `muted` says why the group teaches nothing; '' when it does."""

    sample: Sample
    members: tuple[Scored, ...]
    muted: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """A rollout as per-token columns of equal length T, with its credit; one per prompt, where the world asked anew.

    Examples of one rollout stand one after the other, and all but the first continue it: they are one row of the loss.
    `advantages_T` is 0 and `sampler_T` NaN where they do not exist: a log-prob of 0.0 would mean "probability one".
    """

    sample_id: str
    ids_T: np.ndarray  # int64
    authors_T: np.ndarray  # int8, AUTHOR_CODES
    advantages_T: np.ndarray  # float32
    sampler_T: np.ndarray  # float32
    views: tuple[View, ...] = ()
    weight: float = 1.0  # 0 leaves the row out of the loss and in the group's statistics
    continues: bool = False  # a later prompt of the rollout that the example before it began


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Node:
    """A run of tokens that follows its parent's: every token sees its ancestors and, within the node, what is before it."""

    parent: int  # index in the pack; -1 for a root
    ids_T: np.ndarray  # int64
    modality_T: np.ndarray  # int8: 0 text, 1 image, 2 video
    positions_3T: np.ndarray  # int64, the family's rope index on the path from the root
    views: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pack:
    """The examples of one group as a prefix tree on the family's clock: what they have in common is there once.

    Nodes are in depth-first order, so that the descendants of a node are the nodes right behind it. `paths[i]` are the
    nodes from the root to the end of example i; their tokens, one after the other, are the example's.
    """

    examples: tuple[Example, ...]
    nodes: tuple[Node, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that a packed forward runs over."""
        return sum(len(n.ids_T) for n in self.nodes)

    @property
    def num_trained(self) -> int:
        """Trained tokens N, example by example: those that the world did not write."""
        return int(sum((e.authors_T != WORLD).sum() for e in self.examples))

    def column(self, name: str, example: int) -> np.ndarray:
        """`positions_3T` or `modality_T` along the path of one example, up to its last token."""
        return np.concatenate([getattr(self.nodes[i], name) for i in self.paths[example]], axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A pack with the log-probs that do not depend on the weights being trained; None where nobody needs them.

    `old_N` and `ref_N` are float32 tensors over the pack's trained tokens, example by example.
    """

    pack: Pack
    old_N: Any | None = None
    ref_N: Any | None = None


__all__: Sequence[str] = [
    "Author", "Batch", "Box", "Example", "Group", "Media", "Node", "Pack", "Rollout", "Sample", "Score", "Scored", "Segment",
    "Span", "Stop", "View",
]  # fmt: skip
