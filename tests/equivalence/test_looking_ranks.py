"""Two ranks whose rollouts take different numbers of rounds: neither waits for the other in vain, and both equal one process.

The one process runs over every prompt of every rollout in a row of its own, from pixels, with accumulation doubled. Equal are
the gradients of every optimizer step, to 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.cluster.launch import launcher
from tests.equivalence.looking_main import Case, run
from tests.equivalence.shared_main import Ears
from tests.equivalence.test_ranks import run_alone
from tests.equivalence.test_shared_ranks import one_thread  # noqa: F401  (a fixture)
from tests.equivalence.test_zero import config
from tests.stages import relative

CLOSE = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "append": {"model": "qwen2_5_vl"},
    "append, features": {"model": "qwen3_vl", "level": "features"},
    "fresh": {"model": "qwen3_vl", "context": "fresh"},
    "fresh, features": {"model": "qwen2_5_vl", "context": "fresh", "level": "features", "max_tokens_per_pass": 70},
    "fresh, states, all": {"model": "qwen3_vl", "context": "fresh", "level": "states", "max_tokens_per_pass": 70,
                           "updates": 2, "kl": 0.5, "checkpointing": True},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "fresh, pixels, KL": {"model": "qwen2_5_vl", "context": "fresh", "kl": 0.5},
    "replay": {"model": "qwen3_vl", "replay": True},
    "replay, features": {"model": "qwen2_5_vl", "replay": True, "level": "features"},
}  # fmt: skip

Cases = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cases(tiny_folders: dict[str, Path]) -> Cases:
    return {name: {**case, "model": str(tiny_folders[case["model"]])} for name, case in (CASES | OTHERS).items()}


def launch(name: str, cases: Cases, data: Path, out: Path, timeout: float) -> dict[str, list[dict[str, Any]]]:
    """What both ranks of a launch return, by case."""
    words = [*launcher(name, processes=2), "tests.equivalence.looking_main", str(out), str(data), json.dumps(cases)]
    done = run_alone(*words, timeout=timeout, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [torch.load(out / f"2-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def compare(case: dict[str, Any], pair: list[dict[str, Any]], data: Path, out: Path) -> None:
    first, second = pair
    assert not set(first["turns"]) & set(second["turns"])
    assert {n for turns in first["turns"].values() for n in turns} == {1}
    assert max(n for turns in second["turns"].values() for n in turns) == 3
    kept = {k: v for k, v in case.items() if k not in ("checkpointing", "max_tokens_per_pass")}
    rounds = dict.fromkeys(first["turns"], 1) | dict.fromkeys(second["turns"], 3)
    alone = run(Case(**kept, sharing="expanded", rounds=rounds), out, data, Ears())
    assert alone["turns"] == first["turns"] | second["turns"]
    assert len(alone["gradients"]) == 2
    for one, left, right in zip(alone["gradients"], first["gradients"], second["gradients"], strict=True):
        assert one.norm() > 1e-2
        assert torch.equal(left, right)
        assert relative(left, one) <= CLOSE
    for one, two in zip(alone["logs"], first["logs"], strict=True):
        for name in one.keys() & {"reward", "completion_tokens", "muted", "kl", "ratio", "entropy", "grad_norm"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        if case.get("updates", 1) == 1:
            assert two["sampler_gap"] < CLOSE


@pytest.fixture(scope="module")
def results(cases: Cases, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    default = {name: cases[name] for name in CASES}
    return launch("ddp", default, world, tmp_path_factory.mktemp("two"), timeout=200)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_ddp(name: str, results: dict[str, Any], cases: Cases, world: Path, tmp_path: Path) -> None:
    compare(cases[name], results[name], world, tmp_path)


def test_ranks_agree_on_passes(results: dict[str, Any]) -> None:
    """Where rounds are packs of their own, the rank that looks on wants more forwards than the other."""
    for name in ("fresh, features", "fresh, states, all"):
        first, second = (rank["passes"] for rank in results[name])
        assert any(a < b for a, b in zip(first, second, strict=True)), name


@pytest.mark.slow  # the first run compiles DeepSpeed's shared-memory collectives: most of a minute
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["ddp", "zero3"])
def test_every_case(how: str, cases: Cases, world: Path, tmp_path: Path) -> None:
    """ZeRO-3 with thresholds at which a small model is really partitioned."""
    name = str(config(3, tmp_path)) if how == "zero3" else how
    results = launch(name, cases, world, tmp_path, timeout=800)
    for name, case in cases.items():
        compare(case, results[name], world, tmp_path)
