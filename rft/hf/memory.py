"""Does a forward's memory fit? An estimate, good enough to choose between keeping activations and making them again."""

from __future__ import annotations

from typing import Any

import torch

from rft.recipe import Phase, Recipe

SHARE = 0.9  # of the GPU that may be planned for


def activation_bytes(text: Any, itemsize: int) -> int:
    """Bytes that one token keeps for the backward in all layers of a decoder (`text` config), without checkpointing.

    Inputs of the norms and linear layers, rotated queries and keys, the attention's output, and the four vectors of a gated
    MLP: 8 hidden + 2 key-value + 4 feed-forward widths a layer. (117 kB a layer for Qwen2.5-VL-3B in bfloat16.)
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = 8 * text.hidden_size + 2 * text.num_key_value_heads * head + 4 * text.intermediate_size
    return text.num_hidden_layers * width * itemsize


def most_tokens(recipe: Recipe, phase: Phase, *, packed: bool) -> int:
    """Tokens of the largest forward that a phase can ask for."""
    size = 1 if phase.supervised else phase.group_size
    specs = [recipe.perception_of(p) for p in (phase, phase.mixed) if p]
    rounds = max(1 if spec.use == "single" else spec.budget.rounds for spec in specs)
    written = size * rounds * phase.sampling.max_tokens
    group = recipe.max_prompt_tokens * (1 if packed else size) + written
    if rounds > 1:  # what is looked at differs from member to member, whether it is appended or asked anew
        group += size * (rounds - 1) * recipe.max_prompt_tokens
    return phase.groups_per_device * group  # in several passes, too: where a model is sharded one backward keeps them all


def needs_checkpointing(model: Any, tokens: int, *, world: int, copies: int = 0, room: int = 0) -> tuple[bool, str]:
    """Whether activations of `tokens` tokens would not fit beside what else a step holds, and the sum.

    That is: weights, those of `copies` reference models, gradients and Adam's states, the rounded weights that autocast
    keeps, and `room` bytes of vision memory. A vision tower that learns keeps activations of its own, which are not counted.
    On a CPU they always fit: nobody trains a large model there.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cuda" and not torch.cuda.is_available():
        return False, "on a CPU activations are kept"
    counts = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad, p.element_size()) for p in model.parameters()]
    weights = sum(n * size for n, _, size in counts)
    states = sum(n for n, learns, _ in counts if learns) * 14  # float32 gradient, two moments, and a rounded copy
    states += copies * sum(n for n, _, _ in counts) * 2
    sharded = any(hasattr(p, "ds_numel") for p in model.parameters())
    fixed = (weights + states) / (world if sharded else 1) + room
    kept = tokens * activation_bytes(model.config.text_config, 2)
    total = torch.cuda.get_device_properties(0).total_memory
    sizes = f"{kept / 2**30:.1f} GiB of activations for {tokens} tokens, {fixed / 2**30:.1f} GiB of weights and states, "
    return fixed + kept > SHARE * total, sizes + f"{total / 2**30:.0f} GiB of memory"
