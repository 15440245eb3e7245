"""Published annotation files to rows: what is repaired, clamped and dropped is told by name, and what is kept can be said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rft import Rollout, Segment
from rft.check import check
from rft.cli import main
from rft.data.importers import IMPORTERS, import_annotations
from rft.data.importers.mend import mend_span
from rft.data.samples import read_samples
from rft.data_cli import DATASETS
from rft.errors import DataError
from rft.evaluation.metrics import measure
from rft.families import FAMILIES
from rft.hf.tiny import make_tokenizer
from rft.loaded import load
from rft.plugins import load_object
from rft.rollout.render import Renderer
from tests.videos import spaced, write_video

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
FILES = {
    "charades_sta": DATA / "charades_sta_train.sample.json",
    "activitynet": DATA / "activitynet_captions_train.sample.json",
    "qvhighlights": DATA / "qvhighlights_train.sample.jsonl",
}
REWARDS = {
    "charades_sta": load_object("rewards/grounding.py:temporal_iou"),
    "activitynet": load_object("rewards/grounding.py:temporal_iou"),
    "qvhighlights": load_object("rewards/highlights.py:highlights"),
}


def videos_of(dataset: str) -> list[str]:
    text = FILES[dataset].read_text()
    is_lines = dataset == "qvhighlights"
    return list(dict.fromkeys(json.loads(line)["vid"] for line in text.splitlines())) if is_lines else list(json.loads(text))


def named(folder: Path, names: Iterable[str]) -> Path:
    """A folder of empty files: where the annotation knows the length, importing opens none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.mp4").touch()
    return folder


