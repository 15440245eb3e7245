"""All arms in one run: rounds in ABBA order, gradients compared as they come, the short prompt, the sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rft.bench.arms import Outcome
from rft.bench.measure import PHASES, Stopwatch, abba
from rft.bench.stand import Stand

SHORT_TEXT = 32  # tokens of the short prompt
GROUPS = (2, 4, 8, 16)
LENGTHS = (2, 4, 16, 64)  # prompt over completion


@dataclass(slots=True)
class Rounds:
    """What the rounds of each arm gave, in order."""

    watches: dict[str, list[Stopwatch]] = field(default_factory=dict)
    equality: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def jobs(self, arm: str, job: str) -> list[float]:
        """Seconds of one job in every round; where looking costs time, in those that were not looked into."""
        watches = self.watches.get(arm, [])
        return [w.jobs[job] for w in [w for w in watches if not w.phases] or watches if job in w.jobs]

    def phases(self, arm: str) -> dict[str, float]:
        """Seconds of each phase in the fastest profiled round."""
        fastest = min((w for w in self.watches[arm] if w.phases), key=lambda w: w.jobs["step"])
        return {phase: fastest.phases.get(phase, 0.0) for phase in PHASES}


class Compared:
    """Gradients and results of arms, against those of the first that is shown."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._grads: dict[str, Tensor] = {}
        self._first: Outcome | None = None

    def see(self, outcome: Outcome) -> dict[str, Any]:
        """How the gradients on the model, and the outcome, differ from the first: every parameter counts."""
        grads = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
        if self._first is None:
            self._grads = {n: g.detach().to("cpu", copy=True) for n, g in grads.items()}
            self._first = outcome
        off = on = worst = 0.0
        for name, base in self._grads.items():
            base = base.to(grads[name].device, torch.float64) if name in grads else base.double()
            gap = float((grads[name].double() - base).norm()) if name in grads else float(base.norm())
            norm = float(base.norm())
            off, on, worst = off + gap**2, on + norm**2, max(worst, gap / norm if norm else gap)
        return {
            "grad_rel_l2": (off / on) ** 0.5 if on else off**0.5,
            "grad_worst_parameter": worst,
            "same_parameters": grads.keys() == self._grads.keys(),
            "logprob_max": float((outcome.logprobs_N - self._first.logprobs_N).abs().max()),
            "tokens_identical": outcome.tokens == self._first.tokens,
        }


def all_arms(stand: Stand, names: Sequence[str], rounds: int, say: Callable[[str], None]) -> Rounds:
    """Warm up, then every arm once per round. An arm that runs out of GPU memory is left out, and said so.

    CPU: the timed rounds are profiled too, which costs nothing; CUDA: a round of its own is, behind synchronized edges.
    """
    device = next(stand.model.parameters()).device
    is_cuda = device.type == "cuda"
    found, compared, runners = Rounds(), Compared(stand.model), {}
    work = stand.material.work
    small = stand if is_cuda else stand.with_work(replace(work, frames=min(work.frames, 2), group=2, completion=2))
    for name in names:
        runners[name] = stand.runner(name)
        if is_cuda or not name.startswith("trl"):  # on a CPU one round of TRL is long enough to hide what warming up saves
            warm = runners[name] if small is stand else small.runner(name)
            _guarded(found, name, lambda warm=warm: warm.step(Stopwatch(device)), say)
    plan = [(name, not is_cuda) for name in abba(names, rounds)] + [(name, True) for name in names if is_cuda]
    for name, profiled in plan:
        if name in found.left_out:
            continue
        watch = Stopwatch(device, profiled=profiled)
        outcome = _guarded(found, name, lambda name=name, watch=watch: runners[name].step(watch), say)
        if name in found.left_out:
            continue
        if outcome is not None and name not in found.equality:
            found.equality[name] = compared.see(outcome)
        found.watches.setdefault(name, []).append(watch)
        say(f"{name}: step {watch.jobs['step']:.2f} s, train {watch.jobs['train']:.2f} s")
    return found


def _guarded(found: Rounds, name: str, work: Callable[[], Any], say: Callable[[str], None]) -> Any:
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        found.left_out[name] = "out of GPU memory"
        found.watches.pop(name, None)
        say(f"{name}: left out, out of GPU memory")
    return None


def train_only(stand: Stand, names: Sequence[str], rounds: int) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Least seconds of a train step of each arm, and how gradients compare; warmed up, in ABBA order."""
    device = next(stand.model.parameters()).device
    compared, times, equality = Compared(stand.model), {}, {}
    for turn, name in enumerate([*names, *abba(names, rounds)]):
        runner, watch = stand.runner(name), Stopwatch(device, profiled=False)
        runner.prepare()
        logprobs_N = runner.train(runner.look(watch), watch)
        if turn < len(names):
            equality[name] = compared.see(Outcome(tokens=(), logprobs_N=logprobs_N))
        else:
            times[name] = min(times.get(name, float("inf")), watch.jobs["train"])
    return times, equality


def short_prompt(stand: Stand, rounds: int = 4) -> tuple[dict[str, float], dict[str, Any], Stand]:
    """Train steps on a short text prompt, where sharing can win nothing much: it must not lose."""
    short = stand.with_work(replace(stand.material.work, frames=0, text=SHORT_TEXT))
    times, equality = train_only(short, ("expanded", "ours"), rounds)
    return times, equality["ours"], short


def sweep(stand: Stand, say: Callable[[str], None]) -> dict[str, list[dict[str, float]]]:
    """Speed-up of a train step over the group size, and over prompt / completion, beside G (P + C) / (P + G C)."""
    work, prompt = stand.material.work, len(stand.material.prompt)
    plans: Mapping[str, list[Any]] = {
        "group": [replace(work, group=g) for g in GROUPS],
        "prompt_over_completion": [replace(work, completion=max(1, prompt // r)) for r in LENGTHS],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, works in plans.items():
        found[name] = []
        for one in works:
            times, _ = train_only(stand.with_work(one), ("expanded", "ours-cache", "ours"), 1)
            g, c = one.group, one.completion
            point = {
                "group": g,
                "prompt": prompt,
                "completion": c,
                "train": times["expanded"] / times["ours-cache"],
                "train_cached_vision": times["expanded"] / times["ours"],
                "ideal": g * (prompt + c) / (prompt + g * c),
            }
            found[name].append(point)
            say(f"G={g} C={c}: {point['train']:.1f}x, cached {point['train_cached_vision']:.1f}x, ideal {point['ideal']:.1f}x")
    return found
