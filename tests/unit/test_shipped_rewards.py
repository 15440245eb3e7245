"""The rewards that come with the package: by hand, on hostile text, and against what a policy would try."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from rft import Rollout, Sample, Segment
from rft.evaluation.contract import HOSTILE
from rft.plugins import load_object

temporal_iou = load_object("rewards/grounding.py:temporal_iou")
temporal_set_iou = load_object("rewards/grounding.py:temporal_set_iou")
box_iou = load_object("rewards/detection.py:box_iou")
tagged_answer = load_object("rewards/format.py:tagged_answer")
accuracy = load_object("rewards/choice.py:accuracy")
clue_iou, improvement, look_cost, valid_call, completeness = (
    load_object(f"rewards/perception.py:{name}")
    for name in ("clue_iou", "improvement", "look_cost", "valid_call", "completeness")
)

REWARDS = [temporal_iou, temporal_set_iou, box_iou, tagged_answer, accuracy, clue_iou, look_cost, valid_call, completeness]
LONG = ["<answer>" + "1 to " * 20_000 + "</answer>", "<answer>[" + "(1,2)," * 16_000 + "]</answer>", "<answer>" * 12_000]
OPTIONS = {"options": ["a door", "a man", "a dog", "a car"]}


def wrote(*turns: str) -> Rollout:
    world = Segment(author="world", text="<answer>0 to 1</answer>", ids=())
    segments = [s for turn in turns for s in (world, Segment(author="policy", text=turn, ids=()))]
    return Rollout(sample_id="s", segments=tuple(segments), stop="answered")


def answered(text: str) -> Rollout:
    return wrote(f"<answer>{text}</answer>")


def asked(row: dict[str, Any] | None = None, **answer: Any) -> Sample:
    return Sample(id="s", messages=(), media=(), answer=answer, task="t", row=row or {})


EVERYTHING = asked(OPTIONS, span=(2.0, 5.0), spans=((2.0, 5.0),), box=(0, 0, 10, 10), choice="C")


def test_temporal_iou() -> None:
    assert temporal_iou(answered("2.0 to 5.0"), EVERYTHING) == 1.0
    assert temporal_iou(answered("3.0 to 6.0"), EVERYTHING) == 0.5  # share 2, cover 4
    assert temporal_iou(answered("nothing"), EVERYTHING) == 0.0
    assert temporal_iou(wrote("2.0 to 5.0"), EVERYTHING) == 0.0  # outside the tag


def test_temporal_iou_takes_the_best_of_the_valid_spans() -> None:
    several = asked(span=(2.0, 5.0), valid_spans=((10.0, 14.0), (12.0, 20.0)))
    assert [temporal_iou(answered(text), several) for text in ("2 to 5", "10 to 14", "12.0 to 20.0")] == [1.0, 1.0, 1.0]
    assert temporal_iou(answered("12 to 15"), several) == 0.4  # 2 of 5 with 10 to 14, 3 of 8 with 12 to 20
    assert temporal_iou(answered("6 to 9"), several) == 0.0
    assert temporal_iou(answered("2 to 20"), several) == pytest.approx(8 / 18)  # the best of them, not all of them


def test_temporal_set_iou() -> None:
    two = asked(spans=((0.0, 2.0), (8.0, 10.0)))
    assert temporal_set_iou(answered("[(0, 2), (8, 10)]"), two) == 1.0
    assert temporal_set_iou(answered("[(1, 9)]"), two) == pytest.approx(0.2)  # share 1 + 1, cover 4 + 8 - 2
    assert temporal_set_iou(answered("[(0, 2), (8, 10)]"), two, max_spans=1) == 0.0
    assert temporal_set_iou(wrote("<answer>A</answer><glue>[(0, 2), (8, 10)]</glue>"), two, tag="glue") == 1.0


def test_the_annotation_as_a_template_writes_it_earns_everything() -> None:
    spans = asked(spans=((2.0, 5.0), (7.0, 8.0)))
    for annotated in (EVERYTHING, spans):
        assert temporal_set_iou(answered(str(annotated.answer["spans"])), annotated) == 1.0
    assert box_iou(answered(str(EVERYTHING.answer["box"])), EVERYTHING) == 1.0
    assert accuracy(answered(EVERYTHING.answer["choice"]), EVERYTHING) == 1.0


def test_box_iou() -> None:
    assert box_iou(answered("[0, 0, 10, 10]"), EVERYTHING) == 1.0
    assert box_iou(answered('{"bbox_2d": [0, 0, 10, 5]}'), EVERYTHING) == 0.5
    assert box_iou(answered("a box"), EVERYTHING) == 0.0


@pytest.mark.parametrize("choice", ["C", "(C)", "C. a dog"])
def test_accuracy(choice: str) -> None:
    sample = asked(OPTIONS, choice=choice)
    assert accuracy(answered("C"), sample) == accuracy(answered("Answer: C) a dog"), sample) == 1.0
    assert accuracy(answered("B"), sample) == accuracy(answered("a dog"), sample) == accuracy(wrote("C"), sample) == 0.0


def test_accuracy_reads_letters_of_the_options_only() -> None:
    assert accuracy(answered("E, or rather B"), asked(OPTIONS, choice="B")) == 1.0  # four options: E is none of them
    assert accuracy(answered("E, or rather B"), asked({"options": list("abcde")}, choice="B")) == 0.0
    assert accuracy(answered("D"), asked(choice="D")) == 1.0  # A to D where the row lists none
    assert accuracy(answered("E"), asked(choice="E")) == 0.0


@pytest.mark.parametrize(
    ("text", "plain", "think"),
    [
        ("<answer>b</answer>", 1, 0),
        (" \n<answer> b\n</answer> ", 1, 0),
        ("<think>a</think><answer>b</answer>", 0, 1),
        (" <think>a\nb</think>\n\n<answer>b</answer>\n", 0, 1),
        ("<think></think><answer>b</answer>", 0, 1),
        ("x<answer>b</answer>", 0, 0),
        ("<answer>b</answer>x", 0, 0),
        ("<think>a</think>x<answer>b</answer>", 0, 0),
        ("<answer>b</answer><think>a</think>", 0, 0),
        ("<answer> </answer>", 0, 0),
        ("<think>a</think><answer></answer>", 0, 0),
        ("<answer>b</answer><answer>c</answer>", 0, 0),
        ("<answer><answer>b</answer></answer>", 0, 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0, 0),
        ("<think><answer>b</answer></think>", 0, 0),
        ("<think>a<answer>b</answer>", 0, 0),
        ("<answer>b", 0, 0),
        ("<Answer>b</Answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_tagged_answer(text: str, plain: int, think: int) -> None:
    assert tagged_answer(wrote(text), EVERYTHING) == plain
    assert tagged_answer(wrote(text), EVERYTHING, think=True) == think


def test_only_the_last_turn_counts() -> None:
    right, wrong = "<answer>2.0 to 5.0</answer>", "<answer>7.0 to 9.0</answer>"
    assert temporal_iou(wrote(wrong, right), EVERYTHING) == 1.0
    assert temporal_iou(wrote(right, wrong), EVERYTHING) == 0.0
    assert temporal_iou(wrote(right, ""), EVERYTHING) == 0.0
    assert tagged_answer(wrote("no layout at all", right), EVERYTHING) == 1.0


def test_a_row_without_the_annotation_is_none_of_its_business() -> None:
    sample = asked(text="free")
    for reward in (temporal_iou, temporal_set_iou, box_iou, accuracy, clue_iou, improvement, completeness):
        assert reward(answered("C"), sample) is None


@pytest.mark.parametrize("text", ["", " ", "[]", "()", "[(5, 2)]", "[(0, 0)]", "none"])
def test_an_empty_answer_never_earns(text: str) -> None:
    for sample in (EVERYTHING, asked(OPTIONS, span=(3.0, 3.0), spans=(), box=(0, 0, 0, 0), choice="")):
        for reward in (temporal_iou, temporal_set_iou, box_iou, accuracy):
            assert reward(answered(text), sample) == 0.0


def test_what_a_policy_would_try_does_not_pay() -> None:
    film = 30.0
    assert temporal_iou(answered(f"{film} to 0"), EVERYTHING) == 0.0  # the whole film, backwards
    assert temporal_iou(answered(f"0 to {film}"), EVERYTHING) == pytest.approx(0.1)  # 3 of 30 seconds
    assert temporal_iou(answered("0 to 1e9"), EVERYTHING) == 0.0
    assert temporal_iou(answered("5.0 to 2.0"), asked(span=(5.0, 2.0))) == 0.0  # a reversed annotation, copied
    assert temporal_iou(answered("2 to 5, 7 to 9"), EVERYTHING) == 0.0  # several guesses: one is read
    everywhere = str([(t / 10, t / 10 + 0.1) for t in range(300)])
    assert temporal_set_iou(answered(everywhere), EVERYTHING) == pytest.approx(0.1)  # their union is the film
    assert temporal_set_iou(answered("[(2, 5), (30, 0)]"), EVERYTHING) == 1.0  # a reversed span adds nothing, nor takes
    assert temporal_set_iou(answered(str([(2, 5)] * 9)), EVERYTHING) == 1.0  # nor does repetition
    assert box_iou(answered("[0, 0, 10, 10], [0, 0, 10, 10]"), EVERYTHING) == 0.0
    assert box_iou(answered("[10, 10, 0, 0]"), asked(box=(10, 10, 0, 0))) == 0.0
    assert accuracy(answered("A, B, C, D"), EVERYTHING) == 0.0  # the first is read
    assert tagged_answer(wrote("<answer>2 to 5</answer>" * 2), EVERYTHING) == 0.0


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_any_text_earns_a_number_between_0_and_1_and_soon(reward: Any) -> None:
    rng = random.Random(0)
    pieces = [
        *"0129.,-() []",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        " to ",
        "C",
        "(2, 5)",
        "[0, 0, 10, 10]",
        "\u0663",
    ]
    drawn = ["".join(rng.choices(pieces, k=rng.randrange(25))) for _ in range(2000)]
    for text in (*HOSTILE.values(), *LONG, *drawn):
        start = time.perf_counter()
        value = reward(wrote(text), EVERYTHING)
        assert time.perf_counter() - start < 1.0
        assert isinstance(value, float) and 0.0 <= value <= 1.0, text[:80]
    assert reward(Rollout(sample_id="s", segments=(), stop="malformed"), EVERYTHING) == 0.0
