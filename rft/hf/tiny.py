"""A small vision-language model made from nothing: own tokenizer and chat template, a complete `from_pretrained` folder.

It runs wherever the real one runs (same classes, same tensors) and is small enough to learn on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    set_seed,
)

from rft.errors import RecipeError
from rft.families import FAMILIES, Family
from rft.recipe import Tiny

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words and digits apart, every digit on its own, as in Qwen's pre-tokenizer.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tiny(folder: Path, tiny: Tiny, *, seed: int = 0) -> Path:
    """Write a model, its tokenizer and its processor to `folder`; the same seed gives the same weights.

    Raises:
        RecipeError: the family has no small model.
    """
    if tiny.family not in FAMILIES:
        raise RecipeError("tiny.family", f"unknown family {tiny.family!r}", f"known: {', '.join(FAMILIES)}")
    family = FAMILIES[tiny.family]
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        set_seed(seed)
        model = _model(tiny, family, tokenizer)
        _scale(model, tiny.init_std)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    _processor(family, tokenizer).save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and Qwen's special tokens; decodes any text back to itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_corpus(), trainer)
    core.add_special_tokens(list(SPECIALS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=[s for s in SPECIALS if s not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    phrases = [
        "system user assistant", "You are a helpful assistant.", "When is the square visible? Answer in seconds.",
        "<answer>3.0 to 5.0</answer>", "<think>look at the frames</think><answer>0.5 to 7.5</answer>",
        "From which second to which second is the bright square visible?", "Which option is right? A B C D",
        "<answer>(B)</answer>", "<answer>[12, 40, 88, 96]</answer>", "Find the box of the object in the picture.",
        "<1.5 seconds> <12.0 seconds>", "video image frame start end time moment event question options letter",
    ]  # fmt: skip
    return phrases * 60


def _model(tiny: Tiny, family: Family, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    head = tiny.hidden // tiny.heads
    first = head // 8
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids(family.image_pad),
        "video_token_id": tokenizer.convert_tokens_to_ids(family.video_pad),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids(family.vision_start),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids(family.vision_end),
    }
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.hidden * 2,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": max(1, tiny.heads // 2),
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": tiny.vision_layers,
        "hidden_size": tiny.vision_hidden,
        "intermediate_size": tiny.vision_hidden * 2,
        "num_heads": 4,
        "patch_size": family.patch,
        "temporal_patch_size": family.temporal_patch,
        "spatial_merge_size": family.merge,
        "out_hidden_size": tiny.hidden,
    }
    if family.name == "qwen2_5_vl":
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [first * 2, first, first],
        }  # fmt: skip
        vision |= {
            "window_size": family.unit * 2,
            "fullatt_block_indexes": [tiny.vision_layers - 1],
            "tokens_per_second": int(family.tokens_per_second),
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        return Qwen2_5_VLForConditionalGeneration(config)
    text["head_dim"] = head
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [first * 2, first, first], "mrope_interleaved": True,
    }  # fmt: skip
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen3VLForConditionalGeneration(config)


def _scale(model: torch.nn.Module, std: float) -> None:
    """Bring every matrix but the embeddings from the library's 0.02 to `std`: at 0.02 perception hardly ever starts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(std / 0.02)


def _processor(family: Family, tokenizer: PreTrainedTokenizerFast) -> object:
    size = {"shortest_edge": family.unit**2, "longest_edge": 4096 * family.unit**2}
    patches = {"patch_size": family.patch, "temporal_patch_size": family.temporal_patch, "merge_size": family.merge}
    image = Qwen2VLImageProcessor(size=size, image_mean=family.mean, image_std=family.std, **patches)
    video_class, processor_class = (
        (Qwen2VLVideoProcessor, Qwen2_5_VLProcessor) if family.clock == "axis" else (Qwen3VLVideoProcessor, Qwen3VLProcessor)
    )
    video = video_class(
        size=size,
        image_mean=family.mean,
        image_std=family.std,
        cap_pixels_per_frame=False,
        do_sample_frames=False,
        **patches,
    )
    return processor_class(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=tokenizer.chat_template
    )
