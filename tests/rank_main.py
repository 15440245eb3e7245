"""Run under a launcher by tests/equivalence/test_ranks.py: train two steps and save every step's gradient.

python -m tests.rank_main OUT MODEL DATA PHASE: writes OUT/WORLD-RANK.pt; PHASE is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rft.hf  # noqa: F401  # isort: skip  (makes torchvision importable for transformers)
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from rft.algo.guidance import Guidance
from rft.algo.losses import KL
from rft.hf.arguments import arguments
from rft.hf.models import open_policy
from rft.hf.nonfinite import Guard
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from tests.stages import flat_gradient, phase_of, recipe_of, stage_of


class Keep(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if any(p.grad is not None for p in model.parameters()):  # DeepSpeed holds its own
            self.gradients.append(flat_gradient(model).clone())


def main(out: Path, model: str, data: Path, changes: dict[str, Any]) -> None:
    PartialState(cpu=True)
    together = Together()
    kl = KL(weight=changes.pop("kl", 0.0))
    if "guidance" in changes:
        changes["guidance"] = Guidance(**changes["guidance"])
    phase = phase_of(groups_per_device=1, learning_rate=1e-5, kl=kl, **changes)
    recipe = recipe_of(phase)
    policy = open_policy(model, recipe, train=True)
    stage = stage_of(policy, phase, data)
    guard, keep = Guard(out / "nonfinite", "stop", together), Keep()
    args = arguments(recipe, "only", out / "run", world=together.size)
    trainer = GroupTrainer(policy, stage, args, together=together, guard=guard, callbacks=[guard, keep])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    torch.save(
        {"gradients": keep.gradients, "logs": logs, "accumulation": args.gradient_accumulation_steps},
        out / f"{together.size}-{together.rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
