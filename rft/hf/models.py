"""Models from folders: loaded whole or not at all, frozen by part, with or without adapters."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.logging import disable_progress_bar

from rft.data.frames import FrameStore
from rft.errors import CompatError, RecipeError
from rft.families import Family, family_of
from rft.hf.attention import cannot_share, install
from rft.hf.compat import keep_used_names
from rft.hf.logprobs import Lens
from rft.hf.vision import VisionMemory, shared_level
from rft.recipe import Lora, Phase, Recipe, Trainable
from rft.rollout.render import Renderer

disable_progress_bar()  # loading has none of ours; training has one per phase

PARTS = ("vision", "projector", "language")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded model with what belongs to it."""

    model: Any
    processor: Any
    family: Family
    eos_ids: tuple[int, ...]
    sharing: Literal["packed", "expanded"] = "expanded"

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def lens(self, frames: FrameStore, temperature: float = 1.0, memory: VisionMemory | None = None) -> Lens:
        """The lens of this model's forwards; `memory` must be of a tower that does not change."""
        ids = placeholder_ids(self.tokenizer, self.family)
        return Lens(
            family=self.family,
            frames=frames,
            pad_id=self.tokenizer.pad_token_id,
            image_pad_id=ids[self.family.image_pad],
            video_pad_id=ids[self.family.video_pad],
            suppressed=tuple(ids.values()),
            temperature=temperature,
            sharing=self.sharing,
            memory=memory,
        )

    def memory(self, frames: FrameStore, max_bytes: int) -> VisionMemory | None:
        """What this model's forwards may share of its vision tower's work; None where the tower learns."""
        level = shared_level(self.model, self.family)
        return VisionMemory(self.family, frames, level, max_bytes) if level else None

    def reference_memory(self, frames: FrameStore, max_bytes: int) -> VisionMemory:
        """Where the policy's tower learns, the reference's is another one and encodes for itself; its weights never change."""
        return VisionMemory(self.family, frames, "features", max_bytes)


def open_policy(path: str, recipe: Recipe, *, train: bool) -> LoadedModel:
    """Load a model folder, or an adapter folder with its base, as the recipe wants it.

    With `train`, parts are frozen as `trainable` says, and adapters are added (or continued) as `lora` says.

    Raises:
        RecipeError: the folder is no model of a known family.
        CompatError: weights are missing or left over, or placeholders are unknown to the tokenizer.
    """
    adapter = Path(path, "adapter_config.json")
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path
    model = load_whole(base, dtype=pick_dtype(recipe.dtype), attention=recipe.attention)
    family = family_of(model.config.model_type)
    processor = AutoProcessor.from_pretrained(path if Path(path, "tokenizer_config.json").is_file() else base)
    placeholder_ids(processor.tokenizer, family)
    if train:
        freeze(model, family, recipe.trainable)
    if adapter.is_file():
        model = PeftModel.from_pretrained(model, path, is_trainable=train)
    elif train and recipe.lora:
        model = add_adapters(model, family, recipe.lora, recipe.trainable)
    if train:
        keep_updates(model)  # last: a base under adapters does not learn and stays small
    else:
        model.requires_grad_(False)
    sharing, _ = sharing_of(model, recipe)
    if recipe.attention == "sdpa":
        install(model)
    ids = eos_ids(base, processor.tokenizer)
    return LoadedModel(model=model, processor=processor, family=family, eos_ids=ids, sharing=sharing)


def sharing_of(model: Any, recipe: Recipe) -> tuple[Literal["packed", "expanded"], str]:
    """How groups are run over, and why not packed.

    Raises:
        RecipeError: the recipe insists on packed and this model cannot.
    """
    if recipe.sharing == "expanded":
        return "expanded", "the recipe says so"
    why = cannot_share(model)
    if recipe.attention != "sdpa":
        why = f"attention: {recipe.attention} is the library's own"
    elif torch.cuda.is_available() and pick_dtype(recipe.dtype) == torch.float32 and recipe.sharing == "auto":
        why = "this GPU has no flash kernel for float32, and trees would be written out"
    elif recipe.lora and recipe.lora.dropout:
        why = "lora.dropout draws a mask per row, and a shared prompt would have one for the whole group"
    if why and recipe.sharing == "packed":
        raise RecipeError("sharing", f"packed is not possible: {why}", "set sharing: auto")
    return ("expanded", why) if why else ("packed", "")


