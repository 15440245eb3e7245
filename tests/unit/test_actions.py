"""Model text to looks: every way of writing a clue or a call that policies have found, and those that mean nothing."""

from __future__ import annotations

import random
import time
from math import inf

import pytest

from rft import parsing
from rft.data.views import Look
from rft.evaluation.contract import HOSTILE
from rft.families import FAMILIES
from rft.rollout import actions
from rft.rollout.actions import Limits, Reading
from rft.types import View

FILM = Limits(duration=100.0, extent=(200.0, 100.0), num_frames=16)
QWEN25 = FAMILIES["qwen2_5_vl"]
SHOWN = View(
    media=1, kind="video", source="a.mp4", frames=tuple(range(16)), seconds=tuple(map(float, range(16))),
    pair_seconds=tuple(map(float, range(0, 16, 2))), size=(56, 112), original=(560, 1120), grid=(8, 4, 8), tokens=64,
    duration=100.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status", "windows"),
    [
        ("[(1.0, 2.0), (3.5, 4)]", "parsed", [(1, 2), (3.5, 4)]),
        ("[[1, 2]]", "parsed", [(1, 2)]),
        ("[(3, 5), (1, 4)]", "parsed", [(1, 5)]),  # overlapping: merged, no fault
        ("[(7, 7)]", "parsed", [(7, 7)]),
        ("12.5 to 18 seconds", "repaired", [(12.5, 18)]),
        ("from 3 to 5 s and then 1 min to 65 s", "repaired", [(3, 5), (60, 65)]),
        ("2 to 3 minutes", "out of range", []),
        ("1 to 1.5 minutes", "repaired", [(60, 90)]),
        ("[00:10, 00:20]", "repaired", [(10, 20)]),
        ("(1:02 - 1:30), (3s-5s)", "repaired", [(3, 5), (62, 90)]),
        ("12.5\u201318.0", "repaired", [(12.5, 18)]),
        ("10, 20", "repaired", [(10, 20)]),
        ("[10, 20]", "parsed", [(10, 20)]),
        ('[{"start": 3, "end": 5.5}, {"start_time": "00:10", "end_time": "00:12"}]', "repaired", [(3, 5.5), (10, 12)]),
        ('{"windows": [[1, 2], [3, 4]]}', "repaired", [(1, 2), (3, 4)]),
        ("```json\n[[1, 2]]\n```", "parsed", [(1, 2)]),
        ("[(20, 10)]", "repaired", [(10, 20)]),
        ("[(-5, 3)]", "repaired", [(0, 3)]),
        ("[(90, 300)]", "repaired", [(90, 100)]),
        ("[(1, 2), (3, 4, 5)]", "repaired", [(1, 2)]),
        ("[(1, 2), (3, 4", "repaired", [(1, 2)]),
        ("[(100, 300), (-9, -4), (-3, 0)]", "out of range", []),
        ("[]", "empty", []),
        ("", "empty", []),
        ("None", "empty", []),
        ("[(1, 2, 3)]", "unparsable", []),
        ("frame12 to 13", "unparsable", []),
        ("1e3, 2e3", "unparsable", []),
        ("2024-05-06", "unparsable", []),
        ('{"start_frame": 3, "end_frame": 9}', "unparsable", []),
        ("[(__import__('os'), 2)]", "unparsable", []),
        (f"[({'9' * 400}, {'9' * 400})]", "unparsable", []),
        ("the whole film", "unparsable", []),
    ],
)
def test_windows(text: str, status: str, windows: list) -> None:
    assert actions.windows(text, FILM) == Reading(status=status, windows=tuple(windows))
    for tag in ("clue", "glue"):
        found = actions.clue(f"<think>x</think><answer>A</answer>\n<{tag}> {text}\n</{tag}>", FILM)
        assert (found.status, found.windows, found.name) == (status, tuple(windows), tag)


def test_reversed_windows_and_boxes_can_be_left_out() -> None:
    strict = Limits(duration=100.0, reversed="drop")
    assert actions.windows("[(5, 2), (7, 8)]", strict) == Reading(status="repaired", windows=((7, 8),))
    assert actions.windows("[(5, 2)]", strict) == Reading(status="out of range")
    assert actions.boxes("[50, 60, 10, 20]", strict) == Reading(status="out of range")


def test_which_block_is_the_clue() -> None:
    assert actions.clue("<glue>[(1, 2)]</glue><clue>[(3, 4)]</clue>").windows == ((3, 4),)
    assert actions.clue("<clue><clue>[(3, 4)]</clue>").windows == ((3, 4),)
    assert actions.clue("the clue: [(3, 4)]") == Reading(status="absent")
    assert actions.clue("<clue>[(3, 4)").status == "unparsable"  # cut in the middle: 4 may be 47
    assert actions.clue(None).status == "absent"
    assert actions.clue("<clue>[10, 20, 60, 80]</clue>", FILM, kind="boxes").boxes == ((10, 20, 60, 80),)


