"""The rewards that come with the package: by hand, on hostile text, and against what a policy would try."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from rft import Rollout, Sample, Score, Segment
from rft.evaluation.contract import HOSTILE
from rft.plugins import load_object
from rft.types import View

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


def shown(*seconds: float, tokens: int = 64, crop: tuple | None = None) -> View:
    return View(
        media=0, kind="video", source="a.mp4", frames=tuple(range(len(seconds))), seconds=seconds, pair_seconds=seconds[::2],
        size=(56, 112), original=(560, 1120), grid=(1, 4, 8), tokens=tokens, duration=30.0, crop=crop,
    )  # fmt: skip


def looked(*rounds: tuple[str, tuple[View, ...]], first: tuple[View, ...] = (shown(0.0, 15.0, 29.0),)) -> Rollout:
    """A prompt with `first`, then turns, each answered by the world with views."""
    segments = [Segment(author="world", text="?", views=first)]
    for text, views in rounds:
        segments += [Segment(author="policy", text=text), Segment(author="world", text="", views=views)]
    return Rollout(sample_id="s", segments=tuple(segments))


def clued(text: str) -> str:
    return f"<answer>C</answer><clue>{text}</clue>"


def test_clue_iou() -> None:
    assert clue_iou(wrote(clued("[(2, 5)]")), EVERYTHING) == clue_iou(wrote(clued("2 s to 5 s")), EVERYTHING) == 1.0
    assert clue_iou(wrote(clued("[(3, 6)]")), EVERYTHING) == 0.5
    assert clue_iou(wrote(clued("[(2, 3), (4, 5)]")), EVERYTHING) == pytest.approx(2 / 3)
    assert clue_iou(wrote("<glue>[(10, 14)]</glue>"), asked(span=(2.0, 5.0), valid_spans=((10.0, 14.0),))) == 1.0
    two = wrote(clued("[(2, 5)]"), clued("[(3, 6)]"), "<answer>C</answer>")
    assert [clue_iou(two, EVERYTHING, round=k) for k in (0, 1, 2, 3, -1, -3, -4)] == [1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_clue_iou_compares_with_the_annotated_clue_first() -> None:
    wide = asked(span=(2.0, 5.0), spans=((2.0, 5.0),), clue=((0.0, 8.0), (10.0, 12.0)))
    assert clue_iou(wrote(clued("[(0, 8), (10, 12)]")), wide) == 1.0
    assert clue_iou(wrote(clued("2 to 5")), wide) == pytest.approx(0.3)  # 3 of 10 seconds
    assert clue_iou(wrote(clued("2 to 5")), asked(span=(2.0, 5.0), clue=())) == 1.0  # none was annotated
    assert clue_iou(wrote(clued("[0, 0, 4, 4]")), asked(box=(0, 0, 2, 2), clue_box=(0, 0, 4, 4))) == 1.0
    assert clue_iou(wrote(clued("[0, 0, 4, 4]")), wide, kind="boxes") is None


def test_clue_iou_per_turn() -> None:
    three = wrote(clued("[(2, 5)]"), clued("[(3, 6)]"), clued("[(2, 5)]"))
    assert clue_iou(three, EVERYTHING, per_turn=True) == Score(value=0.75, turns=(1.0, 0.5, 0.0))  # the last owes none
    assert clue_iou(three, EVERYTHING, per_turn=True, max_windows=0) == Score(value=0.0, turns=(0.0, 0.0, 0.0))
    assert clue_iou(wrote(clued("[(3, 6)]")), EVERYTHING, per_turn=True) == Score(value=0.5, turns=(0.5,))
    assert clue_iou(wrote("no", "<answer>C</answer>"), EVERYTHING, per_turn=True) == Score(value=0.0, turns=(0.0, 0.0))
    nothing = Rollout(sample_id="s", segments=(), stop="malformed")
    assert clue_iou(nothing, EVERYTHING, per_turn=True) == Score(value=0.0, turns=())
    assert clue_iou(three, asked(text="free"), per_turn=True) is None
    for hostile in HOSTILE.values():
        text = hostile.replace("answer>", "clue>")
        score = clue_iou(wrote(text, text, text), EVERYTHING, per_turn=True)
        assert 0.0 <= score.value <= 1.0 and score.turns[-1] == 0.0 and score.value == sum(score.turns) / 2


def test_improvement_is_the_last_answer_less_the_first() -> None:
    def from_to(*texts: str) -> Rollout:
        return wrote(*(f"<answer>{text}</answer>" for text in texts))

    span, spans, box, choice = (
        asked(span=(2.0, 5.0)),
        asked(spans=((2.0, 5.0),)),
        asked(box=(0, 0, 10, 10)),
        asked(choice="C"),
    )
    cases = [
        (span, ("3 to 6", "9 to 10", "2 to 5"), 0.5),  # what is between does not count
        (span, ("2 to 5", "3 to 6"), -0.5),
        (span, ("2 to 5",), 0.0),
        (span, ("nothing", "3 to 6"), 0.5),
        (spans, ("[(3, 6)]", "[(2, 5)]"), 0.5),
        (box, ("[0, 0, 10, 5]", "[0, 0, 10, 10]"), 0.5),
        (box, ("[0, 0, 10, 10]", "[0, 0, 10, 10], [0, 0, 10, 10]"), -1.0),
        (choice, ("B", "C"), 1.0),
        (choice, ("C", "Z"), -1.0),
        (asked(span=(2.0, 5.0), valid_spans=((7.0, 9.0),)), ("nothing", "7 to 9"), 1.0),
    ]
    for sample, texts, expected in cases:
        assert improvement(from_to(*texts), sample) == pytest.approx(expected), texts
    assert improvement(from_to("B", "C"), asked(text="free")) is None
    assert improvement(Rollout(sample_id="s", segments=(), stop="malformed"), span) == 0.0
    for hostile in HOSTILE.values():
        for sample in (span, spans, box, choice):
            assert -1.0 <= improvement(wrote("<answer>2 to 5</answer>", hostile), sample) <= 1.0
            assert improvement(wrote(hostile, hostile), sample) == improvement(wrote(hostile), sample) == 0.0


def test_clue_iou_of_a_box_in_the_view_that_it_is_about() -> None:
    truth = asked(box=(100.0, 50.0, 200.0, 150.0))
    assert clue_iou(wrote(clued("[100, 50, 200, 150]")), truth) == 1.0
    assert clue_iou(wrote(clued("[2, 5]")), truth) == 0.0
    there, crop = (shown(0.0, 1.0),), (shown(0.0, 1.0, crop=(100.0, 50.0, 324.0, 162.0)),)
    twice = looked((clued("[10, 5, 20, 15]"), crop), (clued("[0, 0, 50, 50]"), ()), first=there)
    assert clue_iou(twice, truth, boxes="pixels") == pytest.approx(1.0)  # 112 pixels for 1120
    assert clue_iou(twice, truth, boxes="pixels", round=1) == pytest.approx(1.0)  # 112 for 224, from (100, 50) on
    assert clue_iou(wrote(clued("[10, 5, 20, 15]")), truth, boxes="pixels") == 0.0  # nothing was shown
    thousandths = looked((clued("[89, 89, 179, 268]"), ()), first=there)
    assert clue_iou(thousandths, truth, boxes="thousandths") == pytest.approx(1.0, abs=0.02)
    assert clue_iou(twice, truth) == 0.0
    assert clue_iou(twice, EVERYTHING) == 0.0 < clue_iou(wrote(clued("[0, 0, 10, 5]")), EVERYTHING, kind="boxes")
    assert clue_iou(twice, asked(span=(2.0, 5.0)), kind="boxes") is None


def test_look_cost_counts_what_was_chosen() -> None:
    assert look_cost(looked(("a", ())), EVERYTHING) == 0.0  # the prompt is free
    twice = looked(("a", (shown(1.0, tokens=100),)), ("b", (shown(1.0, tokens=100), shown(2.0, tokens=200))), ("c", ()))
    assert look_cost(twice, EVERYTHING, max_tokens=800) == 0.5
    assert look_cost(twice, EVERYTHING, max_tokens=100) == 1.0


def test_valid_call() -> None:
    a, b, wrong = "<zoom>[1, 2, 30, 40]</zoom>", "<zoom>[5, 2, 30, 40]</zoom>", "<zoom>left</zoom>"
    see = (shown(1.0),)
    unknown = '{"name": "search", "arguments": {}}'
    cases = [
        ([(a, see), ("C", ())], 1.0),
        ([(a, see), (b, see), ("C", ())], 1.0),
        ([(a, see), (wrong, ()), ("C", ())], 0.5),
        ([(a, see), (unknown, ()), ("C", ())], 0.5),
        ([(a, see), (a, see), ("C", ())], 0.5),  # the same again
        ([(a + b, see), ("C", ())], 0.5),  # one was shown
        ([(a, ()), ("C", ())], 0.0),  # refused
        ([(a, see), (b, ())], 0.5),  # the last turn calls into the void
        ([("C", see)], 0.0),
        ([(a * 9, see), ("C", ())], 0.0),  # more than max_calls
    ]
    for rounds, expected in cases:
        assert valid_call(looked(*rounds), EVERYTHING) == expected, rounds
    assert valid_call(looked((clued("[(2, 5)]"), see), ("C", ())), EVERYTHING, clue=True) == 1.0
    assert valid_call(looked((clued("[(2, 5)]"), see), ("C", ())), EVERYTHING) == 0.0
    assert valid_call(looked(("<watch>2 to 5</watch>", see)), EVERYTHING, tools={"watch": "windows"}) == 1.0


def test_completeness() -> None:
    inside, quarter = (2.1, 3.0, 3.9, 4.8), [k / 4 for k in range(120)]
    cases = [
        ((shown(*inside),), 1.0),  # each of 2..2.75..3.5..4.25..5
        ((shown(*inside[:2]),), 2 * 1 * 0.5 / 1.5),
        ((shown(*inside, 6.0, 7.0, 8.0, 9.0),), 2 * 1 * 0.5 / 1.5),
        ((shown(3.0, 3.0), shown(3.0)), 2 * 1 * 0.25 / 1.25),  # the same frame again and again
        ((shown(*quarter),), 2 * 13 / 120 / (1 + 13 / 120)),  # the whole film
        ((shown(7.0, 8.0),), 0.0),
        ((), 0.0),
    ]
    for views, expected in cases:
        assert completeness(looked(("a", views), ("C", ())), EVERYTHING) == pytest.approx(expected), views
    assert completeness(looked(("C", ()), first=(shown(*inside),)), EVERYTHING) == 0.0  # what everybody is shown


@pytest.mark.parametrize(
    "text", ["", "[]", "none", "[(5, 2)]", "[(2, 2)]", "[(0, 1e9)]", str([(2, 5)] * 4), "2 to 5, 6 to 7, 8 to 9, 1 to 2"]
)
def test_a_clue_that_names_nothing_or_everything_earns_nothing(text: str) -> None:
    for sample in (EVERYTHING, asked(spans=()), asked(span=(2.0, 5.0)), asked(box=(0, 0, 0, 0))):
        assert clue_iou(wrote(clued(text)), sample) < 1e-6
    assert clue_iou(wrote(clued("0 to 30")), EVERYTHING) == pytest.approx(0.1)  # the whole film


@pytest.mark.parametrize("reward", [clue_iou, look_cost, valid_call, completeness], ids=lambda reward: reward.__name__)
def test_rewards_of_looks_survive_hostile_turns_between_looks(reward: Any) -> None:
    for hostile in HOSTILE.values():
        for tag in ("clue", "zoom", "tool_call"):
            text = hostile.replace("answer>", f"{tag}>")
            value = reward(looked((text, (shown(2.0, 3.0),)), (text, ())), EVERYTHING)
            assert isinstance(value, float) and 0.0 <= value <= 1.0
