"""The model's attention made aware of trees and of equal windows, through the library's registry: no model file is edited.

A forward that passes `tree=` attends as the tree says; one that does not runs the library's SDPA as before. The tree is an
argument of the public forward and not a global, so that a checkpointed layer finds it again when it recomputes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rft.data.pack import Sweep
from rft.errors import CompatError
from rft.hf.kernels import Plan

TEXT, WINDOWS = "rft", "rft_flash_windows"  # the library sends lengths, and no loop, to a name with `flash` in it


def install(model: torch.nn.Module) -> None:
    """Send this model's attention here. `model` may carry adapters; text without a tree runs as SDPA runs it.

    Raises:
        CompatError: the model slides a window over its text, which a tree does not know.
    """
    AttentionInterface.register(TEXT, _text)
    AttentionInterface.register(WINDOWS, _windows)
    AttentionMaskInterface.register(TEXT, sdpa_mask)
    config = model.config
    if why := cannot_share(model):
        raise CompatError("attention", why, "set sharing: expanded")
    config.text_config._attn_implementation = TEXT
    config.vision_config._attn_implementation = WINDOWS


def cannot_share(model: torch.nn.Module) -> str:
    """Why prompts cannot be shared in this model; '' when they can."""
    text = model.config.text_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "some layers see a sliding window only"
    if getattr(text, "attention_dropout", 0.0):
        return f"attention_dropout is {text.attention_dropout:g}"
    if getattr(text, "num_experts", 0):
        return "experts are balanced over tokens, and a shared prompt would count once"
    return ""


def _text(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    tree = given.pop("tree", None)
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    q, k, v = _one_dtype(query, key, value)
    return tree.attend(module.layer_idx, q, k, v, given["scaling"]).transpose(1, 2), None


def _windows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Attention inside windows: those of one length are one batched call."""
    plan = _plan_of(tuple(given["cu_seq_lens_q"].tolist()), query.device)
    q, k, v = _one_dtype(query, key, value)
    return plan.attend(0, q, k, v, given["scaling"]).transpose(1, 2), None


def _one_dtype(*tensors: Tensor) -> list[Tensor]:
    """What autocast does to the library's attention: rotated queries may have been left in float32."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
    return [t.to(dtype) for t in tensors]


@lru_cache(maxsize=32)
def _plan_of(ends: tuple[int, ...], device: torch.device) -> Plan:
    edges = np.asarray(ends, dtype=np.int64)
    own = np.stack([edges[:-1], edges[1:]], axis=1)
    return Plan((Sweep(queries_S2=own, keys_S2=own, causal=False),), device)
