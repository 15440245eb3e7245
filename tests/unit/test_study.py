"""A study without its training: plan, runner, statistics by hand numbers, verdict; and the world it is run on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from math import gamma, pi, sqrt
from pathlib import Path

import av
import numpy as np
import pytest

from rft.cli import main
from rft.cluster.outcome import Planned, conclude
from rft.cluster.paired import T_975, Claim, differences, judge, spread
from rft.cluster.study import open_study, plan, settle
from rft.cluster.sweep import Ended, Job, sweep
from rft.errors import RecipeError
from rft.loaded import load, resolved
from rft.plugins import find_file
from rft.recipe import World
from rft.strict import differing
from rft.synthetic.world import COLOURS, draw_frames, draw_span, make_world

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes" / "study" / "tempsamp.yaml"


# statistics


def test_mean_and_interval_by_hand() -> None:
    seen = spread([1.0, 2.0, 3.0])  # standard deviation 1, t of 2 degrees of freedom 4.3027
    assert (seen.num, seen.mean) == (3, 2.0)
    assert seen.half == pytest.approx(4.3027 / sqrt(3))
    assert (seen.low, seen.high) == (pytest.approx(-0.48417, abs=1e-4), pytest.approx(4.48417, abs=1e-4))
    assert spread([0.5]).half is None and spread([0.5]).low is None


@pytest.mark.parametrize("degrees", range(1, 31))
def test_the_quantiles_leave_two_and_a_half_percent_above(degrees: int) -> None:
    """The density is integrated from 0 to the quantile."""
    xs = np.linspace(0.0, T_975[degrees - 1], 200_001)
    scale = gamma((degrees + 1) / 2) / (sqrt(degrees * pi) * gamma(degrees / 2))
    area = np.trapezoid(scale * (1 + xs**2 / degrees) ** (-(degrees + 1) / 2), xs)
    assert area == pytest.approx(0.475, abs=5e-6)


def test_more_seeds_than_the_table_knows_are_taken_as_its_last() -> None:
    values = [0.0, 1.0] * 30
    assert spread(values).half == pytest.approx(2.0423 * np.std(values, ddof=1) / sqrt(60))


@pytest.mark.parametrize(
    ("paired", "holds", "words"),
    [
        ((0.10, 0.12, 0.11), True, "95 % interval +0.085 to +0.135"),  # sd 0.01, half 4.3027 x 0.01 / sqrt 3 = 0.0248
        ((0.10, 0.20, 0.30), False, "95 % interval -0.048"),  # the mean is above 0, the bound is not
        ((-0.1, -0.1, -0.1), False, "mean difference -0.100"),
        ((0.0, 0.0, 0.0), False, "+0.000"),
        ((0.01, 0.02), True, "sign only"),
        ((0.10, -0.20), False, "sign only"),
        ((0.01,), True, "over 1 seed"),
        ((), False, "no seed"),
    ],
)
def test_a_claim_holds_above_zero_and_from_three_seeds_on_by_its_lower_bound(
    paired: tuple[float, ...], holds: bool, words: str
) -> None:
    verdict = judge(dict(enumerate(paired)))
    assert verdict.holds is holds
    assert words in verdict.grounds


def test_seeds_are_paired_and_not_pooled() -> None:
    """Seeds differ far more than methods do; only seed by seed is the difference seen."""
    grpo, other = {0: 0.2, 1: 0.5, 2: 0.8}, {2: 0.84, 0: 0.25, 1: 0.54, 7: 0.0}
    assert differences(other, grpo) == pytest.approx({0: 0.05, 1: 0.04, 2: 0.04})  # seed 7 has no partner
    assert judge(differences(other, grpo)).holds
    assert spread(list(other.values())[:3]).low < spread(list(grpo.values())).mean  # pooled, nobody could tell


def test_a_claim_is_read_or_refused() -> None:
    assert Claim.parse(" sft_grpo>grpo ") == Claim(better="sft_grpo", worse="grpo")
    for text in ("grpo", "a < b", "a > b > c", "a > a"):
        with pytest.raises(RecipeError, match="cannot read"):
            Claim.parse(text)


# the file and the plan


def written(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text)
    return path


TWO = """
study:
  shared: warmup
  seeds: [3, 5]
  claim: b > a
  trials:
    a: {recipe: recipes/study/grpo.yaml}
    b: {recipe: recipes/study/nonlinear.yaml, num_seeds: 1}
