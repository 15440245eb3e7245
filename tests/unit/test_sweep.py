"""A sweep without its training: what varies, names, the folder, rules by hand numbers, the runner, the report, a search."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rft import sweep_cli
from rft.cluster.carry import run_here, visible_gpus
from rft.cluster.metrics import curve, read_rows
from rft.cluster.plan import plan
from rft.cluster.prune import look
from rft.cluster.report import best, ranked, report, status
from rft.cluster.rules import Median, Rules, verdict
from rft.cluster.space import Draw, names, read_space, settings, short_keys
from rft.cluster.sweep import Job, sweep
from rft.cluster.trials import Swept, Trial, open_folder, open_sweep, pruned, standing
from rft.errors import ClusterError, RecipeError
from rft.loaded import load, resolved
from rft.run.lock import Lock
from rft.strict import differing

ROOT = Path(__file__).parents[2]
RATE, SIZE, STEPS = "phases.grpo.learning_rate", "phases.grpo.group_size", "phases.grpo.steps"


def combined(values: Mapping[str, Any], paired: Sequence[Mapping[str, Any]] = (), exclude: Any = (), **more: int) -> list[Any]:
    return settings(read_space(values, paired), exclude, **{"num_random": 0, "seed": 0, **more})


# what varies


def test_a_grid_is_every_combination_and_pairs_stay_together() -> None:
    found = combined({"a": [1, 2], "b": {"grid": ["x", "y"]}}, [{"c": 1, "d": 10}, {"c": 2, "d": 20}])
    assert [tuple(s.values()) for s in found] == [
        (1, "x", 1, 10), (1, "x", 2, 20), (1, "y", 1, 10), (1, "y", 2, 20),
        (2, "x", 1, 10), (2, "x", 2, 20), (2, "y", 1, 10), (2, "y", 2, 20),
    ]  # fmt: skip
    assert list(found[0]) == ["a", "b", "c", "d"]


def test_draws_are_seeded_lie_in_their_range_and_do_not_depend_on_other_keys() -> None:
    values = {"r": {"random": {"log_uniform": ["1e-4", "1e-2"]}}, "n": {"random": {"integers": [3, 5]}}}
    found = combined(values, num_random=400, seed=7)
    assert found == combined(values, num_random=400, seed=7) != combined(values, num_random=400, seed=8)
    rates = sorted(s["r"] for s in found)
    assert 1e-4 <= rates[0] < 1.1e-4 and 0.9e-2 < rates[-1] <= 1e-2
    assert rates[200] == pytest.approx(1e-3, rel=0.3)  # in the middle of the logarithms; of the numbers it would be 5e-3
    assert {s["n"] for s in found} == {3, 4, 5}
    alone = combined({"r": values["r"]}, num_random=400, seed=7)
    assert [s["r"] for s in alone] == [s["r"] for s in found]
    on_a_grid = combined({"g": [1, 2], "r": values["r"]}, num_random=3, seed=7)
    assert [s["g"] for s in on_a_grid] == [1, 1, 1, 2, 2, 2]
    assert [s["r"] for s in on_a_grid] == [s["r"] for s in alone[:3]] * 2  # the same draws at every point of the grid
    assert Draw(uniform=(1.0, 2.0)).ends == (1.0, 2.0) and Draw(choice=("a", "b")).ends == ("a", "b")


def test_draws_differ_from_each_other_or_it_is_said_that_they_cannot() -> None:
    four = {"a": {"random": {"choice": [1, 2]}}, "b": {"random": {"choice": [1, 2]}}}
    found = combined(four, num_random=4)
    assert {tuple(s.values()) for s in found} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    with pytest.raises(RecipeError, match=r"num_random: only 4 different draws found"):
        combined(four, num_random=5)


def test_what_is_excluded_is_left_out_and_nothing_else() -> None:
    values = {"a": ["1e-4", "2e-4"], "b": [4, 8], "c": [True, 1]}
    kept = combined(values, exclude=[{"a": 1e-4, "b": 8}])
    assert len(kept) == 6 and not [s for s in kept if s["a"] == "1e-4" and s["b"] == 8]
    kept = combined(values, exclude=[{"c": True}])
    assert [s["c"] for s in kept] == [1] * 4 and not any(isinstance(s["c"], bool) for s in kept)


@pytest.mark.parametrize(
    ("values", "paired", "exclude", "where", "what"),
    [
        ({"a": []}, [], [], "sweep.values.a", "empty list"),
        ({"a": [1, 1.0]}, [], [], "sweep.values.a", "1.0 is there twice"),
        ({"a": ["1e-4", 1e-4]}, [], [], "sweep.values.a", "there twice"),
        ({"a": 3}, [], [], "sweep.values.a", "3 is no list"),
        ({"a": {"log_uniform": [1, 2]}}, [], [], "sweep.values.a", "is no list"),
        ({"a": {"random": {"log_unifrm": [1, 2]}}}, [], [], "sweep.values.a.random.log_unifrm", "unknown key"),
        ({"a": {"random": {"log_uniform": [0, 2]}}}, [], [], "sweep.values.a.random.log_uniform", "no range"),
        ({"a": {"random": {"uniform": [2, 1]}}}, [], [], "sweep.values.a.random.uniform", "no range"),
        ({"a": {"random": {"integers": [1, 2.5]}}}, [], [], "sweep.values.a.random.integers.1", "whole number"),
        ({"a": {"random": {"uniform": [1, 2], "choice": [1]}}}, [], [], "sweep.values.a.random", "not one kind"),
        ({"a": {"random": 3}}, [], [], "sweep.values.a.random", "expected a mapping"),
        ({"a": {"random": {"choice": []}}}, [], [], "sweep.values.a.random.choice", "empty"),
        ({"a": {"random": {"choice": [1, 2]}}}, [], [], "sweep.num_random", "nobody says how often"),
        ({"a": [1]}, [{"a": 1}], [], "sweep.paired.0.a", "under values as well"),
        ({}, [{"a": 1, "b": 2}, {"a": 2}], [], "sweep.paired.1", "sets a"),
        ({}, [{"a": 1}, {"a": 1}], [], "sweep.paired", "there twice"),
        ({"a": [1], "a.b": [2]}, [], [], "sweep.values.a.b", "is a part of a"),
        ({"steps": [1, 2]}, [], [{"step": 1}], "sweep.exclude.0.step", "is no key that varies"),
        ({"a": [1, 2]}, [], [{"a": 3}], "sweep.exclude.0", "leaves nothing out"),
        ({"a": [1, 2]}, [], [{"a": 1}, {"a": 2}], "sweep.exclude", "every combination is excluded"),
        ({"a": list(range(200)), "b": list(range(200))}, [], [], "sweep", "40000 settings are too many"),
    ],
)
def test_what_cannot_vary_is_refused_by_its_key(values: Any, paired: Any, exclude: Any, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        combined(values, paired, exclude)
    assert caught.value.where == where and what in caught.value.what


def test_a_misspelt_exclusion_names_the_nearest_key() -> None:
    with pytest.raises(RecipeError, match="did you mean steps"):
        combined({"steps": [1, 2]}, exclude=[{"step": 1}])


def test_a_name_says_what_differs_and_nothing_else() -> None:
    found = names(combined({"p.q.rate": ["1e-4", 0.0002], "p.fixed": [3], "p.kl": [None, {"weight": 0.5}]}))
    assert found == ["rate=0.0001_kl=none", "rate=0.0001_kl=weight-0.5", "rate=0.0002_kl=none", "rate=0.0002_kl=weight-0.5"]
    assert names([{"a": "x/y.py:f"}, {"a": "x y.py:f"}]) == ["a=x-y.py-f~1", "a=x-y.py-f~2"]  # equal, and still two folders
    assert names([{"a": -1.5}, {"a": 1500000}, {"a": True}]) == ["a=-1.5", "a=1500000", "a=true"]
    assert names([{"a": 3}]) == [""]
    assert short_keys(["warmup.steps", "grpo.steps", "grpo.rate"]) == {
        "warmup.steps": "warmup.steps", "grpo.steps": "grpo.steps", "grpo.rate": "rate",
    }  # fmt: skip


# the file and the folder


def written(folder: Path, **spec: Any) -> str:
    path = folder / "s.yaml"
    values = {"recipe": "recipes/quickstart.yaml", "values": {RATE: ["1e-4", "2e-4"], SIZE: [4, 8]}, **spec}
    path.write_text(yaml.safe_dump({"sweep": values}, sort_keys=False))
    return str(path)


def planned(folder: Path, **spec: Any) -> Swept:
    return plan(written(folder, **spec), str(folder / "out"))


def test_every_trial_is_the_recipe_with_its_values_and_its_seed(tmp_path: Path) -> None:
    swept = planned(tmp_path, seeds=[3, 5], sets=["phases.grpo.steps=7"])
    assert [t.name for t in swept.trials][:3] == [
        "learning_rate=0.0001_group_size=4_seed=3",
        "learning_rate=0.0001_group_size=4_seed=5",
        "learning_rate=0.0001_group_size=8_seed=3",
    ]
    assert open_folder(str(tmp_path / "out")) == swept and len(swept.trials) == 8
    base = load("recipes/quickstart.yaml", ["phases.grpo.steps=7"]).standing_alone()
    for trial in swept.trials:
        recipe = load(str(trial.file)).recipe
        phase = replace(base.phases["grpo"], learning_rate=float(trial.values[RATE]), group_size=trial.values[SIZE])
        phases = {**base.phases, "grpo": phase}
        assert recipe == replace(base, seed=trial.seed, name=f"quickstart-{trial.name}", phases=phases)
        assert trial.job.command[1:] == ("-m", "rft.train", str(trial.file), "--output", str(trial.folder))
    assert resolved(load(str(tmp_path / "out" / "recipe.yaml")).recipe) == resolved(base)
    assert open_sweep(tmp_path / "out" / "sweep.yaml") == swept.sweep


def test_one_seed_is_no_part_of_a_name_and_several_seeds_alone_are_all_of_it(tmp_path: Path) -> None:
    assert [t.name for t in planned(tmp_path, values={SIZE: [4, 8]}).trials] == ["group_size=4", "group_size=8"]
    (tmp_path / "b").mkdir()
    assert [t.name for t in planned(tmp_path / "b", values={}, seeds=[0, 1]).trials] == ["seed=0", "seed=1"]


def test_planning_again_changes_nothing_and_another_sweep_does_not_go_on_in_its_folder(tmp_path: Path) -> None:
    planned(tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    planned(tmp_path)
    for spec, where in (
        ({"seeds": [1]}, "sweep.seeds"),
        ({"values": {SIZE: [4, 16]}}, f"sweep.values.{RATE}|sweep.values.{SIZE}"),
        ({"metric": "r1@0.5"}, "sweep.metric"),
        ({"sets": ["phases.grpo.steps=9"]}, "sweep.sets"),
    ):
        with pytest.raises(RecipeError, match=f"holds a sweep in which ({where}) was another"):
            planned(tmp_path, **spec)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == files
    (tmp_path / "other" / "run").mkdir(parents=True)
    with pytest.raises(RecipeError, match="holds something that is no sweep"):
        plan(written(tmp_path), str(tmp_path / "other"))
    with pytest.raises(RecipeError, match="holds no sweep"):
        open_folder(str(tmp_path / "other"))


def test_a_recipe_that_was_edited_since_is_another_sweep(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("extends: recipes/quickstart.yaml\n")
    planned(tmp_path, recipe="r.yaml")
    (tmp_path / "r.yaml").write_text("extends: recipes/quickstart.yaml\nmax_prompt_tokens: 300\n")
    with pytest.raises(RecipeError, match="in which max_prompt_tokens was another"):
        planned(tmp_path, recipe="r.yaml")


def test_all_wrong_values_of_all_trials_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    values = {RATE: ["1e-4", -1], SIZE: [1, 4], "phases.grpo.schedul": ["cosine"]}
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path, values=values)
    told = caught.value.what
    assert told.startswith("4 of 4 settings cannot be trained")
    assert "phases.grpo.schedul: unknown key (did you mean schedule?)\n    in learning_rate=0.0001_group_size=1, " in told
    assert "learning_rate: -1 is too small" in told.replace("phases.grpo.", "") and "in learning_rate=-1_group_size=1" in told
    assert "phases.grpo.group_size: a group needs at least 2 rollouts" in told
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]
    good = {RATE: ["1e-4", "2e-4"], SIZE: [4, 8], "phases.grpo.schedule": ["cosine"]}
    assert len(planned(tmp_path, values=good).trials) == 4  # what was told is all that was wrong


@pytest.mark.parametrize(
    ("spec", "where", "what"),
    [
        ({"value": {}}, "s.yaml: sweep.value", "unknown key"),
        ({"recipe": "recipes/quickstrt.yaml"}, "file 'recipes/quickstrt.yaml'", "not found"),
        ({"values": {"seed": [1, 2]}}, "s.yaml: sweep.values.seed", "no value to choose by"),
        ({"values": {"phases.grp.steps": [1, 2]}}, "s.yaml", "the recipe has no phase 'grp' (did you mean grpo?)"),
        ({"values": {"phases.grpo.rewards": [[], ["iou", "format"], ["ioo"]]}}, "s.yaml", "unknown reward 'ioo'"),
        ({"values": {"rewards.iou.use": ["rewards/grounding.py:iou_"]}}, "s.yaml", "has no 'iou_'"),
        ({"values": {"phases.grpo.kl": [{"weight": 0.0}], "tiny": [{}, {"layers": 2}]}}, "s.yaml", "are the same recipe"),
        ({"seeds": [1, 1]}, "s.yaml: sweep.seeds", "not different seeds"),
        ({"goal": "more"}, "s.yaml: sweep.goal", "not one of max, min"),
        ({"num_random": 3}, "sweep.num_random", "nothing is drawn"),
        ({"rules": {"median": {"after": -1}}}, "s.yaml: sweep.rules.median", "counts from 0"),
        ({"rules": {"mean": {}}}, "s.yaml: sweep.rules.mean", "unknown key"),
        ({"rules": {"median": {}}, "sets": ["data.synthetic.validation=0", "phases.warmup.until=''"]},
         "sweep.rules.median", "nothing is validated"),
        ({"search": {"trials": 0}}, "s.yaml: sweep.search.trials", "no number of trials"),
        ({"search": {"trials": 2}, "exclude": [{SIZE: 4}]}, "s.yaml: sweep.exclude", "goes where it likes"),
        ({"search": {"trials": 2}, "seeds": [0, 1]}, "s.yaml: sweep.seeds", "each setting once"),
        ({"search": {"trials": 2}, "values": {SIZE: [4, 1]}}, "s.yaml", "at least 2 rollouts"),
        ({"search": {"trials": 2}, "values": {RATE: {"random": {"uniform": [-1, 1]}}}}, "s.yaml", "is too small"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused_before_anything_is_written(spec: Any, where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path, **spec)
    assert caught.value.where == where and what in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def test_a_folder_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        plan(written(tmp_path), str(tmp_path / "file" / "out"))
    plan(written(tmp_path), str(tmp_path / "out"), dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s.yaml"]


def test_the_shipped_example(tmp_path: Path) -> None:
    swept = plan("launch/sweeps/example.yaml", str(tmp_path / "x"))
    assert len(swept.trials) == 12 and swept.sweep.rules == Rules(nan=True, no_signal=50, median=Median(after=200))
    one, two = (load(str(swept.trials[i].file)).recipe for i in (0, 11))
    assert differing(resolved(one)["phases"], resolved(two)["phases"]) == "grpo.group_size"
    assert (one.phases["grpo"].learning_rate, two.phases["grpo"].learning_rate) == (1e-4, 2e-4)


# rules


def rows(*muted: float, phase: str = "grpo", **values: float) -> list[dict[str, Any]]:
    return [{"phase": phase, "step": i + 1, "loss": 0.1, "muted": m, **values} for i, m in enumerate(muted)]


def test_steps_are_counted_over_phases() -> None:
    lines = [*({"phase": "a", "step": s} for s in (1, 2, 3)), {"phase": "b", "step": 2, "validation/miou": 0.5}]
    assert curve(lines, "validation/miou") == [(5, 0.5)]


def test_a_number_that_is_none_stops_a_trial() -> None:
    spoilt = [*rows(0.0), {"phase": "grpo", "step": 2, "loss": math.nan}]
    assert verdict(spoilt, [], Rules(nan=True)) == "nan: loss of step 2 of grpo is nan"
    assert verdict([{"phase": "a", "step": 1, "grad_norm": math.inf}], [], Rules(nan=True))
    assert verdict(spoilt, [], Rules(no_signal=5)) is None  # another rule is not asked
    assert verdict([*rows(0.0), {"phase": "a", "step": 1, "sampler_gap": math.nan}], [], Rules(nan=True)) is None


def test_no_signal_is_so_many_silent_steps_in_a_row() -> None:
    rule = Rules(no_signal=3)
    assert verdict(rows(0.0, 1.0, 1.0, 1.0), [], rule) == "no_signal: every group of the last 3 steps was muted"
    assert verdict(rows(1.0, 1.0, 0.9, 1.0, 1.0), [], rule) is None
    assert verdict(rows(1.0, 1.0), [], rule) is None
    supervised = [{"phase": "warmup", "step": i, "nll": 1.0} for i in range(9)]
    assert verdict([*supervised, *rows(1.0, 1.0)], [], rule) is None


def seen(*points: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"phase": "grpo", "step": s, "validation/miou": v} for s, v in points]


def test_the_median_rule_by_hand() -> None:
    """At step 20 the others' best so far are 0.2, 0.5 and 0.6; the fourth has not come as far."""
    others = [((10, 0.2), (20, 0.1)), ((10, 0.3), (20, 0.5)), ((10, 0.6), (30, 0.9)), ((10, 0.9),)]
    rules = Rules(median=Median(after=20))
    assert verdict(seen((10, 0.45), (20, 0.4)), others, rules) == "median: 0.450 at step 20, the median of 3 others is 0.500"
    assert verdict(seen((10, 0.5), (20, 0.1)), others, rules) is None  # as good as the median, at its best
    assert verdict(seen((10, 0.0)), others, rules) is None  # too early
    assert verdict(seen((20, 0.0)), others[1:], rules) is None  # too few others
    assert verdict(seen((20, 0.0)), others[1:], Rules(median=Median(after=20, others=2)))
    assert verdict(seen((10, 0.45), (20, 0.55)), others, rules, goal="min") == (
        "median: 0.450 at step 20, the median of 3 others is 0.300"  # 0.1, 0.3 and 0.6, the least so far
    )
    assert verdict(seen((20, 0.25)), others, rules, goal="min") is None


