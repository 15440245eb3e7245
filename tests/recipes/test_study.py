"""The shipped study's smoke run, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rft.cluster.study import open_study
from rft.train import train

ROOT = Path(__file__).parents[2]
STUDY = "recipes/study/tempsamp.yaml"


def studied(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rft.cli", "study", STUDY, "--smoke", "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def without_clocks(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in lines]


def test_the_smoke_run(tmp_path: Path) -> None:
    out = tmp_path / "study"
    first = studied(out)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "claim: nonlinear > grpo in miou: not judged" in first.stdout
    assert (out / "table.txt").read_text() in first.stdout
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((out / "study.json").read_text())
    assert list(report["rows"])[-3:] == ["after warmup", "grpo", "nonlinear"]
    assert report["failed"] == {}

    # resumed: nothing is left to do, and the same is said
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("state.json")}
    again = studied(out)
    assert "3 of 3 runs had finished before" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("state.json")} == stamps and len(stamps) == 3
    assert json.loads((out / "study.json").read_text()) == report

    # sharing the warm-up changes nothing: the whole recipe in one run takes the same steps
    sets = [*open_study(ROOT / STUDY).smoke.sets, "seed=0"]
    whole = train(str(ROOT / "recipes/study/nonlinear.yaml"), sets, str(tmp_path / "whole"))
    assert report["rows"]["nonlinear"]["seeds"]["0"] == whole["final"]
    assert report["rows"]["after warmup"]["seeds"]["0"] == whole["warmup"]
    shared = [without_clocks(out / "seed-0" / name) for name in ("warmup", "nonlinear")]
    assert without_clocks(tmp_path / "whole") == [*shared[0], *shared[1]]
    assert any(line.get("grad_norm", 0) > 0 for line in shared[1])
