"""One phase of a run: put together, gone on with from where it was cut, trained, saved and scored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rft.askable import askable
from rft.attempt import Attempt
from rft.condition import Condition
from rft.errors import ClusterError, DataError, RecipeError
from rft.evaluation.baselines import best_constant
from rft.evaluation.scorecard import scorecard
from rft.files import write_whole
from rft.hf.arguments import arguments
from rft.hf.callbacks import GradientDigest, MetricsFile, Progress, Validate
from rft.hf.generate import ModelPolicy
from rft.hf.logprobs import Lens
from rft.hf.memory import most_tokens, needs_checkpointing
from rft.hf.models import LoadedModel, renderer_for, sharing_of, trainable_table
from rft.hf.nonfinite import Guard
from rft.hf.saving import Saver, all_or_none
from rft.hf.step import Stage
from rft.hf.trainer import GroupTrainer
from rft.hf.voice import Voice
from rft.recipe import Phase, Recipe
from rft.report.rollout_log import RolloutLog
from rft.rollout.loop import opening
from rft.rollout.policy import Limits
from rft.rollout.render import Renderer
from rft.run import checkpoints
from rft.run.cadence import Cadence
from rft.run.history import cut_back
from rft.run.identity import fingerprint
from rft.run.state import attempt_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRun:
    """A phase of an attempt, with the policy that it trains or scores; the run itself began with the model in `start`."""

    attempt: Attempt
    name: str
    policy: LoadedModel
    start: str
    renderer: Renderer
    lens: Lens  # of training
    seen: Lens  # of evaluation: its memory is another, so that what a step still needs is not disturbed

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.attempt.loaded.recipe

    @property
    def phase(self) -> Phase:
        """What the recipe says about this phase."""
        return self.recipe.phases[self.name]

    def evaluate(self, split: str, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of a model at rest on a split."""
        run, recipe = self.attempt, self.recipe
        limits = Limits(max_tokens=recipe.evaluation.max_tokens, temperature=recipe.evaluation.temperature)
        run.together.doing(f"evaluating on {split}")
        looking = run.loaded.looking_at_eval(self.phase, run.frames.get)
        answering = ModelPolicy(model, self.seen, self.policy.eos_ids, keeps=looking.goes_on)
        ahead = {"ahead": run.prefetcher.ahead} if run.prefetcher else {}
        given = {"seed": recipe.seed, "together": run.together, "looking": looking, **ahead}
        return scorecard(run.evaluated(split), answering, self.renderer, limits, **given)[0]


def open_phase(attempt: Attempt, name: str, policy: LoadedModel, start: str) -> PhaseRun:
    """A phase before anything wraps its model."""
    recipe, frames = attempt.loaded.recipe, attempt.frames
    phase = recipe.phases[name]
    lens = policy.lens(frames, phase.sampling.temperature, policy.memory(frames, _room(recipe)))
    return PhaseRun(
        attempt=attempt,
        name=name,
        policy=policy,
        start=start,
        renderer=renderer_for(recipe, policy, phase),
        lens=lens,
        seen=replace(lens, memory=policy.memory(frames, 0)),
    )


def score_phase(this: PhaseRun) -> dict[str, float]:
    """Metrics on the test split of a phase that an earlier attempt trained and saved, and had no time to score."""
    if not this.attempt.splits["test"]:
        return {}
    where = f"cuda:{this.attempt.together.local_rank}" if torch.cuda.is_available() else "cpu"
    return this.evaluate("test", this.policy.model.to(where).eval())


