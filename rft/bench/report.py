"""What was measured, as text: phases with their floors, ratios with what they may be trusted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GRADIENT = ("train", "train_cached_vision", "peak_memory")
LOGPROBS = ("logprobs", "logprobs_cached_vision")


def table(found: Mapping[str, Any]) -> str:
    """The whole report; `found` is what the JSON holds."""
    return "\n".join([*_heading(found), "", *_phases(found), "", *_ratios(found), *_scaling(found), *_left_out(found)])


def _heading(found: Mapping[str, Any]) -> list[str]:
    work, rates = found["work"], found["ceilings"]
    return [
        f"{work['model']} on {found['machine']}, {found['dtype']}: P={work['prompt']} ({work['visual']} visual), "
        f"C={work['completion']}, G={work['group']}" + (", gradient checkpointing" if work["checkpointing"] else ""),
        f"ceilings measured here: {rates['flops'] / 1e9:,.0f} GFLOP/s matmul, {rates['bytes'] / 1e9:,.1f} GB/s copy",
    ]


def _phases(found: Mapping[str, Any]) -> list[str]:
    """A line of seconds per arm, its floor below."""
    arms = found["arms"]
    if not arms:
        return []
    phases = list(next(iter(arms.values())))
    width = max(len(name) for name in arms) + 2
    lines = [
        f"seconds per phase, {found['clock']}; the line below each: floor, the arm's own arithmetic at the ceilings",
        " " * width + "".join(f"{phase:>14}" for phase in phases) + f"{'step':>10}{'peak MB':>10}",
    ]
    for name, seconds in arms.items():
        peak = found["memory"].get(name)
        tail = f"{found['jobs'][name]['step']['min']:10.2f}" + (f"{peak / 1e6:10.0f}" if peak else f"{'-':>10}")
        lines.append(f"{name:<{width}}" + "".join(f"{seconds[p]:14.3f}" for p in phases) + tail)
        bounds = [found["floor"][name][p] for p in phases]
        lines.append(f"{'  floor':<{width}}" + "".join(f"{'-':>14}" if b is None else f"{b:14.3f}" for b in bounds))
    return lines


def _ratios(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'ours is ... times':<24}{'expanded':>10}{'trl-fair':>10}{'ideal':>8}   same as expanded?"]
    for name, value in found["ratios"].items():
        cells = (value, found["ratios_trl_fair"].get(name))
        text = "".join(f"{'-':>10}" if c is None else f"{c:9.2f}x" for c in cells)
        lines.append(f"{name:<24}{text}{found['ideal'][name]:7.2f}x   {_same(found['equality'], name)}")
    return [*lines, f"by tokens alone, G (P + C) / (P + G C) = {found['ideal']['tokens']:.2f}"]


def _same(equality: Mapping[str, Any], name: str) -> str:
    values = equality["short_prompt"] if name == "short_prompt" else equality
    if values.get("grad_rel_l2") is None:
        return "not compared"
    gradient = f"gradient rel. L2 {values['grad_rel_l2']:.1e}, worst parameter {values['grad_worst_parameter']:.1e}"
    tokens = f"greedy tokens {'identical' if values['tokens_identical'] else 'DIFFER'}"
    logprobs = f"max |d log p| {values['logprob_max']:.1e}"
    if name in LOGPROBS:
        return logprobs
    if name == "rollout":
        return tokens
    return f"{gradient}; {tokens}" if name == "step" else gradient


def _scaling(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, points in (found.get("scaling") or {}).items():
        lines += ["", f"{name.replace('_', ' '):<24}{'G':>6}{'P/C':>8}{'train':>8}{'cached':>8}{'ideal':>8}"]
        for p in points:
            numbers = "".join(f"{p[key]:7.1f}x" for key in ("train", "train_cached_vision", "ideal"))
            lines.append(f"{'':<24}{p['group']:>6}{p['prompt'] / p['completion']:>8.1f}{numbers}")
    return lines


def _left_out(found: Mapping[str, Any]) -> list[str]:
    return [f"left out: {name}, {why}" for name, why in found["left_out"].items()]
