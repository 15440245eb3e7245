"""Which samples a phase can use: those that can be asked, and whose annotation is worth what it would be taught as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rft.algo.guidance import Guidance
from rft.attempt import Attempt
from rft.errors import DataError
from rft.evaluation.contract import Finding, reference_earns_maximum
from rft.hf.voice import Voice
from rft.recipe import Phase
from rft.rollout.loop import opening
from rft.rollout.perceive import unread
from rft.rollout.reference import reference_rollout, variants
from rft.scoring import Reward
from rft.types import Sample, Segment, View


def askable(run: Attempt, voices: Sequence[Voice], name: str, phase: Phase) -> list[Sample]:
    """Training samples, as far as they can be asked in every voice of this phase; the others are named.

    Where the annotation may join a group, it has to earn the maximum: one that is reversed, say, would teach the opposite.
    """
    askable, refused = [], []
    right = run.loaded.recipe.accuracy_of(phase)
    for sample in run.splits["train"]:
        try:
            for voice in voices:
                asked = replace(sample, messages=tuple(voice.renderer.messages(sample)))
                if phase.supervised and voice.looking.is_single:
                    voice.renderer.answer_text(asked)
                elif phase.supervised:
                    reference_rollout(asked, voice.renderer, looking=replace(voice.looking, fetch=unread))
                if phase.guidance:
                    rewards = [r for r in voice.rewards if r.name in right or not right]
                    _deserves_a_seat(asked, voice, rewards, phase.guidance)
            askable.append(sample)
        except DataError as error:
            refused.append((sample.id, error))
    if run.together.rank == 0:
        for sample_id, error in refused:
            run.quarantine.refuse(sample_id, error, name)
    share, most = len(refused) / len(run.splits["train"]), run.loaded.recipe.data.max_bad_share
    if share > most + 1e-9:
        what = f"{len(refused)} samples cannot be used, more than data.max_bad_share={most:g}; the last: {refused[-1][1].what}"
        raise DataError(f"phase {name}", what, "repair or drop these samples, or raise data.max_bad_share")
    return askable


def _deserves_a_seat(sample: Sample, voice: Voice, rewards: Sequence[Reward], guidance: Guidance) -> None:
    """Raise DataError when the annotation, as the group will see it, does not earn the maximum.

    Where rollouts do not look, views are opened only if a reward fails without them.
    """
    renderer, looking = voice.renderer, replace(voice.looking, fetch=unread)

    def findings(*views: View) -> list[Finding]:
        world = Segment(author="world", text="", views=views) if looking.is_single else opening(sample, renderer, looking)
        given = {"looking": looking, "fill": guidance.fill, "field": guidance.field}
        references = [reference_rollout(s, renderer, world, **given) for s in variants(sample, guidance)]
        return reference_earns_maximum(rewards, [sample], references, {})

    if findings() and (found := findings(*(renderer.view(sample, i) for i in range(len(sample.media))))):
        raise DataError(f"sample {sample.id}", found[0].what, found[0].do)
