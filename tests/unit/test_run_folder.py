"""The run folder: its lock, its checkpoints, what it is a run of, its logs, and what asks it to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rft.errors import ClusterError, DataError, RecipeError
from rft.quarantine import Quarantine
from rft.run import checkpoints, history, identity, lock, state
from rft.run.cadence import Cadence
from rft.run.lock import Heartbeat, Lock
from rft.run.stops import Stops, deadline


@pytest.mark.parametrize(
    ("text", "cadence"),
    [
        ("", Cadence()),
        ("30m", Cadence(seconds=1800)),
        ("1.5 h", Cadence(seconds=5400)),
        ("45s", Cadence(seconds=45)),
        ("1 generation", Cadence(generations=1)),
        ("10 generations", Cadence(generations=10)),
    ],
)
def test_a_cadence_is_read(text: str, cadence: Cadence) -> None:
    assert Cadence.parse(text) == cadence


@pytest.mark.parametrize("text", ["30", "m", "0m", "0 generations", "often", "-5m", "1.5 generations", "10 steps"])
def test_what_is_no_cadence_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="save_every"):
        Cadence.parse(text)


def test_a_cadence_is_due() -> None:
    assert Cadence(seconds=10).is_due(seconds=10, generations=0)
    assert not Cadence(seconds=10).is_due(seconds=9.9, generations=100)
    assert Cadence(generations=2).is_due(seconds=0, generations=2)
    assert not Cadence().is_due(seconds=1e9, generations=10**9)


def test_a_lock_is_held_by_one_process_and_not_by_a_dead_one(tmp_path: Path) -> None:
    hold = (
        "import time; from pathlib import Path; from rft.run.lock import Lock; "
        f"Lock.take(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout and child.stdout.readline() == "held\n"
        assert lock.holder_of(tmp_path)["pid"] == child.pid
        with pytest.raises(ClusterError, match=f"process {child.pid} on"):
            Lock.take(tmp_path)
    finally:
        child.kill()  # as a power cut: it cannot give the lock back
        child.wait()
    assert lock.holder_of(tmp_path) is None
    mine = Lock.take(tmp_path)
    assert lock.holder_of(tmp_path)["pid"] == os.getpid()
    mine.free()
    assert not (tmp_path / "lock").exists()
    assert not list(tmp_path.glob(".lock*")), "nothing is left beside it"


def held_elsewhere(folder: Path, *, age: float, job: str = "", restart: int = 0) -> None:
    """The lock of a trainer on another machine whose last sign of life is `age` seconds old."""
    holder = {"host": "elsewhere", "pid": 1, "began": "7", "job": job, "restart": restart}
    (folder / "lock").write_text(json.dumps(holder))
    os.utime(folder / "lock", (time.time() - age, time.time() - age))


def test_a_trainer_elsewhere_lives_by_its_heartbeat(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, age=1000)
    (tmp_path / "heartbeat").write_text("{}")  # just now
    with pytest.raises(ClusterError, match="on elsewhere is training"):
        Lock.take(tmp_path)
    os.utime(tmp_path / "heartbeat", (time.time() - 100, time.time() - 100))
    Lock.take(tmp_path).free()


def test_a_silent_trainer_elsewhere_is_given_time_to_show_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STILL", 3.0)
    monkeypatch.setattr(lock, "BEAT", 0.5)
    held_elsewhere(tmp_path, age=1.5)
    said: list[str] = []
    Lock.take(tmp_path, say=said.append).free()
    assert len(said) == 1 and "silent" in said[0]


def test_a_restarted_job_takes_the_lock_of_its_own_past(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, age=0, job="12", restart=0)
    with pytest.raises(ClusterError):
        Lock.take(tmp_path, job="13", restart=1)
    Lock.take(tmp_path, job="12", restart=1).free()


def test_a_lock_that_was_taken_over_is_not_given_back_by_its_old_holder(tmp_path: Path) -> None:
    old = Lock.take(tmp_path)
    held_elsewhere(tmp_path, age=0)
    old.free()
    assert (tmp_path / "lock").exists()


def test_a_heartbeat_tells_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    beat = Heartbeat(tmp_path)
    beat.step("tune", 7)
    end = time.monotonic() + 10
    while json.loads((tmp_path / "heartbeat").read_text())["step"] != 7 and time.monotonic() < end:
        time.sleep(0.02)
    beat.close()
    told = json.loads((tmp_path / "heartbeat").read_text())
    assert (told["phase"], told["step"]) == ("tune", 7) and told["alive"] >= told["progress"] - 0.1


def sealed(run: Path, step: int, **record: object) -> Path:
    written = checkpoints.staging(run, "x") / "w"
    written.mkdir(parents=True)
    (written / "weights").write_bytes(bytes(range(256)) * 40)
    (written / "deep").mkdir()
    (written / "deep" / "state").write_text("state")
    place = run / checkpoints.CHECKPOINTS / checkpoints.name_of("tune", step)
    checkpoints.seal(written, place, {"step": step, **record})
    return place


def test_a_sealed_checkpoint_is_found_and_sound(tmp_path: Path) -> None:
    place = sealed(tmp_path, 12)
    assert place.name == "tune-000012"
    assert checkpoints.fault(place) == ""
    assert checkpoints.record_of(place) == {"step": 12}
    assert checkpoints.last_good(tmp_path, "tune") == place
    assert checkpoints.last_good(tmp_path, "tun") is None, "another phase's name may be the beginning of this one's"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: (p / "weights").unlink(), "weights is missing"),
        (lambda p: os.truncate(p / "weights", 100), "100 bytes of 10240"),
        (lambda p: (p / "weights").write_bytes(bytes(10240)), "other contents"),
        (lambda p: (p / "deep" / "state").unlink(), "deep/state is missing"),
        (lambda p: (p / "manifest.json").unlink(), "FileNotFoundError"),
        (lambda p: (p / "manifest.json").write_text("{"), "JSONDecodeError"),
        (lambda p: (p / "record.json").write_text("[]"), "is no object"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage, why: str) -> None:
    before, newest = sealed(tmp_path, 8), sealed(tmp_path, 12)
    damage(newest)
    said: list[str] = []
    assert checkpoints.last_good(tmp_path, "tune", said.append) == before
    assert len(said) == 1 and why in said[0] and "tune-000012" in said[0]


def test_a_save_that_was_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    before = sealed(tmp_path, 8)
    half = checkpoints.staging(tmp_path, "tune") / "checkpoint-12"
    half.mkdir(parents=True)
    (half / "weights").write_bytes(b"half")
    assert checkpoints.of_phase(tmp_path, "tune") == [before]
    checkpoints.clear_leftovers(tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} <= {"tune-000008", ".saving-x"}, "sealed() empties its own"
    assert not half.exists()
    assert checkpoints.last_good(tmp_path, "tune") == before


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.1)):
        sealed(tmp_path, step, score=score)
    checkpoints.prune(tmp_path, "tune", keep_last=0, keep_best=1)
    assert len(checkpoints.of_phase(tmp_path, "tune")) == 5
    checkpoints.prune(tmp_path, "tune", keep_last=1, keep_best=2)
    assert [p.name for p in checkpoints.of_phase(tmp_path, "tune")] == ["tune-000002", "tune-000004", "tune-000005"]
    checkpoints.prune(tmp_path, "tune", keep_last=1, keep_best=0)
    assert [p.name for p in checkpoints.of_phase(tmp_path, "tune")] == ["tune-000005"]


RECIPE = {
    "name": "a", "output": "runs/a", "seed": 1, "save_every": "30m", "data": {"train": "/old/train.jsonl", "workers": 2},
    "rewards": {"iou": {"use": "/old/r.py:iou", "weight": 1.0}}, "phases": {"tune": {"steps": 5, "betas": (0.9, 0.99)}},
}  # fmt: skip


def of(
    tmp_path: Path, recipe: dict | None = None, rows: str = "{}\n", source: str = "def iou(): ...\n", place: str = "a"
) -> dict:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(rows)
    (folder / "r.py").write_text(source)
    return identity.identity(recipe or RECIPE, {"train": folder / "train.jsonl"}, {"iou": f"{folder / 'r.py'}:iou"})


def test_a_run_knows_what_it_is_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert identity.settle(run, of(tmp_path), allow_drift=False) == ""
    moved = {**RECIPE, "name": "b", "save_every": "1 generation", "data": {"train": "/new/train.jsonl", "workers": 0}}
    assert identity.settle(run, of(tmp_path, moved, place="b"), allow_drift=False) == "", "files moved, contents did not"
    for where, changed in {
        "recipe.phases.tune.steps": of(tmp_path, {**RECIPE, "phases": {"tune": {"steps": 6, "betas": (0.9, 0.99)}}}),
        "data.train": of(tmp_path, rows='{"a": 1}\n'),
        "rewards.iou": of(tmp_path, source="def iou(): return 1\n"),
        "recipe.rewards.iou.weight": of(tmp_path, {**RECIPE, "rewards": {"iou": {"use": "/old/r.py:iou", "weight": 2.0}}}),
        "recipe.rewards.iou.use": {
            **of(tmp_path),
            "recipe": {**of(tmp_path)["recipe"], "rewards": {"iou": {"use": "f", "weight": 1.0}}},
        },
    }.items():
        with pytest.raises(RecipeError, match=f"in which {where} was another"):
            identity.settle(run, changed, allow_drift=False)
    assert identity.settle(run, of(tmp_path, rows='{"a": 1}\n'), allow_drift=True) == "data.train"
    assert identity.settle(run, of(tmp_path, rows='{"a": 1}\n'), allow_drift=False) == "", (
        "drift that was allowed is the run's own now"
    )


def test_a_damaged_identity_or_state_is_named(tmp_path: Path) -> None:
    for name, read in (
        (identity.IDENTITY, lambda: identity.drift(tmp_path, {})),
        (state.STATE, lambda: state.read_state(tmp_path)),
    ):
        (tmp_path / name).write_text("{")
        with pytest.raises(DataError, match=name):
            read()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logs_are_cut_back_to_where_the_run_goes_on(tmp_path: Path) -> None:
    told = [{"phase": p, "step": s} for p in ("first", "second", "third") for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + '{"phase": "third", "st')
    (tmp_path / "rollouts").mkdir()
    for name in ("first-0", "second-0", "second-1", "third-0"):
        (tmp_path / "rollouts" / f"{name}.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in (0, 1, 2)))
    aside = tmp_path / "attempts" / "2"
    assert history.cut_back(tmp_path, ["first", "second", "third"], "second", 2, aside) == 5 + 1 + 1 + 3
    assert lines(tmp_path / "metrics.jsonl") == told[:5], "the steps up to the second, and the line that was cut is gone"
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 5, "nothing is lost"
    left = {p.stem: [line["step"] for line in lines(p)] for p in (tmp_path / "rollouts").glob("*.jsonl")}
    assert left == {"first-0": [0, 1, 2], "second-0": [0, 1], "second-1": [0, 1], "third-0": []}
    assert history.cut_back(tmp_path, ["first", "second", "third"], "second", 2, aside) == 0


def test_stops(tmp_path: Path) -> None:
    stops = Stops(tmp_path)
    assert stops.reason(first_rank=True) == ""
    (tmp_path / "stop").write_text("preempted\n")
    assert stops.reason(first_rank=True) == "preempted"
    assert stops.reason(first_rank=False) == "", "one rank reads the file system, for all"
    stops.forget_file()
    assert stops.reason(first_rank=True) == ""
    before = signal.getsignal(signal.SIGUSR1)
    with stops.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.reason(first_rank=False) == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_stop_after_generations(tmp_path: Path) -> None:
    stops = Stops(tmp_path, generations=2)
    stops.trained()
    assert stops.reason(first_rank=True) == ""
    stops.trained()
    assert "as many generations" in stops.reason(first_rank=True)


def test_a_stop_in_time(tmp_path: Path) -> None:
    stops = Stops(tmp_path, deadline=time.time() + 100)
    stops.took(step=50.0, save=20.0)
    stops.took(step=10.0)
    assert stops.reason(first_rank=True) == "", "1.3 x 70 s fit"
    stops.took(save=30.0)
    assert "a step and a save need 104 s" in stops.reason(first_rank=True)
    assert deadline({}) == 0.0 and deadline({"RFT_DEADLINE": "12.5"}) == 12.5 and deadline({"RFT_DEADLINE": "soon"}) == 0.0


def test_attempts_are_counted(tmp_path: Path) -> None:
    assert state.next_attempt(tmp_path, {}) == 1
    state.attempt_folder(tmp_path, 1)
    state.attempt_folder(tmp_path, 10)
    assert state.next_attempt(tmp_path, {}) == 11
    assert state.next_attempt(tmp_path, {"RFT_ATTEMPT": "3"}) == 3
    assert state.status(tmp_path) == ""
    state.write_state(tmp_path, status="stopped", step=3)
    assert state.status(tmp_path) == "stopped"


def test_what_was_saved_later_than_a_run_goes_on_from_does_not_count(tmp_path: Path) -> None:
    """A damaged checkpoint would be the newest for ever: of the two kept one, in place of what was just written."""
    sealed(tmp_path, 10)
    os.truncate(sealed(tmp_path, 20) / "weights", 3)
    aside = tmp_path / "attempts" / "2" / "checkpoints"
    assert checkpoints.cut_back(tmp_path, ["tune"], "tune", 10, aside) == ["tune-000020"]
    assert (aside / "tune-000020" / "weights").stat().st_size == 3, "it is put aside and not lost"
    new = sealed(tmp_path, 15)
    checkpoints.prune(tmp_path, "tune", keep_last=1, keep_best=0)
    assert checkpoints.of_phase(tmp_path, "tune") == [new]
    assert checkpoints.cut_back(tmp_path, ["warmup", "tune"], "warmup", 3, aside) == ["tune-000015"], (
        "it grew from another start"
    )
    assert checkpoints.cut_back(tmp_path, ["warmup", "tune"], "warmup", 3, aside) == []


def test_a_sample_in_quarantine_is_told_once_by_all_attempts(tmp_path: Path) -> None:
    for _ in range(2):
        kept = Quarantine(tmp_path / "quarantine.jsonl", total=10, max_share=0.5)
        kept.add("a", DataError("a.mp4", "is cut", "repair it"))
        kept.refuse("b", DataError("b", "is too long", "shorten it"), "tune")
        assert len(kept) == 1
    assert [line["sample"] for line in lines(tmp_path / "quarantine.jsonl")] == ["a", "b"]
