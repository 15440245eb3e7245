"""Trackers beside the files of a run: TensorBoard, W&B, MLflow and Trackio, by the callbacks that transformers has for them.

A run is one run in each tracker, whatever its phases, attempts and processes: the first rank alone reports, and the run's id
is kept in RUN/trackers.json and found there by later attempts. What an integration reads from the environment is set for as
long as it is called. A variable that the user has set wins; an id among them is recorded.

Every phase counts its steps from 0, and nobody knows beforehand where a phase with an `until` ends. So a phase is told by
its name and not by an offset: `reward` of phase `grpo` is `train/grpo/reward`, its validation `eval/grpo/miou` and its test
`test/grpo/miou`, in all four trackers and at the step that `metrics.jsonl` says. Steps that are done again after a cut are
told again, with the same values. No tracker minds: W&B counts reports by itself and draws over `train/global_step`.

TensorBoard, W&B and MLflow write below the run's folder where the user names no other place or server; Trackio reads its
place when it is imported, so that is TRACKIO_DIR or its default. No model is uploaded. Any error of a tracker is told, and
then the attempt goes on without that tracker.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from transformers.integrations.integration_utils import rewrite_logs

from rft.errors import DataError, RecipeError
from rft.files import write_whole

RECORD = "trackers.json"
PROJECT = "rft"
IDS = {"wandb": "WANDB_RUN_ID", "mlflow": "MLFLOW_RUN_ID"}


class Wandb(WandbCallback):
    """Closes the run that it has begun; transformers leaves it to the process, which may begin another one."""

    _is_own = False

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        self._is_own = self._wandb.run is None
        if self._is_own:
            self._wandb.teardown()  # it would remember the environment of an earlier run of this process
        super().setup(args, state, model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_own:
            self._wandb.finish()
            self._wandb.teardown()  # its service has written everything


INTEGRATIONS: Mapping[str, tuple[type[TrainerCallback], Callable[[], bool]]] = {
    "tensorboard": (TensorBoardCallback, is_tensorboard_available),
    "wandb": (Wandb, is_wandb_available),
    "mlflow": (MLflowCallback, is_mlflow_available),
    "trackio": (TrackioCallback, is_trackio_available),
}


def require(names: Sequence[str]) -> None:
    """Raises RecipeError when a tracker that the recipe names cannot be used here."""
    for name in names:
        if not INTEGRATIONS[name][1]():
            what = f"{name} is not installed, or transformers was told not to use it"
            raise RecipeError("trackers", what, f"pip install {name}, or take it out of the recipe's trackers")


def settle(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """What `trackers.json` says, made where it does not say it yet; the user's own ids go first.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / RECORD
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise DataError(str(path), f"not readable: {error}", "restore it, or move it away to begin new tracker runs") from error
    made = uuid.uuid4().hex[:8]
    ids = {"name": f"{folder.name}-{made}", "WANDB_RUN_ID": made, **kept}
    for name in names:
        if given := os.environ.get(IDS.get(name, ""), ""):
            ids[IDS[name]] = given
    if ids != kept:
        write_whole(path, json.dumps(ids, indent=1))
    return ids


