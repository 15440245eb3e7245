"""Rows of a JSONL file: those that become samples, and those that are told why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.data.samples import OVERSHOOT, read_samples
from rft.errors import DataError
from rft.scoring import Reward, score
from rft.types import Media, Rollout, Sample, Segment

GOOD = {"id": "a", "video": "v.mp4", "question": "When?", "answer": {"span": [3, 5]}}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    """A file of rows; text and bytes stand as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def one(folder: Path, row: dict[str, Any]) -> Sample:
    """The sample of a row that can be used."""
    samples, bad = read_samples(written(folder, row))
    assert not bad, bad
    return samples[0]


def refused(folder: Path, row: Any) -> DataError:
    """Why a row cannot be used; it stands between two that can, and those are kept."""
    path = written(folder, {**GOOD, "id": "before"}, row, {**GOOD, "id": "after"})
    samples, bad = read_samples(path)
    assert [s.id for s in samples] == ["before", "after"]
    assert [b.id for b in bad] == ["rows.jsonl:2"]
    assert f"{path}:2" in bad[0].reason.where
    assert bad[0].reason.do
    return bad[0].reason


def test_a_question_a_video_and_a_span(tmp_path: Path) -> None:
    sample = one(tmp_path, {**GOOD, "task": "grounding", "duration": 8})
    assert sample.id == "a"
    assert sample.messages == ()
    assert sample.media == (Media(kind="video", source=str(tmp_path / "v.mp4")),)
    assert sample.answer == {"span": (3.0, 5.0)}
    assert sample.task == "grounding"
    assert sample.origin == f"{tmp_path}/rows.jsonl:1"


def test_what_a_row_leaves_out_and_null_columns(tmp_path: Path) -> None:
    empty = dict.fromkeys(("id", "task", "messages", "image", "videos", "frames", "duration", "options"))
    sample = one(tmp_path, {**empty, "question": "Why?", "answer": "because"})
    assert (sample.id, sample.task, sample.media) == ("rows.jsonl:1", "default", ())
    assert sample.answer == {"text": "because"}


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", "   ", {**GOOD, "id": 2})
    samples, bad = read_samples(path)
    assert ([s.id for s in samples], bad) == (["a", "2"], [])
    assert samples[1].origin == f"{path}:4"


def test_columns_name_media_in_a_fixed_order(tmp_path: Path) -> None:
    row = {**GOOD, "video": ["a.mp4", {"video": "b.mp4", "fps": 4, "video_start": 1.5}], "image": "file:///c.png"}
    row["images"] = [{"image": "/d.png", "max_pixels": 784.0}]
    assert one(tmp_path, row).media == (
        Media(kind="video", source=str(tmp_path / "a.mp4")),
        Media(kind="video", source=str(tmp_path / "b.mp4"), budget={"fps": 4.0, "video_start": 1.5}),
        Media(kind="image", source="/c.png"),
        Media(kind="image", source="/d.png", budget={"max_pixels": 784}),
    )
    assert isinstance(one(tmp_path, row).media[3].budget["max_pixels"], int)


def test_paths_are_relative_to_the_file_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "data", {**GOOD, "video": "../videos/v.mp4"})
    assert read_samples(Path("data/rows.jsonl"))[0][0].media[0].source == str(tmp_path / "videos" / "v.mp4")
    assert read_samples(path)[0][0].media[0].source == str(tmp_path / "videos" / "v.mp4")


@pytest.mark.parametrize(
    ("columns", "seconds"),
    [
        ({"frames": ["0.png", "1.png"], "seconds": [0.5, 2]}, (0.5, 2.0)),
        ({"frames": ["0.png", "1.png"], "sample_fps": 4}, (0.0, 0.25)),
        ({"video": {"video": ["0.png", "1.png"], "sample_fps": 2}}, (0.0, 0.5)),
    ],
)
def test_frames_are_a_video_with_a_clock_of_its_own(tmp_path: Path, columns: dict, seconds: tuple[float, ...]) -> None:
    sample = one(tmp_path, {"question": "When?", "answer": {"span": [0, 1]}, **columns})
    source = (str(tmp_path / "0.png"), str(tmp_path / "1.png"))
    assert sample.media == (Media(kind="frames", source=source, seconds=seconds),)


def test_messages_carry_their_media_inline_as_qwen_vl_utils_writes_them(tmp_path: Path) -> None:
    content = [
        {"type": "image", "image": "i.png", "text": None, "video": None},
        {"type": "text", "text": "and then"},
        {"type": "video", "video": "v.mp4", "max_pixels": 784, "nframes": 8},
        {"type": "video", "video": ["0.png", "1.png"], "sample_fps": 1},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    sample = one(tmp_path, {"messages": messages, "answer": "x"})
    assert sample.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [p["type"] for p in sample.messages[1]["content"]] == ["image", "text", "video", "video"]
    assert sample.messages[1]["content"][2] == {"type": "video"}
    assert [(m.kind, m.budget) for m in sample.media] == [
        ("image", {}),
        ("video", {"max_pixels": 784, "nframes": 8}),
        ("frames", {}),
    ]


def test_bare_parts_take_the_columns_and_media_follow_the_messages(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "video", "video": "inline.mp4"}, {"type": "video"}, {"type": "text", "text": "?"}]
    row = {"messages": [{"role": "user", "content": content}], "video": "column.mp4", "image": "i.png", "answer": "x"}
    assert [Path(m.source).name for m in one(tmp_path, row).media] == ["i.png", "inline.mp4", "column.mp4"]


