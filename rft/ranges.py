"""Numbers of a recipe that cannot be meant: how small and how large each may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rft.errors import RecipeError
from rft.strict import join

SOME = 1e-9  # the least of what has to be above 0
Bounds = Mapping[str, Mapping[str, float]]  # by class of the tree, then by key
LEAST: Bounds = {
    "Recipe": {
        "max_prompt_tokens": 1,
        "keep_last": 0,
        "keep_best": 0,
        "seed": 0,
        "max_tokens_per_pass": 0,
        "vision_memory_gb": 0,
    },
    "Phase": {
        **dict.fromkeys(("steps", "groups_per_step", "groups_per_device", "updates"), 1),
        **dict.fromkeys(("check_every", "refill", "learning_rate", "warmup_steps", "weight_decay", "importance_cap"), 0),
        "max_grad_norm": SOME,
    },
    "Mix": {"share": 0},
    "Allowance": {"rounds": 1, **dict.fromkeys(("looks", "frames", "visual_tokens", "text_tokens", "seconds"), 0)},
    "Sampling": {"temperature": 0, "top_k": 0, "top_p": SOME, "max_tokens": 1},
    "Evaluation": {"max_tokens": 1, "temperature": 0, "max_samples": 0},
    "Clip": {"low": 0, "high": 0},
    "KL": {"weight": 0},
    "Data": {"max_bad_share": 0, "frame_cache_gb": 0, "workers": -1},
    "World": {
        **{"train": 1, "validation": 0, "test": 0, "seconds": 1, "tick": SOME, "fps": 1, "size": 16},
        **{"longest": 0, "objects": 1},
    },
    "Lora": {"rank": 1, "alpha": 1, "dropout": 0},
    "Tiny": {**dict.fromkeys(("hidden", "layers", "heads", "vision_hidden", "vision_layers"), 1), "init_std": SOME},
}
MOST: Bounds = {
    "Mix": {"share": 1},
    "Sampling": {"top_p": 1},
    "Clip": {"low": 1},
    "Data": {"max_bad_share": 1},
    "World": {"objects": 4},
    "Lora": {"dropout": 0.99},
}


def check_ranges(node: Any, at: str = "") -> None:
    """Every number of the tree below `node`, whose dotted key is `at`. Raises RecipeError with the key of the first."""
    bounded = type(node).__name__
    for key, least in LEAST.get(bounded, {}).items():
        if getattr(node, key) < least:
            bound = "a number above 0" if least == SOME else f"{least:g} or more"
            raise RecipeError(join(at, key), f"{getattr(node, key):g} is too small", f"use {bound}")
    for key, most in MOST.get(bounded, {}).items():
        if getattr(node, key) > most:
            raise RecipeError(join(at, key), f"{getattr(node, key):g} is too large", f"use {most:g} or less")
    for key in (f.name for f in fields(node)):
        below = getattr(node, key)
        entries = (
            {join(at, f"{key}.{n}"): e for n, e in below.items()} if isinstance(below, Mapping) else {join(at, key): below}
        )
        for name, entry in entries.items():
            if is_dataclass(entry):
                check_ranges(entry, name)
