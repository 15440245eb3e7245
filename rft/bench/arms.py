"""The arms that need no TRL: one runner, and a line of settings for each arm.

A step is: look (decode and, where features are cached, preprocess and vision), roll out, score, old/ref log-probs, train,
optimize. The optimizer moves nothing (learning rate 0): every arm and every repeat starts from the same weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rft.bench.measure import Stopwatch
from rft.bench.watch import watched
from rft.bench.work import Material, reward
from rft.hf import head
from rft.hf.attention import install
from rft.hf.generate import ModelPolicy
from rft.hf.logprobs import Lens, token_logprobs
from rft.hf.vision import VisionMemory
from rft.rollout.policy import Limits

MEMORY_BYTES = 8 << 30
CHUNK_BYTES = head.CHUNK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """How the work is done. `ours` is the default; every other arm says what it leaves out."""

    packed: bool = True
    cached: bool = True  # tower features once per step instead of in every forward
    windows: bool = True  # windows of the tower in one attention call
    chunked: bool = True  # logits a stretch at a time
    checkpointing: bool | None = None  # None: as the work says


ARMS: dict[str, Arm] = {
    "expanded": Arm(packed=False, cached=False, windows=False),
    "expanded-fair": Arm(packed=False, cached=False),
    "ours": Arm(),
    "ours-packing": Arm(packed=False),
    "ours-cache": Arm(cached=False),
    "ours-windows": Arm(windows=False),
    "ours-chunk": Arm(chunked=False),
    "ours+checkpoint": Arm(checkpointing=True),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a step made, to compare arms by. Its gradients stay on the model until the next step."""

    tokens: tuple[tuple[int, ...], ...]  # greedy
    logprobs_N: Tensor


def attend(model: Any, arm: Arm) -> None:
    """Give the text and the tower of the model the attention of an arm: ours or the library's."""
    install(model)
    if not arm.packed:
        model.config.text_config._attn_implementation = "sdpa"
    if not arm.windows:
        model.config.vision_config._attn_implementation = "sdpa"


def recompute(model: Any, wanted: bool) -> None:
    """Turn gradient checkpointing on or off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library renames it; the old name works in all versions
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


class Runner:
    """Does the work on a model as an arm says. Several runners may share a model and an optimizer, one after the other."""

    def __init__(self, arm: Arm, model: Any, material: Material, optimizer: torch.optim.Optimizer) -> None:
        self.arm, self.model, self.material, self.optimizer = arm, model, material, optimizer

    def prepare(self) -> None:
        """Bring the model into this arm's state."""
        attend(self.model, self.arm)
        head.CHUNK_BYTES = CHUNK_BYTES if self.arm.chunked else 1 << 62
        wanted = self.arm.checkpointing
        recompute(self.model, self.material.work.checkpointing if wanted is None else wanted)

    def step(self, watch: Stopwatch) -> Outcome:
        """One whole step with cold frames."""
        self.prepare()
        with watched(self.model, watch, self.material.work.group), watch.job("step", "other"):
            lens = self.look(watch)
            with watch.job("rollout", "decode tokens"):
                limits = Limits(max_tokens=self.material.work.completion, temperature=0)
                policy = ModelPolicy(self.model, lens, (self.material.eos,))
                replies = policy.extend(self.material.contexts(shared=self.arm.packed), limits)
            with watch.job("reward", "reward"):
                [reward(row) for row, _ in enumerate(replies)]
            with watch.job("logprobs", "old/ref"), torch.no_grad():
                self.logprobs(lens)
            logprobs_N = self.train(lens, watch)
            with watch.job("optimizer", "optimizer"):
                self.optimizer.step()
        return Outcome(tokens=tuple(r.ids for r in replies), logprobs_N=logprobs_N)

    def look(self, watch: Stopwatch) -> Lens:
        """A lens whose frames are decoded and, where the arm caches them, whose features are there."""
        lens = self.material.lens(sharing="packed" if self.arm.packed else "expanded")
        with watch.job("look", "decode"):
            for view in self.material.views:
                lens.frames.get(view)
            if self.arm.cached and self.material.views:
                memory = VisionMemory(lens.family, lens.frames, "features", MEMORY_BYTES)
                memory.encode(self.model, self.material.views)
                lens = replace(lens, memory=memory)
        return lens

    def logprobs(self, lens: Lens) -> Tensor:
        """Log-probs [N] of the given completions."""
        return token_logprobs(self.model, [self.material.pack], lens)[0]

    def train(self, lens: Lens, watch: Stopwatch) -> Tensor:
        """Forward, loss, backward; returns the log-probs [N]."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with watch.job("train", "train forward"):
            logprobs_N = self.logprobs(lens)
            loss = self.material.loss(logprobs_N)
            with watch.phase("backward"):
                loss.backward()
        self.model.eval()
        return logprobs_N.detach()
