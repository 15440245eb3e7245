"""Run by tests/equivalence/test_shared_ranks.py, under a launcher or in its own process: short trainings, one after another.

python -m tests.equivalence.shared_main OUT DATA CASES: CASES is JSON, the fields of `Case` by name; writes
OUT/WORLD-RANK.pt, by name what `run` returns.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rft.hf  # noqa: F401  # isort: skip  (makes torchvision importable for transformers)
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rft.hf import head
from rft.hf.arguments import arguments
from rft.hf.models import LoadedModel, open_policy
from rft.hf.nonfinite import Guard
from rft.hf.sharded import gathered
from rft.hf.step import Stage
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from rft.recipe import KL, Lora, Phase, Recipe, Trainable
from rft.types import Pack, Rollout, Sample
from tests.stages import length_reward, phase_of, recipe_of, stage_of

ROOM = 2**24  # bytes of remembered vision
PATIENCE = 150.0  # seconds for a case


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A training: two optimizer steps over groups of three modalities."""

    model: str
    sharing: str = "packed"
    parts: Sequence[str] = ("vision", "projector", "language")  # that learn
    lora: bool = False
    kl: float = 0.0
    updates: int = 1
    groups: int = 4  # of a step, over all ranks
    checkpointing: bool = False
    remembers: bool = True  # what a frozen tower made
    silent: int | Sequence[str] = -1  # samples, or the rank, whose rollouts all get the same reward
    spares: bool = True  # groups without signal
    max_tokens_per_pass: int = 0
    chunk: int = 0  # tokens scored at once
    fsdp: str = ""  # how the model is sharded; then no trainer

    @property
    def recipe(self) -> Recipe:
        """The recipe that asks for it."""
        phase = phase_of(
            groups_per_device=1,
            groups_per_step=self.groups,
            learning_rate=1e-4,
            kl=KL(weight=self.kl),
            updates=self.updates,
            objective="dapo",
        )
        trainable = Trainable(**{part: part in self.parts for part in ("vision", "projector", "language")})
        lora = Lora(rank=4, alpha=8) if self.lora else None
        return recipe_of(phase, sharing=self.sharing, trainable=trainable, lora=lora)


class Ears(Together):
    """Remembers what this rank said of its passes."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def most(self, value: int) -> int:
        self.passes.append(value)
        return super().most(value)


class Thorough(Stage):
    """Runs over every group."""

    def teaches(self, pack: Pack) -> bool:
        return True


class Keep(TrainerCallback):
    """The full gradient of every optimizer step, zeros where there is none."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        learning = [p for p in model.parameters() if p.requires_grad]
        if any(p.grad is not None for p in learning):  # DeepSpeed holds its own
            self.gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]))

    def listen(self, engine: Any) -> None:
        """Ask DeepSpeed's `engine` before each of its steps, on every rank."""
        from deepspeed.utils import safe_get_full_grad

        step = engine.step

        def asked(*args: Any, **kwargs: Any) -> Any:
            learning = [p for p in engine.module.parameters() if p.requires_grad]
            self.gradients.append(torch.cat([safe_get_full_grad(p).flatten().clone() for p in learning]))
            return step(*args, **kwargs)

        engine.step = asked


def run(case: Case, out: Path, data: Path, together: Ears) -> dict[str, Any]:
    """Gradients of every step, logs, the ids of the samples that this rank met, and how many passes it wanted, call by call."""
    torch.manual_seed(0)  # adapters begin at random
    recipe = case.recipe
    phase = recipe.phases["only"]
    policy = open_policy(case.model, recipe, train=True)
    met: list[str] = []
    lengths: set[int] = set()

    def reward(rollout: Rollout, sample: Sample) -> float:
        met.append(sample.id)
        lengths.add(len(rollout.segments[-1].ids))
        is_silent = together.rank == case.silent if isinstance(case.silent, int) else sample.id in case.silent
        return 0.5 if is_silent else length_reward(rollout, sample)

    stage = _stage(case, policy, phase, data, reward)
    chunk = case.chunk * 4 * policy.model.config.text_config.vocab_size or head.CHUNK_BYTES
    with patch.object(head, "CHUNK_BYTES", chunk):
        if case.fsdp:
            gradients, logs = _sharded(case, policy, stage, together), []
        else:
            gradients, logs = _trained(case, policy, stage, out, together)
    passes, together.passes = together.passes, []
    return {"gradients": gradients, "logs": logs, "met": sorted(set(met)), "lengths": lengths, "passes": passes}