def left(
    trial: Trial, state: str, *, metrics: Sequence[Mapping[str, Any]] = (), score: float | None = None, **more: Any
) -> None:
    """What a trainer leaves in a trial's folder."""
    (trial.folder / "state.json").write_text(json.dumps({"status": state, "seconds": 2.0, **more}))
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if score is not None:
        final = {"miou": score, "r1@0.5": score / 2}
        (trial.folder / "summary.json").write_text(json.dumps({"final": final}))


def test_a_look_stops_a_trial_once_and_leaves_the_finished_alone(tmp_path: Path) -> None:
    swept = planned(tmp_path, rules={"nan": True, "median": {"others": 3}})
    one, *others = swept.trials
    for trial in others:
        left(trial, "finished", metrics=seen((5, 0.5)), score=0.5)
    left(one, "running", metrics=seen((5, 0.4)))
    assert look(one.folder) == "median: 0.400 at step 5, the median of 3 others is 0.500"
    assert (one.folder / "stop").read_text().startswith("pruned: median") and pruned(one.folder).startswith("median")
    assert look(one.folder) == ""  # it has been told
    assert standing(one.folder) == ("pruned", "median: 0.400 at step 5, the median of 3 others is 0.500")
    left(others[0], "finished", metrics=seen((5, 0.1)), score=0.1)
    assert look(others[0].folder) == "" and not (others[0].folder / "stop").exists()
    assert standing(others[0].folder) == ("finished", "")
    assert [t.name for t in swept.unfinished] == []
    left(one, "finished", score=0.4)  # it was at its end when it was told
    assert standing(one.folder)[0] == "finished"


