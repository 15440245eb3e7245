"""What is set aside is named, counted and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rft.errors import DataError
from rft.quarantine import Quarantine


def reason(name: str) -> DataError:
    return DataError(f"sample {name}, /videos/{name}.mp4", "cannot be read as a video (é)", "download it again")


def test_each_is_a_line_with_sample_file_reason_and_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aside = Quarantine(tmp_path / "quarantine.jsonl", total=10, max_share=0.5)
    aside.add("a", reason("a"))
    aside.add("b", reason("b"))
    lines = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "sample": "a",
        "where": "sample a, /videos/a.mp4",
        "reason": "cannot be read as a video (é)",
        "do": "download it again",
    }
    assert len(lines) == len(aside) == 2
    assert "a" in aside
    assert "c" not in aside
    assert capsys.readouterr().out.splitlines()[1] == (
        "quarantined 2 of 10, b: sample b, /videos/b.mp4: cannot be read as a video (é)"
    )


def test_one_that_is_aside_is_counted_once(tmp_path: Path) -> None:
    aside = Quarantine(tmp_path / "q.jsonl", total=2, max_share=0.5)
    for _ in range(3):
        aside.add("a", reason("a"))
    assert len(aside) == 1
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("total", "share", "allowed"),
    [(100, 0.01, 1), (100, 0.29, 29), (50, 0.01, 0), (10, 0.0, 0), (3, 0.5, 1), (4, 0.5, 2)],
)
def test_a_share_may_be_reached_and_not_passed(total: int, share: float, allowed: int) -> None:
    aside = Quarantine(None, total=total, max_share=share)
    for i in range(allowed):
        aside.add(str(i), reason(str(i)))
    with pytest.raises(DataError) as caught:
        aside.add("last", reason("last"))
    assert f"{allowed + 1} of {total} samples cannot be used, more than data.max_bad_share={share:g}" in caught.value.what
    assert "sample last, /videos/last.mp4" in caught.value.what
    assert "data.max_bad_share" in caught.value.do


def test_the_one_that_was_too_many_is_on_file_too(tmp_path: Path) -> None:
    aside = Quarantine(tmp_path / "q.jsonl", total=1, max_share=0.0)
    with pytest.raises(DataError, match=r"q\.jsonl"):
        aside.add("a", reason("a"))
    assert json.loads((tmp_path / "q.jsonl").read_text())["sample"] == "a"


def test_everything_may_be_bad_where_that_is_allowed() -> None:
    aside = Quarantine(None, total=2, max_share=1.0)
    aside.add("a", reason("a"))
    aside.add("b", reason("b"))
    assert len(aside) == 2
