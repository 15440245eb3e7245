"""Train a recipe, top to bottom: open the run, open the data, one phase after the other, the table.

`python -m rft.train RECIPE` is the entry point for `accelerate launch`; `rft train RECIPE` is its short form.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from rft.algo.guidance import Guidance
from rft.condition import Condition
from rft.data.frames import FrameStore
from rft.data.prefetch import Prefetcher
from rft.data.samples import read_samples
from rft.errors import DataError, RecipeError, RftError
from rft.evaluation.baselines import best_constant, random_answer
from rft.evaluation.contract import Finding, reference_earns_maximum
from rft.evaluation.scorecard import scorecard
from rft.files import write_whole
from rft.hf.arguments import arguments
from rft.hf.callbacks import MetricsFile, Progress, Validate
from rft.hf.generate import ModelPolicy
from rft.hf.memory import most_tokens, needs_checkpointing
from rft.hf.models import LoadedModel, open_policy, renderer_for, sharing_of, trainable_table
from rft.hf.nonfinite import Guard
from rft.hf.step import Stage
from rft.hf.tiny import make_tiny
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from rft.hf.voice import Voice
from rft.quarantine import Quarantine
from rft.recipe import SPLITS, Loaded, Phase, Recipe, load, resolved
from rft.report.curves import draw_curves
from rft.report.rollout_log import RolloutLog
from rft.report.table import table
from rft.rollout.policy import Limits
from rft.rollout.reference import reference_rollout, variants
from rft.rollout.render import Renderer
from rft.scoring import Reward
from rft.synthetic.world import make_world
from rft.types import Sample, Segment, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's folder and what all phases share."""

    folder: Path
    loaded: Loaded
    splits: Mapping[str, Sequence[Sample]]
    frames: FrameStore
    prefetcher: Prefetcher | None
    quarantine: Quarantine
    together: Together
    started: float

    def evaluated(self, split: str) -> Sequence[Sample]:
        """The samples of a split that evaluations and baselines look at."""
        return self.splits[split][: self.loaded.recipe.evaluation.max_samples or None]

    def note(self, **values: Any) -> None:
        """Write `state.json`: where the run is."""
        if self.together.rank == 0:
            text = json.dumps({"seconds": round(time.time() - self.started, 1), **values}, indent=1)
            write_whole(self.folder / "state.json", text)

    def say(self, text: str) -> None:
        """Print, on the first rank only."""
        if self.together.rank == 0:
            print(text, flush=True)


