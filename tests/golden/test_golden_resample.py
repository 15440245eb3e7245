"""VideoChat-R1.5's resampler against its released values, and the two streams that take its place by default."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rft.data.resample import RULES, by_frame_rate, two_streams, videochat_r1_5
from rft.errors import DataError

CASES = json.loads((Path(__file__).parent / "videochat_r1_rewards.json").read_text())["functions"]["r15.sample_frames"]["cases"]

# The two defects, and what we do.
OURS = {
    # linspace(0, 296, 7) into the 297 others, 50 and 51 left out
    5: [0, 49, 50, 100, 150, 199, 248, 298],  # the one frame of the tiny window comes out of the budget of 8
    8: None,  # below: the window starts at 0 and not at -5
}


def released(case: dict) -> list[int]:
    given = case["input"]
    found = by_frame_rate(
        given["key_timestamps"],
        total_frames=given["total_frames"],
        num=given["num_frames"],
        ratio=given["key_ratio"],
        fps=given["fps"],
    )
    return list(found)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if case["flag"] == "ok"])
def test_the_preset_is_the_released_rule(index: int) -> None:
    case = CASES[index]
    if "raises" in case:
        with pytest.raises(DataError, match=r"\[1, 2, 3\]"):  # theirs is a bare ValueError
            released(case)
    else:
        assert released(case) == case["output"]


def test_where_the_released_rule_is_defective_ours_differs() -> None:
    assert {i for i, case in enumerate(CASES) if case["flag"] == "bug"} == OURS.keys()
    assert released(CASES[5]) == OURS[5] != CASES[5]["output"]
    early, cut = released(CASES[8]), {"input": {**CASES[8]["input"], "key_timestamps": [[0, 3]]}}
    assert min(CASES[8]["output"]) < 0 and early == released(cut) and early[0] == 0 and len(early) == 30


def test_the_preset_reads_rate_and_length_off_the_file() -> None:
    seconds = [5 + i / 10 for i in range(300)]  # the picture begins at 5 s
    assert list(videochat_r1_5(seconds, [(15, 25)], 60)) == CASES[0]["output"]
    assert list(videochat_r1_5(seconds, [], 60)) == CASES[1]["output"]
    many = [(5 + i / 1000, 6 + i / 1000) for i in range(10_000)]
    assert len(videochat_r1_5(seconds, many, 60)) <= 60
    assert set(RULES) == {"two_streams", "videochat_r1_5"}


@pytest.mark.parametrize("num", [2, 4, 7, 16, 60, 61, 299, 300, 900])
@pytest.mark.parametrize(
    "windows",
    [[], [(10, 20)], [(0, 30)], [(29, 99)], [(5.01, 5.02)], [(7, 7)], [(1, 2), (25, 28)], [(12, 18), (10, 20)], [(-5, 3)]],
    ids=str,
)
def test_the_budget_is_met_exactly(num: int, windows: list) -> None:
    seconds = [i / 10 for i in range(300)]
    frames = two_streams(seconds, windows, num)
    assert len(frames) == min(num, 300) // 2 * 2
    assert list(frames) == sorted(set(frames)) and frames[0] >= 0 and frames[-1] < 300


def test_windows_are_as_much_denser_as_asked_in_true_seconds() -> None:
    steady = np.arange(3000) / 25
    variable = np.concatenate([np.arange(1500) / 25, 60 + np.arange(300) / 5])  # 25 per second for 60 s, then 5 for 60 s
    for seconds in (steady, variable):
        for ratio in (1.0, 3.0, 8.0):
            frames = two_streams(seconds, [(50, 70)], 60, ratio=ratio)
            shown = seconds[list(frames)]
            inside = ((shown >= 50) & (shown <= 70)).sum()
            expected = 60 * 20 * ratio / (20 * ratio + 100)  # density ratio : 1 over 20 and 100 seconds
            assert abs(inside - expected) <= 2, (ratio, inside, expected)
            outside = shown[(shown < 50)]
            assert np.diff(outside).max() <= 2.5 * 120 / 60 * (1 + (ratio - 1) / 6)  # no hole in the sparse stream
    by_index = seconds[list(videochat_r1_5(variable, [(50, 70)], 60, ratio=8.0))]
    assert ((by_index >= 50) & (by_index <= 70)).sum() < 25  # of 37: frame numbers are no seconds in this file


def test_a_small_window_is_seen_and_a_poor_one_gives_back() -> None:
    seconds = [i / 10 for i in range(36_000)]
    inside = [f for f in two_streams(seconds, [(1800.0, 1800.5)], 32) if 18000 <= f <= 18005]
    assert len(inside) >= 2 > sum(18000 <= f <= 18005 for f in two_streams(seconds, [], 32))
    frames = two_streams([i / 2 for i in range(40)], [(4, 6)], 20, ratio=1000.0)  # the window holds 5 frames, 8 to 12
    assert set(range(8, 13)) <= set(frames) and len(frames) == 20
    assert max(np.diff([f for f in frames if f >= 12])) <= 4  # what it cannot take lies all over the film


def test_without_windows_it_is_even_from_first_to_last() -> None:
    seconds = [i / 10 for i in range(301)]
    assert two_streams(seconds, [], 4) == (0, 100, 200, 300)
    for nothing in ([(40, 50)], [(20, 10)], [(30.5, 31)]):
        assert two_streams(seconds, nothing, 4) == (0, 100, 200, 300)


@pytest.mark.parametrize(
    ("seconds", "windows", "more"),
    [
        ([0.0], [], {}),
        ([0.0, 1.0, 2.0], [], {"num": 1}),
        ([0.0, 1.0, 2.0], [], {"ratio": 0.5}),
        ([0.0, 1.0, 2.0], [], {"ratio": float("inf")}),
        ([0.0, 1.0, 2.0], [(0.0, float("nan"))], {}),
        ([0.0, 1.0, 2.0], [(0.0,)], {}),
    ],
)
def test_what_cannot_be_meant_is_an_error(seconds: list, windows: list, more: dict) -> None:
    for rule in RULES.values():
        with pytest.raises(DataError, match="resampling"):
            rule(seconds, windows, **{"num": 2, **more})