@pytest.mark.parametrize(
    ("text", "status", "boxes"),
    [
        ("[10, 20, 60, 80]", "parsed", [(10, 20, 60, 80)]),
        ("[[10, 20, 60, 80], [1, 2, 3, 4]]", "parsed", [(10, 20, 60, 80), (1, 2, 3, 4)]),
        ('{"bbox_2d": [10, 20, 60, 80], "label": "door"}', "repaired", [(10, 20, 60, 80)]),
        ("[60, 80, 10, 20]", "repaired", [(10, 20, 60, 80)]),
        ("[-10, 20, 600, 80]", "repaired", [(0, 20, 200, 80)]),
        ("[10, 20, 10, 80]", "out of range", []),
        ("[300, 20, 400, 80]", "out of range", []),
        ("[]", "empty", []),
        ("[10, 20, 60]", "unparsable", []),
        ("the door", "unparsable", []),
    ],
)
def test_boxes(text: str, status: str, boxes: list) -> None:
    assert actions.boxes(text, FILM) == Reading(status=status, boxes=tuple(boxes))


@pytest.mark.parametrize(
    ("text", "status", "indices"),
    [
        ("[3, 1, 7]", "parsed", (1, 3, 7)),
        ("3, 1", "parsed", (1, 3)),
        ("frames 1, 4 and 7", "repaired", (1, 4, 7)),
        ("I take [2] first", "repaired", (2,)),
        ("[3, 3, 99]", "repaired", (3,)),
        ("[99]", "out of range", ()),
        ("[]", "empty", ()),
        ("[1.5]", "unparsable", ()),
        ("[-1, 2]", "unparsable", ()),
        ("[1], [2]", "unparsable", ()),
        ("[" + "9" * 5000 + "]", "unparsable", ()),
    ],
)
def test_indices(text: str, status: str, indices: tuple) -> None:
    assert actions.indices(text, FILM) == Reading(status=status, indices=indices)


TOOLS = {"zoom": "boxes", "watch": "windows", "frames": "indices"}
BOX = ((10.0, 20.0, 60.0, 80.0),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I look. <zoom>[10, 20, 60, 80]</zoom>", [Reading(status="parsed", name="zoom", boxes=BOX)]),
        (
            '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [10, 20, 60, 80], "video": 1}}\n</tool_call>',
            [Reading(status="parsed", name="zoom", boxes=BOX, media=1)],
        ),
        ('{"arguments": {"box": [10, 20, 60, 80]}, "name": "zoom"}', [Reading(status="parsed", name="zoom", boxes=BOX)]),
        (
            '{"name": "zoom", "arguments": {"box": [10, 20, 60, 80], "span": [3, 5]}}',
            [Reading(status="parsed", name="zoom", boxes=BOX, windows=((3, 5),))],
        ),
        (
            '<tool_call>{"name": "watch", "arguments": {"start": 3, "end": "0:05"}}</tool_call>',
            [Reading(status="parsed", name="watch", windows=((3, 5),))],
        ),
        (
            '{"name": "watch", "arguments": {"start": 5, "end": 3}}',
            [Reading(status="repaired", name="watch", windows=((3, 5),))],
        ),
        ('{"name": "frames", "arguments": {"indices": [4, 2]}}', [Reading(status="parsed", name="frames", indices=(2, 4))]),
        ("<frames>[2]</frames><zoom>nothing</zoom>",
         [Reading(status="parsed", name="frames", indices=(2,)), Reading(status="unparsable", name="zoom")]),
        ('{"name": "search", "arguments": {"query": "door"}}', [Reading(status="unknown", name="search")]),
        ("<tool_call>zoom please</tool_call>", [Reading(status="unparsable")]),
        ('<tool_call>{"name": "zoom", "arguments": {}}</tool_call>', [Reading(status="unparsable", name="zoom")]),
        ("<zoom>[5, 5, 5, 5]</zoom>", [Reading(status="out of range", name="zoom")]),
        ("<zoom>[10, 20, 60, 80]", []),
        ('{"name": "zoom", "arguments": {"box": [10, 20, 60, 80]}', []),
        ("no call", []),
    ],
)  # fmt: skip
def test_calls(text: str, expected: list) -> None:
    assert actions.calls(text, TOOLS, FILM) == tuple(expected)


