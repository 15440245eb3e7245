"""A tokenizer without its model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from rft.errors import RecipeError


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder. Raises RecipeError when it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {folder}", str(error).splitlines()[0], "give a complete model folder") from error
