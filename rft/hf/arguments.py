"""A phase as a GRPOConfig: what TRL must be told so that it does our work and nothing of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import GRPOConfig

from rft.errors import RecipeError
from rft.hf.models import pick_dtype
from rft.recipe import Phase, Recipe

SUPERVISED_ROWS = 2  # TRL wants at least two rows per group; a supervised group still has one member


def rows_per_group(phase: Phase) -> int:
    """How often TRL's sampler repeats a sample: the group size, or its least when nothing is sampled."""
    return SUPERVISED_ROWS if phase.supervised else phase.group_size


def accumulation(phase: Phase, world: int, at: str) -> int:
    """Micro-steps per optimizer step.

    Raises:
        RecipeError: the groups of a step do not divide over the devices.
    """
    per_micro_step = phase.groups_per_device * world
    if phase.groups_per_step % per_micro_step:
        raise RecipeError(
            f"{at}.groups_per_step",
            f"{phase.groups_per_step} groups do not divide over {world} devices x {phase.groups_per_device} groups each",
            f"use a multiple of {per_micro_step}",
        )
    return phase.groups_per_step // per_micro_step


def arguments(recipe: Recipe, name: str, folder: Path, *, world: int, checkpointing: bool = False) -> GRPOConfig:
    """The exact configuration. Its limits on batches are explained in the tests of the seam."""
    phase = recipe.phases[name]
    rows = rows_per_group(phase)
    steps = accumulation(phase, world, f"phases.{name}")
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=phase.groups_per_device * rows,
        num_generations=rows,
        gradient_accumulation_steps=steps,
        steps_per_generation=steps,
        num_iterations=1 if phase.supervised else phase.updates,
        max_steps=phase.steps,
        beta=phase.kl.weight if not (recipe.lora or phase.supervised) else 0.0,  # makes TRL load the reference model
        max_completion_length=phase.sampling.max_tokens,
        learning_rate=phase.learning_rate,
        lr_scheduler_type=phase.schedule,
        warmup_steps=phase.warmup_steps,
        adam_beta1=phase.betas[0],
        adam_beta2=phase.betas[1],
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
        seed=recipe.seed,
        bf16=pick_dtype(recipe.dtype) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=checkpointing,
        save_strategy="no",  # `saving.py` decides
        shuffle_dataset=False,  # the rows are in the order of the whole phase
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",  # `trackers.py` calls the integrations, over all phases of a run
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        log_completions=False,
        use_vllm=False,
        eval_strategy="no",
    )
    config._n_gpu = min(1, config.n_gpu)  # without a launcher the library would wrap the model in DataParallel, in silence
    return config
