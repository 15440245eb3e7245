"""What the arithmetic of each phase costs at least: floating-point operations and bytes, from the sizes of the live model.

The floor of a phase is its own arm's arithmetic at the measured ceilings; the ideal of a ratio is the quotient of two such
counts. Additions of norms, rotary angles and softmax are left out.
"""

from __future__ import annotations

from typing import Any

import torch

from rft.bench.arms import ARMS, Arm
from rft.bench.measure import PHASES
from rft.bench.work import Material

ADAM_PASSES = 7  # weight, gradient and two moments read; weight and moments written


class Arithmetic:
    """Counts for one model and one work. `packed` says whether the group shares its prompt."""

    def __init__(self, model: Any, material: Material) -> None:
        text, tower = model.config.text_config, model.config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._material, self._item = material, next(model.parameters()).element_size()
        self._layers, self._width = text.num_hidden_layers, text.num_attention_heads * head
        self._cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head * self._item  # bytes per token
        self._weights = _linear(model.model.language_model)
        self._head = text.hidden_size * text.vocab_size
        self._trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        merged = sum(_linear(m) for n, m in model.model.visual.named_children() if "merger" in n)
        convolved = sum(m.weight.numel() for m in model.model.visual.modules() if isinstance(m, torch.nn.Conv3d))
        self._tower = _linear(model.model.visual) - merged + convolved, merged, tower
        self.prompt = len(material.prompt)

    def vision(self) -> float:
        """One run of the tower over the video."""
        if self._material.view is None:
            return 0.0
        per_patch, merged, config = self._tower
        (pairs, h, w), family = self._material.view.grid, self._material.family
        whole = getattr(config, "fullatt_block_indexes", None)
        num_whole = config.depth if whole is None else len(whole)
        window = (getattr(config, "window_size", 0) // family.patch) ** 2
        seen = num_whole * h * w + (config.depth - num_whole) * min(window, h * w)
        patches = pairs * h * w
        return patches * (2 * per_patch + 2 * merged / family.merge**2 + 4 * config.hidden_size * seen)

    def prefill(self, packed: bool) -> float:
        """The decoder over the prompts of a group."""
        copies = 1 if packed else self._material.work.group
        return copies * (2 * self._weights * self.prompt + self._attention(self.prompt * (self.prompt + 1) / 2))

    def forward(self, packed: bool) -> float:
        """The decoder and the head, over prompts and completions."""
        lengths = self._material.lengths
        pairs = sum(n * self.prompt + n * (n + 1) / 2 for n in lengths)
        new = 2 * self._weights * sum(lengths) + self._attention(pairs) + 2 * self._head * sum(lengths)
        return self.prefill(packed) + new

    def decoding(self, packed: bool) -> tuple[float, float]:
        """(operations, bytes) of writing the completions token by token: each step reads all weights and all keys."""
        work = self._material.work
        group, steps = work.group, work.completion - 1
        pairs = group * (steps * self.prompt + steps * (steps + 1) / 2)
        operations = 2 * (self._weights + self._head) * group * steps + self._attention(pairs)
        read = (1 if packed else group) * steps * self.prompt + group * steps * (steps + 1) / 2
        return operations, steps * (self._weights + self._head) * self._item + read * self._cached

    def patches(self) -> float:
        """Bytes of turning frames to patches: uint8 read, float32 written."""
        if self._material.view is None:
            return 0.0
        height, width = self._material.view.size
        return 3 * len(self._material.view.frames) * height * width * 5

    def optimizer(self) -> float:
        """Bytes of one AdamW step."""
        return ADAM_PASSES * self._trained * self._item

    def _attention(self, pairs: float) -> float:
        return 4 * self._layers * self._width * pairs


def _linear(module: torch.nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def floor(arm: Arm, count: Arithmetic, group: int, ceilings: dict[str, float], checkpointing: bool) -> dict[str, float | None]:
    """Least seconds of each phase as the arm does it; None where there is no bound worth a number."""
    flops, wide = ceilings["flops"], ceilings["bytes"]
    runs = 1 if arm.cached else 3 * (1 if arm.packed else group)  # of the tower: rollout, old/ref, train
    operations, read = count.decoding(arm.packed)
    again = 1 if (checkpointing if arm.checkpointing is None else arm.checkpointing) else 0
    found = {
        "preprocess": (1 if arm.cached else 3) * count.patches() / wide,
        "vision": runs * count.vision() / flops,
        "prefill": count.prefill(arm.packed) / flops,
        "decode tokens": max(operations / flops, read / wide),
        "old/ref": count.forward(arm.packed) / flops,
        "train forward": count.forward(arm.packed) / flops,
        "backward": (2 + again) * count.forward(arm.packed) / flops,
        "optimizer": count.optimizer() / wide,
    }
    return {phase: found.get(phase) for phase in PHASES}


def ideals(count: Arithmetic, short: Arithmetic, group: int, completion: int, ceilings: dict[str, float]) -> dict[str, float]:
    """What each ratio would be if every arm ran at the ceilings; `tokens` is G (P + C) / (P + G C)."""
    naive, shared, once = count.forward(False), count.forward(True), count.vision()
    flops, wide = ceilings["flops"], ceilings["bytes"]

    def rollout(packed: bool, runs: int) -> float:
        operations, read = count.decoding(packed)
        return (runs * once + count.prefill(packed)) / flops + max(operations / flops, read / wide)

    def step(name: str) -> float:
        return sum(seconds or 0.0 for seconds in floor(ARMS[name], count, group, ceilings, False).values())

    return {
        "train": (3 * naive + group * once) / (3 * shared + once),
        "train_cached_vision": (3 * naive + group * once) / (3 * shared),
        "logprobs": (naive + group * once) / (shared + once),
        "logprobs_cached_vision": (naive + group * once) / shared,
        "rollout": rollout(False, group) / rollout(True, 0),
        "peak_memory": group * (count.prompt + completion) / (count.prompt + group * completion),
        "short_prompt": short.forward(False) / short.forward(True),
        "step": step("expanded") / step("ours"),
        "tokens": group * (count.prompt + completion) / (count.prompt + group * completion),
    }
