"""The entry points as users type them: two processes, and the launches that would silently be something else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.equivalence.test_ranks import run_alone
from tests.recipes.test_recipes import shortened


def test_rft_launch_trains_on_two_processes(tmp_path: Path) -> None:
    sets = [x for value in shortened("recipes/quickstart.yaml", None) for x in ("--set", value)]
    out = tmp_path / "run"
    launch = ["launch", "recipes/quickstart.yaml", "--processes", "2", "--output", str(out), *sets]
    done = run_alone(sys.executable, "-m", "rft.cli", *launch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after warmup") == 1  # one rank speaks
    assert list(json.loads((out / "summary.json").read_text())) == ["random", "best_constant", "warmup", "final"]
    assert {p.name for p in (out / "rollouts").iterdir()} == {
        "warmup-0.jsonl", "warmup-1.jsonl", "grpo-0.jsonl", "grpo-1.jsonl",
    }  # fmt: skip
    rows = [json.loads(line) for p in (out / "rollouts").glob("grpo-*.jsonl") for line in p.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2  # steps x groups x rollouts, each on one rank only
    by_group: dict[tuple[int, str], int] = {}
    for row in rows:
        by_group[row["step"], row["sample"]] = by_group.get((row["step"], row["sample"]), 0) + 1
    assert set(by_group.values()) <= {2, 4}


def test_a_launch_that_is_secretly_one_process_is_refused(tmp_path: Path) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment: MASTER_ADDR and no WORLD_SIZE."""
    command = [sys.executable, "-m", "rft.train", "recipes/quickstart.yaml", "--output", str(tmp_path / "run")]
    done = run_alone(*command, MASTER_ADDR="127.0.0.1")
    assert done.returncode == 1
    assert "--multi_gpu --num_processes N -m rft.train" in done.stderr
    assert not (tmp_path / "run").exists()
    real = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *command[1:]]
    done = run_alone(*real)
    assert done.returncode == 1 and "ClusterError" in done.stderr