class Trackers:
    """The trackers of one attempt at the run in `folder`; every rank but the first has none (`names` is empty).

    Their runs are opened when the first phase begins to train, and closed by `close`.

    Raises:
        DataError: `trackers.json` is damaged.
    """

    def __init__(self, folder: Path, names: Sequence[str], say: Callable[[str], None] = print) -> None:
        self._folder, self._names, self._say = folder, tuple(names), say
        self._kept = settle(folder, self._names) if names else {}
        self._open: dict[str, TrainerCallback] = {}
        self._failed: set[str] = set()
        self._heard: tuple[Any, Any, Any] | None = None  # the Trainer's arguments, state and control, as they were last

    def of_phase(self, name: str) -> TrainerCallback:
        """What the trainer of a phase calls."""
        return _Phase(self, name)

    def begin(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """A phase begins to train: open what is not open yet."""
        self._heard = (args, state, control)
        for name in self._names:
            if name not in self._failed:
                self._ask(name, "on_train_begin", state, model=model)
        self._keep()

    def tell(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a phase after `step` of its optimizer steps, named as in `metrics.jsonl`; nothing before `begin`."""
        if not self._open or self._heard is None:
            return
        state = copy.copy(self._heard[1])
        state.global_step = step
        logs = {_named(phase, key): value for key, value in values.items() if isinstance(value, (int, float))}
        for name in tuple(self._open):
            # the one integration that leaves names as they are
            self._ask(name, "on_log", state, logs=rewrite_logs(logs) if name == "mlflow" else dict(logs))

    def close(self) -> None:
        """Close their runs, such that a later attempt goes on with them."""
        for name in tuple(self._open):
            self._ask(name, "on_train_end", self._heard[1])
        self._open.clear()

    def _ask(self, name: str, event: str, state: Any, **given: Any) -> None:
        """Call one event of an integration. Whatever it raises, the training goes on: the run's own files have every number."""
        args, _, control = self._heard
        args = copy.copy(args)
        args.run_name, args.project = self._kept["name"], PROJECT
        try:
            with environment(self._variables(name)):
                if name not in self._open:
                    self._open[name] = INTEGRATIONS[name][0]()
                getattr(self._open[name], event)(args, state, control, **given)
        except Exception as error:
            self._open.pop(name, None)
            self._failed.add(name)
            told = str(error).strip().partition("\n")[0][:200]
            self._say(f"tracker {name}: {type(error).__name__}: {told}; this attempt goes on without it")

    def _variables(self, name: str) -> dict[str, str]:
        """What an integration shall find in its environment, where the user has not set it."""
        match name:
            case "tensorboard":
                return {"TENSORBOARD_LOGGING_DIR": str(self._folder / "tensorboard")}
            case "wandb":
                own = {"WANDB_RESUME": "allow", "WANDB_DIR": str(self._folder), "WANDB_PROJECT": PROJECT}
                return {**own, "WANDB_RUN_ID": self._kept["WANDB_RUN_ID"]}
            case "mlflow":
                own = {
                    "MLFLOW_TRACKING_URI": f"sqlite:///{self._folder / 'mlflow.db'}",
                    "MLFLOW_EXPERIMENT_NAME": PROJECT,
                    "MLFLOW_TAGS": json.dumps({"rft.folder": str(self._folder)}),
                    # a parameter has one value for ever there, and phases have other arguments
                    "MLFLOW_MAX_LOG_PARAMS": "0",
                    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is not there costs seconds and no minutes
                }
                return {**own, **{k: v for k, v in self._kept.items() if k == IDS["mlflow"]}}
        return {}

    def _keep(self) -> None:
        """Record the ids that the trackers really use: MLflow makes its own, and a user's program may have a run open."""
        found = dict(self._kept)
        if "wandb" in self._open:
            import wandb

            found[IDS["wandb"]] = wandb.run.id
        if "mlflow" in self._open:
            import mlflow

            found[IDS["mlflow"]] = mlflow.active_run().info.run_id
        if found != self._kept:
            self._kept = found
            write_whole(self._folder / RECORD, json.dumps(found, indent=1))


class _Phase(TrainerCallback):
    """Between the trainer of a phase and the trackers of its run."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self._trackers, self._name = trackers, name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._trackers.begin(args, state, control, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "train_runtime" not in logs:
            self._trackers.tell(self._name, state.global_step, logs)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Those of the variables that are not set are set inside; whatever is changed inside is afterwards as it was."""
    before = dict(os.environ)
    os.environ.update({key: value for key, value in variables.items() if key not in before})
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():  # W&B and MLflow leave some of their own
            del os.environ[key]
        os.environ.update(before)


def _named(phase: str, key: str) -> str:
    """The name that the integrations make `eval/`, `test/` or `train/` of."""
    for ours, theirs in (("validation/", "eval_"), ("test/", "test_")):
        if key.startswith(ours):
            return f"{theirs}{phase}/{key.removeprefix(ours)}"
    return f"{phase}/{key}"