def test_every_further_column_reaches_the_reward(tmp_path: Path) -> None:
    sample = one(tmp_path, {**GOOD, "weight": 0.5, "meta": {"deep": [1, 2]}, "unicode": "é"})

    def look(rollout: Rollout, sample: Sample) -> float:
        assert sample.row["meta"] == {"deep": [1, 2]}
        assert sample.row["unicode"] == "é"
        return sample.row["weight"] * len(sample.row["question"])

    said = Rollout(sample_id="a", segments=(Segment(author="policy", text="", ids=(1,)),), stop="answered")
    groups, _ = score([(sample, (said,))], [Reward(name="look", function=look, maximum=None)])
    assert groups[0].members[0].reward == 2.5  # 0.5 x 5 characters


@pytest.mark.parametrize(
    ("options", "choice", "letter"),
    [
        (None, "C", "C"),
        (None, "(B)", "B"),
        (["x", "y"], "B.", "B"),
        ({"A": "x", "B": "y", "C": "z", "D": "u", "E": "v"}, "E", "E"),
    ],
)
def test_a_choice_is_one_letter_whatever_its_marks(tmp_path: Path, options: Any, choice: str, letter: str) -> None:
    assert one(tmp_path, {"question": "Which?", "options": options, "answer": {"choice": choice}}).answer == {"choice": letter}


@pytest.mark.parametrize(("start", "end"), [(3, 8.0), (3, 8.0 + OVERSHOOT), (7.9, 9)])
def test_a_span_may_end_up_to_the_tolerance_after_the_video(tmp_path: Path, start: float, end: float) -> None:
    assert one(tmp_path, {**GOOD, "duration": 8.0, "answer": {"span": [start, end]}}).answer["span"] == (start, end)


@pytest.mark.parametrize(
    ("valid", "read"),
    [
        ([[6, 7], [0, 2.5]], ((6.0, 7.0), (0.0, 2.5))),
        ([[6, 7], [3, 5], [6.0, 7.0], [7, 10]], ((6.0, 7.0), (7.0, 10.0))),  # each once, beside the annotated one
    ],
)
def test_further_spans_may_be_right_as_well(tmp_path: Path, valid: list, read: tuple) -> None:
    row = {**GOOD, "duration": 8.0, "answer": {"span": [3, 5], "valid_spans": valid}}
    assert one(tmp_path, row).answer == {"span": (3.0, 5.0), "valid_spans": read}