"""


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (TWO.replace("claim: b > a", "claim: c > a"), "study.claim", "unknown trial 'c'"),
        (TWO.replace("seeds: [3, 5]", "seeds: [3, 3]"), "study.seeds", "not different seeds"),
        (TWO.replace("num_seeds", "num_seed"), "study.trials.b.num_seed", "unknown key"),
        (TWO.replace("shared", "share"), "study.share", "unknown key"),
        (TWO.replace("    a:", "    warmup:").replace("b > a", "b > warmup"), "study.trials.warmup", "no name"),
        (TWO + "  smoke: {trials: [d]}\n", "study.smoke.trials", "unknown trial 'd'"),
        ("name: x\nmodel: tiny\n", "s.yaml", "is not a study"),
    ],
)
def test_a_wrong_study_names_its_key(text: str, where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        open_study(written(tmp_path, text))
    assert caught.value.where.endswith(where) and what in caught.value.what


def test_the_shared_phase_is_planned_once_per_seed_and_every_trial_goes_on_from_it(tmp_path: Path) -> None:
    planned = plan(open_study(written(tmp_path, TWO)), near=tmp_path, folder=tmp_path / "out")
    assert [(p.seed, p.trial, p.job.after) for p in planned] == [
        (3, "warmup", ""), (3, "a", "seed 3: warmup"), (3, "b", "seed 3: warmup"),
        (5, "warmup", ""), (5, "a", "seed 5: warmup"),
    ]  # fmt: skip
    warmup, a, b = (p.recipe for p in planned[:3])
    assert (list(warmup.phases), warmup.model, warmup.seed) == (["warmup"], "tiny", 3)
    folder = tmp_path / "out" / "seed-3"
    for trial in (a, b):
        assert (list(trial.phases), trial.seed) == (["tune"], 3)
        assert trial.model == str(folder / "warmup" / "checkpoint")
        assert trial.data.synthetic is None and trial.data.train == str(folder / "warmup" / "world" / "train.jsonl")
    assert warmup.data.frame_cache == a.data.frame_cache == b.data.frame_cache
    whole = load("recipes/study/nonlinear.yaml").recipe
    assert b.phases["tune"] == whole.phases["tune"] != a.phases["tune"]
    assert warmup.phases["warmup"] == whole.phases["warmup"]
    assert planned[2].job.command[1:] == ("-m", "rft.train", str(folder / "b.yaml"), "--output", str(folder / "b"))


def test_trials_that_would_not_share_the_start_are_refused(tmp_path: Path) -> None:
    text = "extends: recipes/study/grpo.yaml\nphases: {warmup: {learning_rate: 1e-4}}\n"
    (tmp_path / "other.yaml").write_text(text)
    study = open_study(written(tmp_path, TWO.replace("recipes/study/nonlinear.yaml", "other.yaml")))
    with pytest.raises(RecipeError, match=r"study\.trials\.b: phases\.warmup\.learning_rate is another than in a"):
        plan(study, near=tmp_path, folder=tmp_path)
    study = open_study(written(tmp_path, TWO.replace("shared: warmup", "shared: tune")))
    with pytest.raises(RecipeError, match="tune should be the first of several"):
        plan(study, near=tmp_path, folder=tmp_path)


def test_what_was_planned_can_be_read_and_another_study_does_not_go_on_in_its_folder(tmp_path: Path) -> None:
    planned = plan(open_study(written(tmp_path, TWO)), near=tmp_path, folder=tmp_path)
    settle(planned)
    settle(planned)  # the same again
    assert resolved(load(str(planned[1].file)).recipe) == resolved(planned[1].recipe)
    text = planned[2].file.read_text()
    other = [*planned[:2], replace(planned[2], recipe=replace(planned[2].recipe, seed=4))]
    with pytest.raises(RecipeError, match="holds a study in which seed was another"):
        settle(other)
    assert planned[2].file.read_text() == text


def test_differing_names_the_first_key() -> None:
    assert differing({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c"
    assert differing({"a": 1}, {"a": 1, "b": None}) == "b"
    assert differing({"a": [1, 2]}, {"a": [1, 2]}) == ""


def test_the_shipped_study_is_what_was_asked_for() -> None:
    study = open_study(SHIPPED)
    five = [name for name, trial in study.trials.items() if not trial.num_seeds]
    assert five == ["grpo", "sft_grpo", "mixed", "downscale", "anchor", "nonlinear"] and len(study.seeds) == 5
    assert {n for n, t in study.trials.items() if t.num_seeds == 1} == {"sft", "grpo_sft", "luffy", "hints"}
    assert study.claim == "nonlinear > grpo"
    planned = plan(study, near=SHIPPED.parent, folder=Path("/nowhere"))
    assert len(planned) == 5 + 6 * 5 + 4
    at_seed_0 = {p.trial: p.recipe for p in planned if p.seed == 0}
    samples = {n: sum(p.steps * p.groups_per_step for p in r.phases.values()) for n, r in at_seed_0.items() if n != "warmup"}
    assert len(set(samples.values())) == 1  # all methods see as many samples
    base, both = (load(f"recipes/study/{name}.yaml").recipe.phases for name in ("base", "sft_grpo"))
    assert both["grpo"] == replace(base["tune"], steps=base["tune"].steps // 2, accuracy=())
    assert both["tune"] == replace(base["tune"], steps=base["tune"].steps // 2, objective="nll")


# the runner


def job(folder: Path, name: str, program: str = "", after: str = "") -> Job:
    """A run of one line of Python, which finishes as a real one does: by its state."""
    state = json.dumps({"status": "finished"})
    ending = f"d = pathlib.Path(sys.argv[1]); d.mkdir(exist_ok=True); (d / 'state.json').write_text({state!r})"
    program = f"import pathlib, sys, time\n{program or 'pass'}\n{ending}"
    return Job(name=name, folder=folder / name, command=(sys.executable, "-c", program, str(folder / name)), after=after)


def heard(jobs: list[Job], slots: int = 2) -> tuple[Ended, list[str]]:
    said: list[str] = []
    return sweep(jobs, slots=slots, say=said.append), said


def test_a_failure_is_told_with_its_last_lines_and_stops_only_what_comes_after_it(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "bad", "print('one'); sys.exit('no such video')"),
        job(tmp_path, "orphan", after="bad"),
        job(tmp_path, "good"),
        job(tmp_path, "child", "assert pathlib.Path(sys.argv[1]).with_name('good').is_dir()", "good"),
    ]
    ended, said = heard(jobs)
    assert ended.finished == ("good", "child")
    assert list(ended.failed) == ["bad", "orphan"] and ended.failed["orphan"] == "not run: bad failed"
    (told,) = [text for text in said if "bad: failed" in text]
    assert told.endswith("one\nno such video") and "exit code 1" in told
    assert not (tmp_path / "orphan").exists()


def test_a_run_that_ends_well_without_finishing_has_failed(tmp_path: Path) -> None:
    ended, _ = heard([Job(name="a", folder=tmp_path / "a", command=(sys.executable, "-c", "pass"))])
    assert "exit code 0" in ended.failed["a"]


def test_what_finished_is_not_run_again_and_what_was_cut_goes_on_in_its_folder(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "done"), job(tmp_path, "cut", after="done")]
    heard(jobs)
    stamp = (tmp_path / "done" / "state.json").stat().st_mtime_ns
    (tmp_path / "cut" / "state.json").write_text('{"status": "running"}')
    (tmp_path / "cut" / "checkpoint").write_text("what it had")
    ended, said = heard(jobs)
    assert ended.finished == ("done", "cut") and not ended.failed
    assert said[0] == "1 of 2 runs had finished before"
    assert (tmp_path / "done" / "state.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "cut" / "state.json").read_text()) == {"status": "finished"}
    assert (tmp_path / "cut" / "checkpoint").read_text() == "what it had"


def test_no_more_run_at_once_than_there_are_slots_and_each_with_one_thread(tmp_path: Path) -> None:
    """Each run writes when it began and ended; the most that overlap are the slots."""
    program = "import os; t = time.time(); time.sleep(0.5); print(t, time.time(), os.environ['OMP_NUM_THREADS'], flush=True)"
    jobs = [job(tmp_path, f"j{i}", program) for i in range(4)]
    heard(jobs)
    spans = [tuple(map(float, j.log.read_text().split())) for j in jobs]
    most = max(sum(begin <= at < end for begin, end, _ in spans) for at, _, _ in spans)
    assert most == 2
    assert {threads for _, _, threads in spans} == {1.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_runs(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import signal, sys
from pathlib import Path
from rft.cluster.sweep import Job, sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell runs the tests in the background
folder = Path({str(tmp_path)!r})
child = "import os, sys, time; open(sys.argv[1] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
jobs = [Job(name=n, folder=folder / n, command=(sys.executable, "-c", child, str(folder / n))) for n in "ab"]
try:
    sweep(jobs, slots=2)
except KeyboardInterrupt:
    sys.exit(130)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    pids = [tmp_path / f"{n}.pid" for n in "ab"]
    while not all(p.exists() and p.read_text() for p in pids):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)  # to the parent alone, as a scheduler would
    assert parent.wait(timeout=20) == 130
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


# the outcome


def finished(folder: Path, scores: Mapping[str, Mapping[int, float]]) -> list[Planned]:
    """Runs with these scores, as `rft train` leaves them."""
    recipe = load("recipes/study/grpo.yaml").recipe
    planned = []
    for trial, by_seed in scores.items():
        for seed, score in by_seed.items():
            run = folder / f"seed-{seed}" / trial
            run.mkdir(parents=True)
            (run / "state.json").write_text('{"status": "finished", "seconds": 1.5}')
            final = {"miou": score, "r1@0.5": score / 2, "format": 1.0}
            (run / "summary.json").write_text(json.dumps({"best_constant": {"miou": 0.1}, "final": final}))
            lines = [{"phase": p, "step": s, "validation/miou": score * s / 4} for p in ("one", "two") for s in (2, 4)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            named = Job(name=f"seed {seed}: {trial}", folder=run, command=())
            planned.append(Planned(trial=trial, seed=seed, recipe=recipe, file=run.with_suffix(".yaml"), job=named))
    return planned


def concluded(folder: Path, scores: Mapping[str, Mapping[int, float]], *, is_judged: bool = True, failed: int = 0) -> int:
    planned = finished(folder, scores)
    kept = planned[: len(planned) - failed]
    ended = Ended(finished=tuple(p.job.name for p in kept), failed={p.job.name: "exit code 1" for p in planned[len(kept) :]})
    trials = [t for t in scores if t != "warmup"]
    return conclude(
        planned, ended, folder=folder, title="t", trials=trials, shared="warmup",
        claims=[Claim(better="b", worse="a")], metric="miou", is_judged=is_judged,
    )  # fmt: skip


SCORES = {"warmup": {0: 0.2, 1: 0.2, 2: 0.2}, "a": {0: 0.3, 1: 0.5, 2: 0.7}, "b": {0: 0.40, 1: 0.62, 2: 0.81}, "c": {0: 0.1}}


def test_the_table_the_report_and_the_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert concluded(tmp_path, SCORES) == 0
    text = (tmp_path / "table.txt").read_text()
    assert text in capsys.readouterr().out
    above, below = text.split("minus a, seed by seed")
    (row,) = [line for line in above.splitlines() if line.startswith("a ")]
    assert row.split() == ["a", "3", "0.500", "±", "0.497", "0.250", "±", "0.248"]  # 4.3027 x 0.2 / sqrt 3
    (row,) = [line for line in below.splitlines() if line.startswith("b ")]
    assert row.split() == ["b", "3", "+0.110", "[+0.085,", "+0.135]", "+0.055", "[+0.043,", "+0.067]"]
    (row,) = [line for line in below.splitlines() if line.startswith("c ")]
    assert row.split() == ["c", "1", "-0.200", "sign", "only", "-0.100", "sign", "only"]
    two = {name: {0: 0.3, 1: 0.5} for name in ("a", "b")}
    concluded(tmp_path / "two", two)
    assert "sign only" in (few := (tmp_path / "two" / "table.txt").read_text()) and "[" not in few and "±" not in few
    assert "after warmup" in above and "best constant" in above
    assert "by miou: b > a > c" in text
    grounds = "mean difference +0.110 over 3 seeds, 95 % interval +0.085 to +0.135"
    assert text.endswith(f"\nclaim: b > a in miou: holds ({grounds})\n")
    report = json.loads((tmp_path / "study.json").read_text())
    assert report["claim"]["holds"] is True and report["order"] == ["b", "a", "c"]
    assert report["paired"]["b"]["miou"]["seeds"] == pytest.approx({"0": 0.10, "1": 0.12, "2": 0.11})
    assert report["rows"]["a"]["seeds"]["1"]["r1@0.5"] == 0.25
    assert report["seconds"]["seed 0: a"] == 1.5
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_exit_code_is_the_claims(tmp_path: Path) -> None:
    worse = {**SCORES, "b": {0: 0.40, 1: 0.70, 2: 1.0}}  # +0.1, +0.2, +0.3: the bound is below 0
    assert concluded(tmp_path / "held", SCORES) == 0
    assert concluded(tmp_path / "unproven", worse) == 1
    assert "does not hold" in (tmp_path / "unproven" / "table.txt").read_text()
    assert concluded(tmp_path / "smoke", worse, is_judged=False) == 0
    assert json.loads((tmp_path / "smoke" / "study.json").read_text())["claim"]["holds"] is None
    assert concluded(tmp_path / "one failed", SCORES, failed=1) == 1  # the claim holds, but a run is missing
    assert "missing: seed 0: c: exit code 1" in (tmp_path / "one failed" / "table.txt").read_text()
    assert concluded(tmp_path / "none", {"warmup": {0: 0.2}, "a": {0: 0.2}, "b": {0: 0.3}}, failed=3) == 1


def test_the_command_refuses_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "recipes/quickstart.yaml", "--output", str(tmp_path / "x")]) == 1
    assert "is not a study" in capsys.readouterr().err
    assert main(["study", str(written(tmp_path, TWO)), "--smoke", "--output", str(tmp_path / "x")]) == 1
    assert "does not say what a smoke run is" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit) as caught:
        main(["study", str(SHIPPED), "--seeds", "0,one"])
    assert caught.value.code == 2


# the world


def test_the_default_world_is_what_it_was(tmp_path: Path) -> None:
    make_world(tmp_path, World(train=3, validation=1, test=1), seed=3)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [r["answer"]["span"] for r in rows] == [[0.0, 6.0], [2.0, 5.0], [0.0, 1.0]]
    assert {r["question"] for r in rows} == {"When is the square visible?"}


def test_several_squares_are_seen_in_their_own_spans_and_hide_nobody() -> None:
    world = World(seconds=6.0, objects=3)
    squares = {"red": (0.0, 3.0), "blue": (1.0, 2.0), "green": (1.0, 6.0)}
    for seed in range(20):
        frames = draw_frames(np.random.default_rng(seed), world, squares)
        for colour, (begin, end) in squares.items():
            pixels = (frames == np.array(COLOURS[colour], dtype=np.uint8)).all(-1).sum((1, 2))
            seconds = np.arange(len(frames)) / world.fps
            assert (pixels[(seconds >= begin) & (seconds < end)] == 12 * 12).all()
            assert not pixels[(seconds < begin) | (seconds >= end)].any()


def test_the_question_names_a_square_and_the_answer_is_its_span(tmp_path: Path) -> None:
    """In the file itself: frames of the named colour are those of the span, whatever else is visible."""
    make_world(tmp_path, World(train=16, validation=0, test=0, seconds=6.0, longest=2.0, objects=2), seed=1)
    asked, alone = set(), 0
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        with av.open(str(tmp_path / row["video"])) as container:
            frames = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        near = {c: [t for t, f in frames if (np.abs(f - np.array(rgb)).max(-1) < 60).sum() > 40] for c, rgb in COLOURS.items()}
        colour = row["question"].split()[3]
        begin, end = row["answer"]["span"]
        assert (near[colour][0], near[colour][-1]) == (begin, end - 0.25)  # 4 frames a second
        asked.add(colour)
        alone += sum(map(bool, near.values())) == 1
    assert asked == {"red", "green"}
    assert 0 < alone < 16


def test_no_span_is_longer_than_the_longest_and_all_fit() -> None:
    rng = np.random.default_rng(0)
    spans = [draw_span(rng, World(seconds=12.0, tick=0.5, longest=2.0)) for _ in range(2000)]
    lengths = {end - begin for begin, end in spans}
    assert lengths == {0.5, 1.0, 1.5, 2.0}
    assert min(spans)[0] == 0.0 and max(end for _, end in spans) == 12.0


@pytest.mark.parametrize("sets", ["longest=9", "longest=0.5", "objects=5", "objects=0"])
def test_a_world_that_cannot_be_drawn_is_refused(sets: str) -> None:
    with pytest.raises(RecipeError, match="data.synthetic." + sets.split("=")[0]):
        load(str(find_file("recipes/quickstart.yaml")), [f"data.synthetic.{sets}"])
