"""A stage as training builds it, small: shared by the tests of equivalence and of the seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.samples import read_samples
from rft.hf.models import LoadedModel, open_policy
from rft.hf.step import Stage
from rft.hf.together import Together
from rft.quarantine import Quarantine
from rft.recipe import Phase, Recipe, RewardSpec, Sampling, Trainable
from rft.rollout.render import Prompt, Renderer
from rft.scoring import Reward
from rft.types import Rollout, Sample

BUDGET = Budget(fps=1.0, min_pixels=784, max_pixels=1024)
PROMPTS = {"grounding": Prompt(question="{question}", answer="<answer>{span[0]:.1f} to {span[1]:.1f}</answer>")}


def length_reward(rollout: Rollout, sample: Sample) -> float:
    """Different for nearly every rollout of a random model, so that no group is without signal."""
    return len(rollout.text) / 40 + sum(map(ord, rollout.text)) % 7 / 7


def recipe_of(phase: Phase, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": "tiny",
        "trainable": Trainable(vision=True),
        "rewards": {"length": RewardSpec(use="none.py:none")},
        "phases": {"only": phase},
        "dtype": "float32",
    }
    return Recipe(**{**values, **changes})


def phase_of(**changes: Any) -> Phase:
    values: dict[str, Any] = {
        "groups_per_step": 4,
        "groups_per_device": 4,
        "group_size": 4,
        "steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "sampling": Sampling(max_tokens=6),
    }
    return Phase(**{**values, **changes})


def stage_of(
    policy: LoadedModel,
    phase: Phase,
    world: Path,
    *,
    reward: Callable[..., Any] = length_reward,
    keep: Sequence[int] | None = None,
) -> Stage:
    samples = read_samples(world / "train.jsonl")[0]
    samples = [samples[i] for i in keep] if keep is not None else samples
    renderer = Renderer(tokenizer=policy.tokenizer, family=policy.family, prompts=PROMPTS, budget=BUDGET, max_prompt_tokens=512)
    return Stage(
        name="only",
        phase=phase,
        seed=0,
        samples=[replace(s, messages=tuple(renderer.messages(s))) for s in samples],
        renderer=renderer,
        rewards=[Reward(name="length", function=reward, maximum=None)],
        lens=policy.lens(FrameStore(2**28), phase.sampling.temperature),
        eos_ids=policy.eos_ids,
        quarantine=Quarantine(None, total=len(samples), max_share=0.5),
        vision_learns=any(p.requires_grad for n, p in policy.model.named_parameters() if "visual" in n),
    )


def opened(folder: Path, phase: Phase, **changes: Any) -> LoadedModel:
    policy = open_policy(str(folder), recipe_of(phase, **changes), train=True)
    policy.model.eval()
    return policy


def gradients(policy: LoadedModel, stage: Stage, indices: Sequence[int], order: Sequence[Sequence[int]]) -> torch.Tensor:
    """Flat gradient of one optimizer step: the generation of `indices`, in micro-steps of the given slots."""
    batches, agreed, _ = stage.step(indices, model=policy.model, reference=None, step=0, together=Together())
    agreed = replace(agreed, normaliser=replace(agreed.normaliser, forwards=len(order)))
    policy.model.zero_grad()
    for slots in order:
        loss, _ = stage.loss(policy.model, [batches[i] for i in slots], agreed, Together())
        loss.backward()
    return flat_gradient(policy.model)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())
