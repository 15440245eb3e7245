"""A loss or gradient that is not a number: the offending batch is saved, and the run stops or skips the step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from rft.errors import RftError
from rft.hf.together import Together
from rft.types import Batch


class Guard(TrainerCallback):
    """Sees every micro-step's loss, and the gradients before every optimizer step."""

    def __init__(self, folder: Path, action: Literal["stop", "skip"], together: Together) -> None:
        self._folder, self._action, self._together = folder, action, together
        self._seen: list[Sequence[Batch]] = []
        self._losses: list[float] = []
        self.num_skipped = 0

    def see(self, batches: Sequence[Batch], loss: Tensor, step: int) -> None:
        """Remember a micro-step until its gradients are judged."""
        self._seen.append(batches)
        self._losses.append(float(loss.detach()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Judge the step on all ranks alike; with DeepSpeed the gradients are its own and only the loss is judged."""
        norms = [p.grad.detach().sum() for p in model.parameters() if p.grad is not None]
        sound = all(map(_finite, self._losses)) and (not norms or bool(torch.stack(norms).isfinite().all()))
        if self._together.any(not sound):
            self._save(state.global_step)
            if self._action == "stop":
                raise RftError(
                    f"step {state.global_step}",
                    f"the loss or a gradient is not finite (losses of this rank: {self._losses})",
                    f"the batch is in {self._folder}; lower the learning rate, or set nonfinite: skip",
                )
            self.num_skipped += 1
            for parameter in model.parameters():
                parameter.grad = None  # without a gradient the optimizer leaves a parameter alone
        self._seen, self._losses = [], []

    def _save(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"step": step, "losses": self._losses, "batches": self._seen},
            self._folder / f"step_{step}_rank_{self._together.rank}.pt",
        )


def _finite(value: float) -> bool:
    return value - value == 0
