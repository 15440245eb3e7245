"""A phase in words: what is maximised, normalised how, over how many rollouts."""

from __future__ import annotations

from rft.recipe import Phase

RATIO = {"gspo": "the row's mean ratio", "nll": ""}
MEAN = {
    "grpo": "mean over tokens, then over rows",
    "gspo": "mean over tokens, then over rows",
    "dapo": "mean over all tokens of the step",
    "bnpo": "mean over the tokens of each forward",
    "dr_grpo": "sum over tokens divided by rows x limit",
}


def in_words(phase: Phase) -> str:
    """One or two sentences."""
    batch = f"{phase.groups_per_step} samples a step, {phase.groups_per_device} per forward, {phase.steps} steps"
    end = f", ending when {phase.until}" if phase.until else ""
    if phase.supervised:
        return f"supervised on the annotations (nll, mean over tokens); {batch}{end}"
    ratio = RATIO.get(phase.objective, "each token's ratio")
    on_policy = " (1 here: one update per generation)" if phase.updates == 1 else ""
    kl = f", minus {phase.kl.weight:g} x KL ({phase.kl.estimator}) to the phase's start" if phase.kl.weight else ", no KL"
    return (
        f"{phase.objective}: advantage ({phase.estimator}) x {ratio}{on_policy}, clipped to "
        f"[{1 - phase.clip.low:g}, {1 + phase.clip.high:g}], {MEAN[phase.objective]}{kl}; "
        f"{phase.group_size} rollouts of each of {batch}{end}"
    )