def test_other_seeds_of_a_setting_are_no_rivals(tmp_path: Path) -> None:
    swept = planned(tmp_path, values={SIZE: [4, 8]}, seeds=[0, 1, 2], rules={"median": {"others": 2}})
    for trial in swept.trials:
        left(trial, "running", metrics=seen((5, 0.4 if trial.seed == 0 and trial.values[SIZE] == 4 else 0.5)))
    assert look(swept.trials[0].folder).endswith("the median of 3 others is 0.500")
    left(swept.trials[0], "running", metrics=seen((5, 0.4)))
    for trial in swept.trials[3:5]:
        (trial.folder / "metrics.jsonl").unlink()
    (swept.trials[0].folder / "pruned.json").unlink()
    assert look(swept.trials[0].folder) == ""  # one rival is left, and two seeds of its own


def test_a_run_that_stopped_itself_at_such_a_number_is_pruned_too(tmp_path: Path) -> None:
    one, two, *_ = planned(tmp_path, rules={"nan": True}).trials
    left(one, "failed", reason="RftError: step 3: a gradient is not finite")
    left(two, "failed", reason="DataError: sample x: no such video")
    assert look(one.folder) == "nan: RftError: step 3: a gradient is not finite" and standing(one.folder)[0] == "pruned"
    assert look(two.folder) == "" and standing(two.folder) == ("failed", "DataError: sample x: no such video")


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "a", "step": 1}\n{"phase": "a", "st')
    assert read_rows(tmp_path) == [{"phase": "a", "step": 1}]
    assert read_rows(tmp_path / "nowhere") == []


def test_the_rules_need_no_torch() -> None:
    """Whoever watches over a job looks every few seconds, and begins in no time."""
    program = "import sys, rft.cluster.prune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_run_of_no_sweep_has_no_rules(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert look(tmp_path / "runs" / "one") == ""


# the runner


def job(folder: Path, name: str, program: str) -> Job:
    """A run of a few lines of Python; `end(status)` leaves its state."""
    preface = (
        "import json, os, pathlib, sys, time\nd = pathlib.Path(sys.argv[1]); d.mkdir(exist_ok=True)\n"
        "def end(status): (d / 'state.json').write_text(json.dumps({'status': status}))\n"
    )
    return Job(name=name, folder=folder / name, command=(sys.executable, "-c", preface + program, str(folder / name)))


def test_a_run_that_a_rule_stops_has_neither_failed_nor_finished(tmp_path: Path) -> None:
    waits = "end('running')\nwhile not (d / 'stop').exists(): time.sleep(0.02)\nend('stopped')"
    jobs = [job(tmp_path, "hopeless", waits), job(tmp_path, "good", "end('finished')"), job(tmp_path, "bad", "sys.exit(3)")]

    def rule(folder: Path) -> str:
        if folder.name != "hopeless" or (folder / "stop").exists() or not folder.is_dir():
            return ""
        (folder / "stop").write_text("pruned")
        return "median: far behind"

    said: list[str] = []
    ended = sweep(jobs, slots=2, say=said.append, look=rule)
    assert ended.finished == ("good",) and list(ended.failed) == ["bad"]
    assert ended.pruned == {"hopeless": "median: far behind"}
    assert "hopeless: stopped by a rule, median: far behind" in said


def test_a_run_that_its_user_stops_is_unfinished_and_says_so(tmp_path: Path) -> None:
    ended = sweep([job(tmp_path, "a", "end('stopped')")], slots=1, say=str)
    assert ended.failed["a"].startswith("stopped on request") and not ended.finished


def test_slots_take_the_devices_in_turn(tmp_path: Path) -> None:
    program = "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.3); end('finished')"
    jobs = [job(tmp_path, f"j{i}", program) for i in range(4)]
    assert len(sweep(jobs, slots=2, say=str, devices=("0", "3")).finished) == 4
    devices = [j.log.read_text().strip() for j in jobs]
    assert sorted(devices) == ["0", "0", "3", "3"] and set(devices[:2]) == {"0", "3"}


def test_more_is_asked_for_whenever_a_slot_is_free(tmp_path: Path) -> None:
    """Each job is asked for when fewer than two run, and two of the four run at once."""
    left_over = [
        job(tmp_path, f"m{i}", "t = time.time(); time.sleep(0.4); end('finished'); print(t, time.time())") for i in range(3)
    ]
    everything = [job(tmp_path, "first", "end('finished'); print(time.time(), time.time() + 1e-3)"), *left_over]
    ended = sweep(everything[:1], slots=2, say=str, more=lambda: left_over.pop(0) if left_over else None)
    assert ended.finished == ("first", "m0", "m1", "m2")
    spans = [tuple(map(float, j.log.read_text().split())) for j in everything]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 2


def test_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, gpus in (("2,5", ("2", "5")), ("", ()), ("-1", ()), ("GPU-ab", ("GPU-ab",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert visible_gpus() == gpus


def test_two_runners_do_not_share_a_sweep(tmp_path: Path) -> None:
    swept = planned(tmp_path)
    lock = Lock.take(swept.folder)
    with pytest.raises(ClusterError, match="is running this sweep"):
        run_here(swept)
    lock.free()


# the outcome


def scored(folder: Path, scores: Mapping[int, Sequence[float | None]], **spec: Any) -> Swept:
    """group_size -> the score of each seed, None for a trial that was cut."""
    spec = {"values": {SIZE: list(scores)}, "seeds": list(range(len(next(iter(scores.values()))))), **spec}
    swept = planned(folder, **spec)
    for trial in swept.trials:
        score = scores[trial.values[SIZE]][trial.seed]
        if score is not None:
            left(trial, "finished", metrics=seen((2, score / 4), (4, score / 2)), score=score)
    return swept


def test_the_table_and_the_report(tmp_path: Path) -> None:
    swept = scored(tmp_path, {4: [0.3, 0.5, 0.7], 8: [0.40, 0.62, 0.81], 16: [0.9, None, None], 2: [None] * 3})
    left(swept.trials[-1], "running", metrics=seen((3, 0.05)))
    text = report(swept)
    assert text == (swept.folder / "table.txt").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("group_size=4 ")]
    assert row.split() == ["group_size=4", "3", "0.500", "±", "0.497", "0.250", "±", "0.248"]  # 4.3027 x 0.2 / sqrt 3
    order = ["group_size=8", "group_size=4", "group_size=16"]  # 0.9 is one seed of three
    assert [row.setting for row in ranked(swept)] == order
    assert "best by miou: group_size=8\n" in text
    assert "planned: group_size=16_seed=1\n" in text and "cut: group_size=2_seed=2: its trainer is gone" in text
    found = json.loads((swept.folder / "report.json").read_text())
    assert found["best"] == "group_size=8" and found["order"] == order
    assert found["settings"]["group_size=4"]["miou"] == pytest.approx({"num": 3, "mean": 0.5, "half": 0.49683}, abs=1e-5)
    assert found["trials"]["group_size=2_seed=2"]["status"] == "cut"
    assert found["trials"]["group_size=4_seed=1"] == {
        "setting": "group_size=4", "values": {SIZE: 4}, "seed": 1, "status": "finished", "why": "", "seconds": 2.0,
        "validation": [4, 0.25], "final": {"miou": 0.5, "r1@0.5": 0.25},
    }  # fmt: skip
    for name in ("curves.png", "values.png"):
        assert (swept.folder / name).read_bytes()[:4] == b"\x89PNG"
    told = best(swept)
    assert told.startswith("group_size=8: miou 0.610 ± 0.510 over 3 seeds, best of 3 settings\n")
    assert f"  {SIZE}: 8\n" in told and str(swept.trials[3].file) in told
    assert status(swept).splitlines()[-1] == "12 of 12 trials: 7 finished, 4 planned, 1 cut"
    assert "0.050 at step 3" in status(swept)


def test_the_goal_and_the_metric_decide_what_is_best(tmp_path: Path) -> None:
    scores = {4: [0.3], 8: [0.4]}
    for name, spec, first, mean in (
        ("max", {}, "group_size=8", "0.400"),
        ("min", {"goal": "min"}, "group_size=4", "0.300"),
        ("validation", {"metric": "validation/miou"}, "group_size=8", "0.200"),
    ):
        (tmp_path / name).mkdir()
        swept = scored(tmp_path / name, scores, **spec)
        assert best(swept).startswith(f"{first}: {spec.get('metric', 'miou')} {mean}, best of 2")
        assert ("flattered" in report(swept)) is (name != "validation")
    (tmp_path / "x").mkdir()
    swept = scored(tmp_path / "x", scores, metric="mio")
    with pytest.raises(RecipeError, match=r"no finished trial has 'mio'\n.*did you mean miou"):
        best(swept)


def test_an_empty_sweep_says_so(tmp_path: Path) -> None:
    swept = planned(tmp_path)
    assert status(swept).splitlines()[-1] == "4 of 4 trials: 4 planned"
    with pytest.raises(RecipeError, match="no trial has finished"):
        best(swept)
    assert "planned: learning_rate=0.0001_group_size=4" in report(swept)


# a search

SEARCHED = {
    "values": {RATE: {"random": {"log_uniform": [1e-5, 1e-1]}}, SIZE: [4, 8]},
    "paired": [{"phases.grpo.groups_per_step": 8, "phases.grpo.groups_per_device": 8}, {
        "phases.grpo.groups_per_step": 4, "phases.grpo.groups_per_device": 2}],
    "search": {"trials": 6},
}  # fmt: skip


def worth(trial: Trial) -> float:
    return 1.0 - abs(math.log10(trial.values[RATE]) + 3) / 10


def test_a_search_asks_tells_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from rft.cluster.search import Proposals

    swept = planned(tmp_path, **SEARCHED, rules={"nan": True})
    assert swept.trials == () and open_folder(str(swept.folder)) == swept
    search = Proposals(swept)
    first, second = search.next(), search.next()
    trials = search.swept.trials
    assert [t.job for t in trials] == [first, second] and [t.number for t in trials] == [0, 1]
    assert trials[0].name.startswith("000_learning_rate=")
    phase = load(str(trials[0].file)).recipe.phases["grpo"]
    assert phase.learning_rate == trials[0].values[RATE] and phase.group_size == trials[0].values[SIZE]
    assert (phase.groups_per_step, phase.groups_per_device) in ((8, 8), (4, 2))
    left(trials[0], "finished", score=worth(trials[0]))
    left(trials[1], "running")

    # cut here: another process goes on; the open trial keeps its number and its folder
    again = Proposals(open_folder(str(swept.folder)))
    assert again.swept == search.swept
    assert [t.name for t in again.swept.unfinished] == [trials[1].name]
    again.hear()
    told = again._study.get_trials()
    assert [t.state.name for t in told] == ["COMPLETE", "RUNNING"] and told[0].value == pytest.approx(worth(trials[0]))
    left(trials[1], "running", metrics=seen((5, 0.3)))
    (trials[1].folder / "pruned.json").write_text('{"reason": "median: x"}')
    while again.next():
        left(again.swept.trials[-1], "finished", score=worth(again.swept.trials[-1]))
    again.hear()
    told = again._study.get_trials()
    assert len(again.swept.trials) == len(told) == 6 and {t.state.name for t in told} == {"COMPLETE"}
    assert told[1].value == 0.3  # what a rule stopped is worth what it had
    assert len({t.values[RATE] for t in again.swept.trials}) == 6  # a sampler that began anew would draw the same again
    assert Proposals(open_folder(str(swept.folder))).next() is None
    assert ranked(again.swept)[0].trials[0] == max((t for t in again.swept.trials if t.number != 1), key=worth)
    assert planned(tmp_path, **SEARCHED, rules={"nan": True}).folder == swept.folder  # planning again changes nothing
    assert len(open_folder(str(swept.folder)).trials) == 6


def test_a_proposal_without_a_folder_gets_it_and_a_refused_one_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from rft.cluster.search import Proposals

    # of each pair alone the recipe takes both values; together 4 groups do not fill forwards of 8
    values = {"phases.grpo.groups_per_step": [4, 8], "phases.grpo.groups_per_device": [4, 8]}
    swept = planned(tmp_path, values=values, search={"trials": 12, "sampler": "random"})
    said: list[str] = []
    search = Proposals(swept, said.append)
    asked = search._study.ask(search._space)  # and then the process was killed
    assert not open_folder(str(swept.folder)).trials
    search = Proposals(swept, said.append)
    known = [*search.swept.trials]
    while search.next():
        pass
    trials = search.swept.trials
    assert len(trials) == 12 and [*trials[: len(known)]] == known
    assert all((t.values["phases.grpo.groups_per_step"], t.values["phases.grpo.groups_per_device"]) != (4, 8) for t in trials)
    assert said and "groups do not fill forwards" in said[0]
    refused = [t.number for t in search._study.get_trials() if t.state.name == "FAIL"]
    assert len(refused) == len(said) and {t.number for t in trials}.isdisjoint(refused)
    assert asked.number in {t.number for t in trials} | set(refused)


def test_without_optuna_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rft.cluster.search import Proposals

    swept = planned(tmp_path, **SEARCHED)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r'needs Optuna, which is not installed\n.*pip install "rft\[optuna\]"'):
        Proposals(swept)


# the command


def called(*words: str) -> int:
    parser = argparse.ArgumentParser()
    sweep_cli.add(parser.add_subparsers(required=True))
    options = parser.parse_args(["sweep", *words])
    return options.run(options) or 0


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert called("plan", written(tmp_path), "--output", out, "--dry-run") == 0
    assert "4 trials; nothing was written" in capsys.readouterr().out and not Path(out).exists()
    assert called("plan", written(tmp_path), "--output", out) == 0
    assert called("status", out) == 0
    assert "4 of 4 trials: 4 planned" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="was not submitted to Slurm before"):
        called("resume", out, "--max-running", "2")
    for trial in open_folder(out).trials:
        left(trial, "finished", metrics=seen((4, 0.2)), score=0.5)
    assert called("run", out) == called("resume", out) == 0  # nothing is left to do
    assert called("report", out) == called("best", out) == 0
    assert "best by miou: learning_rate=0.0001_group_size=4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        called("submit", out)  # --max-running is required


def test_what_would_be_submitted_is_what_is_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = planned(tmp_path, rules={"nan": True})
    out = str(swept.folder)
    left(swept.trials[0], "finished", score=0.5)
    left(swept.trials[1], "failed", reason="RftError: step 3: the loss is not finite")
    before = set(tmp_path.rglob("*"))
    assert called("submit", out, "--max-running", "1", "--gpus-per-node", "2", "--time", "1:00:00", "--dry-run") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1%1\n" in script and "#SBATCH --gpus-per-node=2\n" in script  # two of the four are left
    assert set(tmp_path.rglob("*")) - before == {swept.trials[1].folder / n for n in ("pruned.json", "stop")}
    for trial in swept.trials[2:]:
        left(trial, "finished", score=0.5)
    assert called("submit", out, "--max-running", "2") == 0
    assert "nothing is left to submit" in capsys.readouterr().out
