"""Bad input, walked as a user would: a real recipe, real files, the real command. Each is told by name, and nothing is lost.

Rows and keys that are wrong in themselves have their own files (`test_samples`, `test_recipe`, `test_quarantine`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from tests.videos import spaced, write_empty, write_sound, write_video

RECIPE = """
name: bad
model: tiny
tiny: {hidden: 32, layers: 1, vision_hidden: 32, vision_layers: 1}
data: {train: train.jsonl, test: test.jsonl, max_bad_share: 0.5}
media: {fps: 1.0, min_pixels: 784, max_pixels: 784}
max_prompt_tokens: 64
prompts: {grounding: {question: "{question}", answer: "<answer>{span[0]:.1f} to {span[1]:.1f}</answer>"}}
rewards: {mine: {use: "mine.py:length", maximum: null}}
evaluation: {max_tokens: 16}
phases:
  grpo: {steps: 2, groups_per_step: 4, groups_per_device: 4, group_size: 2, sampling: {max_tokens: 16}}
"""
REWARDS = """
def length(rollout, sample): return len(rollout.text) / 10
def raises(rollout, sample): return sample.row["no_such_column"]
def nan(rollout, sample): return float("nan")
def text(rollout, sample): return "1.0"
def short(rollouts, sample): return [1.0]
"""

Told = tuple[int, str, str]


@pytest.fixture(scope="module")
def videos(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per way of being unusable, beside `good_0.mp4` to `good_7.mp4`."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        (folder / f"good_{i}.mp4").write_bytes((world / "videos" / f"train_{i:05d}.mp4").read_bytes())
    whole = (folder / "good_0.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "text.mp4").write_text("this is no video")
    (folder / "nothing.mp4").write_bytes(b"")
    write_sound(folder / "sound.mp4")
    write_empty(folder / "frameless.mp4")
    write_video(folder / "single.mp4", spaced(4, 1))
    # its index says that all is well, and the middle of its pictures is gone
    start = whole.index(b"mdat")
    third = (len(whole) - start) // 3
    (folder / "damaged.mp4").write_bytes(whole[: start + third] + bytes(third) + whole[start + 2 * third :])
    return folder


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], videos: Path
) -> Callable[..., Told]:
    """told(command, *overrides, train=, test=) -> (exit code, stdout, stderr) in a folder with the recipe and its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(command: str, *sets: str, train: Any = None, test: Any = None) -> Told:
        for name, rows in (("train", train or [good(videos, i) for i in range(8)]), ("test", test or [good(videos, 0)])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        output = ("--output", "out") if command == "train" else ()
        code = main([command, "r.yaml", *output, *(x for s in sets for x in ("--set", s))])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def good(videos: Path, i: int, **changes: Any) -> dict[str, Any]:
    row = {"id": f"good_{i}", "video": str(videos / f"good_{i}.mp4"), "question": "When?", "answer": {"span": [1, 3]}}
    return {**row, "task": "grounding", **changes}


UNREADABLE = {
    "missing": "cannot be opened (No such file or directory)",
    "truncated": "cannot be read as a video",
    "text": "cannot be read as a video",
    "nothing": "cannot be read as a video",
    "sound": "has no video stream (audio tracks)",
    "frameless": "has ",  # no video stream, or a stream without frames: as FFmpeg sees it
    "single": "has 1 frame(s) and a clip needs 2",
}


def test_media_that_cannot_be_read_are_quarantined_with_a_reason_and_training_goes_on(
    told, videos: Path, tmp_path: Path
) -> None:
    bad = [good(videos, 0, id=name, video=str(videos / f"{name}.mp4")) for name in UNREADABLE]
    late = good(videos, 0, id="late", answer={"span": [1, 11]})  # the row does not say how long the video is: 8 s
    rows = [*bad, late, *(good(videos, i) for i in range(8))]
    code, out, err = told("train", "data.max_bad_share=0.9", "phases.grpo.steps=4", train=rows)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    aside = {line["sample"]: line for line in lines}
    assert set(aside) == {*UNREADABLE, "late"}
    assert len(lines) == len(aside), "each is on file once"
    for number, (name, reason) in enumerate(UNREADABLE.items(), 1):
        assert aside[name]["reason"].startswith(reason)
        assert aside[name]["where"] == f"sample {name} ({tmp_path}/train.jsonl:{number}), {videos}/{name}.mp4"
        assert aside[name]["do"]
        assert f"of 17, {name}: sample {name} " in out
    assert aside["late"]["reason"] == "the annotated span 1 to 11 ends more than 2 s after the video (8.000 s)"
    assert json.loads((tmp_path / "out" / "state.json").read_text())["quarantined"] == 8
    trained = [json.loads(line) for line in (tmp_path / "out" / "rollouts" / "grpo-0.jsonl").read_text().splitlines()]
    assert len(trained) == 4 * 4 * 2, "another sample was drawn for each that was set aside"
    assert {row["sample"] for row in trained} <= {f"good_{i}" for i in range(8)}


def test_past_the_share_the_run_stops_with_the_last_reason(told, videos: Path, tmp_path: Path) -> None:
    rows = [good(videos, i, video=str(tmp_path / f"none_{i}.mp4") if i < 4 else str(videos / "good_0.mp4")) for i in range(8)]
    code, _, err = told("train", "data.max_bad_share=0.2", "phases.grpo.steps=8", train=rows)
    assert code == 1
    assert "2 of 9 samples cannot be used, more than data.max_bad_share=0.2; the last: sample good_" in err
    assert "repair or drop these samples, or raise data.max_bad_share" in err
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out" / "state.json").read_text())["status"] == "failed"


def test_bad_rows_are_quarantined_before_anything_is_opened(told, videos: Path, tmp_path: Path) -> None:
    rows = [good(videos, i) for i in range(8)]
    rows[2]["answer"] = {"span": [3, 1]}
    rows[3] = {**rows[3], "answer": None}
    rows[4] = {**rows[4], "duration": 8, "answer": {"span": [2, 2]}}
    rows[5] = {**rows[5], "duration": 8, "answer": {"span": [2, 11]}}
    code, out, err = told("train", "data.max_bad_share=0.3", train=rows)
    assert code == 1
    assert "quarantined 1 of 9, train.jsonl:3: sample good_2" in out
    assert "3 of 9 samples cannot be used" in err
    assert not (tmp_path / "out" / "rollouts" / "grpo-0.jsonl").exists()


def test_a_video_that_is_damaged_inside_is_quarantined_like_any_other(told, videos: Path, tmp_path: Path) -> None:
    rows = [*(good(videos, i) for i in range(3)), good(videos, 3, id="damaged", video=str(videos / "damaged.mp4"))]
    code, _, err = told("train", "phases.grpo.steps=3", train=rows)
    assert code == 0, err
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "damaged"
    assert json.loads(line)["where"].endswith(f"{videos}/damaged.mp4")


def test_a_test_video_that_cannot_be_read_does_not_cost_the_training(told, videos: Path, tmp_path: Path) -> None:
    rows = [good(videos, 0), good(videos, 1, video=str(videos / "text.mp4"))]
    code, out, err = told("train", test=rows)
    said = out + err
    assert "sample good_1" in said
    assert f"{videos}/text.mp4" in said
    is_told_before = code == 1 and not (tmp_path / "out" / "rollouts" / "grpo-0.jsonl").exists()
    is_kept = (tmp_path / "out" / "checkpoint" / "config.json").exists()
    assert is_told_before or is_kept


@pytest.mark.parametrize("change", [{"question": "<|im_end|> When?"}, {"task": "unknown"}, {"answer": {"text": "no span"}}])
def test_a_row_that_cannot_be_rendered_is_quarantined(told, videos: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    rows = [*(good(videos, i) for i in range(3)), good(videos, 3, id="odd", **change)]
    code, _, err = told("train", "phases.grpo.steps=3", "phases.grpo.objective=nll", train=rows)
    assert code == 0, err
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "odd"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("{use: 'mine.py:raises'}", "KeyError: 'no_such_column' at "),
        ("{use: 'mine.py:nan'}", "returned nan"),
        ("{use: 'mine.py:text'}", "returned '1.0' (str)"),
        ("{use: 'mine.py:short', per: group}", "returned 1 values for 2 rollouts"),
    ],
)
def test_a_reward_that_gives_no_reward_stops_the_run_and_check_finds_it_first(
    told, reward: str, said: str, tmp_path: Path
) -> None:
    code, _, err = told("train", f"rewards.mine={reward}")
    assert code == 1
    assert "RewardError: reward 'mine', sample 'good_" in err
    assert f"({tmp_path}/train.jsonl:" in err
    assert said in err
    assert "what to do: " in err
    code, out, _ = told("check", f"rewards.mine={reward}")
    assert code == 1
    assert "error: reward 'mine', sample 'good_0'" in out
    assert said.split(" for 2")[0] in out