@pytest.mark.parametrize("valid", [[], [[3, 5]]])
def test_valid_spans_that_add_nothing_are_none(tmp_path: Path, valid: list) -> None:
    assert one(tmp_path, {**GOOD, "answer": {"span": [3, 5], "valid_spans": valid}}).answer == {"span": (3.0, 5.0)}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{not json", "not JSON: Expecting property name"),
        (b'{"id": "\xff"}', "not JSON: 'utf-8' codec"),
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ("3", "a row is a JSON object, this is int"),
        ({**GOOD, "question": None}, "neither messages nor a question"),
        ({**GOOD, "question": "  "}, "neither messages nor a question"),
        ({**GOOD, "question": ["When?"]}, "neither messages nor a question"),
        ({**GOOD, "messages": "When?"}, "messages is str"),
        ({**GOOD, "messages": [{"content": "When?"}]}, "message 0 is not a role and its content"),
        ({**GOOD, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown message part {'type': 'audio'}"),
        ({**GOOD, "messages": [{"role": "user", "content": ["When?"]}]}, "unknown message part 'When?'"),
        ({**GOOD, "messages": [{"role": "user", "content": None}]}, "unknown message part None"),
        (
            {**GOOD, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 0 has a part of type image that nothing names",
        ),
        (
            {**GOOD, "messages": [{"role": "user", "content": "<video> When?"}]},
            "1 media of its columns have no place in its messages",
        ),
        (
            {**GOOD, "video": None, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "the messages end with the assistant's turn",
        ),
    ],
)
def test_a_row_that_asks_nothing_is_told(tmp_path: Path, row: Any, what: str) -> None:
    assert refused(tmp_path, row).what.startswith(what)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (None, "the row has no answer"),
        ("", "the row has no answer"),
        ({}, "the row has no answer"),
        (3.5, "answer is 3.5"),
        ([3, 5], "answer is [3, 5]"),
        ({"span": [5, 3]}, "the annotated span 5 to 3 is reversed"),
        ({"span": [3, 3]}, "the annotated span 3 to 3 has no length"),
        ({"span": [-1, 3]}, "the annotated span starts at -1"),
        ({"span": [8, 9]}, "the annotated span 8 to 9 starts after the video (8.000 s)"),
        ({"span": [3, 10.01]}, "the annotated span 3 to 10.01 ends more than 2 s after the video (8.000 s)"),
        ({"span": [3]}, "span is [3]"),
        ({"span": "3 to 5"}, "span is '3 to 5'"),
        ({"span": [3, None]}, "span is [3, None]"),
        ({"span": [3, float("nan")]}, "span is [3, nan]"),
        ({"span": [True, 5]}, "span is [True, 5]"),
        ({"spans": [[1, 2], [5, 4]]}, "the annotated span 5 to 4 is reversed"),
        ({"spans": [[1, 2], [5, 20]]}, "the annotated span 5 to 20 ends more than 2 s after"),
        ({"spans": []}, "spans is []"),
        ({"spans": 3}, "spans is 3"),
        ({"span": [3, 5], "valid_spans": [[1, 2], [5, 4]]}, "the annotated span 5 to 4 is reversed"),
        ({"span": [3, 5], "valid_spans": [[5, 20]]}, "the annotated span 5 to 20 ends more than 2 s after"),
        ({"span": [3, 5], "valid_spans": [5, 20]}, "span is 5"),
        ({"span": [3, 5], "valid_spans": None}, "valid_spans is None"),
        ({"valid_spans": [[3, 5]]}, "valid_spans stand beside a span, and there is none"),
        ({"box": [10, 10, 10, 20]}, "the annotated box [10, 10, 10, 20] is reversed or has no area"),
        ({"box": [10, 30, 20, 20]}, "the annotated box [10, 30, 20, 20] is reversed or has no area"),
        ({"box": [10, 30, 20]}, "box is [10, 30, 20]"),
        ({"choice": "E"}, "choice 'E' is none of A, B, C, D"),
        ({"choice": 2}, "choice 2 is none of A, B, C, D"),
    ],
)
def test_an_answer_that_cannot_be_true_is_told(tmp_path: Path, answer: Any, what: str) -> None:
    error = refused(tmp_path, {**GOOD, "duration": 8, "answer": answer})
    assert error.what.startswith(what)
    assert error.where == f"sample a ({tmp_path}/rows.jsonl:2)"


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"video": 5}, "video is 5"),
        ({"video": ""}, "video is ''"),
        ({"video": [None]}, "video is None"),
        ({"video": "https://a.b/v.mp4"}, "video https://a.b/v.mp4 is not on this machine"),
        ({"video": {"path": "v.mp4"}}, "unknown key 'path' of a video"),
        ({"video": {"video": "v.mp4", "max_pixel": 784}}, "unknown key 'max_pixel' of a video"),
        ({"video": {"video": "v.mp4", "fps": "2"}}, "fps is '2'"),
        ({"video": {"video": "v.mp4", "nframes": 2.5}}, "nframes is 2.5"),
        ({"frames": ["0.png", "1.png"]}, "a list of frames has no clock"),
        ({"frames": ["0.png", "1.png"], "seconds": [0.0]}, "seconds is [0.0]"),
        ({"frames": ["0.png", "1.png"], "seconds": [1.0, 0.0]}, "the clock of its frames does not ascend"),
        ({"frames": ["0.png", "1.png"], "seconds": "ab"}, "seconds is 'ab'"),
        ({"frames": ["0.png", "1.png"], "sample_fps": 0}, "the clock of its frames does not ascend"),
        ({"frames": [], "sample_fps": 1}, "its list of frames is empty"),
        ({"frames": ["0.png", 3], "sample_fps": 1}, "frame is 3"),
        ({"duration": "8 s"}, "duration is '8 s'"),
        ({"answer": {"choice": "A"}, "options": "yes or no"}, "options is 'yes or no'"),
    ],
)
def test_media_that_are_not_named_as_they_should_be_are_told(tmp_path: Path, columns: dict, what: str) -> None:
    assert refused(tmp_path, {**GOOD, **columns}).what.startswith(what)


def test_an_unknown_key_of_a_media_names_the_nearest(tmp_path: Path) -> None:
    assert refused(tmp_path, {**GOOD, "video": {"video": "v.mp4", "max_pixel": 784}}).do == "did you mean max_pixels?"


def test_two_rows_of_one_id_stop_the_file_and_name_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path, {**GOOD, "id": 7}, {**GOOD, "id": "8"}, {**GOOD, "id": "7"})
    with pytest.raises(DataError) as caught:
        read_samples(path)
    assert caught.value.where == f"{path}:3"
    assert caught.value.what == f"id '7' is already at {path}:1"


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "the file holds no rows"), (b"\n \n", "the file holds no rows"), (b' [\n{"id": 1}]', "this is one JSON array")],
)
def test_a_file_without_rows_is_told(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_samples(tmp_path / "rows.jsonl")
    assert (caught.value.where, caught.value.what) == (str(tmp_path / "rows.jsonl"), what)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_samples(tmp_path / "none.jsonl")
