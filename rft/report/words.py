"""A phase in words: what is maximised, normalised how, over how many rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rft.recipe import Phase, RewardSpec
from rft.rollout.perceive import PerceptionSpec

RATIO = {"gspo": "the row's mean ratio"}
MEAN = {
    "grpo": "mean over tokens, then over rows",
    "gspo": "mean over tokens, then over rows",
    "dapo": "mean over all tokens of the step",
    "bnpo": "mean over the tokens of each forward",
    "dr_grpo": "sum over tokens divided by rows x limit",
}


def looks_in_words(spec: PerceptionSpec) -> str:
    """What a rollout may look at."""
    if spec.use == "single":
        return "looks once"
    way = "each round a new prompt" if spec.context == "fresh" else "one conversation that grows"
    limits = [f"{value:g} {name.replace('_', ' ')}" for name, value in asdict(spec.budget).items() if value]
    return f"looks again: {spec.use}, {way}; up to {', '.join(limits)}"


def in_words(phase: Phase, rewards: Mapping[str, RewardSpec]) -> list[str]:
    """What the phase does, a line per subject."""
    end = f", or until {phase.until} (looked at every {phase.check_every})" if phase.until else ""
    rate = f"learning rate {phase.learning_rate:g}, {phase.schedule}"
    rate += f" after {phase.warmup_steps} warm-up steps" if phase.warmup_steps else ""
    pace = f"{phase.steps} steps{end}; {rate}"
    batch = f"{phase.groups_per_step} samples a step, {phase.groups_per_device} in a forward"
    if phase.supervised:
        return ["learns the annotations: nll, mean over tokens", batch, pace]
    goal = " + ".join(name if spec.weight == 1 else f"{spec.weight:g} {name}" for name, spec in rewards.items())
    ratio = RATIO.get(phase.objective, "each token's ratio")
    updates = (
        "on policy, one update per generation: the ratio is 1 and nothing is clipped"
        if phase.updates == 1
        else f"{phase.updates} updates per generation, the ratio clipped to [{1 - phase.clip.low:g}, {1 + phase.clip.high:g}]"
    )
    penalty = f"minus {phase.kl.weight:g} x KL ({phase.kl.estimator}) to the {phase.kl.reference}'s start"
    kl = penalty if phase.kl.weight else "no KL"
    sampling = f"temperature {phase.sampling.temperature:g}, up to {phase.sampling.max_tokens} tokens each"
    return [
        f"maximises {goal}",
        f"{phase.objective}: advantage ({phase.estimator}) x {ratio}, {MEAN[phase.objective]}; {kl}",
        updates,
        f"{phase.group_size} rollouts of each of {batch}; {sampling}",
        pace,
    ]
