"""True-size architectures as tables, built on the meta device: names and sizes without weights.

Sizes are those of the published config.json files. Placeholder ids are those of the published tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rft.families import FAMILIES
from rft.hf.models import freeze, trainable_table
from rft.recipe import Recipe

QWEN_IDS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What `AutoConfig` needs to build a model of a family."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    ids: dict[str, int] = field(default_factory=lambda: dict(QWEN_IDS))


def _qwen2_5(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> Architecture:
    return Architecture(
        family="qwen2_5_vl",
        tied=tied,
        text={
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
    )  # fmt: skip


def _qwen3(
    hidden: int, ffn: int, layers: int, heads: int, tied: bool, vision: tuple[int, int, int], deep: list[int]
) -> Architecture:
    return Architecture(
        family="qwen3_vl",
        tied=tied,
        text={
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        vision={
            "depth": vision[0], "hidden_size": vision[1], "intermediate_size": vision[2], "num_heads": 16,
            "out_hidden_size": hidden, "patch_size": 16, "deepstack_visual_indexes": deep,
        },
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(2560, 9728, 36, 32, True, (24, 1024, 4096), [5, 11, 17]),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(4096, 12288, 36, 32, False, (27, 1152, 4304), [8, 16, 24]),
}


def on_meta(name: str) -> torch.nn.Module:
    """The named model on the meta device: parameters have shapes and no storage."""
    architecture = ARCHITECTURES[name]
    config = AutoConfig.for_model(
        FAMILIES[architecture.family].model_types[0],
        text_config=architecture.text,
        vision_config=architecture.vision,
        tie_word_embeddings=architecture.tied,
        **architecture.ids,
    )
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def describe_architecture(recipe: Recipe) -> str:
    """Trainable parameters by part, when the recipe's model is in the table."""
    if recipe.model not in ARCHITECTURES:
        return "  (sizes are known for the tabled models only; training prints them after loading)"
    family = FAMILIES[ARCHITECTURES[recipe.model].family]
    model = on_meta(recipe.model)
    freeze(model, family, recipe.trainable)
    adapters = f"\n  LoRA rank {recipe.lora.rank} on the linear layers of the trainable parts" if recipe.lora else ""
    return trainable_table(model, family) + adapters
