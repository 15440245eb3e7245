"""Moment retrieval, highlight detection and the highlight reward against values of the public evaluator and of the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rft import Rollout, Sample, Segment
from rft.evaluation import highlights
from rft.plugins import load_object

HERE = Path(__file__).parent
CASES = json.loads((HERE / "eval_qvhighlights.json").read_text())["cases"]
TEMPSAMP = json.loads((HERE / "tempsamp_vectors.json").read_text())
LEAST = {"Fair": 2, "Good": 3, "VeryGood": 4}
LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}
CENT = 0.00501  # the evaluator rounds to two decimals of a percent

Case = Mapping[str, Any]

reward = load_object("rewards/highlights.py:highlights")


def moments(case: Case) -> list[tuple[list, list]]:
    answered = {s["qid"]: s["pred_relevant_windows"] for s in case["submission"]}
    return [(answered[truth["qid"]], truth["relevant_windows"]) for truth in case["ground_truth"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_moment_retrieval(case: Case) -> None:
    expected, ours = case["expected"]["full"], highlights.moment_retrieval(moments(case))
    if case["name"] == "reversed_pred":  # the evaluator divides by a negative union and gives 100: no span is reversed
        assert not any(ours.values())
        return
    assert 100 * ours["mr_map"] == pytest.approx(expected["MR-mAP"]["average"], abs=CENT)
    for threshold in ("0.5", "0.75"):
        assert 100 * ours[f"mr_map@{threshold}"] == pytest.approx(expected["MR-mAP"][threshold], abs=CENT)
    for threshold in ("0.5", "0.7"):
        assert 100 * ours[f"mr_r1@{threshold}"] == pytest.approx(expected["MR-R1"][threshold], abs=CENT)


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] != "reversed_pred"], ids=lambda case: case["name"])
def test_every_threshold_and_length_of_windows(case: Case) -> None:
    precisions = [highlights.average_precisions(*query) for query in moments(case)]
    for i, threshold in enumerate(highlights.THRESHOLDS):
        mean = 100 * sum(p[i] for p in precisions) / len(precisions)
        assert mean == pytest.approx(case["expected"]["full"]["MR-mAP"][str(threshold)], abs=CENT)
    brief = case["expected"].get("eval_submission", {}).get("brief", {})
    for name, (low, high) in LENGTHS.items():
        inside = [(a, [w for w in truth if low < w[1] - w[0] <= high]) for a, truth in moments(case)]
        if brief and any(truth for _, truth in inside):
            ours = highlights.moment_retrieval([query for query in inside if query[1]])
            assert 100 * ours["mr_map"] == pytest.approx(brief[f"MR-{name}-mAP"], abs=CENT)


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_highlight_detection(case: Case, name: str) -> None:
    answered = {s["qid"]: s["pred_saliency_scores"] for s in case["submission"]}
    queries = [(answered[truth["qid"]], highlights.clip_labels(truth)) for truth in case["ground_truth"]]
    expected, ours = case["expected"][f"HL-min-{name}"], highlights.highlight_detection(queries, LEAST[name])
    assert 100 * ours["hl_map"] == pytest.approx(expected["HL-mAP"], abs=CENT)
    assert 100 * ours["hit@1"] == pytest.approx(expected["HL-Hit1"], abs=CENT)


def test_tempsamp_highlight_evaluation() -> None:
    case = TEMPSAMP["highlight_eval"]
    labels = case["gt_saliency"]
    aps = [highlights.clip_precision(case["pred_saliency"], [s >= 4 for s in scores]) for scores in zip(*labels)]
    assert aps == pytest.approx(case["ap_per_annotator"], abs=2e-6)
    ours = highlights.highlight_detection([(case["pred_saliency"], labels)])
    assert (round(100 * ours["hl_map"], 2), 100 * ours["hit@1"]) == (case["HL_mAP"], case["HIT1"])


@pytest.mark.parametrize("case", TEMPSAMP["highlight_reward"], ids=lambda case: case["case"])
def test_tempsamp_highlight_reward(case: Case) -> None:
    seconds, scores = (", ".join(f"{x:g}" for x in column) for column in zip(*case["pred"]))
    text = f"<answer>The highlight timestamps are in the {seconds} seconds. Their saliency scores are {scores}</answer>"
    rollout = Rollout(sample_id="s", segments=(Segment(author="policy", text=text),))
    sample = Sample(id="s", answer={"highlights": case["gt"]})
    assert reward(rollout, sample) == pytest.approx(case["R_ts"], abs=2e-6)
