"""Times of arms to ratios: how many times faster `ours` is than a baseline, for the same work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft.bench.runs import Rounds

# ratio: (job, the arm of ours). Without cached vision the tower runs in ours, once per forward, as it does in the baseline.
JOBS = {
    "train": ("train", "ours-cache"),
    "train_cached_vision": ("train", "ours"),
    "logprobs": ("logprobs", "ours-cache"),
    "logprobs_cached_vision": ("logprobs", "ours"),
    "rollout": ("rollout", "ours"),
    "peak_memory": ("", "ours"),
    "short_prompt": ("", "ours"),
    "step": ("step", "ours"),
}


def ratios(rounds: Rounds, baseline: str, memory: Mapping[str, int], short: Mapping[str, float]) -> dict[str, float | None]:
    """Baseline over ours, least times; None where one of the two was not measured."""
    found = {}
    for name, (job, ours) in JOBS.items():
        if name == "peak_memory":
            pair = memory.get(baseline), memory.get(ours)
        elif name == "short_prompt":
            pair = short.get(baseline), short.get(ours)
        else:
            pair = tuple(min(times, default=None) for times in (rounds.jobs(baseline, job), rounds.jobs(ours, job)))
        found[name] = pair[0] / pair[1] if pair[0] is not None and pair[1] else None
    return found


def equality(rounds: Rounds, short: Mapping[str, Any]) -> dict[str, Any]:
    """How `ours` differs from `expanded`, and every other arm by name; the first arm that was seen is the measure."""
    arms = dict(rounds.equality)
    if "ours" not in arms or "expanded" not in arms:
        return {"grad_rel_l2": None, "arms": arms, "short_prompt": dict(short)}
    return {**arms["ours"], "arms": arms, "short_prompt": dict(short)}
