"""A loss or gradient that is not a number: the offending batch is saved, and the run stops or skips the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from rft.errors import RecipeError, RftError
from rft.hf.together import Together
from rft.types import Batch


class Guard(TrainerCallback):
    """Judges every micro-step's loss before its backward, and the gradients before every optimizer step, on all ranks alike.

    DeepSpeed steps inside its backward and keeps the gradients to itself: there only the loss is judged, and a step cannot
    be skipped.
    """

    def __init__(self, folder: Path, action: Literal["stop", "skip"], together: Together) -> None:
        if action == "skip" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise RecipeError("nonfinite", "DeepSpeed takes a step before it can be skipped", "set nonfinite: stop")
        self._folder, self._action, self._together = folder, action, together
        self._seen: list[Sequence[Batch]] = []
        self._is_spoilt = False
        self.num_skipped = 0

    def see(self, batches: Sequence[Batch], loss: Tensor, step: int) -> None:
        """Judge the loss of a micro-step. Raises RftError when it is not finite and the run shall stop."""
        self._seen.append(batches)
        if self._together.any(not bool(loss.detach().isfinite())):
            self._spoil(step, "the loss")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Judge the gradients, and take them away where something was not finite."""
        sums = [p.grad.detach().sum() for p in model.parameters() if p.grad is not None]
        if not self._is_spoilt and self._together.any(bool(sums) and not bool(torch.stack(sums).isfinite().all())):
            self._spoil(state.global_step, "a gradient")
        if self._is_spoilt:
            self.num_skipped += 1
            if self._together.rank == 0:
                print(f"step {state.global_step}: skipped, {self.num_skipped} so far; see {self._folder}", flush=True)
            for parameter in model.parameters():
                parameter.grad = None  # without a gradient the optimizer leaves a parameter alone
        self._seen, self._is_spoilt = [], False

    def _spoil(self, step: int, what: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step}_rank_{self._together.rank}.pt"
        torch.save({"step": step, "what": what, "batches": self._seen}, path)
        if self._action == "stop":
            do = f"its batch is in {path}; lower the learning rate, or set nonfinite: skip"
            raise RftError(f"step {step}", f"{what} is not finite", do)
        self._is_spoilt = True