def load_whole(path: str, *, dtype: torch.dtype | str, attention: str) -> Any:
    """`from_pretrained`, refusing a checkpoint that does not fill the model or holds more than it."""
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {path}", str(error).splitlines()[0], "give a model folder, a hub name, or tiny") from error
    wrong = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
    if wrong:
        listed = "; ".join(f"{len(keys)} {name.replace('_', ' ')}, e.g. {keys[0]}" for name, keys in wrong.items())
        raise CompatError(f"model {path}", f"the checkpoint and the model disagree: {listed}", "use a complete checkpoint")
    keep_used_names(model)
    return model


def pick_dtype(name: str) -> torch.dtype:
    """The recipe's dtype; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else torch.float32
    return getattr(torch, name)


def keep_updates(model: torch.nn.Module) -> None:
    """Trainable weights in float32: bfloat16 has 8 bits, and loses every update below 0.4 % of a weight in silence.

    Forwards still run in bfloat16, under autocast. DeepSpeed keeps float32 copies of its own.
    """
    if not is_deepspeed_zero3_enabled() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def eos_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """End-of-turn ids: the model folder's and the tokenizer's. Nothing else is read from a generation config."""
    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        found = None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *ids]))


def placeholder_ids(tokenizer: Any, family: Family) -> dict[str, int]:
    """Token id of every placeholder string of the family.

    Raises:
        CompatError: the tokenizer does not know one of them as a single token.
    """
    ids = {}
    for text in family.placeholders:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise CompatError("tokenizer", f"{text} is not one token of it", f"use a tokenizer of the {family.name} family")
        ids[text] = encoded[0]
    return ids


def part_of(name: str, family: Family) -> str:
    """vision, projector or language, by a parameter's name on the plain model.

    Raises:
        CompatError: the name belongs to none of them.
    """
    prefixes = (family.projector_prefixes, family.vision_prefixes, family.language_prefixes)
    for part, starts in zip(("projector", "vision", "language"), prefixes, strict=True):
        if name.startswith(starts):
            return part
    raise CompatError("model", f"parameter {name} belongs to no known part of {family.name}", "correct families.py")


def freeze(model: torch.nn.Module, family: Family, trainable: Trainable) -> None:
    """Only the trainable parts keep their gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(trainable, part_of(name, family)))


def add_adapters(model: Any, family: Family, lora: Lora, trainable: Trainable) -> Any:
    """Low-rank adapters on every linear layer of the trainable parts; the head and the base weights stay as they are."""
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and getattr(trainable, part_of(name + ".", family))
    ]
    if not targets:
        raise RecipeError("trainable", "no part is trainable, so there is nothing to adapt", "set trainable.language: true")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def trainable_table(model: torch.nn.Module, family: Family) -> str:
    """Trainable and all parameters by part, one line each: what the optimizer will move."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        count = parameter.numel() if not hasattr(parameter, "ds_numel") else parameter.ds_numel
        counts[part_of(plain, family)][0] += count if parameter.requires_grad else 0
        counts[part_of(plain, family)][1] += count
    return "\n".join(f"  {part:<10} {on:>14,} of {total:>14,} trainable" for part, (on, total) in counts.items())


def renderer_for(recipe: Recipe, policy: LoadedModel, phase: Phase | None) -> Renderer:
    """How samples are shown to this policy in this phase."""
    return Renderer(
        tokenizer=policy.tokenizer,
        family=policy.family,
        prompts=recipe.prompts_of(phase),
        budget=recipe.media,
        max_prompt_tokens=recipe.max_prompt_tokens,
    )


def export(checkpoint: str, output: Path, *, merge: bool) -> None:
    """Write a checkpoint as a plain model folder; with `merge`, adapters become part of the weights.

    Raises:
        RecipeError: the checkpoint is an adapter and `merge` is not set, or the other way round, or `output` is taken.
    """
    is_adapter = Path(checkpoint, "adapter_config.json").is_file()
    if not is_adapter and not Path(checkpoint, "config.json").is_file():
        raise RecipeError(checkpoint, "there is no checkpoint here", "give a folder that training saved")
    if is_adapter != merge:
        what = "an adapter, not a model" if is_adapter else "a whole model already: there is no adapter to merge"
        raise RecipeError(checkpoint, f"this is {what}", "add --merge" if is_adapter else "leave --merge out")
    if output.exists() and any(output.iterdir()):
        raise RecipeError(str(output), "the folder is not empty", "give another one")
    base = json.loads(Path(checkpoint, "adapter_config.json").read_text())["base_model_name_or_path"] if merge else checkpoint
    model = load_whole(base, dtype="auto", attention="sdpa")
    if merge:
        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    model.save_pretrained(output)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(output)
