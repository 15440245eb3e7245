"""The shipped launches on two CPU processes, one of which meets text only and the other videos only, against one process.

Gradients of every optimizer step to 1e-5. What ranks of other mixtures do is in test_ranks.py and test_shared_ranks.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.cluster.launch import launcher
from tests.equivalence.test_ranks import run_alone
from tests.equivalence.test_shared_ranks import Cases, Results, compare, one_thread  # noqa: F401  (a fixture)
from tests.equivalence.test_zero import config
from tests.equivalence.test_zero import pytestmark as needs_deepspeed

CASES: dict[str, dict[str, Any]] = {
    "pixels": {"model": "qwen2_5_vl", "kl": 0.5, "groups": 2},  # the tower learns, and the reference has one of its own
    "features": {"model": "qwen3_vl", "parts": ("language",), "groups": 2},
    "passes": {"model": "qwen3_vl", "groups": 2, "max_tokens_per_pass": 40},
}
TEXT, VIDEO = {"text0", "text1"}, {"video0", "video1"}


@pytest.fixture(scope="module")
def cases(tiny_folders: dict[str, Path]) -> Cases:
    return {name: {**case, "model": str(tiny_folders[case["model"]])} for name, case in CASES.items()}


@pytest.fixture(scope="module")
def apart(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows in an order in which the shuffle gives one rank the texts and the other the clips."""
    folder = tmp_path_factory.mktemp("apart")
    clips = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows = {}
    for i in range(2):
        rows[f"video{i}"] = {**clips[i], "id": f"video{i}", "video": str(world / clips[i]["video"])}
        question = f"Which option is right, {i}?"
        rows[f"text{i}"] = {"id": f"text{i}", "question": question, "answer": "A", "task": "grounding"}
    order = ("text0", "video0", "video1", "text1")
    (folder / "train.jsonl").write_text("".join(json.dumps(rows[name]) + "\n" for name in order))
    return folder


def launch(name: str, cases: Cases, data: Path, out: Path, timeout: float = 120) -> Results:
    """What both ranks of a launch return, by case."""
    words = [*launcher(name, processes=2), "tests.equivalence.shared_main", str(out), str(data), json.dumps(cases)]
    done = run_alone(*words, timeout=timeout, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[:6000]
    ranks = [torch.load(out / f"2-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def check(results: Results, cases: Cases, data: Path, out: Path) -> None:
    for name, case in cases.items():
        assert [set(rank["met"]) for rank in results[name]] == [TEXT, VIDEO], name
        compare(case, results[name], data, out)


def test_ddp(cases: Cases, apart: Path, tmp_path: Path) -> None:
    check(launch("ddp", cases, apart, tmp_path), cases, apart, tmp_path)


@needs_deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int, cases: Cases, apart: Path, tmp_path: Path) -> None:
    """ZeRO-2 as shipped; ZeRO-3 with thresholds at which a small model is really partitioned."""
    name = "zero2" if stage == 2 else str(config(3, tmp_path))
    check(launch(name, cases, apart, tmp_path, timeout=400), cases, apart, tmp_path)