def train_phase(this: PhaseRun, target: Path) -> dict[str, float]:
    """Train the phase from where it is, seal its model in `target` and return its metrics on the test split.

    Raises:
        Stopped: someone asked for it; what was trained is in a checkpoint.
    """
    run, recipe, phase, name = this.attempt, this.recipe, this.phase, this.name
    together = run.together
    stage = _stage(this)
    guard = Guard(run.folder / "nonfinite" / name, phase.nonfinite, together)
    metrics_file = MetricsFile(run.folder / "metrics.jsonl", name, run.started)
    writes = [metrics_file, Progress(name), run.trackers.of_phase(name)] if together.rank == 0 else []
    if run.digests and together.rank == 0:
        writes.append(GradientDigest(run.folder / "gradients.jsonl", name))
    checkpointing, why = _checkpointing(this)
    look = _look(this, metrics_file, lambda: trainer.evaluate())
    saver = Saver(
        run.folder,
        name,
        updates=phase.updates,
        cadence=Cadence.parse(recipe.save_every),
        keep_last=recipe.keep_last,
        keep_best=recipe.keep_best,
        best_by=recipe.best_by,
        stops=run.stops,
        together=together,
        record=lambda step: _record(this, step),
        fence=run.check_lock,
        heartbeat=run.heartbeat,
        validate=look,
    )
    trainer = GroupTrainer(
        this.policy,
        stage,
        arguments(recipe, name, saver.staging, world=together.size, checkpointing=checkpointing),
        reference=this.start if phase.kl.reference == "run" else "",
        ahead=_ahead(run, stage) if run.prefetcher else None,
        together=together,
        guard=guard,
        saver=saver,
        evaluate=lambda model: this.evaluate("validation", model),
        callbacks=[guard, *writes],
    )
    if look:
        trainer.add_callback(look)
    trainer.add_callback(saver)  # last: it hears what the others decided
    run.say(f"\nphase {name}: {phase.objective}, {phase.groups_per_step} groups a step, up to {phase.steps} steps")
    run.say(trainable_table(this.policy.model, this.policy.family))
    sharing, why_not = this.lens.sharing, sharing_of(this.policy.model, recipe)[1]
    run.say(f"  sharing: {sharing}" + (f" ({why_not})" if why_not else ""))
    run.say(f"  gradient checkpointing: {'on' if checkpointing else 'off'} ({why})")
    checkpoint = _go_on(this)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.note(status="running", phase=name, step=trainer.state.global_step)
    if saver.stopped:
        run.stop_if_asked(saver.stopped)
    if phase.until and look:
        ended = f"ended at step {trainer.state.global_step}" if look.reached else "was not reached"
        run.say(f"phase {name}: {phase.until}: {ended}")
    _leave(this, trainer, target)  # before anything that may still fail
    with trainer.at_rest() as model:
        result = this.evaluate("test", model) if run.splits["test"] else {}
    run.trackers.tell(name, trainer.state.global_step, {f"test/{k}": v for k, v in result.items()})
    trainer.accelerator.free_memory()
    return result


def _room(recipe: Recipe) -> int:
    """Bytes of a frozen tower's features that are kept beyond what a step needs."""
    return int(recipe.vision_memory_gb * 2**30)


def _stage(this: PhaseRun) -> Stage:
    run, recipe, phase = this.attempt, this.recipe, this.phase
    own = _voice("phase", this, phase, this.renderer)
    mixed = None
    if phase.mixed:
        mixed = _voice("mix", this, phase.mixed, renderer_for(recipe, this.policy, phase.mixed))
    reference = replace(this.lens, memory=this.policy.reference_memory(run.frames, _room(recipe)))
    log = RolloutLog(path=run.folder / "rollouts" / f"{this.name}-{run.together.rank}.jsonl")
    return Stage(
        name=this.name,
        phase=phase,
        seed=recipe.seed,
        samples=askable(run, [own, mixed] if mixed else [own], this.name, phase),
        renderer=own.renderer,
        rewards=own.rewards,
        looking=own.looking,
        mixed=mixed,
        lens=this.lens,
        reference_lens=reference if this.lens.memory is None else None,
        max_tokens_per_pass=recipe.max_tokens_per_pass,
        eos_ids=this.policy.eos_ids,
        quarantine=run.quarantine,
        vision_learns=recipe.trainable.vision or recipe.trainable.projector,
        rollout_log=log if recipe.log_rollouts else None,
    )


def _voice(name: str, this: PhaseRun, phase: Phase, renderer: Renderer) -> Voice:
    loaded = this.attempt.loaded
    looking = loaded.looking(phase, this.attempt.frames.get)
    return Voice(name=name, renderer=renderer, rewards=loaded.rewards(phase), looking=looking)


def _checkpointing(this: PhaseRun) -> tuple[bool, str]:
    """Whether activations are computed again in the backward, and why."""
    recipe, phase = this.recipe, this.phase
    if recipe.gradient_checkpointing != "auto":
        return bool(recipe.gradient_checkpointing), "the recipe says so"
    has_copy = phase.kl.weight > 0 and not recipe.lora and not phase.supervised
    tokens = most_tokens(recipe, phase, packed=this.lens.sharing == "packed")
    world = this.attempt.together.size
    return needs_checkpointing(this.policy.model, tokens, world=world, copies=int(has_copy), room=_room(recipe))


def _look(this: PhaseRun, metrics_file: MetricsFile, evaluate: Callable[[], dict[str, float]]) -> Validate | None:
    """The validation beside the steps, where there is something to look at."""
    run, phase = this.attempt, this.phase
    validation = run.evaluated("validation")

    def report(step: int, values: Mapping[str, float]) -> None:
        metrics_file.write(step, values)
        run.trackers.tell(this.name, step, values)

    if phase.until and not validation:
        raise RecipeError(f"phases.{this.name}.until", "there is no validation split to look at", "set data.validation")
    if not validation or not phase.check_every:
        return None
    constant = best_constant(validation, run.splits["train"], this.renderer)
    until = Condition.parse(phase.until) if phase.until else None
    return Validate(
        phase.check_every,
        evaluate,
        report if run.together.rank == 0 else lambda step, values: None,
        until=until,
        known={"best_constant": constant.get(until.left, 0.0) if until else 0.0},
    )


