"""Perceptions that look again whatever a random model says, and stages whose rollouts have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rft import parsing
from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.views import Look
from rft.hf.models import LoadedModel
from rft.hf.step import Agreement, Stage
from rft.hf.together import Together
from rft.recipe import Phase
from rft.rollout.perceive import Allowance, Final, Looking, Perception, State, Turn, Ways
from rft.rollout.perceptions import Iterative, Replay
from rft.rollout.policy import stream_key
from rft.types import Batch, Group, Rollout, Sample, View
from tests.stages import length_reward, stage_of

ALONE = Together()
EVERY = (0, 1, 2)
WIDE = Budget(fps=1.0, min_pixels=4 * 784, max_pixels=4 * 1024)  # pairs of 2 x 2 tokens
ENDS = range(0, 400, 3)  # a third of all tokens end a turn: most rollouts may go on, and their lengths differ


@dataclass(kw_only=True)
class Wandering(Iterative):
    """Iterative perception where a reply without a clue names one all the same: its words decide where, and how often."""

    turns: Mapping[str, int] = field(default_factory=dict)  # by sample; for the others, one to three by the first reply
    blank: bool = False  # some turns show nothing new

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        if not parsing.blocks(reply, ("clue",)):
            if state.round >= self.turns.get(state.sample.id, 1 + stream_key(state.replies[0]) % 3):
                return Final()
            draw = stream_key(*state.replies)
            if self.blank and draw % 2:
                return Turn(text="Nothing is there. Look elsewhere.", looks=(), refused=("outside",))
            begin = draw % 6
            reply = f"<clue>{begin} to {begin + 2}</clue>"
        return super().observe(reply, media, state)


@dataclass(kw_only=True)
class Pointing(Replay):
    """Replay where a reply is cut behind any of some letters, and its words decide which region follows, if any."""

    wanted: Mapping[str, int] = field(default_factory=dict)  # turns by sample; for the others the words decide

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple("aeiourstn")

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        draw = stream_key(reply, state.round)
        wanted = self.wanted.get(state.sample.id, 1 if draw % 4 == 0 else state.rounds)
        if not any(stop in reply for stop in self.stops) or state.round >= wanted:
            return Final()
        if draw % 5 == 0:
            return Turn(looks=(), refused=("unparsable",), inline=True)
        x, y = (draw >> 8) % 14, (draw >> 16) % 14
        region = (x, y, x + 4 + (draw >> 24) % 14, y + 4 + (draw >> 32) % 14)
        return Turn(looks=[Look(of=state.views[0], region=region)], inline=True)


def wandering(rounds: int = 3, **given: Any) -> tuple[Callable[[], Perception], Allowance]:
    budget = Allowance(rounds=rounds)
    return lambda: Wandering(budget=budget, frames=4, **given), budget


def pointing(rounds: int = 3) -> tuple[Callable[[], Perception], Allowance]:
    return Pointing, Allowance(rounds=rounds)


def looking_stage(
    policy: LoadedModel,
    phase: Phase,
    data: Path,
    how: tuple[Callable[[], Perception], Allowance] | None,
    context: Ways = "append",
    *,
    frames: FrameStore | None = None,
    room: int | None = 2**24,
    ends: Sequence[int] = ENDS,
    reward: Callable[..., Any] | None = None,
    keep: Sequence[int] | None = None,
    **changes: Any,
) -> Stage:
    """As training builds it; `how` None is a plain rollout, `room` None remembers nothing of what the tower made."""
    stage = stage_of(policy, phase, data, reward=reward or worth, keep=keep)
    frames = frames or FrameStore(2**28)
    memory = None if room is None else policy.memory(frames, room)
    make, budget = how or (None, None)
    looking = Looking(make=make, context=context, budget=budget, fetch=frames.get) if make else Looking(fetch=frames.get)
    values = {
        "lens": policy.lens(frames, phase.sampling.temperature, memory=memory),
        "renderer": replace(stage.renderer, budget=WIDE, max_prompt_tokens=1024),
        "eos_ids": (*stage.eos_ids, *ends),
        "looking": looking,
    }
    return replace(stage, **{**values, **changes})


def worth(rollout: Rollout, sample: Sample) -> float:
    """Different for nearly every rollout, whichever of its turns differs."""
    return length_reward(rollout, sample) + sum(map(ord, "".join(rollout.turns))) % 5 / 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    groups: Sequence[Group]
    batches: Sequence[Batch]
    agreed: Agreement

    @property
    def rollouts(self) -> list[Rollout]:
        return [m.rollout for g in self.groups for m in g.members]


def generation(model: torch.nn.Module, stage: Stage, indices: Sequence[int] = EVERY, step: int = 0) -> Generation:
    """What `Stage.step` does when one update is made of a generation, and the groups that it came from."""
    samples, prompts = stage.open(indices, step)
    if stage.phase.supervised:
        groups = stage.annotate(samples, prompts, step)
    else:
        groups, _ = stage.explore(samples, prompts, model, step, ALONE, None)
    packs = [stage.pack(e) for e in stage.credit(groups, ALONE)]
    agreed = stage.agree(packs, ALONE)
    if stage.lens.memory is not None:
        stage.lens.memory.encode(model, (v for p in packs for n in p.nodes for v in n.views))
    return Generation(groups=groups, batches=[Batch(pack=p) for p in packs], agreed=agreed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    loss: torch.Tensor
    metrics: Mapping[str, float]
    gradients: Mapping[str, torch.Tensor]

    @property
    def flat(self) -> torch.Tensor:
        return torch.cat([g.flatten() for g in self.gradients.values()])


def taught_by(model: torch.nn.Module, stage: Stage, batches: Sequence[Batch], agreed: Agreement) -> Taught:
    """Loss and gradient of the batches in one micro-step; zeros where a parameter has none."""
    model.zero_grad()
    loss, metrics = stage.loss(model, batches, agreed, ALONE)
    loss.backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learning.items()}
    return Taught(loss=loss.detach(), metrics=metrics, gradients=gradients)


def expanded(stage: Stage) -> Stage:
    """The oracle's: pixels in every forward, a row per prompt of every rollout, all in one pass."""
    return replace(stage, lens=replace(stage.lens, sharing="expanded", memory=None), max_tokens_per_pass=0)
