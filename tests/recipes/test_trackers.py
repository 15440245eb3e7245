"""A run is one run in each tracker, over two phases and two attempts; a tracker that fails costs its own curves alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rft.errors import DataError, RecipeError
from rft.hf import trackers
from rft.train import train

ROOT = Path(__file__).parents[2]
SMALL = [
    "tiny.hidden=32", "tiny.layers=1", "tiny.heads=2", "tiny.vision_hidden=16", "tiny.vision_layers=1",
    "data.synthetic={train: 4, validation: 1, test: 1}", "data.workers=0", "log_rollouts=false",
    "evaluation={max_tokens: 4, max_samples: 1}",
    "phases.warmup={steps: 2, until: '', check_every: 2, groups_per_step: 2, groups_per_device: 2}",
    "phases.grpo={steps: 3, check_every: 3, groups_per_step: 2, groups_per_device: 2, group_size: 2}",
    "phases.grpo.sampling.max_tokens=4",
]  # fmt: skip
Curves = Mapping[str, Sequence[tuple[int, float]]]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what this machine's user has set, and without a network."""
    for key in settings():
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if re.match("WANDB|MLFLOW|TRACKIO|TENSORBOARD", k)}


def run(folder: Path, tracker: str, **more: Any) -> None:
    """Train, and leave the environment as it was."""
    before = settings()
    train(str(ROOT / "recipes/quickstart.yaml"), [*SMALL, f"trackers=[{tracker}]"], str(folder), **more)
    assert settings() == before


def cut_and_resumed(folder: Path, tracker: str) -> tuple[dict[str, str], dict[str, str]]:
    """A run that is cut in its second phase and does that one's first step again: its ids after either attempt."""
    run(folder, tracker, stop_after=3)
    shutil.rmtree(folder / "checkpoints" / "grpo-000001")
    first = json.loads((folder / "trackers.json").read_text())
    run(folder, tracker)
    return first, json.loads((folder / "trackers.json").read_text())


def logged(folder: Path, key: str) -> dict[str, list[tuple[int, float]]]:
    """Of `metrics.jsonl`: a number of each phase at its steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if key in line:
            found.setdefault(line["phase"], []).append((line["step"], line[key]))
    return found


def check(curves: Curves, folder: Path) -> None:
    """Every step of both phases is there, the one that was done again twice, with the number that the run's own file has."""
    losses, rates, looks = (logged(folder, key) for key in ("loss", "learning_rate", "validation/miou"))
    assert [s for s, _ in losses["warmup"]] == [1, 2] and [s for s, _ in losses["grpo"]] == [1, 2, 3]
    for phase in ("warmup", "grpo"):
        for name, expected in (("train/{}/learning_rate", rates), ("train/{}/loss", losses), ("eval/{}/miou", looks)):
            told, known = curves[name.format(phase)], dict(expected[phase])
            again = [1] if phase == "grpo" and name.startswith("train/") else []
            assert [step for step, _ in told] == [*again, *known]
            assert [value for _, value in told] == pytest.approx([known[step] for step, _ in told])
        assert len(curves[f"test/{phase}/miou"]) == 1
    assert not {"train/loss", "eval/miou", "test/miou"} & set(curves)  # two phases would write over each other


def tensorboard_curves(folder: Path) -> Curves:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_one_folder_with_all_steps_of_both_phases(tmp_path: Path) -> None:
    first, last = cut_and_resumed(tmp_path / "run", "tensorboard")
    assert first == last and first["name"].startswith("run-")
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert {p.parent for p in files} == {tmp_path / "run" / "tensorboard"} and len(files) == 2  # one per attempt
    check(tensorboard_curves(tmp_path / "run" / "tensorboard"), tmp_path / "run")


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's own folder wins, and is a file: the writer cannot be opened."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "taken"))
    run(tmp_path / "run", "tensorboard")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracker tensorboard: ")]
    assert len(told) == 1 and "goes on without it" in told[0]
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "finished"
    assert len(logged(tmp_path / "run", "loss")["grpo"]) == 3
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_keeps_its_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    first, last = cut_and_resumed(tmp_path / "run", "wandb")
    assert first == last and wandb.run is None
    places = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(places) == 2 and all(p.name.endswith(f"-{first['WANDB_RUN_ID']}") for p in places)
    check(wandb_curves(places), tmp_path / "run")


def wandb_curves(places: Sequence[Path]) -> Curves:
    """What the offline folders would send, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: dict[str, list[tuple[int, float]]] = {}
    for place in places:
        data, at = next(place.glob("*.wandb")).read_bytes(), 7
        assert len(data) < 2**15  # one block of a LevelDB log, so that every record is whole
        while at < len(data):
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            record = Record.FromString(data[at + 7 : at + 7 + size])
            at += 7 + size
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name in row.keys() & {n for n in row if n.count("/") > 1}:
                curves.setdefault(name, []).append((row["train/global_step"], row[name]))
    return curves


def test_mlflow_keeps_its_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    first, last = cut_and_resumed(tmp_path / "run", "mlflow")
    assert first == last
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [r.info.run_id for r in found] == [first["MLFLOW_RUN_ID"]] and found[0].info.status == "FINISHED"
    history = {k: client.get_metric_history(first["MLFLOW_RUN_ID"], k) for k in found[0].data.metrics}
    check({k: [(m.step, m.value) for m in sorted(h, key=lambda m: m.step)] for k, h in history.items()}, tmp_path / "run")


def test_trackio_keeps_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")  # read when it is imported
    first, last = cut_and_resumed(tmp_path / "run", "trackio")
    assert first == last
    rows = storage.SQLiteStorage.get_logs(trackers.PROJECT, first["name"])
    names = {n for row in rows for n in row if n.count("/") > 1}
    curves = {n: [(row["train/global_step"], row[n]) for row in rows if n in row] for n in names}
    check(curves, tmp_path / "run")


def test_ids_are_the_users_own_and_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    given = trackers.settle(tmp_path, ["wandb"])
    assert given["WANDB_RUN_ID"] == "mine"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert trackers.settle(tmp_path, ["wandb", "tensorboard"]) == given == json.loads((tmp_path / "trackers.json").read_text())
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(DataError, match=r"trackers\.json"):
        trackers.settle(tmp_path, ["wandb"])


def test_a_tracker_that_is_not_there_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a folder is made."""
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "TRUE")  # the same to transformers as not installed
    with pytest.raises(RecipeError, match="pip install mlflow"):
        run(tmp_path / "run", "tensorboard, mlflow")
    assert not (tmp_path / "run").exists()