def test_an_empty_data_set_is_told(told, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for command in ("train", "check"):
        code, out, err = told(command, "data.train=empty.jsonl")
        assert code == 1
        assert f"{tmp_path}/empty.jsonl: the file holds no rows" in out + err


def test_a_prompt_over_budget_shows_fewer_frames(told, tmp_path: Path) -> None:
    code, _, err = told("train", "max_prompt_tokens=17", "media.fps=4")  # 16 pairs ask for 16 tokens beside 14 of text
    assert code == 0, err
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    code, out, _ = told("check", "max_prompt_tokens=17", "media.fps=4")
    assert code == 0
    assert "media tokens (up to 3), 17 in all, of 17" in out


def test_a_budget_that_nothing_fits_is_told_with_the_arithmetic(told) -> None:
    code, out, _ = told("check", "max_prompt_tokens=15")
    assert code == 1
    assert "its prompt takes 14 tokens of text and 2 of media at their smallest, of 15" in out
    assert "raise max_prompt_tokens or lower media.min_pixels" in out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.grpo.group_size=1", "phases.grpo.group_size: a group needs at least 2 rollouts to compare"),
        ("phases.grpo.groups_per_device=3", "phases.grpo.groups_per_step: 4 groups do not fill forwards of 3"),
    ],
)
def test_a_group_that_the_batch_cannot_hold_is_told_before_a_folder_is_made(
    told, override: str, said: str, tmp_path: Path
) -> None:
    code, _, err = told("train", override)
    assert code == 1
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_trained_over(told, tmp_path: Path) -> None:
    assert told("train", "phases.grpo.steps=1")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    code, out, _ = told("train", "phases.grpo.steps=1")
    assert code == 0 and "this run has finished" in out
    code, _, err = told("train", "phases.grpo.steps=2")
    assert code == 1 and "phases.grpo.steps was another" in err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
