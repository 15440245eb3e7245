"""The step: from the samples of one generation to batches, and from batches to a loss. Read `Stage.step` aloud.

Functions of (model, groups, stage): the trainer only binds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rft.algo import ESTIMATORS, OBJECTIVES
from rft.algo.credit import accuracy_of, batch_std, compared, credit, turn_advantages
from rft.algo.diagnostics import describe
from rft.algo.filters import mute
from rft.algo.guidance import is_certain, wants_seat
from rft.algo.losses import Normaliser, policy_share
from rft.data.pack import pack, split
from rft.errors import DataError
from rft.hf.columns import columns_of
from rft.hf.generate import ModelPolicy
from rft.hf.head import plain
from rft.hf.logprobs import Lens, token_logprobs
from rft.hf.sharded import is_sharded
from rft.hf.together import Together
from rft.hf.voice import Voice, apart
from rft.quarantine import Quarantine
from rft.recipe import Phase
from rft.report.rollout_log import RolloutLog
from rft.rollout.guided import Guide
from rft.rollout.loop import opening, roll_out
from rft.rollout.perceive import ONCE, Looking
from rft.rollout.policy import Limits, stream_key
from rft.rollout.reference import reference_rollout
from rft.rollout.render import Renderer
from rft.scoring import Reward, score
from rft.types import REFERENCE, WORLD, Batch, Example, Group, Pack, Rollout, Sample, Scored, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What all ranks know of one generation: the sizes of its optimizer step, and the kinds of media in any forward."""

    normaliser: Normaliser
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a phase needs to turn samples into batches: everything but the weights.

    Groups are asked by `renderer` and judged by `rewards`; with `phase.mix` some by `mixed`, drawn per step and sample.
    """

    name: str
    phase: Phase
    seed: int
    samples: Sequence[Sample]
    renderer: Renderer
    rewards: Sequence[Reward]
    looking: Looking = ONCE
    mixed: Voice | None = None
    lens: Lens
    reference_lens: Lens | None = None  # of the reference model, where its vision tower is another one
    eos_ids: tuple[int, ...]
    quarantine: Quarantine
    vision_learns: bool = False
    max_tokens_per_pass: int = 0
    rollout_log: RolloutLog | None = None

    @property
    def limits(self) -> Limits:
        """The phase's sampling."""
        s = self.phase.sampling
        return Limits(max_tokens=s.max_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    @property
    def accuracy(self) -> dict[str, float] | None:
        """Weights of the rewards that say how right an answer is: the only one, where none is named; None is all of them."""
        names = self.phase.accuracy or [r.name for r in self.rewards if len(self.rewards) == 1]
        return {r.name: r.weight for r in self.rewards if r.name in names} or None

    @property
    def own(self) -> Voice:
        """The phase's own prompts and rewards."""
        return Voice(name="phase", renderer=self.renderer, rewards=self.rewards, looking=self.looking)

    def voice(self, sample: Sample, step: int) -> Voice:
        """What the groups of this sample are asked with at this step: the same on any rank, and in a refill."""
        mix = self.phase.mix
        is_mixed = mix is not None and stream_key(self.seed, self.name, step, sample.id, "mix") / 2**64 < mix.share
        return self.mixed if is_mixed else self.own

    def step(
        self,
        indices: Sequence[int],
        *,
        model: torch.nn.Module,
        reference: Any,
        step: int,
        together: Together,
        trainer_state: Any = None,
    ) -> tuple[list[Batch], Agreement, dict[str, list[float]]]:
        """One generation: a batch per sample, in order, what the ranks agreed on, and what to log.

        `reference(packs, kinds) -> ref_N` is called only when the KL weight is not 0. `together` holds the collectives;
        rewards in TRL's style get `trainer_state`.
        """
        together.doing("opening", [self.samples[i].id for i in indices])
        samples, prompts = self.open(indices, step)
        if self.phase.supervised:
            groups, metrics = self.annotate(samples, prompts, step), {}
        else:
            groups, metrics = self.explore(samples, prompts, model, step, together, trainer_state)
        examples = self.credit(groups, together)
        packs = [self.pack(e) for e in examples]
        if self.rollout_log:
            self._log(step, groups, examples)
        agreed = self.agree(packs, together)
        if self.lens.memory is not None:
            self.lens.memory.encode(model, (v for p in packs if self.teaches(p) for n in p.nodes for v in n.views))
        together.doing("running over what was written", [s.id for s in samples], meets=True)
        sampled = not self.phase.supervised
        old = self.log_probs(model, packs, agreed.kinds, together) if sampled and self.phase.updates > 1 else None
        ref = reference(packs, agreed.kinds) if sampled and self.phase.kl.weight else None
        batches = [Batch(pack=p, old_N=old and old[i], ref_N=ref and ref[i]) for i, p in enumerate(packs)]
        return batches, agreed, metrics

    def open(self, indices: Sequence[int], step: int) -> tuple[list[Sample], list[Segment]]:
        """Samples as they are asked at this step, with their prompts.

        One whose media cannot be read is quarantined, and another drawn in its place.
        """
        opened = [self._readable(self.samples[index], step) for index in indices]
        return [sample for sample, _ in opened], [prompt for _, prompt in opened]

    def _readable(self, sample: Sample, step: int) -> tuple[Sample, Segment]:
        """The sample, or the first that can be read from a place drawn by its id on: the same on any rank."""
        begin = self._draw(step, sample.id, "in place of")
        for place in range(len(self.samples) + 1):
            if sample.id not in self.quarantine:
                voice = self.voice(sample, step)
                try:
                    asked = replace(sample, messages=tuple(voice.renderer.messages(sample)))
                    prompt = opening(asked, voice.renderer, voice.looking)
                    for view in prompt.views:
                        self.lens.frames.get(view)  # headers can be sound and frames not
                    if self.phase.supervised and not voice.looking.is_single:  # nor is what the annotation looks at
                        reference_rollout(asked, voice.renderer, prompt, looking=voice.looking)
                    return asked, prompt
                except DataError as error:
                    self.quarantine.add(sample.id, error)
            sample = self.samples[(begin + place) % len(self.samples)]
        raise DataError(f"phase {self.name}", "no sample is left that can be read", "see quarantine.jsonl")

    def _draw(self, step: int, *why: object) -> int:
        """Index of a sample, by hash."""
        return stream_key(self.seed, self.name, step, *why) % len(self.samples)

    def annotate(self, samples: Sequence[Sample], prompts: Sequence[Segment], step: int) -> list[Group]:
        """Supervised groups: the annotation is the only member, and nobody scores it."""
        rollouts = []
        for sample, prompt in zip(samples, prompts, strict=True):
            voice = self.voice(sample, step)
            rollouts.append(reference_rollout(sample, voice.renderer, prompt, looking=voice.looking))
        return [
            Group(sample=s, members=(Scored(rollout=r, reward=0.0, parts={}),)) for s, r in zip(samples, rollouts, strict=True)
        ]

    def explore(
        self,
        samples: list[Sample],
        prompts: list[Segment],
        model: torch.nn.Module,
        step: int,
        together: Together,
        trainer_state: Any,
    ) -> tuple[list[Group], dict[str, list[float]]]:
        """Roll out, score, guide and mute; with `refill`, silent groups make room for other samples, up to n times.

        The log describes what was sampled first: guiding and refilling change what is trained on, not how the policy did.
        """
        goes_on = any(voice.looking.goes_on for voice in (self.own, self.mixed) if voice)
        policy = ModelPolicy(model, self.lens, self.eos_ids, weights=step, keeps=goes_on)
        size, guidance = self.phase.group_size, self.phase.guidance

        def judged(voice: Voice, pairs: Sequence[tuple[Sample, Sequence[Rollout]]]) -> Sequence[Group]:
            together.doing("scoring", [sample.id for sample, _ in pairs])
            groups, report = score(pairs, voice.rewards, trainer_state=trainer_state)
            for name, count in report.failed.items():
                failed[name] = failed.get(name, 0) + count
            for error in report.errors:
                print(f"step {step}: {error}", flush=True)
            return groups

        def rolled(
            samples: Sequence[Sample], prompts: Sequence[Segment], *attempt: object
        ) -> tuple[Sequence[Group], list[Group]]:
            """The groups as the policy left them, and as they are trained on."""
            draw = (self.seed, self.name, step, *attempt)
            wanted = [
                guidance is not None and wants_seat(guidance, step, stream_key(*draw, s.id, "guided") / 2**64) for s in samples
            ]
            sizes = [size - (w and is_certain(guidance)) for w in wanted]
            together.doing("rolling out", [s.id for s in samples])
            voices = [self.voice(s, step) for s in samples]

            def rolled_out(voice: Voice, places: list[int]) -> list[tuple[Rollout, ...]]:
                columns = ([column[i] for i in places] for column in (samples, prompts, sizes))
                given = {"renderer": voice.renderer, "looking": voice.looking}
                return roll_out(*columns, policy=policy, limits=self.limits, draw=draw, **given)

            rollouts = apart(voices, rolled_out)
            alone = apart(voices, lambda voice, places: judged(voice, [(samples[i], rollouts[i]) for i in places]))
            if guidance is None:
                return alone, list(mute(alone, self.advantages))

            def joined(voice: Voice, places: list[int]) -> list[Group]:
                guide = Guide(
                    guidance=guidance,
                    size=size,
                    policy=policy,
                    renderer=voice.renderer,
                    looking=voice.looking,
                    limits=self.limits,
                    judge=partial(judged, voice),
                    compares_siblings=any(r.per == "group" for r in voice.rewards),
                    accuracy=lambda member: accuracy_of(member, self.accuracy)[0],
                    draw=draw,
                    put_aside=self.quarantine.add,
                )
                return guide.join(*([column[i] for i in places] for column in (alone, prompts, wanted)))

            return alone, list(mute(apart(voices, joined), self.advantages))

        failed: dict[str, int] = {}
        alone, groups = rolled(samples, prompts)
        metrics = describe(groups)
        if guidance is not None:
            guided = describe(groups, guided=True)
            metrics = describe(alone) | {k: v for k, v in guided.items() if k == "muted" or k.startswith("reference/")}
        if self.mixed:
            metrics["mixed"] = [float(self.voice(s, step).name == self.mixed.name) for s in samples]
        for attempt in range(self.phase.refill):
            silent = [i for i, g in enumerate(groups) if g.muted]
            if not together.any(bool(silent)):
                break
            if self.rollout_log:  # what gives way is in the log as well
                self._log(step, [groups[i] for i in silent], [credit(groups[i], None) for i in silent])
            drawn = [self._draw(step, groups[i].sample.id, "refill", attempt) for i in silent]
            for i, group in zip(silent, rolled(*self.open(drawn, step), "refill", attempt)[1], strict=True):
                groups[i] = group
        return groups, metrics | {f"reward/{name}/failed": [float(n)] for name, n in failed.items() if n}

    def _log(self, step: int, groups: Sequence[Group], examples: Sequence[Sequence[Example]]) -> None:
        self.rollout_log.write(step, groups, examples, prompts=[self.voice(g.sample, step).name for g in groups])

    def advantages(self, group: Group) -> list[float]:
        """What the phase's estimator gives the turns of a group's members, up to a scale where that is the batch's."""
        params = dict(self.phase.estimator_args)
        if params.get("std") == "batch":
            params["batch_std"] = 1.0
        given = {"accuracy": self._shaped, "per": self.phase.credit, **params}
        return [a for turns in turn_advantages(group, ESTIMATORS[self.phase.estimator], **given) for a in turns]

    @property
    def _shaped(self) -> dict[str, float] | None:
        return self.accuracy if self.phase.shape_target == "accuracy" else None

    def credit(self, groups: Sequence[Group], together: Together) -> list[tuple[Example, ...]]:
        """Examples of each group; a batch-wide standard deviation is taken over all ranks."""
        if self.phase.supervised:
            return [credit(g, None) for g in groups]
        params = dict(self.phase.estimator_args)
        estimator = ESTIMATORS[self.phase.estimator]
        accuracy = self._shaped
        if params.get("std") == "batch":
            mine = [compared(g, estimator, accuracy=accuracy, **params) for g in groups]
            params["batch_std"] = batch_std([values for theirs in together.gather(mine) for values in theirs])
        given = {"per": self.phase.credit, "mask_truncated": self.phase.mask_truncated}
        given["mask_over_turns"] = self.phase.mask_over_turns
        return [credit(g, estimator, accuracy=accuracy, **given, **params) for g in groups]

    def pack(self, examples: Sequence[Example]) -> Pack:
        """A group on the family's clock."""
        lens = self.lens
        return pack(examples, family=lens.family, image_pad_id=lens.image_pad_id, video_pad_id=lens.video_pad_id)

    def teaches(self, pack: Pack) -> bool:
        """False when the gradient of a pack is exactly 0: no advantage differs from it, and nothing else pulls."""
        if self.phase.supervised or self.phase.kl.weight:
            return True
        return any(e.weight and bool(e.advantages_T.any()) for e in pack.examples)

    def passes(self, packs: Sequence[Pack], together: Together) -> list[list[Pack]]:
        """Packs in forwards of at most `max_tokens_per_pass`, as many on every rank: what is missing is empty."""
        limit = self.max_tokens_per_pass
        if not limit:
            return [list(packs)]
        passes: list[list[Pack]] = [[]]
        for part in (part for p in packs for part in split(p, limit)):
            if passes[-1] and sum(p.num_tokens for p in passes[-1]) + part.num_tokens > limit:
                passes.append([])
            passes[-1].append(part)
        return passes + [[]] * (together.most(len(passes)) - len(passes))

    @torch.no_grad()
    def log_probs(
        self, model: torch.nn.Module, packs: Sequence[Pack], kinds: frozenset[str], together: Together, lens: Lens | None = None
    ) -> list[Tensor]:
        """Per pack, float32 [N] on the CPU, empty where it teaches nothing: forwards of the same size as in training."""
        size, out = self.phase.groups_per_device, []
        for start in range(0, len(packs), size):
            chunk = packs[start : start + size]
            teaching = [p for p in chunk if self.teaches(p)]
            parts = [token_logprobs(model, one, lens or self.lens, kinds=kinds)[0] for one in self.passes(teaching, together)]
            sizes = [p.num_trained if self.teaches(p) else 0 for p in chunk]
            out += torch.cat(parts).cpu().split(sizes)
        return out

    def agree(self, packs: Sequence[Pack], together: Together) -> Agreement:
        """Sizes and media over all ranks. A generation is one optimizer step; further updates cover it again.

        Where the vision tower learns, text alone still counts as an image: parameters that one rank leaves without a
        gradient stop the others.
        """
        for news in together.gather(self.quarantine.news()):
            self.quarantine.hear(news)
        examples = [e for p in packs for e in p.examples]
        tokens = sum(map(_kept, packs))
        taught = [e for p in packs if self.teaches(p) for e in p.examples if e.weight]
        seen = sum(int((e.authors_T != WORLD).sum()) for e in taught)
        reference = 0 if self.phase.supervised else sum(int((e.authors_T == REFERENCE).sum()) for e in taught)
        forwards = -(-len(packs) // self.phase.groups_per_device)
        rows = sum(not e.continues for e in examples)
        rows, tokens, seen, forwards, reference = together.total([rows, tokens, seen, forwards, reference])
        kinds = together.union({v.kind for p in packs if self.teaches(p) for n in p.nodes for v in n.views})
        if self.vision_learns:
            kinds = kinds or {"image"}
        rounds = max(voice.looking.budget.rounds for voice in (self.own, self.mixed) if voice)
        limit = self.phase.sampling.max_tokens * rounds
        normaliser = Normaliser(rows=rows, tokens=tokens, seen=seen, reference=reference, forwards=forwards, max_tokens=limit)
        return Agreement(normaliser=normaliser, kinds=frozenset(kinds))

    def loss(
        self, model: torch.nn.Module, batches: Sequence[Batch], agreed: Agreement, together: Together
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of the step's loss that these batches carry: summed over all forwards and ranks it is the loss.

        Groups without signal are not run over; a rank that has no other takes part with a forward that weighs nothing.
        """
        normaliser = agreed.normaliser
        phase = self.phase
        temperature = 1.0 if phase.supervised else None
        batches = [b for b in batches if self.teaches(b.pack)]
        *early, last = self.passes([b.pack for b in batches], together)
        # Only the last pass goes through the wrapper and keeps its activations. The others are run again when their gradient
        # is due; a sharded model cannot do that, since its ranks gather in step.
        again = token_logprobs if is_sharded(model) else partial(checkpoint, token_logprobs, use_reentrant=False)
        inner = model if is_sharded(model) else plain(model)
        given = {"temperature": temperature, "kinds": agreed.kinds}
        parts = [again(inner, packs, self.lens, **given) for packs in early]
        parts.append(token_logprobs(model, last, self.lens, **given))
        logprobs_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
        columns = columns_of(batches, logprobs_N, guided=phase.guidance is not None and not phase.supervised)
        loss, sums = OBJECTIVES[phase.objective](
            columns,
            normaliser,
            clip_low=phase.clip.low,
            clip_high=phase.clip.high,
            kl=phase.kl,
            importance_cap=phase.importance_cap,
            off_policy=phase.off_policy,
        )
        if not normaliser.seen:  # every group of the step is silent: there is nothing to describe
            return loss, {}
        share_N = policy_share(columns, normaliser)
        metrics = {name: float(value) for name, value in sums.items()}
        metrics["entropy"] = float((entropy_N * share_N).sum())
        if not phase.supervised:
            gap_N = (logprobs_N.detach() - columns.sampler_N).abs()
            metrics["sampler_gap"] = float((gap_N.nan_to_num() * share_N).sum())
        return loss, metrics


def _kept(pack: Pack) -> int:
    """Trained tokens of the rows that are not left out."""
    return sum(int((e.authors_T != WORLD).sum()) for e in pack.examples if e.weight)