def _ahead(run: Attempt, stage: Stage) -> Callable[[Sequence[int]], None]:
    """Decode the media of samples (by index) that are not in quarantine, in other processes."""

    def ahead(indices: Sequence[int]) -> None:
        for sample in (stage.samples[i] for i in indices):
            if sample.id not in run.quarantine:
                with suppress(DataError):  # the step meets it again, and says what is wrong
                    run.prefetcher.ahead(opening(sample, stage.renderer, stage.looking).views)

    return ahead


def _record(this: PhaseRun, step: int) -> dict[str, Any]:
    """What a checkpoint remembers beside the trainer's own state. Guidance and schedules are functions of the step."""
    return {
        "phase": this.name,
        "prompts": step // this.phase.updates * this.phase.groups_per_step,
        "world": this.attempt.together.size,
        "identity": fingerprint(this.attempt.folder),
        "seconds": round(time.time() - this.attempt.started, 1),
        "quarantine": this.attempt.quarantine.kept(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    }


def _go_on(this: PhaseRun) -> Path | None:
    """The checkpoint from which the phase goes on; what was told after it is put aside, and what it restores is said.

    Raises:
        ClusterError: it was written by another number of processes, and DeepSpeed cannot divide it anew.
    """
    run, name = this.attempt, this.name
    first = run.together.rank == 0
    found = run.together.gather(checkpoints.last_good(run.folder, name, run.say) if first else None)[0]
    record = checkpoints.record_of(found) if found else {"step": 0, "world": run.together.size}
    aside, names = attempt_folder(run.folder, run.number), list(this.recipe.phases)
    cut = 0
    if first:
        if moved := checkpoints.cut_back(run.folder, names, name, record["step"], aside / checkpoints.CHECKPOINTS):
            run.say(f"{', '.join(moved)}: later than what is gone on from, now in attempts/{run.number}/checkpoints")
        cut = cut_back(run.folder, names, name, record["step"], aside)
    run.note(status="running", phase=name, step=record["step"])
    run.together.wait()
    if found is None:
        return None
    then, now = record["world"], run.together.size
    if then != now and any(found.glob("global_step*")):
        what = f"was written by {then} processes under DeepSpeed, and these are {now}"
        raise ClusterError(f"checkpoint {found.name}", what, f"start {then} processes, or begin anew with --set model={found}")
    run.quarantine.restore(record["quarantine"])
    if first:
        told = _report(this, found, record, cut)
        write_whole(aside / "resume.json", json.dumps(told, indent=1))
    return found


def _report(this: PhaseRun, found: Path, record: Mapping[str, Any], cut: int) -> dict[str, Any]:
    """What is restored and from where, printed and returned."""
    run, here = this.attempt, {p.name for p in found.iterdir()}
    then, now = record["world"], run.together.size
    parts = {
        "weights": any(n.endswith(".safetensors") for n in here),
        "optimizer": "optimizer.pt" in here or any(n.startswith(("global_step", "optimizer")) for n in here),
        "schedule": "scheduler.pt" in here or any(n.startswith("global_step") for n in here),
        "random state": any(n.startswith("rng_state") for n in here),
    }
    restored = [part for part, is_there in parts.items() if is_there]
    lost = [part for part in parts if part not in restored]
    lines = [
        f"\nphase {this.name} goes on after step {record['step']}, from {found}",
        f"  restored: {', '.join(restored)}, place in the data ({record['prompts']} prompts), "
        f"{len(record['quarantine'])} samples in quarantine",
    ]
    if lost:
        lines.append(f"  not there: {', '.join(lost)}")
    if then != now:
        lines.append(
            f"  {then} processes then, {now} now: the same prompts in the same order, but sums are added up in another order, "
            "and dropout draws anew: equal up to rounding, not to the bit"
        )
    if cut:
        lines.append(f"  {cut} lines about later steps, which are done again, are in attempts/{run.number}")
    for line in lines:
        run.say(line)
    return {
        "from": str(found), "phase": this.name, "step": record["step"], "prompts": record["prompts"], "restored": restored,
        "not_there": lost, "world": {"then": then, "now": now}, "lines_put_aside": cut, "drift": run.drift,
        "versions": {"then": record["versions"], "now": _record(this, 0)["versions"]},
    }  # fmt: skip


def _leave(this: PhaseRun, trainer: GroupTrainer, target: Path) -> None:
    """Seal the trained model, with its processor, in `target`."""
    run = this.attempt
    half, step = checkpoints.staging(run.folder, f"end-of-{this.name}"), trainer.state.global_step
    run.together.doing("saving", meets=True)

    def name_it() -> None:
        if run.together.rank == 0:
            run.check_lock()
            this.policy.processor.save_pretrained(half)
            checkpoints.seal(half, target, {**_record(this, step), "step": step})
            checkpoints.clear_leftovers(run.folder)

    all_or_none(run.together, str(target), half, (lambda: trainer.save_model(str(half)), name_it), run.check_lock)
