"""The seam with TRL: a GRPOTrainer whose rows are groups. Only overrides; what they do is in `step.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from rft.algo.diagnostics import shares
from rft.errors import RolloutError
from rft.hf.attention import install
from rft.hf.compat import reload_weights
from rft.hf.head import plain
from rft.hf.models import LoadedModel
from rft.hf.nonfinite import Guard
from rft.hf.saving import Saver
from rft.hf.sharded import gathered
from rft.hf.step import Stage
from rft.hf.together import Together
from rft.types import Batch, Pack


class GroupTrainer(GRPOTrainer):
    """Trains one phase. TRL keeps its sampler, buffer, reference model, accelerate and checkpoints; the rest is ours.

    `reference` is the folder of the reference model; by default it is the one that the policy was loaded from.
    """

    def __init__(
        self,
        policy: LoadedModel,
        stage: Stage,
        args: GRPOConfig,
        *,
        together: Together,
        guard: Guard,
        saver: Saver | None = None,
        reference: str = "",
        evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        ahead: Callable[[Sequence[int]], None] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.stage, self.together, self.guard, self._evaluate, self._ahead = stage, together, guard, evaluate, ahead
        self._sums: dict[str, float] = {}
        self._saver = saver
        asked = order(
            len(stage.samples),
            at_once=args.generation_batch_size // args.num_generations,
            generations=-(-args.max_steps // args.num_iterations),
            seed=args.seed,
        )
        with _named(policy.model, reference):
            super().__init__(
                model=policy.model,
                reward_funcs=[_never_called],
                args=args,
                train_dataset=Dataset.from_dict({"sample": asked, "prompt": [""] * len(asked)}),
                processing_class=policy.processor,
                callbacks=list(callbacks),
            )
        if is_deepspeed_zero3_enabled() or self.accelerator.is_fsdp2:
            # a sharded reference answers in its own forward only, on all ranks alike
            self.stage = replace(stage, reference_lens=None)
        if self.ref_model is not None and stage.lens.sharing == "packed":
            install(self.accelerator.unwrap_model(self.ref_model))
        if ahead:
            self.data_collator = self._met
        self.remove_callback(PrinterCallback)  # `metrics.jsonl` has every number
        args.ddp_find_unused_parameters = False  # TRL turns it on for every VLM; it breaks a second forward

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if isinstance(model, DistributedDataParallel):
            settle_buckets(model)
        return model, loader

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        indices = [row["sample"] for row in inputs[:: self.num_generations]]
        if len(indices) % self.args.steps_per_generation:
            raise RolloutError("generation", f"{len(indices)} groups do not fill {self.args.steps_per_generation} micro-steps")
        with self.at_rest() as model:
            batches, agreed, values = self.stage.step(
                indices,
                model=model,
                reference=self._reference,
                step=self.state.global_step,
                together=self.together,
                trainer_state=self.state,
            )
        for name, mean in self.together.means(values).items():
            self._metrics["train"][name].append(mean)
        # TRL reads the first value's length, and shuffles and splits lists that have one entry per row
        return {"sample": torch.tensor(indices), "batch": batches, "agreed": [agreed] * len(batches)}

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        batches: list[Batch] = inputs["batch"]
        if not batches:
            what = "TRL split the batch below one group: a bug, report it"
            raise RolloutError("loss", "a micro-step without groups", what)
        self.together.doing("training", [e.sample_id for b in batches for e in b.pack.examples[:1]], meets=True)
        loss, sums = self.stage.loss(model, batches, inputs["agreed"][0], self.together)
        self.guard.see(batches, loss, self.state.global_step)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if (self._step + 1) % self.current_gradient_accumulation_steps == 0:
            for name, value in shares(self.together.sums(self._sums)).items():
                self._metrics["train"][name].append(value)
            self._sums = {}
        return loss * self.together.size  # DDP and ZeRO average over ranks; the normaliser already spans them

    def _met(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The loader is one generation ahead of the training: what it meets is decoded meanwhile."""
        self._ahead(list(dict.fromkeys(row["sample"] for row in rows)))
        return rows

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The trainer's own state; TRL would add a model card to it."""
        if self._saver is None:
            raise RolloutError("checkpoint", "nobody said where checkpoints go", "give the trainer a saver")
        self._saver.save(lambda: super(GRPOTrainer, self)._save_checkpoint(model, trial), self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not reload_weights(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Our evaluation on the validation split, by the code that evaluates everywhere else."""
        with self.at_rest() as model:
            return self._evaluate(model) if self._evaluate else {}

    @contextmanager
    def at_rest(self) -> Iterator[torch.nn.Module]:
        """The plain model in eval mode, gathered and without checkpointing; training mode comes back afterwards."""
        checkpointing = self.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gradient_checkpointing_kwargs=checkpointing
            ) as model,
            gathered(model),
            self.accelerator.autocast(),
        ):
            was_training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(was_training)

    def _reference(self, packs: Sequence[Pack], kinds: frozenset[str]) -> list[Tensor]:
        """Log-probs under a frozen copy of the phase's or the run's start, or under the model without its adapter."""
        if self.ref_model is not None:
            return self._from(self.ref_model, packs, kinds)
        model = self.accelerator.unwrap_model(self.model)
        with model.disable_adapter():
            return self._from(model, packs, kinds)

    def _from(self, model: Any, packs: Sequence[Pack], kinds: frozenset[str]) -> list[Tensor]:
        """Where the tower learns, the reference's own tower has a memory of its own: its weights never change."""
        lens = self.stage.reference_lens or self.stage.lens
        if lens.memory is not None and lens is not self.stage.lens:
            lens.memory.encode(plain(model), (v for p in packs for n in p.nodes for v in n.views))
        return self.stage.log_probs(model, packs, kinds, self.together, lens)


def order(samples: int, *, at_once: int, generations: int, seed: int) -> list[int]:
    """Samples (by index) in the order of a whole phase, `at_once` of them a generation: one permutation after the other.

    What does not fill a generation at the end of a permutation waits for the next one. The place in the phase says what
    comes next, and nothing else does: TRL's own sampler draws a permutation per epoch from a generator that no checkpoint
    holds, so that a run resumed in its second epoch would begin the first one again.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = -(-at_once // samples)
    asked: list[int] = []
    while len(asked) < generations * at_once:
        permutation = torch.randperm(samples * copies, generator=generator)
        asked += [i % samples for i in permutation[: samples * copies // at_once * at_once].tolist()]
    return asked[: generations * at_once]


def settle_buckets(model: DistributedDataParallel) -> None:
    """Run a backward of zeros, so that the gradients of all steps are summed in the same buckets.

    DDP lays its buckets out anew after the first backward of a process. From three ranks on a sum depends on its bucket, so
    the first step of a resumed process would differ from the same step of one that went on, in the last bits.
    """
    learning = [p for p in model.module.parameters() if p.requires_grad]
    model.reducer.prepare_for_backward([])
    torch.stack([(p * 0).sum() for p in learning]).sum().backward()
    for parameter in learning:
        parameter.grad = None


@contextmanager
def _named(model: Any, folder: str) -> Iterator[None]:
    """TRL loads its reference model by the name that the policy's config has: for as long as it looks, `folder`."""
    name = model.config._name_or_path
    model.config._name_or_path = folder or name
    try:
        yield
    finally:
        model.config._name_or_path = name


def _never_called(**_: Any) -> list[float]:
    raise RolloutError("reward", "TRL called its own reward path", "the seam is broken: check the TRL version")
