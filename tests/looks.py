"""Rollouts that look, without a model: a film of known frames, a policy that says what it is told, transcripts by hand.

The film has 4 frames per second for 20 seconds, frame i at i / 4, and is shown in 8 frames of 28 x 56 pixels (32 x 64 where a
token stands for 32 pixels): 4 pairs of 2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rft.data.budget import Budget
from rft.data.media import read
from rft.families import FAMILIES
from rft.hf.tiny import make_tokenizer
from rft.perceiving import looking
from rft.rollout.loop import opening, roll_out
from rft.rollout.perceive import Allowance, Looking, PerceptionSpec
from rft.rollout.policy import Context, Limits, Scripted
from rft.rollout.render import Prompt, Renderer
from rft.types import Media, Rollout, Sample
from tests.videos import spaced, write_video

FIRST = (0.0, 2.75, 5.75, 8.5, 11.25, 14.0, 17.0, 19.75)  # nearest to 19.75 k / 7, at a quarter of a second each
PRINTED = ("1.4", "7.1", "12.6", "18.4")  # the means of its pairs
TURN = "<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<answer>6 to 9</answer>"
TOKENIZER = make_tokenizer()


def film(path: Path, num_frames: int = 80) -> Path:
    return write_video(path, spaced(4, num_frames))


def renderer(family: str = "qwen2_5_vl", max_prompt_tokens: int = 8192, **prompt: str) -> Renderer:
    prompt = {"answer": "<answer>{span[0]:g} to {span[1]:g}</answer>", **prompt}
    budget = Budget(nframes=8, min_pixels=784, max_pixels=3136)
    given = {"prompts": {"default": Prompt(**prompt)}, "budget": budget, "max_prompt_tokens": max_prompt_tokens}
    return Renderer(tokenizer=TOKENIZER, family=FAMILIES[family], **given)


def asking(*media: Path | Media, row: dict[str, Any] | None = None, **answer: Any) -> Sample:
    found = tuple(m if isinstance(m, Media) else Media(kind="video", source=str(m)) for m in media)
    return Sample(id="s", media=found, row={"question": "when?", **(row or {})}, answer=answer or {"span": (6.0, 9.0)})


def looks(use: str, context: str = "append", history: str = "none", fetch: Callable = read, **more: Any) -> Looking:
    """A perception with its arguments; what `Allowance` knows goes there."""
    limits = {name: more.pop(name) for name in list(more) if name in Allowance.__dataclass_fields__ and name != "frames"}
    limits |= {"frames": more.pop("most_frames")} if "most_frames" in more else {}
    budget = Allowance(**{"rounds": 3, **limits})
    return looking(
        PerceptionSpec(use=use, args=more, context=context, history=history, budget=budget), "perception", fetch=fetch
    )


def rolled(
    sample: Sample,
    said: Sequence[str] | Callable[[int], str],
    how: Looking,
    render: Renderer,
    *,
    limit: int = 400,
    between: Callable[[int], object] = lambda turn: None,
) -> tuple[Rollout, list[Context]]:
    """The rollout in which the policy says one text after the other, and what it was asked with. `between` runs first."""
    met: list[Context] = []

    def script(index: int, context: Context) -> str:
        between(len(met))
        met.append(context)
        return said(len(met) - 1) if callable(said) else said[len(met) - 1]

    policy = Scripted(script, render.encode, render.eos)
    prompts, limits = [opening(sample, render, how)], Limits(max_tokens=limit)
    given = {"policy": policy, "renderer": render, "limits": limits, "draw": (0, "t", 7), "looking": how}
    ((rollout,),) = roll_out([sample], prompts, [1], **given)
    for segment in rollout.segments:
        assert list(segment.ids) == render.encode(segment.text) + [render.eos] * (segment.ids[-1:] == (render.eos,)) * (
            segment.author != "world"
        )
    return rollout, met


def moving(family: str, pairs: Sequence[str], each: int = 2) -> str:
    """What stands for a video in a transcript, `each` tokens per pair; `pairs` are the seconds that are printed."""
    if family == "qwen2_5_vl":
        inside = "<|video_pad|>" * (each * len(pairs))
    else:
        pads = "<|video_pad|>" * each
        inside = "".join(f"<{pair} seconds><|vision_start|>{pads}<|vision_end|>" for pair in pairs)
    return f"<|vision_start|>{inside}<|vision_end|>"


def user(text: str) -> str:
    """A prompt that is one message."""
    return f"<|im_start|>user\n{text}{TURN}"


def photo(name: Path) -> Media:
    """A picture of noise, 224 pixels wide and 112 high."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 224, 3), dtype=np.uint8)).save(name)
    return Media(kind="image", source=str(name))