def test_looks_are_in_the_frame_of_the_file() -> None:
    (crop,) = actions.looks(Reading(status="parsed", boxes=((28, 14, 56, 56),)), SHOWN, QWEN25, frames=4)
    assert crop == Look(video=1, crop=(280, 140, 560, 560), frames=4)
    both = Reading(status="parsed", boxes=((28, 14, 56, 56),), windows=((3, 5),))
    assert actions.looks(both, SHOWN, QWEN25, fps=2.0)[0].span == (3, 5)
    dense = actions.looks(
        Reading(status="parsed", windows=((0.5, 4.5), (20, 30))), SHOWN, QWEN25, frames=8, share=0.1, least=1.0
    )
    assert [look.span for look in dense] == [(0, 5.5), (19, 31)]
    (chosen,) = actions.looks(Reading(status="parsed", indices=(2, 4)), SHOWN, QWEN25, frames=8, max_tokens=64)
    assert chosen == Look(indices=(2, 4), of=SHOWN, max_tokens=64)
    assert actions.looks(Reading(status="unparsable"), SHOWN, QWEN25) == ()


def test_memory_over_rounds() -> None:
    old, new = [(10, 20)], [(15, 30)]
    assert actions.remember(old, new) == ((15, 30),)
    assert actions.remember(old, new, "union") == ((10, 30),)
    assert actions.remember(old, new, "intersect") == ((15, 20),)
    assert actions.remember(old, [(40, 50)], "intersect") == ((40, 50),)
    assert (
        actions.remember(old, [], "union") == actions.remember([], old, "intersect") == actions.remember(old, []) == ((10, 20),)
    )
    assert actions.is_unchanged(old, [(10, 20.2)]) and not actions.is_unchanged(old, [(10, 21)])  # 1 - 10 / 10.2, 1 - 10 / 11
    assert actions.is_unchanged([], []) and not actions.is_unchanged([], old)


def test_ten_thousand_windows_cost_nothing() -> None:
    spans = [(k / 100, k / 100 + 0.5) for k in range(10_000)]
    for text in (str(spans), str([{"start": a, "end": b} for a, b in spans]), " ".join(f"{a} to {b}" for a, b in spans)):
        start = time.perf_counter()
        found = actions.clue(f"<clue>{text}</clue>", FILM)
        assert time.perf_counter() - start < 5.0
        assert found.status == "repaired" and found.windows == (pytest.approx((0.0, 0.57)),)  # the first eight, merged


LONG = [
    "<clue>" * 20_000,
    "<clue>" + "[" * 50_000,
    "<clue>" + "1 to " * 20_000 + "</clue>",
    "<clue>" + "9" * 90_000 + "</clue>",
    "<clue>" + "1-" * 40_000 + "</clue>",
    "<zoom>" + "1," * 40_000 + "</zoom>",
    "{" * 50_000,
    '{"name":' * 9_000,
]
PIECES = [
    *"0129.,-:()[]{} \n",
    "<clue>",
    "</clue>",
    "<zoom>",
    "</zoom>",
    "<tool_call>",
    "</tool_call>",
    " to ",
    "(2, 5)",
    "nan",
]
PIECES += ["[0, 0, 10, 10]", '{"name": "zoom", "arguments": ', '"start": 3', '"end": ', "s", "min", "\u0663"]


def test_no_text_raises_and_every_reading_is_usable_or_says_why() -> None:
    rng = random.Random(0)
    drawn = ["".join(rng.choices(PIECES, k=rng.randrange(30))) for _ in range(3000)]
    hostile = [t.replace("answer>", f"{tag}>") for t in HOSTILE.values() for tag in ("clue", "zoom")]
    for text in (*HOSTILE.values(), *hostile, *LONG, *drawn):
        start = time.perf_counter()
        readings = [
            actions.clue(text, FILM),
            actions.clue(text, FILM, kind="boxes"),
            actions.windows(text, FILM),
            actions.boxes(text, FILM),
            actions.indices(text, FILM),
            *actions.calls(text, TOOLS, FILM),
            *actions.calls(text, TOOLS),
        ]
        assert time.perf_counter() - start < 5.0, text[:40]
        for found in readings:
            values = (*found.windows, *found.boxes, *found.indices)
            assert found.is_usable == bool(values)
            assert all(0 <= a <= b < inf for a, b in found.windows)
            assert all(0 <= b[0] < b[2] and 0 <= b[1] < b[3] for b in found.boxes)
            for wanted in actions.looks(found, SHOWN, QWEN25, frames=4):
                assert isinstance(wanted, Look)


def test_the_strict_reader_is_a_part_of_the_tolerant_one() -> None:
    for text in ("[(1.0, 2.0), (3.5, 4)]", "[]", "(1, 2)", "[[5, 2]]"):
        assert parsing.windows(text) == parsing.time_spans(text)
    assert parsing.objects('a {"b": {"c": 1}} d {e} {f') == ['{"b": {"c": 1}}', "{e}"]
    assert parsing.blocks("<a>1</a><b>2<a> 3 </a></b>", ("a", "b")) == [("a", "1"), ("a", "3")]
