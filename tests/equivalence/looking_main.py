"""Run by tests/equivalence/test_looking_ranks.py, under a launcher or in its own process: trainings of rollouts that look.

python -m tests.equivalence.looking_main OUT DATA CASES: CASES is JSON, the fields of `Case` by name; writes
OUT/WORLD-RANK.pt, by name what `run` returns.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rft.hf  # noqa: F401  # isort: skip  (makes torchvision importable for transformers)
import torch
from transformers import TrainerCallback

from rft.hf.arguments import arguments
from rft.hf.models import open_policy
from rft.hf.nonfinite import Guard
from rft.hf.trainer import GroupTrainer
from rft.recipe import KL, Recipe, Trainable
from rft.rollout.perceive import Allowance
from rft.types import Rollout, Sample
from tests.equivalence.shared_main import Ears, Keep
from tests.looking import Pointing, Wandering, looking_stage, worth
from tests.stages import phase_of, recipe_of

PATIENCE = 100.0  # seconds for a case
LEVELS = {"pixels": Trainable(vision=True), "states": Trainable(), "features": Trainable(projector=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two optimizer steps in which the rollouts of the ranks take different numbers of rounds."""

    model: str
    context: str = "append"
    level: str = "pixels"  # what forwards share of the tower's work
    rounds: Sequence[int] | Mapping[str, int] = (1, 3)  # of the rollouts of each rank, or of each sample
    replay: bool = False
    sharing: str = "packed"
    kl: float = 0.0
    updates: int = 1
    max_tokens_per_pass: int = 0
    checkpointing: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe that asks for it."""
        phase = phase_of(
            groups_per_device=1,
            groups_per_step=2,
            group_size=3,
            learning_rate=1e-5,
            kl=KL(weight=self.kl),
            updates=self.updates,
        )
        return recipe_of(phase, sharing=self.sharing, trainable=LEVELS[self.level])


def run(case: Case, out: Path, data: Path, together: Ears) -> dict[str, Any]:
    """Gradients of every step, logs, and by sample that this rank met the turns of its rollouts."""
    torch.manual_seed(0)
    recipe = case.recipe
    phase = recipe.phases["only"]
    policy = open_policy(case.model, recipe, train=True)
    turns: dict[str, list[int]] = {}

    def reward(rollout: Rollout, sample: Sample) -> float:
        turns.setdefault(sample.id, []).append(len(rollout.turns))
        return worth(rollout, sample)

    budget = Allowance(rounds=3)

    def make() -> Wandering | Pointing:
        wanted = case.rounds if isinstance(case.rounds, Mapping) else Everywhere(case.rounds[together.rank])
        return Pointing(wanted=wanted) if case.replay else Wandering(budget=budget, frames=4, turns=wanted)

    room = 2**24 if case.level != "pixels" and case.sharing == "packed" else None
    ends = range(0, 400, 20) if case.replay else range(0, 400, 2)
    stage = looking_stage(policy, phase, data, (make, budget), case.context, room=room, ends=ends, reward=reward)
    frames, lens = stage.lens.frames, stage.lens
    own = lens.memory is None and case.kl > 0 and case.sharing == "packed"  # the reference's tower has a memory of its own
    remembered = replace(lens, memory=policy.reference_memory(frames, 2**24)) if own else None
    stage = replace(stage, reference_lens=remembered, max_tokens_per_pass=case.max_tokens_per_pass)
    guard, keep = Guard(out / "nonfinite", "stop", together), Keep()
    args = arguments(recipe, "only", out / "run", world=together.size, checkpointing=case.checkpointing)
    trainer = GroupTrainer(policy, stage, args, together=together, guard=guard, callbacks=[guard, keep])

    class Begin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if trainer.is_deepspeed_enabled:
                keep.listen(trainer.deepspeed)

    trainer.add_callback(Begin())
    trainer.train()
    trainer.accelerator.free_memory()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    passes, together.passes = together.passes, []
    return {"gradients": keep.gradients, "logs": logs, "turns": turns, "passes": passes}


class Everywhere(dict):
    """The same number for every sample."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get(self, key: str, default: int = 0) -> int:
        return self.number


def main(out: Path, data: Path, cases: Mapping[str, Mapping[str, Any]]) -> None:
    together = Ears.join()
    results = {}
    for name, case in cases.items():
        faulthandler.dump_traceback_later(PATIENCE, exit=True)  # ranks that wait for each other say where, and end
        results[name] = run(Case(**case), out, data, together)
    faulthandler.cancel_dump_traceback_later()
    torch.save(results, out / f"{together.size}-{together.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
