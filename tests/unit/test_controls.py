"""Other hands on the clue: the annotation's, a drawn one, and the first frames again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.evaluation.rounds import CONTROLS, at_rounds, can_be_led, controlled
from rft.rollout.perceive import Looking
from rft.types import Media, Rollout
from tests.looks import ANSWER, FIRST, asking, film, looks, renderer, rolled

CLUE = (4.0, 10.0)
WRONG = "<answer>1 to 2</answer><clue>15 to 18</clue>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


def shown(rollout: Rollout) -> list[tuple[float, float]]:
    return [(v.seconds[0], v.seconds[-1]) for v in rollout.views]


def under(control: str, path: Path, how: Looking, said: list[str]) -> Rollout:
    sample = asking(path, span=(6.0, 9.0), clue=(CLUE,), frames=[2, 3], clue_box=(0.0, 0.0, 48.0, 24.0))
    return rolled(sample, said, controlled(how, control), renderer())[0]


@pytest.mark.parametrize("context", ["append", "fresh"])
def test_the_oracle_shows_the_annotation_whatever_is_said(context: str, path: Path) -> None:
    how = looks("iterative", context, rule="window", share=0.0)
    for said in ([WRONG, WRONG, ANSWER], ["nothing", "<clue>", ANSWER]):
        assert shown(under("oracle_clue", path, how, said))[1:] == [CLUE, CLUE]
    assert shown(rolled(asking(path), [WRONG, WRONG, ANSWER], how, renderer())[0])[1:] == [(15.0, 18.0)] * 2  # alone


def test_a_random_clue_is_as_long_and_neither_of_the_two(path: Path) -> None:
    how = looks("iterative", rule="window", share=0.0)
    sample = asking(path, span=(6.0, 9.0), clue=(CLUE,))
    drawn = []
    for number in range(8):
        one = replace(sample, id=f"s{number}")
        rollout, _ = rolled(one, [WRONG, WRONG, ANSWER], controlled(how, "random_clue"), renderer())
        again, _ = rolled(one, ["else", "else", ANSWER], controlled(how, "random_clue"), renderer())
        assert rollout.views == again.views  # drawn by the sample, and not by what the model says
        drawn += shown(rollout)[1:]
    assert all(5.0 <= end - start <= 6.0 and start >= 0 and end <= 19.75 for start, end in drawn)  # 6 s, frames inside
    assert len(set(drawn)) > 10 and CLUE not in drawn and (15.0, 18.0) not in drawn


@pytest.mark.parametrize("context", ["append", "fresh"])
def test_the_same_frames_are_the_first_ones_again(context: str, path: Path) -> None:
    for how in (
        looks("iterative", context),
        at_rounds(looks("iterative", context), 3, renderer(), {"s": 24}),
        looks("zoom", context, rounds=2),
    ):
        rollout = under("same_frames", path, how, [WRONG, "nothing", ANSWER][: how.budget.rounds])
        assert rollout.views == rollout.views[:1] * how.budget.rounds and rollout.refused == ()
    if context == "fresh":  # as they were, of a prompt too that had to shrink its media until it fitted
        sample, how = (
            asking(path, span=(6.0, 9.0), clue=(CLUE,)),
            controlled(looks("iterative", context, rounds=2), "same_frames"),
        )
        rollout, _ = rolled(sample, [WRONG, ANSWER], how, renderer(max_prompt_tokens=22))
        assert rollout.views[0].tokens < 8 and rollout.views[1] == rollout.views[0]


@pytest.mark.parametrize("use", ["iterative", "zoom", "frames", "replay"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_every_perception_stands_every_control(control: str, use: str, context: str, path: Path) -> None:
    for said in (["<answer>1 to 2</answer>", ANSWER, ANSWER], ["<sot>[0.1, 0.1, 0.2, 0.2]<eot>", ANSWER, ANSWER]):
        rollout = under(control, path, looks(use, context), said)
        assert rollout.stop == "answered" and rollout.refused == ()
        ended = use == "replay" and "<eot>" not in said[0]  # no word is put in a mouth that has closed
        assert (len(rollout.views) == 1) == ended
        for before, behind in zip(rollout.segments, rollout.segments[1:], strict=False):
            if use == "replay" and behind.author == "world":
                assert before.ids[-1] != renderer().eos


def test_the_oracle_of_a_tool(path: Path) -> None:
    rollout = under("oracle_clue", path, looks("zoom", rounds=2), ["<zoom>[40, 20, 50, 25]</zoom>", ANSWER])
    assert [v.crop for v in rollout.views] == [None, (0.0, 0.0, 48.0, 24.0)]
    rollout = under("oracle_clue", path, looks("frames", rounds=2), ["<frames>[7]</frames>", ANSWER])
    assert set(rollout.views[1].seconds) == set(FIRST[2:4])
    rollout = under("random_clue", path, looks("zoom", rounds=2), ["<zoom>[40, 20, 50, 25]</zoom>", ANSWER])
    x0, y0, x1, y1 = rollout.views[1].crop
    assert abs(x1 - x0 - 48) <= 4 and abs(y1 - y0 - 24) <= 4 and (x0, y0) != (0.0, 0.0)  # a pixel shown is 1.7 of the file


def test_the_oracle_leads_as_long_as_it_has_something_to_look_at(path: Path) -> None:
    """Then the model has the word: what it calls for is shown, and its answer is its own."""
    said = ["<zoom>[0, 0, 28, 28]</zoom>", "<zoom>[5, 5, 50, 28]</zoom>", ANSWER]
    for control, views in (("oracle_clue", 3), ("same_frames", 3)):
        rollout = under(control, path, looks("zoom"), said)
        assert (rollout.turns, len(rollout.views), rollout.answer) == (tuple(said), views, "6 to 9")
    assert under("oracle_clue", path, looks("zoom"), said).views[1].crop == (0.0, 0.0, 48.0, 24.0)


def test_a_random_clue_lies_in_what_the_row_shows(path: Path) -> None:
    part = Media(kind="video", source=str(path), budget={"video_start": 12.0, "video_end": 18.0})
    how, begins = controlled(looks("iterative", "fresh", rule="window", rounds=2, share=0.0), "random_clue"), []
    for number in range(12):
        sample = replace(asking(part, span=(14.0, 16.0)), id=f"s{number}")
        rollout, _ = rolled(sample, [WRONG, ANSWER], how, renderer())
        start, end = shown(rollout)[1]
        assert rollout.refused == () and 12.0 <= start < end <= 18.0 and 1.5 <= end - start <= 2.0
        begins.append(start)
    assert len(set(begins)) > 6
    whole = replace(asking(part, span=(0.0, 20.0)), id="all")  # longer than what is shown
    assert rolled(whole, [WRONG, ANSWER], how, renderer())[0].refused == ()


def test_what_can_be_led(path: Path) -> None:
    span, box, choice = asking(path, span=(1.0, 2.0)), asking(path, span=(1.0, 2.0), box=(0, 0, 9, 9)), asking(path, choice="C")
    for use, samples, expected in (
        ("iterative", [span, box], True),
        ("iterative", [span, choice], False),
        ("zoom", [box], True),
        ("zoom", [box, span], False),  # it has nowhere to look
        ("frames", [span, box], True),
        ("replay", [span], False),
        ("replay", [box], True),
    ):
        assert can_be_led(samples, renderer(), looks(use, rounds=2)) == expected, (use, expected)
        assert can_be_led(samples, renderer(), at_rounds(looks(use), 2, renderer(), {"s": 16})) == expected, (use, expected)
    assert not can_be_led([asking(path, clue=[4.0, 10.0])], renderer(), looks("iterative"))  # no clue that could be shown