def train(name: str, sets: Sequence[str] = (), output: str | None = None) -> dict[str, Any]:
    """Run every phase of a recipe and return the summary that is written to `summary.json`."""
    started = time.time()
    loaded = load(name, sets)
    together = Together.join()
    folder = together.gather(_open_folder(loaded, output) if together.rank == 0 else None)[0]
    run = _open_run(folder, loaded, together, started)
    recipe = loaded.recipe
    run.note(status="running", phase="", step=0)
    try:
        summary = _phases(run)
    except BaseException as error:
        run.note(status="failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if run.prefetcher:
            run.prefetcher.close()
    if together.rank == 0:
        write_whole(folder / "summary.json", json.dumps(summary, indent=1))
        levels = {
            f"{k.replace('_', ' ')} (test)": summary[k]["miou"]
            for k in ("random", "best_constant")
            if "miou" in summary.get(k, {})
        }
        draw_curves(folder / "metrics.jsonl", folder / "curves.png", lines=levels)
    last = list(recipe.phases)[-1]
    labels = {"random": "random", "best_constant": "best constant", "final": f"after {last}"}
    run.say("\n" + table({labels.get(name, f"after {name}"): metrics for name, metrics in summary.items()}))
    run.say(f"\n{recipe.name}: {time.time() - started:.0f} s, everything is in {folder}")
    frames = {
        "decoded_here": run.frames.misses,
        "found": run.frames.hits,
        "rebuilt": run.frames.rebuilt,
        "decoders_replaced": run.prefetcher.restarts if run.prefetcher else 0,
    }
    run.note(status="finished", phase=last, reason="all phases done", quarantined=len(run.quarantine), frames=frames)
    return summary


def _phases(run: Run) -> dict[str, Any]:
    recipe = run.loaded.recipe
    model = str(run.folder / "model") if recipe.model == "tiny" else recipe.model
    if recipe.model == "tiny" and run.together.rank == 0:
        make_tiny(Path(model), recipe.tiny, seed=recipe.seed)
    run.together.wait()
    summary: dict[str, Any] = {}
    names, start = list(recipe.phases), model
    _refuse_adapter(start, recipe)
    for number, name in enumerate(names):
        target = run.folder / "checkpoint" if number == len(names) - 1 else run.folder / "phases" / name
        policy = open_policy(model, recipe, train=True)
        if not number:
            summary = _before(run, policy, renderer_for(recipe, policy, recipe.phases[name]))
        result = _phase(run, name, policy, target, start)
        summary["final" if number == len(names) - 1 else name] = result
        model = str(target)
        del policy
        gc.collect()
    return summary


def _refuse_adapter(start: str, recipe: Recipe) -> None:
    """With adapters the reference is the model without them: not where a run begins that begins with an adapter."""
    pulled = [name for name, phase in recipe.phases.items() if phase.kl.weight and not phase.supervised]
    if pulled and Path(start, "adapter_config.json").is_file():
        what = f"an adapter: the model without it is no reference for the KL of phase {pulled[0]}"
        raise RecipeError(f"model {start}", what, "`rft export --merge` it and start from that folder, or set kl.weight to 0")


def _before(run: Run, policy: LoadedModel, renderer: Renderer) -> dict[str, Any]:
    """What can be known before training: whether the evaluations can be shown, and the trivial baselines on the test split."""
    recipe, together = run.loaded.recipe, run.together
    if recipe.model != "tiny" and policy.family.name != recipe.family:
        raise RecipeError("family", f"{recipe.model} is {policy.family.name}, not {recipe.family}", "set family in the recipe")
    for split in ("validation", "test"):
        for sample in run.evaluated(split)[together.rank :: together.size]:
            renderer.prompt(sample)  # an evaluation leaves nothing out: a sample that cannot be shown ends the run now
    train_split, test = run.splits["train"], run.evaluated("test")
    if not test:
        return {}
    return {
        "random": random_answer(test, train_split, renderer, run.loaded.recipe.seed),
        "best_constant": best_constant(test, train_split, renderer),
    }


def _phase(run: Run, name: str, policy: LoadedModel, target: Path, start: str) -> dict[str, float]:
    """Train one phase, save it to `target` and return its metrics on the test split; the run itself began with `start`."""
    recipe, phase = run.loaded.recipe, run.loaded.recipe.phases[name]
    together = run.together
    renderer = renderer_for(recipe, policy, phase)
    own = Voice(name="phase", renderer=renderer, rewards=run.loaded.rewards(phase))
    mixed = None
    if phase.mixed:
        rewards = run.loaded.rewards(phase.mixed)
        mixed = Voice(name="mix", renderer=renderer_for(recipe, policy, phase.mixed), rewards=rewards)
    room = int(recipe.vision_memory_gb * 2**30)
    lens = policy.lens(run.frames, phase.sampling.temperature, policy.memory(run.frames, room))
    seen = replace(lens, memory=policy.memory(run.frames, 0))  # an evaluation does not disturb what a step still needs
    limits = Limits(max_tokens=recipe.evaluation.max_tokens, temperature=recipe.evaluation.temperature)

    def evaluate(split: str, model: torch.nn.Module) -> dict[str, float]:
        answering = ModelPolicy(model, seen, policy.eos_ids)
        ahead = {"ahead": run.prefetcher.ahead} if run.prefetcher else {}
        return scorecard(run.evaluated(split), answering, renderer, limits, seed=recipe.seed, together=together, **ahead)[0]

    stage = Stage(
        name=name,
        phase=phase,
        seed=recipe.seed,
        samples=_askable(run, [own, mixed] if mixed else [own], name, phase),
        renderer=own.renderer,
        rewards=own.rewards,
        mixed=mixed,
        lens=lens,
        reference_lens=replace(lens, memory=policy.reference_memory(run.frames, room)) if lens.memory is None else None,
        max_tokens_per_pass=recipe.max_tokens_per_pass,
        eos_ids=policy.eos_ids,
        quarantine=run.quarantine,
        vision_learns=recipe.trainable.vision or recipe.trainable.projector,
        rollout_log=RolloutLog(path=run.folder / "rollouts" / f"{name}-{together.rank}.jsonl") if recipe.log_rollouts else None,
    )
    guard = Guard(run.folder / "nonfinite" / name, phase.nonfinite, together)
    metrics_file = MetricsFile(run.folder / "metrics.jsonl", name, run.started)
    packed = lens.sharing == "packed"
    tokens = most_tokens(recipe, phase, packed=packed)
    checkpointing, why = recipe.gradient_checkpointing, "the recipe says so"
    if checkpointing == "auto":
        has_copy = phase.kl.weight > 0 and not recipe.lora and not phase.supervised
        checkpointing, why = needs_checkpointing(policy.model, tokens, world=together.size, copies=int(has_copy), room=room)
    trainer = GroupTrainer(
        policy,
        stage,
        arguments(recipe, name, run.folder / "phases" / name, world=together.size, checkpointing=checkpointing),
        reference=start if phase.kl.reference == "run" else "",
        ahead=_ahead(run, stage) if run.prefetcher else None,
        together=together,
        guard=guard,
        evaluate=lambda model: evaluate("validation", model),
        callbacks=[guard, *([metrics_file, Progress(name)] if together.rank == 0 else [])],
    )
    validation = run.evaluated("validation")
    if phase.until and not validation:
        raise RecipeError(f"phases.{name}.until", "there is no validation split to look at", "set data.validation")
    look = None
    if validation and phase.check_every:
        constant = best_constant(validation, run.splits["train"], renderer)
        until = Condition.parse(phase.until) if phase.until else None
        look = Validate(
            phase.check_every,
            trainer.evaluate,
            metrics_file.write if together.rank == 0 else lambda step, values: None,
            until=until,
            known={"best_constant": constant.get(until.left, 0.0) if until else 0.0},
        )
        trainer.add_callback(look)
    run.say(f"\nphase {name}: {phase.objective}, {phase.groups_per_step} groups a step, up to {phase.steps} steps")
    run.say(trainable_table(policy.model, policy.family))
    run.say(f"  sharing: {lens.sharing}" + ("" if packed else f" ({sharing_of(policy.model, recipe)[1]})"))
    run.say(f"  gradient checkpointing: {'on' if checkpointing else 'off'} ({why})")
    trainer.train()
    run.note(status="running", phase=name, step=trainer.state.global_step)
    if phase.until:
        ended = f"ended at step {trainer.state.global_step}" if look.reached else "was not reached"
        run.say(f"phase {name}: {phase.until}: {ended}")
    trainer.save_model(str(target))  # before anything that may still fail
    if together.rank == 0:
        policy.processor.save_pretrained(target)
    together.wait()
    with trainer.at_rest() as model:
        result = evaluate("test", model) if run.splits["test"] else {}
    trainer.accelerator.free_memory()
    return result


def _ahead(run: Run, stage: Stage) -> Callable[[Sequence[int]], None]:
    """Decode the media of samples (by index) that are not in quarantine, in other processes."""

    def ahead(indices: Sequence[int]) -> None:
        for sample in (stage.samples[i] for i in indices):
            if sample.id not in run.quarantine:
                with suppress(DataError):  # the step meets it again, and says what is wrong
                    run.prefetcher.ahead(stage.renderer.prompt(sample).views)

    return ahead


def _askable(run: Run, voices: Sequence[Voice], name: str, phase: Phase) -> list[Sample]:
    """Training samples, as far as they can be asked in every voice of this phase; the others are named.

    Where the annotation may join a group, it has to earn the maximum: one that is reversed, say, would teach the opposite.
    """
    askable, refused = [], []
    right = run.loaded.recipe.accuracy_of(phase)
    for sample in run.splits["train"]:
        try:
            for voice in voices:
                asked = replace(sample, messages=tuple(voice.renderer.messages(sample)))
                if phase.supervised:
                    voice.renderer.answer_text(asked)
                if phase.guidance:
                    rewards = [r for r in voice.rewards if r.name in right or not right]
                    _deserves_a_seat(asked, voice.renderer, rewards, phase.guidance)
            askable.append(sample)
        except DataError as error:
            refused.append((sample.id, error))
    if run.together.rank == 0:
        for sample_id, error in refused:
            run.quarantine.refuse(sample_id, error, name)
    share, most = len(refused) / len(run.splits["train"]), run.loaded.recipe.data.max_bad_share
    if share > most + 1e-9:
        what = f"{len(refused)} samples cannot be used, more than data.max_bad_share={most:g}; the last: {refused[-1][1].what}"
        raise DataError(f"phase {name}", what, "repair or drop these samples, or raise data.max_bad_share")
    return askable


def _deserves_a_seat(sample: Sample, renderer: Renderer, rewards: Sequence[Reward], guidance: Guidance) -> None:
    """Raise DataError when the annotation, as the group will see it, does not earn the maximum.

    Views are opened only where a reward fails without them.
    """

    def findings(*views: View) -> list[Finding]:
        world = Segment(author="world", text="", views=views)
        told = variants(sample, guidance)
        references = [reference_rollout(s, renderer, world, fill=guidance.fill, field=guidance.field) for s in told]
        return reference_earns_maximum(rewards, [sample], references, {})

    if findings() and (found := findings(*(renderer.view(sample, i) for i in range(len(sample.media))))):
        raise DataError(f"sample {sample.id}", found[0].what, found[0].do)


def _open_folder(loaded: Loaded, output: str | None) -> Path:
    """A folder of its own for this run: the one asked for if it holds no run, else the next free default."""
    if output:
        folder = Path(output).absolute()
        if (folder / "state.json").exists():
            status = json.loads((folder / "state.json").read_text()).get("status")
            raise RecipeError(str(folder), f"this folder holds a {status} run", "choose another --output, or move it away")
    else:
        base = Path(loaded.recipe.output.format(name=loaded.recipe.name)).absolute()
        tries = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
        folder = next(f for f in tries if not (f / "state.json").exists())
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "recipe.yaml", yaml.safe_dump(resolved(loaded.standing_alone()), sort_keys=False, allow_unicode=True))
    return folder


