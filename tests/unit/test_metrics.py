"""The numbers of the table, by hand, and the baselines that need no model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.data.budget import Budget
from rft.evaluation.baselines import best_constant, borrowed, random_answer, relative
from rft.evaluation.metrics import measure
from rft.families import FAMILIES
from rft.report.table import table
from rft.rollout.render import Prompt, Renderer
from rft.types import Rollout, Sample, Segment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "eval_grounding.json").read_text())


class NoTokens:
    """Baselines speak text: of a tokenizer they need its special tokens only."""

    all_special_tokens = ("<|im_end|>",)
    eos_token_id = 0


PROMPTS = {
    "when": Prompt(answer="<answer>{span[0]} to {span[1]}</answer>"),
    "whens": Prompt(answer="<answer>{spans}</answer>"),
    "which": Prompt(answer="<answer>({choice})</answer>"),
    "where": Prompt(answer="<answer>{box}</answer>"),
    "what": Prompt(answer="<answer>{answer}</answer>"),
}
RENDERER = Renderer(tokenizer=NoTokens(), family=FAMILIES["qwen2_5_vl"], prompts=PROMPTS, budget=Budget())


def sample(name: str, task: str = "when", **answer: Any) -> Sample:
    columns = {key: answer.pop(key) for key in ("duration", "options") if key in answer}
    row = {"id": name, "answer": answer.get("text", answer), **columns}
    return Sample(id=name, messages=(), media=(), answer=answer, task=task, row=row)


def says(name: str, text: str) -> Rollout:
    return Rollout(sample_id=name, segments=(Segment(author="policy", text=text, ids=()),), stop="answered")


def measured(*pairs: tuple[Sample, str]) -> dict[str, float]:
    return measure([s for s, _ in pairs], [says(s.id, text) for s, text in pairs])


def test_the_public_values_of_temporal_recall() -> None:
    golden = GOLDEN["temporal_r1"]
    pairs = [
        (sample(str(i), span=tuple(p["gt"])), f"<answer>{p['pred'][0]} to {p['pred'][1]}</answer>")
        for i, p in enumerate(golden["pairs"])
    ]
    found = measured(*pairs)
    wanted = golden["aggregate"]
    assert 100 * found["miou"] == pytest.approx(wanted["mIoU"], abs=1e-6)
    for threshold in ("0.3", "0.5", "0.7"):
        assert 100 * found[f"r1@{threshold}"] == pytest.approx(wanted[threshold], abs=1e-6)


def test_spans_by_hand() -> None:
    # 2 to 6 of 4 to 8: 2 / 6; 0 to 5 of 0 to 10: 5 / 10, at the threshold; no span read: 0
    found = measured(
        (sample("a", span=(4.0, 8.0)), "<answer>2 to 6</answer>"),
        (sample("b", span=(0.0, 10.0)), "<answer>0 to 5</answer>"),
        (sample("c", span=(0.0, 10.0)), "It happens from 0 to 10."),
        (sample("d", span=(0.0, 10.0)), "<answer>from 0 to 10</answer> or so"),
    )
    assert found["miou"] == pytest.approx((1 / 3 + 1 / 2 + 0 + 1) / 4)
    assert (found["r1@0.3"], found["r1@0.5"], found["r1@0.7"]) == (0.75, 0.5, 0.25)
    assert found["format"] == 0.5  # c has no answer block, and d says more after it


def test_of_several_valid_spans_the_best_fit_counts() -> None:
    several = {"span": (4.0, 8.0), "valid_spans": ((10.0, 20.0),)}
    found = measured(
        (sample("a", **several), "<answer>10 to 20</answer>"),
        (sample("b", **several), "<answer>4 to 6</answer>"),
        (sample("c", **several), "<answer>8 to 10</answer>"),
        (sample("d", span=(4.0, 8.0)), "<answer>10 to 20</answer>"),  # without them it is wrong
    )
    assert found["miou"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert (found["r1@0.5"], found["r1@0.7"], found["format"]) == (0.5, 0.25, 1.0)


def test_sets_of_spans_by_hand() -> None:
    # [(0, 2), (4, 6)] of [(1, 5)]: shared 1 + 1, union 6; an empty list is no answer
    annotated = ((1.0, 5.0),)
    found = measured(
        (sample("a", "whens", spans=annotated), "<answer>[(0, 2), (4, 6)]</answer>"),
        (sample("b", "whens", spans=annotated), "<answer>[]</answer>"),
    )
    assert found["miou"] == pytest.approx(1 / 6)
    assert found["format"] == 0.5


def test_boxes_by_hand() -> None:
    # 10 x 10 shifted by 5: 50 / 150; half of it: 50 / 100, at the threshold; two boxes are a spray
    annotated = (0.0, 0.0, 10.0, 10.0)
    found = measured(
        (sample("a", "where", box=annotated), "<answer>[5, 0, 15, 10]</answer>"),
        (sample("b", "where", box=annotated), "<answer>[0, 0, 5, 10]</answer>"),
        (sample("c", "where", box=annotated), "<answer>[0, 0, 10, 10], [0, 0, 10, 10]</answer>"),
    )
    assert found == {
        "box_iou": pytest.approx((1 / 3 + 1 / 2 + 0) / 3),
        "box@0.5": pytest.approx(1 / 3),
        "format": pytest.approx(2 / 3),
    }


def test_letters_by_hand() -> None:
    found = measured(
        (sample("a", "which", choice="B"), "<answer>(B)</answer>"),
        (sample("b", "which", choice="B"), "<answer>C</answer>"),
        (sample("c", "which", choice="A", options=["x", "y"]), "<answer>D</answer>"),  # not among two options
        (sample("d", "which", choice="A"), "A"),
    )
    assert found == {"accuracy": 0.25, "format": 0.5}


def test_each_metric_is_a_mean_over_the_samples_that_have_its_key() -> None:
    found = measured(
        (sample("a", span=(0.0, 4.0)), "<answer>0 to 4</answer>"),
        (sample("b", "which", choice="B"), "<answer>A</answer>"),
        (sample("c", "which", choice="B"), "<answer>B</answer>"),
        (sample("d", "what", text="rain"), "<answer>snow</answer>"),
    )
    assert found == {"miou": 1.0, "r1@0.3": 1.0, "r1@0.5": 1.0, "r1@0.7": 1.0, "accuracy": 0.5, "format": 1.0}


def test_a_sample_with_two_annotations_is_read_twice() -> None:
    both = sample("a", "which", choice="B", span=(2.0, 4.0))
    assert measured((both, "<answer>B, from 2 to 3</answer>")) == {
        "miou": 0.5, "r1@0.3": 1.0, "r1@0.5": 1.0, "r1@0.7": 0.0, "accuracy": 1.0, "format": 1.0,
    }  # fmt: skip
    assert measured((both, "<answer>B</answer>"))["format"] == 0.0, "half of what is annotated is not there"


def test_nothing_gives_no_metrics() -> None:
    assert measure([], []) == {}


def test_the_table_has_a_column_per_metric_and_a_dash_where_there_is_none() -> None:
    text = table({"random": {"miou": 0.25, "format": 1.0}, "after warmup": {"format": 0.5}})
    assert [line.split() for line in text.splitlines()] == [
        ["miou", "format"], ["random", "0.250", "1.000"], ["after", "warmup", "-", "0.500"],
    ]  # fmt: skip


def test_a_borrowed_span_is_scaled_to_the_length() -> None:
    lender = sample("t", span=(2.0, 4.0), duration=8)
    assert borrowed(sample("s", span=(0.0, 1.0), duration=4), lender, RENDERER).text == "<answer>1.0 to 2.0</answer>"
    assert borrowed(sample("s", span=(0.0, 1.0)), lender, RENDERER).text == "<answer>2.0 to 4.0</answer>", "no length, no scale"
    assert relative(lender) == {"span": (0.25, 0.5)}
    many = sample("m", "whens", spans=((2.0, 4.0), (6.0, 8.0)), duration=8)
    assert relative(many) == {"spans": ((0.25, 0.5), (0.75, 1.0))}


def test_a_borrowed_annotation_is_the_lenders_even_where_a_template_names_the_column() -> None:
    assert (
        borrowed(sample("s", "what", text="rain"), sample("t", "what", text="snow"), RENDERER).text == "<answer>snow</answer>"
    )


def test_the_best_constant_is_the_best_of_the_training_annotations() -> None:
    samples = [
        sample("a", span=(0.0, 4.0), duration=8),
        sample("b", span=(0.0, 8.0), duration=16),
        sample("c", span=(6.0, 8.0), duration=8),
    ]
    train = [
        sample("t", span=(6.0, 8.0), duration=8),
        sample("u", span=(0.0, 2.0), duration=4),
        sample("v", span=(0.0, 8.0), duration=8),
    ]
    # relative: 0.75 to 1 scores (0 + 0 + 1) / 3, 0 to 0.5 scores (1 + 1 + 0) / 3, 0 to 1 scores (1/2 + 1/2 + 1/4) / 3
    found = best_constant(samples, train, RENDERER)
    assert found["miou"] == pytest.approx(2 / 3)
    assert found["format"] == 1.0


def test_valid_spans_are_lent_and_do_not_make_a_kind_of_their_own() -> None:
    samples = [sample("a", span=(0.0, 4.0), duration=8), sample("b", span=(0.0, 1.0), valid_spans=((2.0, 4.0),), duration=4)]
    train = [sample("t", span=(0.0, 1.0), valid_spans=((4.0, 8.0), (6.0, 8.0)), duration=8)]
    # relative: 0.5 to 1 scores 0 and 1, 0.75 to 1 scores 0 and 1 / 2, 0 to 0.125 scores 1 / 4 and 1 / 2
    assert best_constant(samples, train, RENDERER)["miou"] == 0.5
    assert best_constant(samples, [sample("t", span=(0.0, 1.0), duration=8)], RENDERER)["miou"] == pytest.approx(0.375)
    many = [replace(samples[1], id=str(i)) for i in range(300)]
    # a third each
    assert random_answer(many, train, RENDERER, seed=0)["miou"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3, abs=0.05)
    assert relative(train[0]) == {"span": (0.0, 0.125), "valid_spans": ((0.5, 1.0), (0.75, 1.0))}


def test_the_best_constant_is_chosen_per_kind_of_sample() -> None:
    samples = [
        sample("a", "which", choice="A"),
        sample("b", "which", choice="B"),
        sample("c", "which", choice="B"),
        sample("d", span=(1.0, 2.0)),
    ]
    train = [sample("t", "which", choice="A"), sample("u", "which", choice="B"), sample("v", span=(1.0, 3.0))]
    found = best_constant(samples, train, RENDERER)
    assert found["accuracy"] == pytest.approx(2 / 3)  # B, always
    assert found["miou"] == 0.5  # 1 to 3 of 1 to 2


def test_a_random_answer_is_an_annotation_of_the_same_kind() -> None:
    samples = [sample(str(i), span=(0.0, 4.0), duration=4) for i in range(200)]
    train = [
        sample("t", span=(0.0, 2.0), duration=4),
        sample("u", span=(0.0, 8.0), duration=8),
        sample("v", "which", choice="A"),
    ]
    # one of the two spans scores 1/2 and the other 1: 0.75 at the mean of 200, with a deviation of 0.25 / sqrt(200) = 0.018
    found = random_answer(samples, train, RENDERER, seed=0)
    assert found["miou"] == pytest.approx(0.75, abs=0.07)
    assert found == random_answer(samples, train, RENDERER, seed=0)
    assert found != random_answer(samples, train, RENDERER, seed=1)


@pytest.mark.parametrize("train", [[], [sample("t", "which", choice="A")]])
def test_without_an_annotation_to_borrow_nothing_is_said_rather_than_the_truth(train: list[Sample]) -> None:
    samples = [sample("a", span=(0.0, 4.0))]
    for found in (random_answer(samples, train, RENDERER, seed=0), best_constant(samples, train, RENDERER)):
        assert (found["miou"], found["format"]) == (0.0, 0.0)
