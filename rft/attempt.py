"""An attempt at a run: its folder found or made and locked, what is there already, its data and caches opened.

A run that was cut is gone on with by the next attempt, in the same folder, from its last sound checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from rft.data.frames import FrameStore
from rft.data.prefetch import Prefetcher
from rft.data.samples import BadRow, read_samples
from rft.errors import ClusterError, DataError, RecipeError
from rft.files import write_whole
from rft.hf import trackers
from rft.hf.together import Together
from rft.hf.trackers import Trackers
from rft.loaded import Loaded, resolved
from rft.quarantine import Quarantine
from rft.recipe import SPLITS, Recipe
from rft.run import checkpoints, identity, state
from rft.run.lock import Heartbeat, Lock, holder_of
from rft.run.stops import Stops, deadline
from rft.synthetic.world import make_world
from rft.types import Sample

Resume = Literal["auto", "never"]


class Stopped(Exception):
    """The run was asked to stop and is at a place from which it goes on; the message is the reason. No error."""


class Finished(Exception):
    """The run had finished before; the message is its folder. No error either: jobs that are started twice are harmless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run's folder, and what all phases of this attempt share."""

    folder: Path
    number: int
    loaded: Loaded
    splits: Mapping[str, Sequence[Sample]]
    frames: FrameStore
    prefetcher: Prefetcher | None
    quarantine: Quarantine
    together: Together
    stops: Stops
    heartbeat: Heartbeat | None  # the first rank's, like the lock
    lock: Lock | None
    trackers: Trackers  # the first rank's; those of the others are silent
    started: float  # when the run would have begun, had it not been cut
    digests: bool = False  # `gradients.jsonl` is written: a hash of every step's gradients
    drift: str = ""  # what differs from what the run was begun with, where that was allowed

    @property
    def seconds(self) -> float:
        """How long the run has been worked at, by all its attempts."""
        return time.time() - self.started

    def evaluated(self, split: str) -> Sequence[Sample]:
        """The samples of a split that evaluations and baselines look at."""
        return self.splits[split][: self.loaded.recipe.evaluation.max_samples or None]

    def note(self, **values: Any) -> None:
        """Write `state.json`: where the run is. One that another trainer took over is that one's to tell of."""
        if self.together.rank == 0 and (self.lock is None or self.lock.is_mine):
            common = {"attempt": self.number, "world": self.together.size, "host": os.uname().nodename}
            drift = {"drift": self.drift} if self.drift else {}
            seconds = round(self.seconds, 1)
            state.write_state(self.folder, **values, seconds=seconds, **common, **drift)

    @property
    def at(self) -> dict[str, Any]:
        """Phase and step of the last sign of progress: of this attempt, or of the one before."""
        known = self.heartbeat.at if self.heartbeat and self.heartbeat.at["phase"] else state.read_state(self.folder)
        return {"phase": known.get("phase", ""), "step": known.get("step", 0)}

    def say(self, text: str) -> None:
        """Print, on the first rank only."""
        if self.together.rank == 0:
            print(text, flush=True)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` knows so far: the phases that are done."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def sum_up(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        if self.together.rank == 0:
            self.check_lock()
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))

    def check_lock(self) -> None:
        """Before the first rank makes something final. Raises ClusterError when the run is another trainer's by now."""
        if self.lock and not self.lock.is_mine:
            what = "another trainer has taken this run over: this one was silent for too long"
            raise ClusterError(str(self.folder), what, "leave the run to it; nothing of it was touched")

    def stop_if_asked(self, reason: str = "") -> None:
        """Between two phases, or for a `reason` that a phase already stopped for: raise Stopped, on all ranks alike."""
        told = self.together.gather(reason or self.stops.reason(first_rank=self.together.rank == 0))
        if reason := next((r for r in told if r), ""):
            raise Stopped(reason)


@contextmanager
def attempt_at(
    loaded: Loaded,
    together: Together,
    *,
    output: str | None = None,
    resume: Resume = "auto",
    allow_drift: bool = False,
    stop_after: int = 0,
    digests: bool = False,
) -> Iterator[Attempt]:
    """Open the run, and close it whatever happens. `stop_after` so many generations this attempt stops, 0 is never.

    Raises:
        Finished: the folder that was asked for holds a finished run.
        RecipeError: the folder holds another run, or a run that shall not be resumed.
        ClusterError: another trainer is at this run.
        DataError: a split cannot be read.
    """
    found: Any = None
    mine: Lock | None = None
    if together.rank == 0:
        try:
            mine, found = _claim(loaded, output, resume, allow_drift)
        except Exception as error:  # the other ranks wait to hear where the run is
            found = error
    found = together.gather(found)[0]
    if isinstance(found, Exception):
        raise found
    folder, number, drift = found
    stops = Stops(folder, deadline=deadline(), generations=stop_after)
    heartbeat = Heartbeat(folder) if together.rank == 0 else None
    told = Trackers(folder, loaded.recipe.trackers if together.rank == 0 else ())
    prefetcher = None
    failed = partial(state.write_state, folder, status="failed", attempt=number, world=together.size)
    try:
        with stops.listening():
            try:
                together.watch(folder / "ranks", ended=lambda reason: failed(reason=reason))
                together.doing("opening the data")
                opened = _opened(loaded, together, folder, number, stops, heartbeat, mine, told)
            except BaseException as error:
                if together.rank == 0:
                    failed(reason=f"{type(error).__name__}: {error}")
                raise
            attempt = replace(opened, drift=drift, digests=digests)
            prefetcher = attempt.prefetcher
            yield attempt
    finally:
        together.unwatch()
        if prefetcher:
            prefetcher.close()
        if heartbeat:
            heartbeat.close()
        if mine:
            mine.free()
        told.close()  # it may wait for a network


def _claim(loaded: Loaded, output: str | None, resume: Resume, allow_drift: bool) -> tuple[Lock, tuple[Path, int, str]]:
    """The folder of the run, locked, the number of this attempt at it, and what drifted."""
    recipe = loaded.standing_alone()
    trackers.require(recipe.trackers)
    mine = identity.identity(
        resolved(recipe),
        {split: Path(path) for split in SPLITS if (path := getattr(recipe.data, split))},
        {name: spec.use for name, spec in recipe.rewards.items()},
    )
    for folder in _places(recipe, output, resume, mine):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(folder, job=os.environ.get("SLURM_JOB_ID", ""), restart=_restarts())
            try:
                return lock, (folder, *_settled(folder, recipe, mine, allow_drift))
            except BaseException:
                lock.free()
                raise
        except ClusterError:
            if output:
                raise
        except OSError as error:
            raise RecipeError(str(folder), f"cannot be written: {error.strerror}", "choose another --output") from error
    raise RecipeError(recipe.output, "no name is left for a folder", "give --output")


def _places(recipe: Recipe, output: str | None, resume: Resume, mine: Mapping[str, Any]) -> Iterator[Path]:
    """The folder asked for; or the default, numbered, where nothing is yet or an unfinished run of the same.

    A run has begun when its identity is written: one that was cut soon after may have no state yet.
    """
    if output:
        folder = Path(output).absolute()
        if resume == "never" and (status := state.status(folder)) not in state.UNBEGUN:
            raise RecipeError(str(folder), f"this folder holds a {status} run", "choose another --output, or move it away")
        yield folder
        return
    base = Path(recipe.output.format(name=recipe.name)).absolute()
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        status = state.status(folder)
        if status == "finished" or identity.drift(folder, mine):
            continue
        if status in state.UNBEGUN or (resume == "auto" and holder_of(folder) is None):
            yield folder


def _settled(folder: Path, recipe: Recipe, mine: Mapping[str, Any], allow_drift: bool) -> tuple[int, str]:
    """Make the folder this run's; returns the number of the attempt and what drifted."""
    drift, number = identity.drift(folder, mine), state.next_attempt(folder)
    if state.status(folder) == "finished" and (allow_drift or not drift):
        raise Finished(str(folder))
    if drift and allow_drift:
        print(f"{folder}: {drift} is another than the run was begun with; going on, as --allow-drift says", flush=True)
        aside = state.attempt_folder(folder, number)
        for name in (identity.IDENTITY, "recipe.yaml"):  # the record of it, before anything forgets what was
            if (file := folder / name).exists():
                shutil.copyfile(file, aside / f"{file.stem}-before{file.suffix}")
    identity.settle(folder, mine, allow_drift=allow_drift)
    if recipe.trackers:
        trackers.settle(folder, recipe.trackers)
    state.attempt_folder(folder, number)
    write_whole(folder / "recipe.yaml", yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True))
    checkpoints.clear_leftovers(folder)
    (folder / state.STOP).unlink(missing_ok=True)  # what an earlier attempt was asked is done
    (folder / "rollouts").mkdir(exist_ok=True)
    return number, drift


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "") or 0)


def _opened(
    loaded: Loaded, together: Together, folder: Path, number: int,
    stops: Stops, heartbeat: Heartbeat | None, lock: Lock | None, told: Trackers,
) -> Attempt:  # fmt: skip
    data = loaded.recipe.data
    if data.synthetic and together.rank == 0:
        _render(loaded.recipe, folder)
    together.wait()
    splits, bad = _splits(loaded, folder)
    own = "quarantine.jsonl" if together.rank == 0 else f"quarantine-{together.rank}.jsonl"
    quarantine = Quarantine(folder / own, total=len(bad) + sum(map(len, splits.values())), max_share=data.max_bad_share)
    if together.rank == 0:  # every rank reads the same files; one of them tells
        for row in bad:
            quarantine.add(row.id, row.reason)
    quarantine.hear([(row.id, row.reason) for row in bad])
    if not splits["train"]:
        raise DataError("data.train", "there is nothing to train on", "set data.train to a JSONL file with usable rows")
    frames = FrameStore(int(data.frame_cache_gb * 2**30), data.frame_cache_folder or folder / "frames")
    workers = data.decoders(torch.cuda.is_available())
    return Attempt(
        folder=folder, number=number, loaded=loaded, splits=splits, frames=frames,
        prefetcher=Prefetcher(frames, workers) if workers else None, quarantine=quarantine, together=together, stops=stops,
        heartbeat=heartbeat, started=time.time() - _spent(folder), lock=lock, trackers=told,
    )  # fmt: skip


def _render(recipe: Recipe, folder: Path) -> None:
    """The synthetic world, unless it is there: it appears whole."""
    world, place = recipe.data.synthetic, folder / "world"
    if world is None or place.exists():
        return
    half = folder / ".world"
    shutil.rmtree(half, ignore_errors=True)
    total = sum(getattr(world, s) for s in SPLITS)
    with tqdm(total=total, desc="rendering videos", unit="clip", dynamic_ncols=True, mininterval=1.0) as bar:
        make_world(half, world, seed=recipe.seed, progress=lambda done: bar.update(done - bar.n))
    os.replace(half, place)


def _splits(loaded: Loaded, folder: Path) -> tuple[dict[str, list[Sample]], list[BadRow]]:
    data = loaded.recipe.data
    splits: dict[str, list[Sample]] = {}
    bad: list[BadRow] = []
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
    return splits, bad


def _spent(folder: Path) -> float:
    """Seconds that earlier attempts have worked, as far as the log tells."""
    path = folder / "metrics.jsonl"
    told = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in reversed(told):
        with suppress(ValueError, KeyError, TypeError):  # the last one may be cut
            return float(json.loads(line)["seconds"])
    return 0.0
