"""The shipped study's smoke run, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rft.cluster.study import open_study, plan
from rft.train import train

ROOT = Path(__file__).parents[2]
STUDY = "recipes/study/tempsamp.yaml"


def studied(folder: Path, study: str = STUDY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rft.cli", "study", study, "--smoke", "--output", str(folder)]
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


def test_the_arms_of_the_look_study_differ_in_how_they_look_alone() -> None:
    """Same clips, warm-up and number of updates; and as many visual tokens in two rounds as in one."""
    planned = plan(open_study(ROOT / "recipes/study/look.yaml"), near=ROOT / "recipes/study", folder=Path("/nowhere"))
    arms = {p.trial: p.recipe for p in planned if p.seed == 0 and p.trial != "warmup"}
    assert list(arms) == ["twice", "once", "r1_5", "r1_5_wide"]
    tunes = {name: recipe.phases["tune"] for name, recipe in arms.items()}
    for tune in tunes.values():
        assert (tune.steps, tune.groups_per_step, tune.group_size, tune.learning_rate) == (300, 16, 8, 2e-4)
    looks = {name: arms[name].perception_of(tune) for name, tune in tunes.items()}
    assert {name: look.budget.rounds for name, look in looks.items()} == {"twice": 2, "once": 1, "r1_5": 1, "r1_5_wide": 1}
    assert all(tunes[name].eval_perception.budget.rounds == 2 for name in ("r1_5", "r1_5_wide"))
    assert tunes["r1_5"].eval_perception.args.items() <= looks["twice"].args.items()  # scored in the views of `twice`
    assert "clue" in arms["r1_5"].rewards_of(tunes["r1_5"]) and "clue" not in arms["once"].rewards_of(tunes["once"])


@pytest.mark.slow
def test_the_smoke_run_of_looking(tmp_path: Path) -> None:
    done = studied(tmp_path / "look", "recipes/study/look.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for claim in ("twice > once", "twice > r1_5"):
        assert f"claim: {claim} in miou: not judged" in done.stdout
    report = json.loads((tmp_path / "look" / "study.json").read_text())
    assert report["rows"]["once"]["visual_tokens"]["mean"] == 20 and report["failed"] == {}
    assert [claim["text"] for claim in report["claims"]] == ["twice > once", "twice > r1_5"]
