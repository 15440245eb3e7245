"""Score a checkpoint on a recipe's split: the same prompts, pixels and decoding as in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rft.data.frames import FrameStore
from rft.data.prefetch import Prefetcher
from rft.data.samples import read_samples
from rft.errors import DataError, RecipeError
from rft.evaluation.baselines import best_constant, random_answer
from rft.evaluation.scorecard import scorecard
from rft.files import write_whole
from rft.hf.generate import ModelPolicy
from rft.hf.models import open_policy, renderer_for
from rft.hf.together import Together
from rft.recipe import SPLITS, load
from rft.report.table import table
from rft.rollout.policy import Limits


def evaluate(
    name: str, sets: Sequence[str], checkpoint: str, *, split: str = "test", output: str | None = None
) -> dict[str, Any]:
    """Metrics of `checkpoint` on a split, the trivial baselines and every answer; `output` gets them as JSON.

    Raises:
        DataError: the split is empty, holds bad rows, or a sample cannot be shown: nothing is left out in silence.
    """
    loaded = load(name, sets)
    recipe = loaded.recipe
    together = Together.join()
    samples, train = (_samples(loaded, s, checkpoint) for s in (split, "train"))
    if not samples:
        raise DataError(f"data.{split}", "there is nothing to evaluate", f"set data.{split}")
    policy = open_policy(checkpoint, recipe, train=False)
    policy.model.to(f"cuda:{together.local_rank}" if torch.cuda.is_available() else "cpu").eval()
    renderer = renderer_for(recipe, policy, recipe.phases[list(recipe.phases)[-1]])
    samples = samples[: recipe.evaluation.max_samples or None]
    limits = Limits(max_tokens=recipe.evaluation.max_tokens, temperature=recipe.evaluation.temperature)
    frames = FrameStore(int(recipe.data.frame_cache_gb * 2**30), recipe.data.frame_cache_folder)
    lens = policy.lens(frames, memory=policy.memory(frames, int(recipe.vision_memory_gb * 2**30)))
    answering = ModelPolicy(policy.model, lens, policy.eos_ids)
    with Prefetcher(frames, recipe.data.decoders(torch.cuda.is_available())) as prefetcher:
        metrics, rollouts = scorecard(
            samples, answering, renderer, limits, seed=recipe.seed, together=together, ahead=prefetcher.ahead
        )
    baselines = {}
    if train:
        baselines = {
            "random": random_answer(samples, train, renderer, recipe.seed),
            "best_constant": best_constant(samples, train, renderer),
        }
    answers = [{"sample": r.sample_id, "text": r.text, "stop": r.stop} for r in rollouts]
    result = {**metrics, "baselines": baselines, "split": split, "samples": len(samples), "answers": answers}
    if together.rank == 0:
        labelled = {name.replace("_", " "): values for name, values in baselines.items()}
        print(table({**labelled, "checkpoint": metrics}), flush=True)
        if output:
            write_whole(Path(output), json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _samples(loaded: Any, split: str, checkpoint: str) -> list[Any]:
    """The split's samples; those of a synthetic world lie beside the checkpoint, in its run folder."""
    if split not in SPLITS:
        raise RecipeError("--split", f"unknown split {split!r}", f"one of {', '.join(SPLITS)}")
    named = getattr(loaded.recipe.data, split)
    if loaded.recipe.data.synthetic:
        worlds = [p / "world" for p in Path(checkpoint).absolute().parents if (p / "world").is_dir()]
        if not worlds:
            raise DataError(checkpoint, "no synthetic world is near this checkpoint", "give a checkpoint inside its run folder")
        path = worlds[0] / f"{split}.jsonl"
    elif named:
        path = loaded.path(named)
    else:
        return []
    samples, bad = read_samples(path)
    if bad and split != "train":
        raise DataError(bad[0].id, f"{bad[0].reason} (one of {len(bad)} bad rows in {path})", "repair or drop them")
    return samples
