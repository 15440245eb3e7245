"""A small sweep with real training: cut in the middle, taken up again, and thinned out by its rules."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rft.cluster.carry import run_here
from rft.cluster.plan import plan
from rft.cluster.report import ranked, report, status
from rft.cluster.trials import open_folder, standing
from rft.loaded import load
from rft.train import train

ROOT = Path(__file__).parents[2]
STEPS = 40
RUN = (
    "import argparse, sys\nfrom rft import sweep_cli\np = argparse.ArgumentParser()\n"
    "sweep_cli.add(p.add_subparsers())\no = p.parse_args(['sweep', *sys.argv[1:]])\nsys.exit(o.run(o))"
)
SWEEP = {
    "recipe": "recipes/quickstart.yaml",
    "sets": [
        "data.synthetic={train: 4, validation: 1, test: 2}", "log_rollouts=false", "evaluation.max_tokens=4",
        "phases.warmup.steps=1", "phases.warmup.until=''",
        "phases.warmup.groups_per_step=2", "phases.warmup.groups_per_device=2",
        "phases.grpo.groups_per_step=2", "phases.grpo.groups_per_device=2", "phases.grpo.group_size=2",
        "phases.grpo.check_every=0", "phases.grpo.sampling.max_tokens=4",
    ],
    "values": {"phases.grpo.learning_rate": ["1e-4", "1e30"]},
    # from nothing no rollout is right: GRPO has no signal, and would go on without one for a very long time
    "paired": [
        {"phases.grpo.objective": "nll", "phases.grpo.steps": STEPS},
        {"phases.grpo.objective": "grpo", "phases.grpo.steps": 100_000},
    ],
    "rules": {"nan": True, "no_signal": 5},
}  # fmt: skip


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_a_sweep_that_is_cut_goes_on_and_its_rules_end_the_hopeless(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"sweep": SWEEP}, sort_keys=False))
    swept = plan(str(tmp_path / "s.yaml"), str(tmp_path / "out"))
    good, silent, diverging, both = swept.trials
    runner = begun(tmp_path, "run", str(swept.folder), "--slots", "2")
    until = time.monotonic() + 90
    while lines_of(good.folder) < 5:
        assert runner.poll() is None and time.monotonic() < until, runner.stdout.read()
        time.sleep(0.02)
    runner.send_signal(signal.SIGTERM)
    runner.wait(timeout=60)
    runner.stdout.close()
    assert standing(good.folder)[0] not in ("finished", "pruned", "failed")
    assert len(swept.unfinished) >= 3

    said: list[str] = []
    pruned = {trial.name for trial in swept.trials if standing(trial.folder)[0] == "pruned"}
    ended = run_here(open_folder(str(swept.folder)), slots=2, say=said.append)
    assert ended.finished == (good.name,) and not ended.failed, said
    assert pruned | set(ended.pruned) == {silent.name, diverging.name, both.name}
    words = {trial.name: standing(trial.folder) for trial in swept.trials}
    assert words[good.name] == ("finished", ""), said
    assert words[diverging.name][0] == "pruned" and words[diverging.name][1].startswith("nan: ")
    for trial in (silent, both):
        assert words[trial.name] == ("pruned", "no_signal: every group of the last 5 steps was muted")
        assert lines_of(trial.folder) < 50_000

    # what was cut went on in its folder, step by step, and ends where it would have ended
    rows = [json.loads(line) for line in (good.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "grpo" and "loss" in row] == list(range(1, STEPS + 1))
    assert sorted(p.name for p in (good.folder / "attempts").iterdir()) == ["1", "2"]
    assert (good.folder / "attempts" / "2" / "resume.json").is_file()  # it was asked to stop, and saved
    whole = train(str(good.file), (), str(tmp_path / "whole"))
    assert json.loads((good.folder / "summary.json").read_text())["final"] == whole["final"]
    assert [row.setting for row in ranked(open_folder(str(swept.folder)))] == [good.name]
    assert f"pruned: {silent.name}: no_signal" in report(swept)
    assert status(swept).endswith("4 of 4 trials: 1 finished, 3 pruned")

    stamps = {p: p.stat().st_mtime_ns for p in swept.folder.rglob("state.json")}
    ended = run_here(open_folder(str(swept.folder)), say=said.append)
    assert not ended.finished and not ended.pruned and said[-1].startswith("4 of 4 trials are done")
    assert {p: p.stat().st_mtime_ns for p in swept.folder.rglob("state.json")} == stamps


def test_a_search_trains_what_it_proposes(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    values = {"phases.grpo.learning_rate": {"random": {"log_uniform": ["1e-5", "1e-3"]}}}
    sets = [*SWEEP["sets"], "phases.grpo.objective=nll", "phases.grpo.steps=2"]
    searched = {"recipe": SWEEP["recipe"], "sets": sets, "values": values, "search": {"trials": 2}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"sweep": searched}))
    ended = run_here(plan(str(tmp_path / "s.yaml"), str(tmp_path / "out")), slots=2, say=str)
    swept = open_folder(str(tmp_path / "out"))
    assert ended.finished == tuple(trial.name for trial in swept.trials) and not ended.failed
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(swept.folder / "search.journal")))
    told = optuna.load_study(study_name="sweep", storage=storage).get_trials()
    assert [trial.number for trial in told] == [trial.number for trial in swept.trials] == [0, 1]
    for known, trial in zip(told, swept.trials, strict=True):
        assert known.value == json.loads((trial.folder / "summary.json").read_text())["final"]["miou"]
        assert known.params["phases.grpo.learning_rate"] == load(str(trial.file)).recipe.phases["grpo"].learning_rate
