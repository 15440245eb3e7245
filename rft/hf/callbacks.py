"""What happens beside the steps: a progress bar, the metrics file, and the condition that ends a phase."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from rft.condition import Condition

SHOWN = ("nll", "reward", "kl")  # the loss of an on-policy step is 0 by construction


class Progress(TrainerCallback):
    """One bar per phase, with an estimate of what is left and the numbers that move."""

    def __init__(self, name: str) -> None:
        self._name, self._bar = name, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=self._name, unit="step", dynamic_ncols=True, mininterval=1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {k: f"{logs[k]:.3g}" for k in SHOWN if logs and isinstance(logs.get(k), float)}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


class MetricsFile(TrainerCallback):
    """One JSON line per step in `metrics.jsonl`, with the phase and the wall clock."""

    def __init__(self, path: Path, phase: str, started: float) -> None:
        self._path, self._phase, self._started = path, phase, started

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "train_runtime" not in logs:
            self.write(state.global_step, logs)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        line = {"phase": self._phase, "step": step, "seconds": round(time.time() - self._started, 2), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class GradientDigest(TrainerCallback):
    """One JSON line per step: a hash of the gradients' bits, "" where an engine keeps them to itself."""

    def __init__(self, path: Path, phase: str) -> None:
        self._path, self._phase = path, phase

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        digest, seen = blake2b(digest_size=16), False
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                digest.update(name.encode())
                digest.update(parameter.grad.detach().cpu().contiguous().view(torch.uint8).numpy())
                seen = True
        line = {"phase": self._phase, "step": state.global_step + 1, "gradients": digest.hexdigest() if seen else ""}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Validate(TrainerCallback):
    """Evaluates every `every` steps, and ends the phase when a condition holds. Every rank asks and hears the same."""

    def __init__(
        self,
        every: int,
        evaluate: Callable[[], dict[str, float]],
        report: Callable[[int, Mapping[str, float]], None],
        *,
        until: Condition | None = None,
        known: Mapping[str, float],
    ) -> None:
        self._every, self._evaluate, self._report = every, evaluate, report
        self._until, self._known = until, known
        self.reached = False
        self.at, self.metrics = 0, dict[str, float]()  # the step that was looked at last, and what was seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every:
            return
        metrics = self._evaluate()
        self.at, self.metrics = state.global_step, metrics
        self._report(state.global_step, {f"validation/{k}": v for k, v in metrics.items()})
        if self._until and self._until.holds({**self._known, **metrics}):
            self.reached = control.should_training_stop = True