def _open_run(folder: Path, loaded: Loaded, together: Together, started: float) -> Run:
    data = loaded.recipe.data
    if data.synthetic and together.rank == 0:
        total = sum(getattr(data.synthetic, s) for s in SPLITS)
        with tqdm(total=total, desc="rendering videos", unit="clip", dynamic_ncols=True, mininterval=1.0) as bar:
            make_world(
                folder / "world",
                data.synthetic,
                seed=loaded.recipe.seed,
                progress=lambda done: bar.update(done - bar.n),
            )
    together.wait()
    splits, bad = {}, []
    for split in SPLITS:
        splits[split] = []
        if not getattr(data.synthetic or data, split):
            continue
        path = folder / "world" / f"{split}.jsonl" if data.synthetic else loaded.path(getattr(data, split))
        splits[split], wrong = read_samples(path)
        if wrong and split != "train":
            what = f"{wrong[0].reason.what} (one of {len(wrong)} rows of the {split} split that cannot be used)"
            raise DataError(wrong[0].id, what, "an evaluation leaves nothing out: repair or drop them")
        bad += wrong
    total = len(bad) + sum(map(len, splits.values()))
    own = "quarantine.jsonl" if together.rank == 0 else f"quarantine-{together.rank}.jsonl"
    quarantine = Quarantine(folder / own, total=total, max_share=data.max_bad_share)
    if together.rank == 0:  # every rank reads the same files; one of them tells
        for row in bad:
            quarantine.add(row.id, row.reason)
    quarantine.hear([(row.id, row.reason) for row in bad])
    if not splits["train"]:
        raise DataError("data.train", "there is nothing to train on", "set data.train to a JSONL file with usable rows")
    frames = FrameStore(int(data.frame_cache_gb * 2**30), data.frame_cache_folder or folder / "frames")
    workers = data.decoders(torch.cuda.is_available())
    return Run(
        folder=folder, loaded=loaded, splits=splits, frames=frames, 
        prefetcher=Prefetcher(frames, workers) if workers else None,
        quarantine=quarantine, together=together, started=started,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments of `rft train`."""
    parser = argparse.ArgumentParser(prog="rft train", description="Train a recipe.")
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override one value")
    parser.add_argument("--output", help="folder of the run; default: the recipe's, numbered")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        train(options.recipe, options.sets, options.output)
    except RftError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
