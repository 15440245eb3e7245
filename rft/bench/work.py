"""The fixed work, made by seed: one video prompt, a group of completions, and the numbers that a GRPO loss asks for.

Shapes: `T` tokens of a row, `N` trained tokens of all rows, flat and in row order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rft.algo.losses import KL, OBJECTIVES, Columns, Normaliser
from rft.bench.shapes import with_our_ids
from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.media import view
from rft.data.pack import pack
from rft.families import FAMILIES, Family
from rft.hf.architectures import Architecture
from rft.hf.logprobs import Lens
from rft.hf.tiny import make_tokenizer
from rft.rollout.policy import Context
from rft.synthetic.world import encode
from rft.types import POLICY, WORLD, Example, Media, Pack, Segment, View

FPS = 4  # of the file; every second frame is shown
BETA = 0.04
FRAME_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is done, in numbers. `text` counts the prompt's tokens beside the visual ones; no frames, no video."""

    frames: int
    size: tuple[int, int]
    group: int
    completion: int
    text: int
    checkpointing: bool = False
    ragged: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """The work as data. `old_N` and `ref_N` surround the log-probs of a model that knows nothing, -log V."""

    work: Work
    family: Family
    vocab: int
    view: View | None
    prompt: tuple[int, ...]
    pack: Pack
    old_N: Tensor
    ref_N: Tensor
    eos: int
    pad: int
    placeholders: tuple[int, ...]
    image_pad: int
    video_pad: int

    @property
    def views(self) -> tuple[View, ...]:
        """The video, if there is one."""
        return () if self.view is None else (self.view,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Trained tokens of each row."""
        return tuple(int((e.authors_T != WORLD).sum()) for e in self.pack.examples)

    def lens(self, **how: object) -> Lens:
        """A lens over a cold frame store. No policy may end its turn: completions have the length that was asked for."""
        return Lens(
            family=self.family,
            frames=FrameStore(FRAME_BYTES),
            pad_id=self.pad,
            image_pad_id=self.image_pad,
            video_pad_id=self.video_pad,
            suppressed=(self.eos, *self.placeholders),
            **how,
        )

    def contexts(self, *, shared: bool) -> list[Context]:
        """The prompt once per row: the very same segment, or a segment of its own for each row."""
        copies = [Segment(author="world", text="", ids=self.prompt, views=self.views) for _ in range(self.work.group)]
        return [Context(segments=(copies[0 if shared else row],), key=row) for row in range(self.work.group)]

    def loss(self, logprobs_N: Tensor) -> Tensor:
        """GRPO with clipping and KL against the given old and reference log-probs."""
        device = logprobs_N.device
        columns = Columns(
            logprobs_N=logprobs_N,
            advantages_N=torch.cat([torch.full((n,), reward(row)) for row, n in enumerate(self.lengths)]).to(device),
            row_N=torch.repeat_interleave(torch.tensor(self.lengths)).to(device),
            weight_R=torch.ones(self.work.group, device=device),
            old_N=self.old_N.to(device),
            ref_N=self.ref_N.to(device),
        )
        tokens = len(self.old_N)
        sizes = Normaliser(rows=self.work.group, tokens=tokens, seen=tokens, forwards=1, max_tokens=self.work.completion)
        return OBJECTIVES["grpo"](columns, sizes, kl=KL(weight=BETA))[0]


def make_material(work: Work, architecture: Architecture, folder: Path) -> Material:
    """Draw everything from the seed; the video is a real file, rendered once under `folder`."""
    rng = np.random.default_rng(work.seed)
    family, tokenizer = FAMILIES[architecture.family], make_tokenizer()
    ids, vocab = with_our_ids(architecture).ids, architecture.text["vocab_size"]
    placeholders = tuple(tokenizer.convert_tokens_to_ids(list(family.placeholders)))
    never = {*placeholders, *tokenizer.all_special_ids}
    shown = _show(work, family, folder, rng) if work.frames else None
    text = rng.integers(0, min(tokenizer.get_vocab()[s] for s in tokenizer.all_special_tokens), work.text)
    media = ""
    if shown:
        written = family.placeholder_text("video", shown.grid, shown.pair_seconds)
        media = f"{family.vision_start}{written}{family.vision_end}"
    prompt = (*tokenizer.encode(media, add_special_tokens=False), *text.tolist())[: (shown.tokens if shown else 0) + work.text]
    allowed = np.setdiff1d(np.arange(vocab), sorted(never))
    lengths = rng.integers(max(1, work.completion // 2), work.completion + 1, work.group)
    if not work.ragged:
        lengths[:] = work.completion
    examples = [_example(prompt, rng.choice(allowed, n), row, shown) for row, n in enumerate(lengths)]
    laid = pack(examples, family=family, image_pad_id=ids["image_token_id"], video_pad_id=ids["video_token_id"])
    old_N, ref_N = torch.from_numpy(rng.normal(-math.log(vocab), 0.1, (2, lengths.sum())).astype(np.float32))
    return Material(
        work=work,
        family=family,
        vocab=vocab,
        view=shown,
        prompt=prompt,
        pack=laid,
        old_N=old_N,
        ref_N=ref_N,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        placeholders=placeholders,
        image_pad=ids["image_token_id"],
        video_pad=ids["video_token_id"],
    )


def _show(work: Work, family: Family, folder: Path, rng: np.random.Generator) -> View:
    """A view of `frames` frames of a moving pattern under noise."""
    path = folder / "bench.mp4"
    height, width = work.size
    y, x = np.mgrid[:height, :width]
    phase = np.arange(2 * work.frames)[:, None, None] / 3
    waves = np.stack([np.sin(y / 17 + phase), np.sin(x / 23 - phase), np.sin((x + y) / 31 + phase)], axis=-1)
    noise = rng.integers(-20, 21, (height, width, 3))
    encode(path, (128 + 100 * waves + noise).clip(0, 255).astype(np.uint8), FPS)
    pixels = height * width
    budget = Budget(nframes=work.frames, min_pixels=pixels, max_pixels=pixels)
    return view(Media(kind="video", source=str(path)), 0, family=family, budget=budget)


def _example(prompt: tuple[int, ...], completion: np.ndarray, row: int, shown: View | None) -> Example:
    authors_T = np.array([WORLD] * len(prompt) + [POLICY] * len(completion), dtype=np.int8)
    return Example(
        sample_id="bench",
        ids_T=np.concatenate([np.array(prompt), completion]).astype(np.int64),
        authors_T=authors_T,
        advantages_T=np.where(authors_T == POLICY, reward(row), 0).astype(np.float32),
        sampler_T=np.full(len(authors_T), np.nan, dtype=np.float32),
        views=() if shown is None else (shown,),
    )


def reward(row: int) -> float:
    """The deterministic reward of a row, centred and never 0."""
    return (1.0, -1.0, 0.5, -0.5)[row % 4]
