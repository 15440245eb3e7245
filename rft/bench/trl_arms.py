"""The arms of TRL: a real `GRPOTrainer`, whose own methods generate, score and take the loss. It knows images and no video,
so the frames of a video go in as equal images, one per temporal patch: as many patches and tokens as the video has.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from rft.bench.arms import Arm, attend, recompute
from rft.bench.measure import Stopwatch
from rft.bench.watch import charged, watched
from rft.bench.work import BETA, Material, reward
from rft.hf.tiny import make_tiny
from rft.recipe import Tiny

TRL_ARMS: dict[str, Arm] = {
    "trl": Arm(packed=False, cached=False, windows=False),
    "trl-fair": Arm(packed=False, cached=False),
}


def make_trainer(model: Any, material: Material, optimizer: torch.optim.Optimizer, folder: Path) -> GRPOTrainer:
    """TRL's trainer on the shared model, set to the same group, completion, loss and KL weight.

    The reference is the model itself: its weights never move, and TRL would look for a copy on the hub.
    """
    work = material.work
    processor = AutoProcessor.from_pretrained(make_tiny(folder / "processor", Tiny(family=material.family.name)))
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work.group,
        num_generations=work.group,
        gradient_accumulation_steps=1,
        max_completion_length=work.completion,
        generation_kwargs={
            "min_new_tokens": work.completion,
            "suppress_tokens": [material.eos, *material.placeholders],
        },
        loss_type="grpo",
        beta=0.0,
        use_vllm=False,
        bf16=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        gradient_checkpointing=work.checkpointing,
        report_to=[],
        disable_tqdm=True,
        log_completions=False,
        save_strategy="no",
        eval_strategy="no",
        remove_unused_columns=False,
        seed=work.seed,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[_rewards],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "never read"}] * work.group),
        processing_class=processor,
        optimizers=(optimizer, None),
    )
    trainer.beta, trainer.ref_model = BETA, trainer.model
    trainer.current_gradient_accumulation_steps = 1  # what `train()` would set
    return trainer


def _rewards(completions: Sequence[Any], **_: Any) -> list[float]:
    return [reward(row) for row in range(len(completions))]


class TrlRunner:
    """One step of TRL's trainer, its phases read off its own methods."""

    def __init__(self, arm: Arm, trainer: GRPOTrainer, material: Material, optimizer: torch.optim.Optimizer) -> None:
        self.arm, self.trainer, self.material, self.optimizer = arm, trainer, material, optimizer
        self._text = _text(trainer.processing_class, material)

    def prepare(self) -> None:
        """Bring the shared model into this arm's state."""
        attend(self.trainer.model, self.arm)
        recompute(self.trainer.model, self.material.work.checkpointing)

    def step(self, watch: Stopwatch) -> None:
        """One whole step with cold frames."""
        self.prepare()
        trainer, model = self.trainer, self.trainer.model
        model.train()
        with ExitStack() as stack:
            stack.enter_context(watched(model, watch, self.material.work.group))
            for owner, name, phase, job in (
                (trainer, "_generate_single_turn", "decode tokens", "rollout"),
                (trainer, "_tokenize_prompts", "preprocess", None),
                (trainer, "_calculate_rewards", "reward", "reward"),
                (type(trainer.processing_class), "__call__", "preprocess", None),
            ):
                stack.enter_context(charged(owner, name, watch, phase, job))
            stack.enter_context(watch.job("step", "other"))
            rows = self.look(watch)
            with charged(trainer, "_get_per_token_logps_and_entropies", watch, "old/ref", "logprobs"):
                inputs = trainer._prepare_inputs(rows)
            self.train(inputs, watch)
            with watch.job("optimizer", "optimizer"):
                self.optimizer.step()
        model.eval()

    def look(self, watch: Stopwatch) -> list[dict[str, Any]]:
        """The rows of one group, their pictures decoded once."""
        images = []
        with watch.job("look", "decode"):
            for view in self.material.views:
                frames = self.material.lens().frames.get(view)
                images = [Image.fromarray(frame) for frame in frames[:: self.material.family.temporal_patch]]
        row = {"prompt": [{"role": "user", "content": self._text}]} | ({"images": images} if images else {})
        return [dict(row) for _ in range(self.material.work.group)]

    def train(self, inputs: dict[str, Any], watch: Stopwatch) -> None:
        """TRL's loss and its backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with watch.job("train", "train forward"):
            loss = self.trainer.compute_loss(self.trainer.model, inputs)
            with watch.phase("backward"):
                loss.backward()


def _text(processor: Any, material: Material) -> str:
    """Digits, each a token, that bring the prompt with its pictures to the length of the video prompt."""
    pictures = material.view.grid[0] if material.view else 0
    template = processor.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False)
    around = len(processor.tokenizer.encode(template, add_special_tokens=False)) + 2 * pictures
    shown = material.view.tokens if material.view else 0
    return "7" * (len(material.prompt) - around - shown)
