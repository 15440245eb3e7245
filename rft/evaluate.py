"""Score a checkpoint on a recipe's split: the same prompts, pixels and decoding as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from rft.data.frames import FrameStore
from rft.data.prefetch import Prefetcher
from rft.data.samples import read_samples
from rft.errors import DataError, RecipeError
from rft.evaluation.baselines import best_constant, random_answer
from rft.evaluation.best_of import Text, agreement, best, confidence, picked, surest
from rft.evaluation.metrics import measure
from rft.evaluation.scorecard import scorecard
from rft.files import write_whole
from rft.hf.generate import ModelPolicy
from rft.hf.models import open_policy, renderer_for
from rft.hf.together import Together
from rft.recipe import SPLITS, Phase, Recipe, load
from rft.report.table import table
from rft.rollout.policy import Limits
from rft.strict import nearest
from rft.types import Rollout, Sample


def evaluate(
    name: str,
    sets: Sequence[str],
    checkpoint: str,
    *,
    split: str = "test",
    output: str | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Metrics of `checkpoint` on a split, the trivial baselines and every answer; `output` gets them as JSON.

    `prompts` names phases (or PHASE.mix, what a phase mixes in) whose prompts to ask with; by default the last one's. With
    several every sample is answered once per prompt: metrics of each, of the best answer per sample in hindsight
    (`oracle`), and of the one that the policy was surest of (`selected`).

    Raises:
        RecipeError: a name in `prompts` is none.
        DataError: the split is empty, holds bad rows, or a sample cannot be shown: nothing is left out in silence.
    """
    loaded = load(name, sets)
    recipe = loaded.recipe
    phases = _asked(recipe, prompts)
    together = Together.join()
    samples, train = (_samples(loaded, s, checkpoint) for s in (split, "train"))
    if not samples:
        raise DataError(f"data.{split}", "there is nothing to evaluate", f"set data.{split}")
    policy = open_policy(checkpoint, recipe, train=False)
    policy.model.to(f"cuda:{together.local_rank}" if torch.cuda.is_available() else "cpu").eval()
    renderers = {named: renderer_for(recipe, policy, phase) for named, phase in phases.items()}
    renderer = next(iter(renderers.values()))
    samples = samples[: recipe.evaluation.max_samples or None]
    limits = Limits(max_tokens=recipe.evaluation.max_tokens, temperature=recipe.evaluation.temperature)
    frames = FrameStore(int(recipe.data.frame_cache_gb * 2**30), recipe.data.frame_cache_folder)
    lens = policy.lens(frames, memory=policy.memory(frames, int(recipe.vision_memory_gb * 2**30)))
    answering = ModelPolicy(policy.model, lens, policy.eos_ids)
    given = {"seed": recipe.seed, "together": together}
    with Prefetcher(frames, recipe.data.decoders(torch.cuda.is_available())) as prefetcher:
        cards = {
            named: scorecard(samples, answering, asking, limits, ahead=prefetcher.ahead, **given)
            for named, asking in renderers.items()
        }
    baselines = {}
    if train:
        baselines = {
            "random": random_answer(samples, train, renderer, recipe.seed),
            "best_constant": best_constant(samples, train, renderer),
        }
    scored = {named: metrics for named, (metrics, _) in cards.items()}
    rollouts = {named: answered for named, (_, answered) in cards.items()}
    about = {"baselines": baselines, "split": split, "samples": len(samples)}
    if len(cards) == 1:
        ((only, metrics),) = scored.items()
        rows = {"checkpoint": metrics}
        result = {**metrics, **about, "asked": only, "answers": [_answer(r) for r in rollouts[only]]}
    else:
        compared, answers = _best_of(samples, rollouts, renderer.text)
        count = {2: "two", 3: "three"}.get(len(cards), str(len(cards)))
        labels = {"oracle": f"best of {count} (oracle)", "selected": f"surest of {count}"}
        rows = scored | {labels[how]: metrics for how, metrics in compared.items()}
        result = {"prompts": scored, **compared, **about, "answers": answers}
    if together.rank == 0:
        labelled = {name.replace("_", " "): values for name, values in baselines.items()}
        print(table({**labelled, **rows}), flush=True)
        if output:
            write_whole(Path(output), json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _asked(recipe: Recipe, names: Sequence[str]) -> dict[str, Phase]:
    """The phases whose prompts are asked with, by name; the last one's where none is named."""
    for name in names:
        if name not in recipe.asked:
            raise RecipeError("--prompts", f"no phase {name!r} has prompts of its own", nearest(name, recipe.asked))
    return {name: recipe.asked[name] for name in names or [list(recipe.phases)[-1]]}


def _answer(rollout: Rollout) -> dict[str, Any]:
    return {"sample": rollout.sample_id, "text": rollout.text, "stop": rollout.stop}


def _best_of(
    samples: Sequence[Sample], rollouts: Mapping[str, Sequence[Rollout]], text: Text
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Metrics of what the oracle and the selector pick, and per sample the answers with what they were picked by."""
    names = {"oracle": best(samples, rollouts), "selected": surest(rollouts, text)}
    answers = []
    for place, sample in enumerate(samples):
        given = {}
        for name, (rollout, sure) in ((n, (r[place], confidence(r[place], text))) for n, r in rollouts.items()):
            sure = sure if isfinite(sure) else None  # JSON knows no infinity
            given[name] = {"text": rollout.text, "stop": rollout.stop, "agreement": agreement(sample, rollout), "logprob": sure}
        answers.append({"sample": sample.id, "prompts": given, **{how: picks[place] for how, picks in names.items()}})
    return {how: measure(samples, picked(rollouts, picks)) for how, picks in names.items()}, answers


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
