"""The trainer itself on a real Slurm: two nodes, two ranks on each. Cut and resumed it is what it is uncut, bit for bit."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from rft.cluster.job import PORTS
from tests.slurm.conftest import Cluster, Run, rft

pytestmark = pytest.mark.slurm
CLOCKS = ("seconds", "runtime", "per_second", "time", "peak", "memory")  # parts of names of what a machine decides
SHORT = (
    "tiny={hidden: 64, layers: 2, heads: 4, vision_hidden: 32, vision_layers: 2}",
    "data.synthetic={train: 16, validation: 4, test: 4, seconds: 4}",
    "evaluation.max_tokens=8",
    "phases.warmup.until=",
    "phases.grpo.learning_rate=1e-3",
    "phases.warmup.steps=3",
    "phases.grpo.steps=14",
    "phases.grpo.group_size=2",
    "phases.grpo.sampling.max_tokens=8",
    *(f"phases.{phase}.{key}" for phase in ("warmup", "grpo") for key in ("groups_per_step=4", "groups_per_device=1")),
    *(f"phases.{phase}.check_every=0" for phase in ("warmup", "grpo")),
)


FOUR = ("--nodes", "2", "--processes-per-node", "2")
REWARD = """
def varied(rollout, sample):
    return sum(map(ord, rollout.text)) % 7 / 7
"""


def submitted(folder: Path, *words: str) -> Run:
    rewards = folder.with_name("varied.py")
    rewards.write_text(REWARD)  # a random model earns nothing by the recipe's own, and would not change
    sets = [word for value in (*SHORT, f"rewards.iou.use={rewards}:varied") for word in ("--set", value)]
    size = ["--cpus-per-task", "2", "--time", "20"]
    done = rft("submit", "recipes/quickstart.yaml", "--output", folder, *sets, *size, *words)
    assert done.returncode == 0, done.stderr
    return Run(folder=folder)


def metrics(run: Run) -> list[dict[str, Any]]:
    """Every line that was logged, without what depends on the clock."""
    path = run.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if not any(word in k for word in CLOCKS)} for row in rows]


def trained(run: Run, phase: str) -> int:
    return sum(row.get("phase") == phase for row in metrics(run))


def contents(folder: Path) -> dict[str, bytes]:
    """The weights in a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def rollouts(run: Run) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted((run.folder / "rollouts").glob("*.jsonl"))}


def test_a_run_that_was_warned_ends_as_one_that_was_not(cluster: Cluster, tmp_path: Path) -> None:
    cut = submitted(tmp_path / "cut", *FOUR, "--sbatch=--hold")
    first = PORTS[int(cut.job) % len(PORTS)]
    with socket.create_server(("", first)):  # the port that this job would try first is somebody else's
        cluster.call("scontrol", "release", cut.job)
        cut.until(lambda run: trained(run, "grpo") >= 3, seconds=150)
        cluster.warn(cut.job)
        whole = submitted(tmp_path / "whole", *FOUR)
        cut.until(lambda run: any(a.ended == "stopped" for a in run.attempts))
    for run in (cut, whole):
        run.until_status("finished", seconds=200)
        run.until_gone()
    assert len(cut.attempts) == 2 and len(whole.attempts) == 1 and cut.state["world"] == 4
    names = {p.name for p in (cut.folder / "attempts" / "1").iterdir()}
    assert {f"rank-{k}.log" for k in range(4)} <= names, "one log per rank"
    ports = [int(port) for port in re.findall(r"--main_process_port (\d+) ", cut.log)]
    assert len(ports) == 2 and ports[0] != first and set(ports) <= set(PORTS)
    assert "phase grpo" in rft("logs", cut.folder, "--rank", "0").stdout
    assert 3 <= trained(cut, "grpo") == trained(whole, "grpo")
    assert metrics(cut) == metrics(whole)
    assert rollouts(cut) == rollouts(whole)
    assert contents(cut.folder / "checkpoint") == contents(whole.folder / "checkpoint") != {}
    assert json.loads((cut.folder / "summary.json").read_text()) == json.loads((whole.folder / "summary.json").read_text())
    saved = next((cut.folder / "checkpoints").glob("grpo-*"))
    assert contents(saved) != contents(cut.folder / "checkpoint"), "nothing was learnt after the cut: equal says nothing"
    assert {p.name for p in (cut.folder / "attempts").iterdir()} == {"1", "2"}
    assert (cut.folder / "attempts" / "2" / "resume.json").exists() and cut.state["attempt"] == 2


def test_an_error_of_the_trainer_is_told_and_not_repeated(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(rollout, sample):\n    raise ValueError('this reward is broken')\n")
    run = submitted(tmp_path / "run", "--set", f"rewards.iou.use={broken}:broken")
    run.until_gone(seconds=150)
    assert run.state["status"] == "failed" and "this reward is broken" in run.state["reason"]
    assert len(run.attempts) == 1 and os.path.getsize(run.folder / "attempts" / "1" / "rank-0.log")
