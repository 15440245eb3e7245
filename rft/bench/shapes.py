"""The models that are measured: true sizes from the table, and the small shape of the CPU gates. Weights are random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rft.families import FAMILIES
from rft.hf.architectures import ARCHITECTURES, Architecture
from rft.hf.models import freeze
from rft.hf.tiny import make_tokenizer
from rft.recipe import Trainable

TINY = Architecture(
    family="qwen2_5_vl",
    tied=True,
    text={
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    vision={
        "depth": 4, "hidden_size": 160, "intermediate_size": 432, "num_heads": 4, "out_hidden_size": 256,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [3], "tokens_per_second": 2,
    },
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model and the work that it is measured on unless flags say otherwise."""

    architecture: Architecture
    frames: int
    size: tuple[int, int]  # height, width in pixels
    completion: int
    checkpointing: bool  # an unshared prompt of true size does not fit without


SHAPES: dict[str, Shape] = {
    "tiny": Shape(architecture=TINY, frames=24, size=(224, 224), completion=64, checkpointing=False),
    **{
        short: Shape(architecture=ARCHITECTURES[name], frames=128, size=size, completion=256, checkpointing=True)
        for short, name, size in (
            ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", (224, 448)),
            ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", (224, 448)),
            ("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", (256, 512)),
        )
    },
}


def with_our_ids(architecture: Architecture) -> Architecture:
    """The architecture with the placeholder ids of the tokenizer that we can make without a download."""
    family, tokenizer = FAMILIES[architecture.family], make_tokenizer()
    names = {
        "vision_start_token_id": family.vision_start, "vision_end_token_id": family.vision_end,
        "image_token_id": family.image_pad, "video_token_id": family.video_pad,
    }  # fmt: skip
    return replace(architecture, ids={key: tokenizer.convert_tokens_to_ids(text) for key, text in names.items()})


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A model with random weights, made on the device; the tower is frozen and attention is the library's.

    Nothing goes through the meta device: rotary buffers are not among the parameters and would come back empty.
    """
    architecture = with_our_ids(architecture)
    family, tokenizer = FAMILIES[architecture.family], make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(
        family.model_types[0],
        text_config=architecture.text | ends,
        vision_config=architecture.vision,
        tie_word_embeddings=architecture.tied,
        **architecture.ids,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    freeze(model, family, Trainable(vision=False, projector=False, language=True))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()
