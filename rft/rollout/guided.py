"""The annotation joins groups, after the policy's rollouts were scored: gates, hints and splices need to know how it did.

A group with a certain seat sampled one fewer, and the annotation takes the place that is left. A group with a gated seat
sampled all, and a drawn member gives way to it: never the worst by choice, which would bias the group's mean. The annotation is
the last member either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rft.algo.guidance import Guidance, drawn_index, hint_length, opens
from rft.errors import DataError
from rft.rollout.loop import roll_out
from rft.rollout.perceive import Looking
from rft.rollout.policy import Limits, Policy, stream_key
from rft.rollout.reference import drawn_variant, reference_rollout
from rft.rollout.render import Renderer
from rft.types import Group, Rollout, Sample, Scored, Segment

Judge = Callable[[Sequence[tuple[Sample, Sequence[Rollout]]]], Sequence[Group]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What it takes to let the annotation in.

    `judge` scores rollouts with the phase's rewards, `accuracy` says how right a member is (1 at best), and `draw` (seed,
    step ...) with the sample keys whatever is drawn. An annotation whose look cannot be shown stays out: `put_aside` hears
    the sample's id and why.
    """

    guidance: Guidance
    size: int  # of a full group
    policy: Policy
    renderer: Renderer
    looking: Looking
    limits: Limits
    judge: Judge
    compares_siblings: bool  # some reward looks at the whole group: all are judged again when a member joins
    accuracy: Callable[[Scored], float]
    draw: tuple[object, ...]
    put_aside: Callable[[str, DataError], None]

    def join(self, groups: Sequence[Group], prompts: Sequence[Segment], wanted: Sequence[bool]) -> list[Group]:
        """The groups in order, those that want the annotation and whose gate is open with it; others as they are."""
        groups = list(groups)
        open_ones = [
            i for i, w in enumerate(wanted) if w and opens(self.guidance, [self.accuracy(m) for m in groups[i].members])
        ]
        if self.guidance.hints:
            return self._hinted(groups, prompts, open_ones)
        told = {i: self._told_of(groups[i], prompts[i]) for i in open_ones}
        open_ones = [i for i in open_ones if told[i]]
        kept = [self._seated(groups[i]) for i in open_ones]
        references = [told[i] for i in open_ones]
        if self.compares_siblings:
            pairs = [
                (groups[i].sample, (*(m.rollout for m in members), reference))
                for i, members, reference in zip(open_ones, kept, references, strict=True)
            ]
        else:
            pairs = [(groups[i].sample, (reference,)) for i, reference in zip(open_ones, references, strict=True)]
        for i, members, judged in zip(open_ones, kept, self.judge(pairs) if pairs else (), strict=True):
            whole = judged.members if self.compares_siblings else (*members, *judged.members)
            groups[i] = replace(judged, members=whole, muted=groups[i].muted or judged.muted)
        return groups

    def _seated(self, group: Group) -> tuple[Scored, ...]:
        """The members that stay: all where a seat is free, else all but a drawn one."""
        if len(group.members) < self.size:
            return group.members
        drawn = drawn_index(len(group.members), self._uniform(group.sample, "seat"))
        return (*group.members[:drawn], *group.members[drawn + 1 :])

    def _told_of(self, group: Group, prompt: Segment, *, fills: bool = True) -> Rollout | None:
        """The annotation as a rollout; None when what it asks to see cannot be shown."""
        best = max(group.members, key=self.accuracy).rollout if group.members else None
        given = {"fill": self.guidance.fill, "field": self.guidance.field, "best": best} if fills else {}
        told = self._told(group.sample, prompt)
        try:
            return reference_rollout(told, self.renderer, prompt, looking=self.looking, **given)
        except DataError as error:
            self.put_aside(group.sample.id, error)
            return None

    def _told(self, sample: Sample, prompt: Segment) -> Sample:
        """The sample with the spans that its annotation names in this group: the same ones for every hint."""
        return drawn_variant(sample, self.guidance, self.renderer, prompt, partial(self._uniform, sample))

    def _hinted(self, groups: list[Group], prompts: Sequence[Segment], failing: Sequence[int]) -> list[Group]:
        """Failing groups are sampled again behind more and more of the annotation's first turn, until a member passes."""
        for level in self.guidance.hints:
            told = {i: self._told_of(groups[i], prompts[i], fills=False) for i in failing}
            failing = [i for i in failing if told[i]]
            first = [told[i].segments[1].ids for i in failing]
            hints = [self.renderer.reply("reference", ids[: hint_length(level, len(ids))]) for ids in first]
            rollouts = roll_out(
                [groups[i].sample for i in failing],
                [prompts[i] for i in failing],
                [self.size] * len(failing),
                policy=self.policy,
                renderer=self.renderer,
                limits=self.limits,
                draw=(*self.draw, "hint", level),
                looking=self.looking,
                hints=hints,
            )
            pairs = [(groups[i].sample, rolled) for i, rolled in zip(failing, rollouts, strict=True)]
            for i, group in zip(failing, self.judge(pairs) if pairs else (), strict=True):
                groups[i] = group
            failing = [i for i in failing if opens(self.guidance, [self.accuracy(m) for m in groups[i].members])]
        return groups

    def _uniform(self, sample: Sample, *why: object) -> float:
        return stream_key(*self.draw, sample.id, *why) / 2**64
