"""When a phase saves and when it stops, decided by all ranks at the end of a generation, and how a checkpoint is made whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rft.errors import ClusterError, RecipeError
from rft.hf.callbacks import Validate
from rft.hf.together import Together
from rft.run import checkpoints
from rft.run.cadence import Cadence
from rft.run.lock import Heartbeat
from rft.run.stops import Stops


class Saver(TrainerCallback):
    """Saves a phase of the run in the folder `run`, and ends it early where someone asks for that.

    Only at generation boundaries: inside a generation there are rollouts that no checkpoint holds. The phase's own end is
    not saved here, because the phase leaves its model then. `record(step)` is what a checkpoint shall remember beside the
    trainer's own state, and `fence()` raises where the run is not this trainer's any more. `stopped` says why the phase was
    left before its end.
    """

    def __init__(
        self,
        run: Path,
        phase: str,
        *,
        updates: int,
        cadence: Cadence,
        keep_last: int,
        keep_best: int,
        best_by: str,
        stops: Stops,
        together: Together,
        record: Callable[[int], Mapping[str, Any]],
        fence: Callable[[], None] = lambda: None,
        heartbeat: Heartbeat | None = None,
        validate: Validate | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._run, self._phase, self._updates, self._cadence = run, phase, updates, cadence
        self._keep_last, self._keep_best, self._best_by = keep_last, keep_best, best_by
        self._stops, self._together, self._record = stops, together, record
        self._fence = fence
        self._heartbeat, self._validate, self._say = heartbeat, validate, say
        self._saved_at, self._generations, self._best = time.monotonic(), 0, float("-inf")
        self._began = time.monotonic()
        self.stopped = ""

    @property
    def staging(self) -> Path:
        """The trainer's output folder, where nothing stays."""
        return checkpoints.staging(self._run, self._phase)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time counts from here, and the best so far may be an earlier attempt's."""
        self._saved_at = time.monotonic()
        self._best = max(checkpoints.scores(self._run, self._phase).values(), default=float("-inf"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A generation begins with the first of its steps."""
        if state.global_step % self._updates == 0:
            self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, where a generation ends."""
        if self._heartbeat:
            self._heartbeat.step(self._phase, state.global_step)
        if state.global_step % self._updates:
            return
        if self._together.rank == 0:
            self._fence()  # two trainers would write one log
        self._generations += 1
        self._stops.took(step=time.monotonic() - self._began)
        self._stops.trained()
        first = self._together.rank == 0
        due = first and (self._is_new_best(state.global_step) or self._is_due())
        told = self._together.gather((self._stops.reason(first_rank=first), due))
        if state.global_step >= state.max_steps or control.should_training_stop:
            return
        self.stopped = next((reason for reason, _ in told if reason), "")
        if self.stopped:
            control.should_training_stop = True
        control.should_save = bool(self.stopped) or told[0][1]

    def save(self, write: Callable[[], None], step: int) -> None:
        """Let the trainer `write` its state into `staging`, and make a checkpoint of it. Every rank calls.

        Raises:
            ClusterError: something could not be written, on any rank. The checkpoints before are as they were.
        """
        began = time.monotonic()
        first = self._together.rank == 0
        self._together.doing("saving", meets=True)
        written = self.staging / f"checkpoint-{step}"

        def empty() -> None:
            if first:
                self._fence()
                shutil.rmtree(self.staging, ignore_errors=True)

        def all_of_it() -> None:
            write()
            if self._together.local_rank == 0:
                checkpoints.sync(written)  # what this machine wrote

        place = self._run / checkpoints.CHECKPOINTS / checkpoints.name_of(self._phase, step)

        def name_it() -> None:
            if first:
                self._fence()
                checkpoints.seal(written, place, {**self._record(step), "step": step, "score": self._score(step)})
                checkpoints.point_to(self._run, place)
                checkpoints.prune(self._run, self._phase, keep_last=self._keep_last, keep_best=self._keep_best)

        all_or_none(self._together, f"checkpoint {place.name}", self.staging, (empty, all_of_it, name_it), self._fence)
        if first:
            shutil.rmtree(self.staging, ignore_errors=True)
        self._saved_at, self._generations = time.monotonic(), 0
        self._stops.took(save=time.monotonic() - began)

    def _is_due(self) -> bool:
        return self._cadence.is_due(seconds=time.monotonic() - self._saved_at, generations=self._generations)

    def _is_new_best(self, step: int) -> bool:
        score = self._score(step)
        if not self._keep_best or score is None or score <= self._best:
            return False
        self._best = score
        return True

    def _score(self, step: int) -> float | None:
        """What the validation of this very step says, if there was one."""
        if self._validate is None or self._validate.at != step:
            return None
        if self._keep_best and self._best_by not in self._validate.metrics:
            known = ", ".join(sorted(self._validate.metrics))
            raise RecipeError("best_by", f"the validation measures no {self._best_by!r}", f"known: {known}")
        return self._validate.metrics.get(self._best_by)


def all_or_none(
    together: Together, what: str, staging: Path, parts: Sequence[Callable[[], None]], fence: Callable[[], None]
) -> None:
    """Every rank does one part after the other, and hears before the next how it went for all.

    Raises:
        ClusterError: a part failed on any rank; nothing is left in `staging`, unless that is another trainer's by now.
    """
    for part in parts:
        if faults := [fault for fault in together.gather(_tried(part)) if fault]:
            if together.rank == 0:
                with suppress(ClusterError):
                    fence()
                    shutil.rmtree(staging, ignore_errors=True)
            do = "make room or repair the disk, and start again: it goes on from the last checkpoint"
            raise ClusterError(what, f"could not be saved: {faults[0]}", do)


def _tried(action: Callable[[], None]) -> str:
    """What went wrong, for the other ranks to hear: libraries raise all kinds of errors on a full disk."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
