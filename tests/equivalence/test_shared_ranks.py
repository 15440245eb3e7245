"""Packed on two processes = expanded on one: DDP, ZeRO-2 and ZeRO-3 through the trainer, FSDP2 on the bare model.

Gradients of every optimizer step, relative L2. The ranks meet different media and completions of different lengths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.shared_main import Case, Ears, run
from tests.equivalence.test_ranks import launched, run_alone
from tests.equivalence.test_zero import config
from tests.stages import relative

CLOSE = 1e-5
STATES = ("projector", "language")  # the mergers learn and run in every forward, on what the memory holds

CASES: dict[str, dict[str, Any]] = {
    "tower learns": {"model": "qwen2_5_vl", "kl": 0.5, "updates": 2, "checkpointing": True, "chunk": 5},
    "rank without signal": {"model": "qwen2_5_vl", "silent": 1},
    "unequal passes": {"model": "qwen3_vl", "parts": STATES, "max_tokens_per_pass": 40, "kl": 0.5, "checkpointing": True},
    "features": {"model": "qwen3_vl", "parts": ("language",)},
    "adapters": {"model": "qwen2_5_vl", "parts": STATES, "lora": True, "kl": 0.5, "updates": 2, "checkpointing": True},
}
SHARDED: dict[str, dict[str, Any]] = {
    "pixels, blocks": {"model": "qwen2_5_vl", "fsdp": "blocks", "checkpointing": True, "chunk": 5},
    "pixels, parts": {"model": "qwen3_vl", "fsdp": "parts", "max_tokens_per_pass": 40},
    "states, blocks": {"model": "qwen3_vl", "fsdp": "blocks", "parts": STATES, "checkpointing": True},
    "states, parts": {"model": "qwen3_vl", "fsdp": "parts", "parts": STATES, "chunk": 5, "silent": 1},
}
# A reference with a tower of its own, in the first phase of a run, where one rank has text only.
LONELY: dict[str, dict[str, Any]] = {"text alone": {"model": "qwen2_5_vl", "kl": 0.5, "groups": 2}}

Cases = dict[str, dict[str, Any]]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def opened_cases(tiny_folders: dict[str, Path]) -> Cases:
    return {n: {**c, "model": str(tiny_folders[c["model"]])} for n, c in (LONELY | CASES | SHARDED).items()}


def launch(cases: Cases, data: Path, out: Path, zero: int = 0) -> Results:
    """What both ranks return, by case."""
    module = ["tests.equivalence.shared_main", str(out), str(data), json.dumps(cases)]
    command, environment = launched(2, *module), {}
    if zero:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config(zero, out)), "-m", *module]
        environment["DS_ACCELERATOR"] = "cpu"
    done = run_alone(*command, timeout=500 if zero else 240, **environment)
    assert done.returncode == 0, done.stderr[:6000]
    ranks = [torch.load(out / f"2-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def compare(case: dict[str, Any], pair: list[dict[str, Any]], data: Path, out: Path) -> list[torch.Tensor]:
    """Gradients of every step against one process that runs over every row of every group, pixels and all."""
    first, second = pair
    assert not set(first["met"]) & set(second["met"])
    assert len(first["lengths"] | second["lengths"]) > 3
    plain = {"sharing": "expanded", "remembers": False, "spares": False}
    kept = {k: v for k, v in case.items() if k not in ("checkpointing", "chunk", "max_tokens_per_pass")}
    if "silent" in case:
        kept["silent"] = second["met"]
    alone = run(Case(**kept, **plain), out, data, Ears())
    assert len(alone["gradients"]) == 2
    for one, left, right in zip(alone["gradients"], first["gradients"], second["gradients"], strict=True):
        assert one.norm() > 1e-2
        assert torch.equal(left, right)
        assert relative(left, one) <= CLOSE
    for one, two in zip(alone["logs"], first["logs"], strict=True):
        for name in one.keys() & {"reward", "completion_tokens", "muted", "kl", "ratio", "grad_norm"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    return alone["gradients"]


def check_passes(pair: list[dict[str, Any]]) -> None:
    wanted = list(zip(*(rank["passes"] for rank in pair), strict=True))
    assert any(a > b for a, b in wanted) and any(a < b for a, b in wanted), wanted


@pytest.fixture(scope="module")
def results(opened_cases: Cases, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two gloo processes: DDP trainings, then sharded models."""
    cases = {n: c for n, c in opened_cases.items() if n in CASES | SHARDED}
    return launch(cases, mixed, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_ddp(name: str, results: Results, opened_cases: Cases, mixed: Path, tmp_path: Path) -> None:
    compare(opened_cases[name], results[name], mixed, tmp_path)


def test_ranks_agree_on_passes(results: Results) -> None:
    """Each wants more forwards than the other somewhere, and the gradient was equal."""
    check_passes(results["unequal passes"])


def test_one_rank_was_silent(results: Results) -> None:
    first, _ = results["rank without signal"]
    assert [log["muted"] for log in first["logs"]] == [0.5, 0.5]  # of the groups of both ranks


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2(name: str, results: Results) -> None:
    first, second = results[name]
    whole, sharded = first["gradients"]
    assert whole.norm() > 1e-2
    assert torch.equal(sharded, second["gradients"][1])
    assert relative(sharded, whole) <= CLOSE


@pytest.mark.slow  # the first run compiles DeepSpeed's shared-memory collectives: most of a minute
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int, opened_cases: Cases, mixed: Path, tmp_path: Path) -> None:
    cases = {n: c for n, c in opened_cases.items() if n in LONELY | CASES}
    results = launch(cases, mixed, tmp_path, zero=stage)
    for name, case in cases.items():
        compare(case, results[name], mixed, tmp_path)
    check_passes(results["unequal passes"])
    first, second = (rank["met"] for rank in results["text alone"])
    assert all("text" in m for m in first) and not any("text" in m for m in second)
