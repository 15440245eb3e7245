"""Rewards of looks, by hand: the clue, the calls, what they cost and what they showed."""

from __future__ import annotations

from typing import Any

import pytest

from rft import Rollout, Sample, Score, Segment
from rft.evaluation.contract import HOSTILE
from rft.plugins import load_object
from rft.types import View

clue_iou, improvement, look_cost, valid_call, completeness = (
    load_object(f"rewards/perception.py:{name}")
    for name in ("clue_iou", "improvement", "look_cost", "valid_call", "completeness")
)

OPTIONS = {"options": ["a door", "a man", "a dog", "a car"]}


def wrote(*turns: str) -> Rollout:
    world = Segment(author="world", text="<answer>0 to 1</answer>", ids=())
    segments = [s for turn in turns for s in (world, Segment(author="policy", text=turn, ids=()))]
    return Rollout(sample_id="s", segments=tuple(segments), stop="answered")


def asked(row: dict[str, Any] | None = None, **answer: Any) -> Sample:
    return Sample(id="s", messages=(), media=(), answer=answer, task="t", row=row or {})


EVERYTHING = asked(OPTIONS, span=(2.0, 5.0), spans=((2.0, 5.0),), box=(0, 0, 10, 10), choice="C")


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


def test_ending_early_does_not_pay_where_the_rounds_are_known() -> None:
    long, short = wrote(clued("[(2, 5)]"), clued("[(3, 6)]"), "<answer>C</answer>"), wrote(clued("[(2, 5)]"))
    assert clue_iou(short, EVERYTHING, per_turn=True).value == 1.0 > clue_iou(long, EVERYTHING, per_turn=True).value == 0.75
    given = {"per_turn": True, "rounds": 3}
    assert clue_iou(short, EVERYTHING, **given) == Score(value=0.5, turns=(1.0,))
    assert clue_iou(wrote(clued("[(2, 5)]"), "<answer>C</answer>"), EVERYTHING, **given) == Score(value=0.5, turns=(1.0, 0.0))
    assert clue_iou(long, EVERYTHING, **given) == clue_iou(long, EVERYTHING, per_turn=True)
    assert clue_iou(short, EVERYTHING, per_turn=True, rounds=1).value == 1.0


def test_what_a_fresh_prompt_shows_again_answers_no_call() -> None:
    call, seen, new = "<zoom>[1, 2, 30, 40]</zoom>", (shown(2.1, 3.0, tokens=100),), (shown(2.1, 3.0, 3.9, 4.8, tokens=100),)

    def asked_anew(*views: tuple) -> Rollout:
        segments = [Segment(author="world", text="", views=seen)]
        for some in views:
            world = Segment(author="world", text="", views=some, is_fresh=True)
            segments += [Segment(author="policy", text=call), world]
        return Rollout(sample_id="s", segments=(*segments, Segment(author="policy", text="C")))

    refused, answered = asked_anew(seen), asked_anew(new)
    for reward, none, some in ((valid_call, 0.0, 1.0), (look_cost, 0.0, 100 / 4096), (completeness, 0.0, 1.0)):
        assert (reward(refused, EVERYTHING), reward(answered, EVERYTHING)) == (none, pytest.approx(some)), reward
    assert look_cost(asked_anew(new, new), EVERYTHING) == pytest.approx(100 / 4096)  # again what the look showed
    grown = looked((call, seen), ("C", ()), first=seen)  # a conversation that grows says what it shows
    assert valid_call(grown, EVERYTHING) == 1.0


def test_a_call_is_the_same_whether_it_names_the_first_media_or_none() -> None:
    named = '{"name": "zoom", "arguments": {"box": [1, 2, 30, 40], "image": 0}}'
    twice = looked(("<zoom>[1, 2, 30, 40]</zoom>", (shown(1.0),)), (named, (shown(1.0),)), ("C", ()))
    assert valid_call(twice, EVERYTHING) == 0.5


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