def _stage(case: Case, policy: LoadedModel, phase: Phase, data: Path, reward: Callable[..., float]) -> Stage:
    """As training builds it. Some ordinary tokens end an answer, so that lengths differ."""
    stage = stage_of(policy, phase, data, reward=reward)
    frames = stage.lens.frames
    lens = replace(stage.lens, memory=policy.memory(frames, ROOM) if case.remembers else None)
    reference = lens.memory is None and case.remembers
    stage = replace(
        stage,
        lens=lens,
        reference_lens=replace(lens, memory=policy.reference_memory(frames, ROOM)) if reference else None,
        max_tokens_per_pass=case.max_tokens_per_pass,
        eos_ids=(*stage.eos_ids, *range(0, 400, 6)),
    )
    return stage if case.spares else Thorough(**{f.name: getattr(stage, f.name) for f in fields(Stage)})


def _trained(
    case: Case, policy: LoadedModel, stage: Stage, out: Path, together: Together
) -> tuple[list[torch.Tensor], list[Mapping[str, float]]]:
    guard, keep = Guard(out / "nonfinite", "stop", together), Keep()
    args = arguments(case.recipe, "only", out / "run", world=together.size, checkpointing=case.checkpointing)
    trainer = GroupTrainer(policy, stage, args, together=together, guard=guard, callbacks=[guard, keep])

    class Begin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if trainer.is_deepspeed_enabled:
                keep.listen(trainer.deepspeed)

    trainer.add_callback(Begin())
    trainer.train()
    trainer.accelerator.free_memory()
    return keep.gradients, [log for log in trainer.state.log_history if "grad_norm" in log]


def _sharded(case: Case, policy: LoadedModel, stage: Stage, together: Together) -> list[torch.Tensor]:
    """Of one generation, in micro-steps of different media: the expanded gradient of all ranks, and the sharded model's."""
    model = policy.model.eval()
    indices = range(together.rank, 4, together.size)
    batches, agreed, _ = stage.step(indices, model=model, reference=None, step=0, together=together)

    def gradient(stage: Stage) -> list[torch.Tensor]:
        for batch in batches:
            (stage.loss(model, [batch], agreed, together)[0] * together.size).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]

    oracle = replace(stage, lens=replace(stage.lens, sharing="expanded", memory=None), max_tokens_per_pass=0)
    whole = torch.cat([g.flatten() for g in gradient(oracle)])
    dist.all_reduce(whole)
    model.zero_grad()
    shard(model, case.fsdp)
    with gathered(model):  # the ranks decode different numbers of tokens
        again, _, _ = stage.step(indices, model=model, reference=None, step=0, together=together)
    written = [[e.ids_T.tolist() for b in made for e in b.pack.examples] for made in (batches, again)]
    assert written[0] == written[1]
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = gradient(stage)
    assert all(isinstance(g, DTensor) and g.to_local().numel() < g.numel() for g in parts if g.numel() > 1)
    return [whole / together.size, torch.cat([g.full_tensor().flatten() for g in parts])]


def shard(model: Any, how: str) -> None:
    """`blocks`: units as the library's wrapping by layer class makes them. `parts`: also tower, mergers and embeddings.

    The embeddings are one unit with the head that is tied to them. Where the tower's states are remembered its mergers run
    without it, so a tower that is a unit leaves them to units of their own.
    """
    inner, visual = model.model, model.model.visual
    units: list[Any] = list(inner.language_model.layers)
    if how == "parts":
        mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
        units += [*mergers, visual, [inner.language_model.embed_tokens, model.lm_head]]
    else:
        units += visual.blocks
    for unit in [*units, model]:
        fully_shard(unit)


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
