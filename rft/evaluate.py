"""Score a checkpoint on a recipe's split: the same prompts, pixels and decoding as in training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from rft.evaluation.rounds import CONTROLS, at_rounds, can_be_led, controlled, report, spent, widened
from rft.evaluation.scorecard import Ahead, scorecard
from rft.files import write_whole
from rft.hf.generate import ModelPolicy
from rft.hf.models import LoadedModel, open_policy, renderer_for
from rft.hf.together import Together
from rft.loaded import Loaded, load
from rft.perceiving import looking
from rft.recipe import SPLITS, Phase, Recipe
from rft.report.table import table
from rft.rollout.perceive import Looking, PerceptionSpec
from rft.rollout.policy import Limits
from rft.rollout.render import Renderer
from rft.strict import nearest
from rft.types import Rollout, Sample

CHUNK = 64  # samples that are answered before the first row is timed


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
    desk = Desk.open(name, sets, checkpoint, split)
    recipe, samples, together = desk.loaded.recipe, desk.samples, desk.together
    phases = _asked(recipe, prompts)
    renderers = {named: renderer_for(recipe, desk.policy, phase) for named, phase in phases.items()}
    renderer = next(iter(renderers.values()))
    with desk.decoding() as ahead:
        cards = {
            named: desk.card(renderers[named], desk.loaded.looking_at_eval(phase, desk.frames.get), ahead)
            for named, phase in phases.items()
        }
    train = desk.train
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A checkpoint and the samples that it is to answer."""

    loaded: Loaded
    samples: Sequence[Sample]
    train: Sequence[Sample]  # for the trivial baselines
    policy: LoadedModel
    frames: FrameStore
    together: Together

    @classmethod
    def open(cls, name: str, sets: Sequence[str], checkpoint: str, split: str) -> Desk:
        """Raises DataError when the split is empty or holds bad rows."""
        loaded = load(name, sets)
        recipe = loaded.recipe
        together = Together.join()
        samples, train = (_samples(loaded, s, checkpoint) for s in (split, "train"))
        if not samples:
            raise DataError(f"data.{split}", "there is nothing to evaluate", f"set data.{split}")
        policy = open_policy(checkpoint, recipe, train=False)
        policy.model.to(f"cuda:{together.local_rank}" if torch.cuda.is_available() else "cpu").eval()
        frames = FrameStore(int(recipe.data.frame_cache_gb * 2**30), recipe.data.frame_cache_folder)
        return cls(
            loaded=loaded,
            samples=samples[: recipe.evaluation.max_samples or None],
            train=train,
            policy=policy,
            frames=frames,
            together=together,
        )

    def anew(self) -> Desk:
        """The same, with nothing decoded: for whoever is timed."""
        return replace(self, frames=FrameStore(self.frames.max_bytes))

    @contextmanager
    def decoding(self) -> Iterator[Ahead]:
        """Inside, whoever calls what is given has views decoded ahead."""
        workers = self.loaded.recipe.data.decoders(torch.cuda.is_available())
        with Prefetcher(self.frames, workers) as prefetcher:
            yield prefetcher.ahead

    def card(self, renderer: Renderer, looking: Looking, ahead: Ahead) -> tuple[dict[str, float], list[Rollout]]:
        """Metrics and rollouts of all samples."""
        recipe = self.loaded.recipe
        limits = Limits(max_tokens=recipe.evaluation.max_tokens, temperature=recipe.evaluation.temperature)
        # a memory for each way of looking: what one encoded is no gift to the next one that is timed
        memory = self.policy.memory(self.frames, int(recipe.vision_memory_gb * 2**30))
        lens = self.policy.lens(self.frames, memory=memory)
        answering = ModelPolicy(self.policy.model, lens, self.policy.eos_ids, keeps=looking.goes_on)
        given = {"seed": recipe.seed, "together": self.together, "looking": looking, "ahead": ahead}
        return scorecard(self.samples, answering, renderer, limits, **given)


def evaluate_rounds(
    name: str, sets: Sequence[str], checkpoint: str, rounds: Sequence[int], *, split: str = "test", output: str | None = None
) -> dict[str, Any]:
    """The same policy with so many rounds of looking, and controls beside its own number of them; `output` gets it as JSON.

    The recipe's own number is among the rows whether it is asked for or not: asked as the recipe says, what it shows of a
    sample is what any other number of rounds may show of it (`rft/evaluation/rounds.py`); the controls look as the recipe does,
    behind another clue. A recipe that does not look has
    one round, and is asked for more as VideoChat-R1.5 asks: `iterative`, with fresh prompts.

    Every row decodes its videos and encodes them itself, behind a chunk of samples that nobody times.

    Raises:
        DataError: the split is empty, holds bad rows, or a sample cannot be shown.
    """
    desk = Desk.open(name, sets, checkpoint, split)
    recipe, together = desk.loaded.recipe, desk.together
    phase = recipe.phases[list(recipe.phases)[-1]]
    renderer = renderer_for(recipe, desk.policy, phase)
    asked = desk.loaded.looking_at_eval(phase)
    own = 1 if asked.is_single else max(asked.budget.rounds, 1)
    more = looking(PerceptionSpec(use="iterative", context="fresh"), "perception") if asked.is_single else asked
    table_rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"rounds": {}, "controls": {}}

    def measured(looks: Looking, number: int, renderer: Renderer) -> tuple[dict[str, Any], list[Rollout]]:
        row = desk.anew()
        with row.decoding() as ahead:
            began = time.monotonic()
            metrics, rollouts = row.card(renderer, replace(looks, fetch=row.frames.get), ahead)
            seconds = time.monotonic() - began
        return report(metrics, rollouts, number, seconds, ranks=together.size), rollouts

    first = replace(desk, samples=desk.samples[: CHUNK * together.size]).anew()
    first.card(renderer, replace(asked, fetch=first.frames.get), lambda views: None)
    told, rollouts = measured(asked, own, renderer)
    tokens, wide = spent(rollouts), widened(renderer)
    for number in sorted({own, *rounds}):
        row = told if number == own else measured(at_rounds(more, number, wide, tokens), number, wide)[0]
        result["rounds"][str(number)] = row
        table_rows[f"{number} round{'s' * (number > 1)}{', its own' * (number == own)}"] = row
    led, shown = (asked, renderer) if own > 1 else (at_rounds(more, 2, wide, tokens), wide)
    if more.is_teachable and can_be_led(desk.samples, shown, led):
        for control in CONTROLS:
            result["controls"][control], _ = measured(controlled(led, control), led.budget.rounds, shown)
            table_rows[f"{led.budget.rounds}, {control.replace('_', ' ')}"] = result["controls"][control]
    result |= {"split": split, "samples": len(desk.samples), "visual_tokens": told["visual_tokens"]}
    result |= {"own": own, "controls_at": led.budget.rounds}
    if together.rank == 0:
        print(table(table_rows, more=("visual_tokens", "valid_clues", "seconds")), flush=True)
        if not result["controls"]:
            print("no controls: they need a perception with `teach`, and in every annotation something that it looks at")
        if output:
            write_whole(Path(output), json.dumps(result, indent=1))
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
