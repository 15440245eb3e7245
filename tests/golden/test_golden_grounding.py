"""Spans, boxes, letters and layouts against values that public functions return; `README.md` here names the sources.

`OURS` is the whole list of the VideoChat-R1 cases in which we answer differently, or where the original fails, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from rft import Rollout, Sample, Segment, geometry, parsing
from rft.plugins import load_object

HERE = Path(__file__).parent
REWARDS = json.loads((HERE / "videochat_r1_rewards.json").read_text())["functions"]
GROUNDING = json.loads((HERE / "eval_grounding.json").read_text())
TEMPSAMP = json.loads((HERE / "tempsamp_vectors.json").read_text())

temporal_iou = load_object("rewards/grounding.py:temporal_iou")
temporal_set_iou = load_object("rewards/grounding.py:temporal_set_iou")
box_iou = load_object("rewards/detection.py:box_iou")
tagged_answer = load_object("rewards/format.py:tagged_answer")
accuracy = load_object("rewards/choice.py:accuracy")

Case = Mapping[str, Any]


def wrote(text: str) -> Rollout:
    return Rollout(sample_id="s", segments=(Segment(author="policy", text=text, ids=()),), stop="answered")


def asked(**answer: Any) -> Sample:
    return Sample(id="s", messages=(), media=(), answer=answer, task="t", row={})


# Each reader gives (what the file says, what we say) of a case, as dictionaries with the same keys.


def segment_list(case: Case) -> tuple[dict, dict]:
    return {"r1": case["r1"]["output"]}, {"r1": parsing.time_spans(case["input"]["s"]) is not None}


def set_overlap(case: Case) -> tuple[dict, dict]:
    return {"iou": case["output"]}, {"iou": geometry.spans_iou(case["input"]["pred"], case["input"]["gt"])}


def moment(case: Case) -> tuple[dict, dict]:
    given = case["input"]
    texts, spans = given.get("completions", [given.get("completion")]), given.get("gts", [given.get("gt")])
    ours = {
        "iou": [temporal_iou(wrote(text), asked(span=span)) for text, span in zip(texts, spans, strict=True)],
        "format": [tagged_answer(wrote(text), asked(), think=True) for text in texts],
    }
    theirs = {key: case[key].get("output") for key in ours if key in case}
    return theirs, {key: ours[key] for key in theirs}


def layout(case: Case) -> tuple[dict, dict]:
    rollout = wrote(case["input"]["completion"])
    return (
        {"think": case["r1.tg/cls"]["output"][0], "answer": case["r15.tg/mc/detection"]["output"][0]},
        {"think": tagged_answer(rollout, asked(), think=True), "answer": tagged_answer(rollout, asked())},
    )


def grounded_choice(case: Case) -> tuple[dict, dict]:
    given, rollout = case["input"], wrote(case["input"]["completion"])
    theirs = {"answer": case["r1"]["answer"]["output"][0]}
    ours = {"answer": accuracy(rollout, asked(choice=given["gt_answer"]))}
    if "gt_glue" in given:
        theirs |= {"r1": case["r1"]["iou"]["output"][0], "r15": case["r15"]["iou"]["output"][0]}
        truth = asked(spans=given["gt_glue"])
        ours["r1"] = temporal_set_iou(rollout, truth, tag="glue")
        ours["r15"] = temporal_set_iou(rollout, truth, tag="glue", max_spans=3)
    return theirs, ours


def choice_layout(case: Case) -> tuple[dict, dict]:
    rollout = wrote(case["input"]["completion"])
    return (
        {"think": case["grpo_qa.format"]["output"][0], "answer": case["grpo_qa_nothink.format"]["output"][0]},
        {"think": tagged_answer(rollout, asked(), think=True), "answer": tagged_answer(rollout, asked())},
    )


def track(case: Case) -> tuple[dict, dict]:
    boxes, truth = parsing.boxes(parsing.tagged(case["input"]["completion"], "answer")), case["input"]["gt"]
    ious = [geometry.box_iou(a, b) for a, b in zip(boxes, truth)] if boxes and len(boxes) == len(truth) else [0.0]
    return {"iou": case["iou"]["output"][0]}, {"iou": fmean(ious)}


def detection(case: Case) -> tuple[dict, dict]:
    text, truth = case["input"]["completion"], case["input"]["gt"]
    evidence = parsing.boxes(parsing.tagged(text, "glue"))
    ours = {
        "detection_iou": box_iou(wrote(text), asked(box=truth)),
        "igqa_iou_x0.2": 0.2 * geometry.box_iou(evidence[0], truth) if evidence else 0.0,
        "format_detection": tagged_answer(wrote(text), asked()),
    }
    return {key: case[key]["output"][0] for key in ours}, ours


def moment_list(case: Case) -> tuple[dict, dict]:
    rollout = wrote(case["input"]["completion"])
    return (
        {key: case[key]["output"][0] for key in ("iou", "format")},
        {
            "iou": temporal_set_iou(rollout, asked(spans=[case["input"]["gt"]]), max_spans=3),
            "format": tagged_answer(rollout, asked()),
        },
    )


def evaluated_span(case: Case) -> tuple[dict, dict]:
    span = parsing.time_span(wrote(case["input"]["text"]).answer)
    return {"span": case["output"]}, {"span": list(span or (None, None))}


def evaluated_iou(case: Case) -> tuple[dict, dict]:
    iou = geometry.span_iou(case["input"]["pred"], case["input"]["gt"])
    ours = {"iou_clamped": iou, "R@0.3/0.5/0.7": [int(iou >= t) for t in (0.3, 0.5, 0.7)]}
    return case.get("output", dict.fromkeys(ours)), ours


def candidates(case: Case) -> tuple[dict, dict]:
    given = case["input"]
    return {"iou": case["output"]}, {"iou": [geometry.span_iou(span, given["gt"]) for span in given["candidates"]]}


def letter(case: Case) -> tuple[dict, dict]:
    return {"letter": case["output"]}, {"letter": parsing.choice(case["input"]["s"], "ABCDEFG") or ""}


READERS: Mapping[str, Callable[[Case], tuple[dict, dict]]] = {
    "is_valid_two_d_list_format": segment_list,
    "compute_iou": set_overlap,
    "r1.tg": moment,
    "format.think_answer": layout,
    "gqa": grounded_choice,
    "r1.qa.format": choice_layout,
    "tracking": track,
    "r15.detection_igqa": detection,
    "r15.tg": moment_list,
    "r1.eval.parse_timestamp_output": evaluated_span,
    "r1.eval.grounding_metric": evaluated_iou,
    "r1.eval.calc_iou": candidates,
    "extract_characters_regex": letter,
}

# (function, case) -> what we return where the file says something else or is a defect, and why.
OURS: Mapping[tuple[str, int], tuple[dict, str]] = {
    # meant by the original, and decided otherwise here
    ("is_valid_two_d_list_format", 9): ({"r1": True}, "a lone (1.0, 2.0) names one span without doubt"),
    ("r15.tg", 2): ({"iou": 0.0, "format": 0.0}, "the last block is the answer, and two blocks are no layout"),
    ("r1.eval.parse_timestamp_output", 2): ({"span": [3.0, 4.0]}, "words have any case, as in the original's reward"),
    # quirks that we do not keep
    ("is_valid_two_d_list_format", 3): ({"r1": True}, "a blank after the trailing comma changes nothing"),
    ("is_valid_two_d_list_format", 5): ({"r1": True}, "lists of lists are what datasets write"),
    ("is_valid_two_d_list_format", 11): ({"r1": True}, "01 is 1"),
    ("r1.tg", 8): ({"iou": [0.0], "format": [0.0]}, "no time is negative; dropping the sign would invent one"),
    ("r1.tg", 10): ({"iou": [2 / 3], "format": [0.0]}, "two blanks are blanks: 2..4 in 2..5"),
    ("format.think_answer", 2): ({"think": 0.0, "answer": 0.0}, "an empty answer is none"),
    ("gqa", 10): ({"answer": 1.0, "r1": 1.0, "r15": 1.0}, "the last answer block counts; the format reward refuses two"),
    ("tracking", 9): ({"iou": 1.0}, "a code fence around the list changes nothing"),
    ("r15.detection_igqa", 0): (
        {"detection_iou": 0.0, "igqa_iou_x0.2": 0.0, "format_detection": 0.0},
        "what stands outside the tag is not the answer",
    ),
    ("extract_characters_regex", 5): ({"letter": "C"}, "the B of Because is not a word"),
    # defects
    ("is_valid_two_d_list_format", 4): ({"r1": True}, "padding inside the brackets is free"),
    ("is_valid_two_d_list_format", 10): ({"r1": True}, "so is a blank before a comma"),
    ("compute_iou", 5): ({"iou": 0.0}, "two different instants share nothing"),
    ("compute_iou", 7): ({"iou": 0.0}, "a reversed span is dropped: nothing is left to overlap"),
    ("compute_iou", 11): ({"iou": 1.0}, "the reversed span is dropped, the other one is right"),
    ("r1.tg", 7): ({"iou": [2 / 3], "format": [0.0]}, "0:02 to 0:04 is 2 to 4 s: 2..4 in 2..5"),
    ("r1.tg", 12): ({"iou": [1.0]}, "the same instant twice, instead of an exception"),
    ("r1.tg", 13): ({"iou": [1.0, 1.0]}, "each on its own: the second is the same instant twice"),
    ("r1.tg", 14): ({"iou": [0.0]}, "a reversed annotation overlaps nothing, instead of an exception"),
    ("format.think_answer", 6): ({"think": 0.0, "answer": 0.0}, "a repeated answer is counted and refused"),
    ("format.think_answer", 9): ({"think": 0.0, "answer": 0.0}, "a repeated answer is counted and refused"),
    ("gqa", 3): ({"answer": 1.0, "r1": 1.0, "r15": 1.0}, "blanks inside a tag are stripped"),
    ("gqa", 8): ({"answer": 1.0, "r1": 1.0, "r15": 1.0}, "Because of C claims C"),
    ("gqa", 14): ({"answer": 0.0}, "no letter on both sides is not agreement"),
    ("gqa", 15): ({"answer": 0.0}, "7 and 12 are no letters, and differ"),
    ("gqa", 16): ({"answer": 0.0}, "J is not H"),
    ("r1.qa.format", 0): ({"think": 1.0, "answer": 0.0}, "exactly the layout that the prompt with thinking asks for"),
    ("r1.qa.format", 1): ({"think": 0.0, "answer": 1.0}, "exactly the layout that the prompt without thinking asks for"),
    ("tracking", 4): ({"iou": 0.0}, "half reversed is reversed: 0 by rule, not by cancelled areas"),
    ("r15.detection_igqa", 2): (
        {"detection_iou": 0.0, "igqa_iou_x0.2": 0.0, "format_detection": 1.0},
        "half reversed is reversed: 0 by rule, not by cancelled areas",
    ),
    ("r15.detection_igqa", 3): (
        {"detection_iou": 0.0, "igqa_iou_x0.2": 0.0, "format_detection": 1.0},
        "half reversed is reversed: no division by a negative union",
    ),
    ("r15.detection_igqa", 6): (
        {"detection_iou": 0.0, "igqa_iou_x0.2": 0.0, "format_detection": 0.0},
        "'x' is no coordinate, and no layout is paid for it",
    ),
    ("r15.detection_igqa", 7): (
        {"detection_iou": 0.0, "igqa_iou_x0.2": 0.0, "format_detection": 0.0},
        "1+1 is text: nothing evaluates it, and no layout is paid for it",
    ),
    ("r15.tg", 4): ({"iou": 1.0, "format": 1.0}, "newlines around the list are free"),
    ("r1.eval.parse_timestamp_output", 1): ({"span": [3.0, 4.0]}, "only the inside of the answer is read"),
    ("r1.eval.grounding_metric", 3): (
        {"iou_clamped": 1.0, "R@0.3/0.5/0.7": [1, 1, 1]},
        "the same instant twice, instead of an exception",
    ),
}


@pytest.mark.parametrize(("name", "index"), [(n, i) for n in READERS for i in range(len(REWARDS[n]["cases"]))])
def test_videochat_r1(name: str, index: int) -> None:
    expected, ours = READERS[name](REWARDS[name]["cases"][index])
    if (name, index) in OURS:
        expected = OURS[name, index][0]
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == (value if isinstance(value, str | bool) else pytest.approx(value, abs=1e-9)), key


def test_every_defect_has_an_answer_and_no_exception_is_idle() -> None:
    cases = {(name, i): case for name in READERS for i, case in enumerate(REWARDS[name]["cases"])}
    assert {key for key, case in cases.items() if case["flag"] == "bug"} <= OURS.keys() <= cases.keys()
    for (name, index), (value, _) in OURS.items():
        if cases[name, index]["flag"] != "bug":
            assert READERS[name](cases[name, index])[0] != value, (name, index)


def test_pairs_of_spans() -> None:
    for case in (*GROUNDING["temporal_r1"]["pairs"], *GROUNDING["nextgqa"]["pairs"]):
        expected = case["iou"] if "iou" in case else case["IoU"]
        if case["pred"] == [3, 1]:  # the reversed window: its script gives -1
            expected = 0.0
        assert geometry.span_iou(case["pred"], case["gt"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", GROUNDING["multi_segment_iou"]["cases"], ids=str)
def test_sets_of_spans(case: Case) -> None:
    expected = case["multi_segment_iou"]
    if case["pred"] == [[5, 2]]:  # read backwards by the original, which gives 1: a reversed span overlaps nothing
        expected = 0.0
    assert geometry.spans_iou(case["pred"], case["gt"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", GROUNDING["multi_segment_iou"]["format_cases"], ids=str)
def test_lists_of_spans(case: Case) -> None:
    read_by_us = {"[(2,1)]": [(2.0, 1.0)], " [(1,2)]": [(1.0, 2.0)]}  # reversed: the reward's to judge; a blank is free
    spans = parsing.time_spans(case["text"])
    assert spans == read_by_us[case["text"]] if case["text"] in read_by_us else (spans is not None) == case["valid"]


@pytest.mark.parametrize("case", GROUNDING["temporal_r1"]["text_parsing"], ids=str)
def test_spans_in_prose(case: Case) -> None:
    assert list(parsing.time_span(case["text"]) or (None, None)) == case["videochat_r1"]


@pytest.mark.parametrize("case", GROUNDING["refcoco"]["pairs"], ids=str)
def test_pairs_of_boxes(case: Case) -> None:
    assert geometry.box_iou(case["pred"], case["gt"]) == pytest.approx(case["iou"], abs=1e-9)


@pytest.mark.parametrize("case", GROUNDING["refcoco"]["text_parsing"], ids=str)
def test_boxes_in_text(case: Case) -> None:
    none = case["box"] == [0, 0, 0, 0]  # the original's way of saying that it found nothing
    assert parsing.boxes(case["text"]) == (None if none else [tuple(case["box"])])


@pytest.mark.parametrize("case", GROUNDING["videochat_track"]["cases"], ids=str)
def test_tracks(case: Case) -> None:
    ious = [geometry.box_iou(a, b) for a, b in zip(case["pred"], case["gt"], strict=True)]
    assert fmean(ious) == pytest.approx(case["average_overlap"], abs=1e-9)


@pytest.mark.parametrize("case", TEMPSAMP["iou"], ids=str)
def test_tempsamp_overlap(case: Case) -> None:
    expected = case["clamp"] if "clamp" in case else case["recommended"]
    assert geometry.span_iou(case["pred"], case["gt"]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("case", TEMPSAMP["parse"], ids=str)
def test_tempsamp_spans(case: Case) -> None:
    """Column `tz`, the parser of the training code, with units and clocks, which it misses or misreads."""
    ours = {"<answer>12.54s to 17.83s</answer>": [12.54, 17.83], "<answer>0:12 to 0:17</answer>": [12.0, 17.0]}
    span = parsing.time_span(wrote(case["text"]).answer)
    assert (list(span) if span else None) == ours.get(case["text"], case["tz"])


@pytest.mark.parametrize("case", TEMPSAMP["format"], ids=str)
def test_tempsamp_layout(case: Case) -> None:
    """Column `ancestor_strict`, but a repeated block is not the layout."""
    repeated = case["text"].count("<think>") > 1 or case["text"].count("<answer>") > 1
    expected = 0.0 if repeated else case["ancestor_strict"]
    assert tagged_answer(wrote(case["text"]), asked(), think=True) == expected
