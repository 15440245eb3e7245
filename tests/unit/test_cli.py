"""The `rft` command as a user meets it: what it prints, and the exit codes of what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rft.cli import main
from rft.plugins import shipped_root

QUICKSTART = "recipes/quickstart.yaml"
SMALL = ("--set", "data.synthetic={train: 8, validation: 4, test: 4}")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder: what it needs of the package is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    code = main(argv)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_show_prints_a_recipe_with_origins(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", QUICKSTART, "--set", "phases.grpo.steps=7")
    assert (code, err) == (0, "")
    assert "\nname: quickstart " in out
    (line,) = [line for line in out.splitlines() if "steps: 7" in line]
    assert line.endswith("# --set")


def test_an_unknown_key_is_named_with_the_nearest_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", QUICKSTART, "--set", "phases.grpo.grup_size=4")
    assert (code, out) == (1, "")
    assert err == "\nRecipeError: phases.grpo.grup_size: unknown key\n  what to do: did you mean group_size?\n"


def test_a_missing_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "recipes/quikstart.yaml")
    assert code == 1
    assert "did you mean recipes/quickstart.yaml?" in err


@pytest.mark.parametrize("argv", [(), ("trian", QUICKSTART), ("check", QUICKSTART, "--samples", "-1"), ("eval", QUICKSTART)])
def test_a_command_line_that_cannot_be_read_exits_with_two(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_check_of_the_quickstart_passes_in_seconds_and_shows_what_the_model_will_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = time.time()
    code, out, err = run(capsys, "check", QUICKSTART)
    assert time.time() - started < 30
    assert (code, err) == (0, "")
    assert out.endswith("\nnothing to report: this recipe can be trained\n")
    assert "phase warmup\n  learns the annotations" in out
    assert "phase grpo\n  maximises iou" in out
    assert "<|vision_start|>[8 video tokens]<|vision_end|>When is the square visible?" in out
    assert "as they should be" in out


def test_check_of_a_wrong_answer_template_names_the_reward(capsys: pytest.CaptureFixture[str]) -> None:
    template = "prompts.grounding.answer=<answer>{span[0]:.1f} - {span[1]:.1f}</answer>"
    limits = ("--set", "evaluation.max_tokens=32", "--set", "phases.grpo.sampling.max_tokens=32")
    code, out, _ = run(capsys, "check", QUICKSTART, *SMALL, *limits, "--set", template)
    assert code == 1
    assert "error: reward 'iou', sample 'train_00000'" in out
    assert "the annotation earns 0 and not the maximum 1" in out
    assert "... and 14 more of this kind" in out, "16 rows are tried and two are shown"
    assert out.endswith("\n16 errors\n")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.warmup.until=mioou > 0.5", "error: phases.warmup.until: 'mioou > 0.5' names 'mioou'"),
        ("phases.grpo.sampling.max_tokens=4", "error: phases.grpo.sampling.max_tokens: 4 cut the annotation of sample"),
        ("evaluation.max_tokens=4", "error: evaluation.max_tokens: 4 cut the annotation of sample"),
        ("rewards.iou.use=rewards/grounding.py:temporal_iuo", "did you mean temporal_iou?"),
        ("rewards.iou.args={strict: true}", "error: reward 'iou': does not take the argument 'strict'"),
        ("prompts.groundign.system=Hello", "warning: phases.grpo: prompts.groundign: no row has the task 'groundign'"),
        ("max_prompt_tokens=12", "tokens of text and 2 of media at their smallest, of 12"),
    ],
)
def test_check_finds(capsys: pytest.CaptureFixture[str], override: str, said: str) -> None:
    code, out, _ = run(capsys, "check", QUICKSTART, *SMALL, "--set", override)
    assert said in out
    assert code == (0 if said.startswith("warning") else 1)


def test_check_reads_the_users_rows_and_weighs_the_bad_ones_as_a_run_would(
    world: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(world / row["video"])
    rows[0]["answer"] = {"span": [5, 3]}
    rows[1]["video"] = "nothing.mp4"
    (elsewhere / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = (
        "--set",
        "data.synthetic=null",
        "--set",
        "data.train=mine.jsonl",
        "--set",
        f"data.validation={world}/validation.jsonl",
    )
    code, out, _ = run(capsys, "check", QUICKSTART, *own)
    assert code == 1
    assert f"error: sample train_00000 ({elsewhere}/mine.jsonl:1): the annotated span 5 to 3 is reversed" in out
    assert f"error: sample train_00001 ({elsewhere}/mine.jsonl:2), {elsewhere}/nothing.mp4: cannot be opened" in out
    assert "1 rows cannot be used (6.2%, allowed 1.0%)" in out  # 1 of 12 + 4
    assert "warning: phases.warmup.groups_per_step: a step takes" in out
    assert "warning: data.test: there is no test split" in out
    code, out, _ = run(capsys, "check", QUICKSTART, *own, "--set", "data.max_bad_share=0.1")
    assert code == 0, "both are fewer than the run puts up with"
    assert "error" not in out
    code, out, _ = run(capsys, "check", QUICKSTART, *own, "--set", "data.train=miine.jsonl")
    assert code == 1
    assert "error: data.train, file 'miine.jsonl': not found" in out
    assert "did you mean mine.jsonl?" in out


def test_check_without_a_tokenizer_counts_bytes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["data.synthetic=null", "model=some/qwen", "max_prompt_tokens=200", 'prompts.grounding.question="{question}"']
    sets += [f"data.{split}={world}/{split}.jsonl" for split in ("train", "validation", "test")]
    argv = [x for s in sets for x in ("--set", s)]
    code, out, _ = run(capsys, "check", QUICKSTART, *argv)
    assert code == 0
    assert "text tokens are counted in bytes, an upper bound" in out
    # start, user, newline: 6; marks and pads: 2 + 8; the question: 27; end, newline: 2; start, assistant, newline: 11
    assert "8 media tokens (up to 8), 56 in all, of 200" in out


def test_check_compares_the_family_with_the_model_on_disk(
    tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "check", QUICKSTART, *SMALL, "--set", f"model={tiny_folders['qwen3_vl']}")
    assert code == 1
    assert "error: family: the recipe says qwen2_5_vl and" in out
    assert "what to do: set family: qwen3_vl" in out


def test_cp_copies_a_shipped_file_once(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    code, out, _ = run(capsys, "cp", "rewards/grounding.py", "mine/")
    assert code == 0
    assert (elsewhere / "mine" / "grounding.py").read_bytes() == (shipped_root() / "rewards" / "grounding.py").read_bytes()
    assert "use: mine/grounding.py:FUNCTION" in out
    code, _, err = run(capsys, "cp", "rewards/grounding.py", "mine")
    assert code == 1
    assert "there is a file of this name already" in err
    assert "FUNCTION" not in run(capsys, "cp", QUICKSTART, "own.yaml")[1]
    assert run(capsys, "show", "own.yaml")[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewards/groundin.py", "did you mean rewards/grounding.py?"),
        ("rft/types.py", "is no shipped file"),
        ("/etc/hosts", "is no shipped file"),
    ],
)
def test_cp_of_anything_else_is_refused(name: str, said: str, capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    code, _, err = run(capsys, "cp", name, "x")
    assert code == 1
    assert said in err
    assert list(elsewhere.iterdir()) == []


def test_export_of_what_is_no_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    code, _, err = run(capsys, "export", str(elsewhere / "nothing"), "out")
    assert code == 1
    assert "RecipeError" in err
    assert "nothing" in err
    assert not (elsewhere / "out").exists()


def test_export_refuses_an_output_that_is_not_empty(
    tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out" / "precious").touch()
    code, _, err = run(capsys, "export", str(tiny_folders["qwen2_5_vl"]), "out")
    assert code == 1
    assert "the folder is not empty" in err
    code, _, err = run(capsys, "export", str(tiny_folders["qwen2_5_vl"]), "new", "--merge")
    assert code == 1
    assert "leave --merge out" in err


@pytest.mark.parametrize("status", ["finished", "failed", "running"])
def test_the_folder_of_a_run_that_shall_not_go_on_is_not_written_into(
    status: str, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out" / "state.json").write_text(json.dumps({"status": status}))
    code, _, err = run(capsys, "train", QUICKSTART, *SMALL, "--output", "out", "--resume", "never")
    assert code == 1
    assert f"this folder holds a {status} run" in err
    assert "choose another --output" in err
    assert [p.name for p in (elsewhere / "out").iterdir()] == ["state.json"]


@pytest.mark.parametrize("argv", [("train", QUICKSTART), ("eval", QUICKSTART, "--checkpoint", "x")])
def test_a_launch_of_several_that_would_be_one_is_refused(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "ClusterError: launch: MASTER_ADDR is set but WORLD_SIZE is not" in err
    assert list(elsewhere.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = [sys.executable, "-m", "rft.cli", "show", QUICKSTART]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=shipped_root()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_check_judges_each_split_by_its_own_annotations(
    world: Path, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    """Train and test may use the same ids: no annotation of one may be held against a row of the other."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:2]
    for name, span in (("train", [1.0, 3.0]), ("test", [5.0, 7.0])):
        lines = [json.dumps({**r, "video": str(world / r["video"]), "answer": {"span": span}}) for r in rows]
        (elsewhere / f"{name}.jsonl").write_text("\n".join(lines))
    code, out, _ = run(capsys, "check", "recipes/grounding/grpo.yaml", "--set", "model=tiny")
    assert code == 0, out
    assert "tried on 4 rows" in out
