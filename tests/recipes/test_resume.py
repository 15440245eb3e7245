"""A run that was cut goes on as if it had not been: weights, gradients and every logged number, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rft import verify
from rft.errors import ClusterError, RecipeError
from rft.run import checkpoints
from rft.run.state import read_state, status
from rft.train import main, train

HERE = Path(__file__).parent
SMALL = str(HERE / "small.yaml")
ORDER = {"warmup": 0, "tune": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(SMALL, output=str(run), digests=True)
    return run


def equal(straight: Path, run: Path, *, gradients: bool = True) -> None:
    found = verify.compare(straight, run)
    assert not found["losses"] and not found["weights"], found
    assert not gradients or not found["gradients"], found
    assert json.loads((run / "summary.json").read_text()) == json.loads((straight / "summary.json").read_text())
    logs = sorted(p.name for p in (straight / "rollouts").iterdir())
    assert [(run / "rollouts" / name).read_text() == (straight / "rollouts" / name).read_text() for name in logs] == [True] * 2


def test_stopped_after_every_generation_it_is_the_same_run(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempts = 0
    while status(run) != "finished":
        train(SMALL, output=str(run), stop_after=1, digests=True)
        attempts += 1
        assert attempts < 12
    assert attempts == 8, "4 + 4 generations, the last of a phase ends it"
    equal(straight, run)
    told = json.loads((run / "attempts" / "7" / "resume.json").read_text())
    assert told["step"] == 4 and told["prompts"] == 8 and told["not_there"] == [] and told["phase"] == "tune"


def test_the_comparison_sees_one_bit(straight: Path, tmp_path: Path) -> None:
    """What the other tests rely on: another seed, another gradient, one bit of one weight."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(straight, other)
    file = other / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name].view(-1)[0] *= 1 + 2**-23
    save_file(weights, file)
    assert name in verify.compare(straight, other)["weights"]
    lines = (other / "gradients.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace(json.loads(lines[5])["gradients"], "0" * 32)
    (other / "gradients.jsonl").write_text("\n".join(lines))
    assert "phase tune step 2: gradients" in verify.compare(straight, other)["gradients"]
    (other / "metrics.jsonl").write_text("".join((straight / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]))
    assert verify.compare(straight, other)["losses"]


def killed(run: Path, kills: int, seed: int, longest: float) -> list[dict]:
    argv = [sys.executable, "-m", "tests.recipes.killed_main", SMALL, str(run), str(kills), str(seed), str(longest)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + run.with_suffix(".log").read_text()[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def at_most_one_generation_is_lost(attempts: list[dict]) -> None:
    for one in attempts:
        phase, step = one["step"] or ("warmup", 0)
        updates = {"warmup": 1, "tune": 2}
        kept_phase, kept = one["saved"] or ("warmup", 0)
        if kept_phase == phase:
            assert step - kept <= updates[phase], one
        else:  # the first generation of the next phase; or the last of a phase that has not left its model yet
            assert ORDER[phase] == ORDER[kept_phase] + 1 and step <= updates[phase], one


def test_killed_at_random_moments(straight: Path, tmp_path: Path) -> None:
    attempts = killed(tmp_path / "run", kills=6, seed=1, longest=0.3)
    assert sum(one["killed"] for one in attempts) == 6
    at_most_one_generation_is_lost(attempts)
    equal(straight, tmp_path / "run", gradients=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_sixty_times(straight: Path, tmp_path: Path) -> None:
    """Over several runs, because one is soon at its end."""
    kills, number = 0, 0
    while kills < 60:
        attempts = killed(tmp_path / str(number), kills=min(10, 60 - kills), seed=100 + number, longest=0.4)
        at_most_one_generation_is_lost(attempts)
        equal(straight, tmp_path / str(number), gradients=False)
        kills += sum(one["killed"] for one in attempts)
        number += 1
    print(f"{kills} kills in {number} runs")


@pytest.mark.parametrize("how", ["signal", "file", "deadline"])
def test_a_stop_request_saves_and_ends_well(how: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def ask() -> None:
        while not (run / "checkpoints" / "tune-000002").exists():
            time.sleep(0.005)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            (run / "stop").write_text("preempted")

    if how == "deadline":
        monkeypatch.setenv("RFT_DEADLINE", str(time.time() - 1))
    else:
        threading.Thread(target=ask, daemon=True).start()
    assert main([SMALL, "--output", str(run), "--digest-gradients"]) == 0
    state = read_state(run)
    assert state["status"] == "stopped"
    assert {"signal": "SIGUSR1", "file": "preempted", "deadline": "time limit"}[how] in state["reason"]
    assert not (run / "lock").exists()
    monkeypatch.delenv("RFT_DEADLINE", raising=False)
    train(SMALL, output=str(run), digests=True)
    assert status(run) == "finished" and not (run / "stop").exists()
    equal(straight, run)


def test_a_finished_run_is_left_alone(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    assert main([SMALL, "--output", str(straight)]) == 0
    assert "has finished" in capsys.readouterr().out
    assert main([SMALL, "--output", str(straight), "--set", "seed=5"]) == 1, "it is no run of this recipe"
    assert "in which recipe.seed was another" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()} == before


def cut(tmp_path: Path, generations: int = 6) -> Path:
    run = tmp_path / "run"
    train(SMALL, output=str(run), stop_after=generations, digests=True)
    return run


def test_a_damaged_checkpoint_costs_one_generation(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cut(tmp_path, 4)  # ends the warm-up
    train(SMALL, output=str(run), stop_after=2, digests=True)
    newest = run / "checkpoints" / "tune-000004"
    os.truncate(newest / "optimizer.pt", (newest / "optimizer.pt").stat().st_size - 1)
    train(SMALL, output=str(run), digests=True)
    out = capsys.readouterr().out
    assert "tune-000004 cannot be used (optimizer.pt has" in out and "goes on after step 2" in out
    equal(straight, run)


def test_a_damaged_model_of_an_earlier_phase_is_made_again_with_what_grew_from_it(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cut(tmp_path, 4)
    train(SMALL, output=str(run), stop_after=1, digests=True)
    os.truncate(run / "phases" / "warmup" / "model.safetensors", 100)
    train(SMALL, output=str(run), digests=True)
    out = capsys.readouterr().out
    assert "model.safetensors has 100 bytes of" in out and "tune-000002: later than what is gone on from" in out
    assert (run / "attempts" / "3" / "checkpoints" / "tune-000002").is_dir()
    equal(straight, run)


def test_a_trainer_that_was_taken_over_leaves_the_run_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    theirs = {}

    def take_over() -> None:
        while not (run / "checkpoints" / "warmup-000001").exists():
            time.sleep(0.005)
        (run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": "7"}))
        (run / "state.json").write_text('{"status": "running", "host": "elsewhere"}')
        theirs.update(lines=len((run / "metrics.jsonl").read_text().splitlines()))

    threading.Thread(target=take_over, daemon=True).start()
    with pytest.raises(ClusterError, match="another trainer has taken this run over"):
        train(SMALL, output=str(run))
    assert read_state(run) == {"status": "running", "host": "elsewhere"}
    assert len((run / "metrics.jsonl").read_text().splitlines()) <= theirs["lines"] + 1, "the step that it was in"
    assert (run / "lock").exists()


def test_a_phase_that_cannot_leave_its_model_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".saving-end-of-warmup").write_text("")  # a file, where the library makes a folder
    with pytest.raises(ClusterError, match=r"phases/warmup: could not be saved: FileExistsError"):
        train(SMALL, ["save_every=", "phases.warmup.steps=1"], output=str(run))
    state = read_state(run)
    assert (state["status"], state["phase"], state["step"]) == ("failed", "warmup", 1)


def test_adapters_begin_the_same_in_any_attempt(tmp_path: Path) -> None:
    import torch

    for number in (1, 2):
        torch.rand(number)  # whatever an attempt has drawn before
        train(
            SMALL,
            ["lora.rank=2", "phases.tune.kl.reference=run", "save_every="],
            output=str(tmp_path / str(number)),
            stop_after=1,
        )
    assert not verify.compare(tmp_path / "1", tmp_path / "2")["losses"]


def test_data_that_cannot_be_opened_fail_the_run_and_free_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("RFT_WATCHDOG", "soon")
    with pytest.raises(ClusterError, match="RFT_WATCHDOG"):
        train(SMALL, output=str(run))
    assert read_state(run)["status"] == "failed" and not (run / "lock").exists()


def test_a_changed_recipe_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cut(tmp_path, 2)
    changed = ["--set", "phases.tune.learning_rate=0.01"]
    state = read_state(run)
    assert main([SMALL, "--output", str(run), *changed]) == 1
    assert "in which recipe.phases.tune.learning_rate was another" in capsys.readouterr().err
    assert read_state(run) == state and not (run / "lock").exists(), "nothing happened"
    assert main([SMALL, "--output", str(run), "--resume", "never"]) == 1
    assert main([SMALL, "--output", str(run), *changed, "--allow-drift", "--stop-after", "1"]) == 0
    assert read_state(run)["drift"] == "recipe.phases.tune.learning_rate"
    assert list(run.glob("attempts/*/recipe-before.yaml")) and list(run.glob("attempts/*/identity-before.json"))


def test_two_trainers_never_have_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-m", "rft.train", SMALL, "--output", str(run)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while not (run / "lock").exists():
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(ClusterError, match="is training this run"):
            train(SMALL, output=str(run))
    finally:
        first.kill()
        first.wait()


def test_without_an_output_an_unfinished_run_goes_on_and_a_finished_one_gets_a_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["phases.tune.steps=2", "phases.warmup.steps=1", "evaluation.max_samples=2"]
    train(SMALL, sets, stop_after=1)
    assert status(tmp_path / "runs" / "small") == "stopped"
    train(SMALL, [*sets, "seed=5"], stop_after=1)
    assert status(tmp_path / "runs" / "small-2") == "stopped", "another recipe does not touch it"
    (tmp_path / "runs" / "small" / "state.json").rename(tmp_path / "state.json")  # cut before it said anything
    train(SMALL, [*sets, "seed=6"], stop_after=1)
    assert status(tmp_path / "runs" / "small-3") == "stopped", "nor does it where the run was cut soon after it began"
    (tmp_path / "state.json").rename(tmp_path / "runs" / "small" / "state.json")
    train(SMALL, sets)
    assert status(tmp_path / "runs" / "small") == "finished"
    train(SMALL, sets, stop_after=1)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["small", "small-2", "small-3", "small-4"]


def test_a_disk_that_is_full_loses_nothing(straight: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB: a checkpoint's weights are larger."""
    run = cut(tmp_path, 5)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"from rft.train import main; sys.exit(main([{SMALL!r}, '--output', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ClusterError: checkpoint tune-" in done.stderr and "could not be saved" in done.stderr
    assert read_state(run)["status"] == "failed" and not (run / "lock").exists()
    assert not list((run / "checkpoints").glob(".saving*"))
    newest = checkpoints.last_good(run, "tune") or checkpoints.last_good(run, "warmup")
    assert newest and not checkpoints.fault(newest)
    (run / "gradients.jsonl").unlink()  # the limited attempt wrote none
    train(SMALL, output=str(run))
    equal(straight, run, gradients=False)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        train(SMALL, output=str(tmp_path / "file" / "run"))


def test_the_best_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = ["save_every=", "keep_best=1", "keep_last=1", "phases.warmup.check_every=1", "phases.warmup.until=miou >= 2"]
    train(SMALL, sets, output=str(run), stop_after=3)
    found = {p.name: checkpoints.record_of(p)["score"] for p in checkpoints.of_phase(run, "warmup")}
    looked = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {f"warmup-{line['step']:06d}": line["validation/miou"] for line in looked if "validation/miou" in line}
    assert found and found.items() <= scores.items()
    assert max(scores.values()) in found.values()
    assert (run / "checkpoints" / "last-good").read_text().strip() in found