def imported(dataset: str, root: Path, annotations: Path | None = None, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    out = root / "train.jsonl"
    found = import_annotations(dataset, annotations or FILES[dataset], root / "media", out, **more)
    assert json.loads((root / "train.jsonl.report.json").read_text()) == found
    samples, bad = read_samples(out)
    assert not bad and len(samples) == found["written"]
    assert found["read"] == found["written"] + sum(found["dropped"].values())
    for kind in ("repaired", "clamped", "dropped"):
        assert all(count == len(found["ids"][reason]) for reason, count in found[kind].items())
    return found, samples


EXPECTED = {
    "charades_sta": {
        "read": 281, "written": 278, "repaired": {"reversed": 4, "blanks": 1}, "clamped": {"end_after_video": 38},
        "dropped": {"starts_after_video": 3},
    },
    "activitynet": {
        "read": 460, "written": 458, "repaired": {"blanks": 312, "reversed": 2},
        "clamped": {"end_by_float_noise": 6, "end_after_video": 18}, "dropped": {"zero_length": 2},
    },
    "qvhighlights": {"read": 40, "written": 40, "repaired": {}, "clamped": {}, "dropped": {}},
}  # fmt: skip
NAMED = {
    "charades_sta": {
        "reversed": ["LEOL6#0", "IOL8Q#0", "AKKWU#0", "AKKWU#1"],
        "starts_after_video": ["LEOL6#0", "AKKWU#0", "AKKWU#1"],
    },
    "activitynet": {
        "reversed": ["v_0bosp4-pyTM#3", "v_rhOtqArO-3Y#5"],
        "zero_length": ["v_N7ppHQNikv8#2", "v_4rKTw99bM8g#1"],
    },
    "qvhighlights": {},
}


@pytest.mark.parametrize("dataset", FILES)
def test_the_sample_of_every_dataset(dataset: str, tmp_path: Path) -> None:
    """Counts and names are those that the samples are known for, and every completion says its own annotation."""
    named(tmp_path / "media", videos_of(dataset))
    found, samples = imported(dataset, tmp_path)
    assert {key: found[key] for key in EXPECTED[dataset]} == EXPECTED[dataset]
    assert {reason: sorted(found["ids"][reason]) for reason in NAMED[dataset]} == {
        reason: sorted(ids) for reason, ids in NAMED[dataset].items()
    }
    renderer = Renderer(
        tokenizer=make_tokenizer(),
        family=FAMILIES["qwen2_5_vl"],
        prompts=load(str(ROOT / f"recipes/{dataset}/grpo.yaml")).recipe.prompts,
    )
    for sample in samples:
        said = Rollout(sample_id=sample.id, segments=(Segment(author="reference", text=renderer.answer_text(sample)),))
        assert REWARDS[dataset](said, sample) >= 1 - 1e-6, sample.id  # an IoU of 0.99 and better
        metrics = measure([sample], [said])
        assert {metrics.get("miou", 1.0), metrics.get("mr_map", 1.0), metrics["format"]} == {1.0}


def test_a_reversed_span_is_swapped_or_dropped(tmp_path: Path) -> None:
    named(tmp_path / "media", videos_of("charades_sta"))
    _, samples = imported("charades_sta", tmp_path)
    assert next(s.answer["span"] for s in samples if s.id == "IOL8Q#0") == (12.0, 20.9)
    found, samples = imported("charades_sta", tmp_path, reversed="drop")
    assert (found["written"], found["repaired"], found["dropped"]) == (277, {"blanks": 1}, {"reversed": 4})
    assert not {s.id for s in samples} & set(found["ids"]["reversed"])


def test_a_row(tmp_path: Path) -> None:
    named(tmp_path / "media", ["v_fynO9wmckLA"])
    imported("activitynet", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "id": "v_fynO9wmckLA#1",
        "video": "media/v_fynO9wmckLA.mp4",  # below the rows' own folder: the two move together
        "question": "They demonstrate how they run on a track, and do a long jump into sand.",
        "answer": {"span": [50.47, 106.26]},
        "task": "grounding",
        "duration": 106.25999999999999,
    }


def test_a_row_of_highlights(tmp_path: Path) -> None:
    named(tmp_path / "media", ["synth000000_0.0_150.0"])
    _, samples = imported("qvhighlights", tmp_path)
    answer = samples[0].answer  # clips 39 to 47; the third of the first is 8 / 3
    assert samples[0].id == "synth000000_0.0_150.0#900001"
    assert answer["highlights"][:2] == [[78.0, 2.7], [80.0, 2.7]] and answer["highlights"][-1] == [94.0, 2.7]
    assert answer["windows"] == [[78.0, 96.0]]
    assert answer["timestamps"].startswith("78, 80, 82") and answer["scores"].startswith("2.7, 2.7, 2.7")


@pytest.mark.parametrize(
    ("span", "duration", "kept", "notes"),
    [
        ((1.0, 2.5), 10.0, (1.0, 2.5), []),
        ((2.5, 1.0), 10.0, (1.0, 2.5), ["reversed"]),
        ((3.0, 3.0), 10.0, None, ["zero_length"]),
        ((12.0, 9.0), 10.0, (9.0, 10.0), ["reversed", "end_after_video"]),
        ((9.0, 12.5), 10.0, (9.0, 10.0), ["end_far_after_video"]),
        ((9.0, 12.5), None, (9.0, 12.5), []),
        ((1.0, 10.0000000001), 10.0, (1.0, 10.0), ["end_by_float_noise"]),
        ((10.0, 11.0), 10.0, None, ["starts_after_video"]),
        ((-1.0, 2.0), 10.0, (0.0, 2.0), ["start_before_video"]),
        ((-2.0, 0.0), 10.0, None, ["ends_before_video"]),
        ((1.234, 5.678), 10.0, (1.23, 5.68), ["rounded"]),
        ((1.004, 1.006), 10.0, None, ["lost_in_rounding"]),  # would be said as 1.00 to 1.01, five times as long
    ],
)
def test_what_is_done_to_a_span(span: tuple, duration: float | None, kept: tuple | None, notes: list[str]) -> None:
    mended, found = mend_span(*span, duration, "swap")
    assert [reason for _, reason in found] == notes
    assert (found[-1][0] == "dropped" if found else False) == (kept is None)
    assert kept is None or mended == kept


def test_the_original_lines_of_charades(tmp_path: Path) -> None:
    """Without a duration the file is asked: the stand-in lasts 20 s."""
    media = tmp_path / "media" / "a" / "b"
    media.mkdir(parents=True)
    write_video(media / "AO8RW.MKV", spaced(1, 20))
    (media / "BROKE.mp4").write_bytes(b"no video")
    lines = [
        "AO8RW 0.0 6.9##a person is putting a book on a shelf.",
        "AO8RW 18.0 21.0##a person closes the door.",
        "GONE1 1.0 2.0##a person sits.",
        "",
        "AO8RW 9.5 4.0##person  begins to run.\r",
        "BROKE 1.0 2.0##a person stands.",
        "GONE1 4.0 3.0##a person runs.",
        "AO8RW 3.0 4.0## ",
    ]
    (tmp_path / "sta.txt").write_text("\n".join(lines) + "\n")
    found, samples = imported("charades_sta", tmp_path, tmp_path / "sta.txt")
    assert {s.id: (s.answer["span"], s.row["question"], s.row["duration"]) for s in samples} == {
        "AO8RW#0": ((0.0, 6.9), "a person is putting a book on a shelf.", 20.0),
        "AO8RW#1": ((18.0, 20.0), "a person closes the door.", 20.0),
        "AO8RW#2": ((4.0, 9.5), "person begins to run.", 20.0),
    }
    assert found["ids"] == {
        "end_after_video": ["AO8RW#1"],
        "media_missing": ["GONE1#0", "GONE1#1"],
        "blanks": ["AO8RW#2"],
        "reversed": ["AO8RW#2", "GONE1#1"],
        "media_unreadable": ["BROKE#0"],
        "empty_text": ["AO8RW#3"],
    }


MALFORMED = {
    "no JSON": ("charades_sta", '{\n"A": {\n', 3),
    "a list": ("charades_sta", "[1]", 1),
    "lengths differ": ("charades_sta", '{\n"A": {"timestamps": [[0, 1]], "sentences": []}}', 2),
    "no pair": ("charades_sta", '{\n\n"A": {"timestamps": [[0, 1, 2]], "sentences": ["a"]}}', 3),
    "no number": ("activitynet", '{"A": {"timestamps": [[0, NaN]], "sentences": ["a"]}}', 1),
    "no duration": ("activitynet", '{"A": {"duration": 0, "timestamps": [[0, 1]], "sentences": ["a"]}}', 1),
    "no sentence": ("activitynet", '{"A": {"timestamps": [[0, 1]], "sentences": [null]}}', 1),
    "no entry": ("activitynet", '{"A": 3}', 1),
    "one video twice": (
        "activitynet",
        '{"A": {"timestamps": [], "sentences": []},\n"A": {"timestamps": [], "sentences": []}}',
        2,
    ),
    "a broken line": ("charades_sta", "A 0.0 1.0##a\nA 0.0 b##c\n", 2),
    "a line without hashes": ("charades_sta", "A 0.0 1.0 a\n", 1),
    "not UTF-8": ("charades_sta", "A 0.0 1.0##a\nA 0.0 1.0##\udcff\n", 2),
    "a broken record": ("qvhighlights", '{"qid": 1}\n', 1),
    "a record that is no JSON": ("qvhighlights", "\n{qid}\n", 2),
}
RECORD = {
    "qid": 1, "query": "a dog", "vid": "A", "duration": 10, "relevant_windows": [[2, 6]], "relevant_clip_ids": [1, 2],
    "saliency_scores": [[1, 2, 3], [4, 4, 4]],
}  # fmt: skip
for name, changed in {
    "unequal scores": {"saliency_scores": [[1, 2, 3]]},
    "two annotators": {"saliency_scores": [[1, 2], [3, 4]]},
    "a score of five": {"saliency_scores": [[1, 2, 5], [3, 4, 4]]},
    "a clip twice": {"relevant_clip_ids": [1, 1]},
    "a negative clip": {"relevant_clip_ids": [-1, 1]},
    "windows of one": {"relevant_windows": [[2]]},
    "a length that is text": {"duration": "10"},
}.items():
    MALFORMED[name] = ("qvhighlights", json.dumps(RECORD | {"qid": 0}) + "\n" + json.dumps(RECORD | changed), 2)
MALFORMED["a query twice"] = ("qvhighlights", json.dumps(RECORD) + "\n" + json.dumps(RECORD), 2)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    dataset, text, line = MALFORMED[case]
    path = tmp_path / "annotations"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    named(tmp_path / "media", ["A"])
    with pytest.raises(DataError) as error:
        import_annotations(dataset, path, tmp_path / "media", tmp_path / "train.jsonl")
    assert error.value.where.split(", ")[0] == f"{path}:{line}"
    assert not (tmp_path / "train.jsonl").exists()


def test_odd_records_of_highlights(tmp_path: Path) -> None:
    named(tmp_path / "media", ["A"])
    records = [
        RECORD,
        RECORD | {"qid": 2, "relevant_clip_ids": [5, 1]},  # clip 5 would begin at 10 s, where the video ends
        RECORD | {"qid": 3, "relevant_windows": [[6, 2], [3, 3]]},
        RECORD | {"qid": 4, "relevant_windows": [[12, 14]]},
        RECORD | {"qid": 5, "relevant_clip_ids": [], "saliency_scores": []},
        {key: RECORD[key] for key in ("query", "vid", "duration")} | {"qid": 6},  # the published test split
        RECORD | {"qid": 7, "vid": "B"},
    ]
    (tmp_path / "qvh.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found, samples = imported("qvhighlights", tmp_path, tmp_path / "qvh.jsonl")
    assert [s.id for s in samples] == ["A#1", "A#2", "A#3"]
    assert samples[0].answer["highlights"] == [[2.0, 2.0], [4.0, 4.0]]
    assert samples[1].answer["highlights"] == [[2.0, 4.0]] and samples[1].row["saliency_scores"] == [[4, 4, 4]]
    assert samples[2].answer["windows"] == [[2.0, 6.0]]
    assert found["ids"] == {
        "clips_out_of_order": ["A#2"],
        "clip_after_video": ["A#2"],
        "reversed": ["A#3"],
        "window_zero_length": ["A#3"],
        "window_starts_after_video": ["A#4"],
        "no_windows": ["A#4"],
        "no_highlights": ["A#5"],
        "no_labels": ["A#6"],
        "media_missing": ["B#7"],
    }


def test_nothing_left_is_an_error_and_the_report_says_why(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    with pytest.raises(DataError, match="media_missing 278"):
        import_annotations("charades_sta", FILES["charades_sta"], tmp_path / "media", tmp_path / "train.jsonl")
    found = json.loads((tmp_path / "train.jsonl.report.json").read_text())
    assert found["dropped"] == {"media_missing": 278, "starts_after_video": 3} and found["written"] == 0
    with pytest.raises(DataError, match="no such folder"):
        import_annotations("charades_sta", FILES["charades_sta"], tmp_path / "none", tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        import_annotations("charades_sta", tmp_path / "none.json", tmp_path / "media", tmp_path / "train.jsonl")


def test_two_files_of_one_id_are_not_chosen_between(tmp_path: Path) -> None:
    named(tmp_path / "media" / "a", ["LEOL6", "IOL8Q"])
    named(tmp_path / "media" / "b", ["IOL8Q"])
    with pytest.raises(DataError, match=r"a/IOL8Q\.mp4 and .*b/IOL8Q\.mp4"):
        import_annotations("charades_sta", FILES["charades_sta"], tmp_path / "media", tmp_path / "train.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(IMPORTERS) == DATASETS
    named(tmp_path / "media", videos_of("charades_sta"))
    out = tmp_path / "new" / "train.jsonl"
    words = ["data", "import", "charades_sta", "--annotations", str(FILES["charades_sta"])]
    assert main([*words, "--media", str(tmp_path / "media"), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "278 rows of 281 annotations" in told and "reversed: IOL8Q#0" not in told
    for name in NAMED["charades_sta"]["reversed"]:
        assert name in next(line for line in told.splitlines() if "reversed" in line)
    assert all(Path(json.loads(line)["video"]).is_file() for line in out.read_text().splitlines())
    assert main([*words, "--media", str(tmp_path / "none"), "--out", str(out)]) == 1


@pytest.mark.parametrize("dataset", FILES)
def test_imported_rows_pass_the_check_of_their_recipe(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real stand-in files as long as the videos: prompts, budgets, rewards and templates of the shipped recipe."""
    media = tmp_path / "media"
    media.mkdir()
    lasting = 32 if dataset == "charades_sta" else 151 if dataset == "qvhighlights" else 240
    first = videos_of(dataset)[:2]
    write_video(media / f"{first[0]}.mp4", spaced(2, 2 * lasting))
    (media / f"{first[1]}.mp4").symlink_to(media / f"{first[0]}.mp4")
    _, samples = imported(dataset, tmp_path)
    assert len(samples) > 2
    rows = tmp_path / "train.jsonl"
    code = check(str(ROOT / f"recipes/{dataset}/grpo.yaml"), [f"data.train={rows}", f"data.test={rows}"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "as they should be" in told
