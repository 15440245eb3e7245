"""More rounds at the same cost, and other hands on the clue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.evaluation.rounds import CONTROLS, at_rounds, can_be_led, controlled, describe, one_look, report
from rft.families import FAMILIES
from rft.rollout.loop import opening
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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rounds_share_the_tokens_of_one_look_evenly(family: str, path: Path) -> None:
    render, short = renderer(family), asking(Media(kind="video", source=str(path), budget={"nframes": 4}))
    assert one_look([short, asking(path)], render) == 8
    how = looks("iterative", "fresh", rule="window")
    for rounds, each in ((1, 8), (2, 4), (4, 2)):
        at = at_rounds(how, rounds, 8)
        assert (at.budget.rounds, at.budget.visual_tokens, at.make().budget) == (rounds, 8, at.budget)
        rollout, _ = rolled(asking(path), ["<clue>4 to 10</clue>"] * rounds, at, render)
        assert len(rollout.turns) == rounds and rollout.refused == ()
        assert all(v.tokens <= each for v in rollout.views) and sum(v.tokens for v in rollout.views) <= 8
        assert rollout.views[0].tokens > each / 2 - 1  # a share is used, not hoarded
    assert how.make().budget.visual_tokens == 0  # the one it was made from is as it was
    assert at_rounds(Looking(), 2, 8).is_single


@pytest.mark.parametrize("use", ["zoom", "frames", "replay"])
def test_perceptions_that_know_of_no_budget_share_it_too(use: str, path: Path) -> None:
    call = "<zoom>[0, 0, 1000, 1000]</zoom><frames>[1, 3]</frames><sot>[0, 0, 1, 1]<eot>"
    for rounds, tokens in ((1, 8), (2, 16), (2, 8)):
        how = at_rounds(looks(use), rounds, tokens)
        rollout, _ = rolled(asking(path), [call, ANSWER][-rounds:], how, renderer())
        assert len(rollout.views) == rounds and rollout.refused == ()
        assert all(view.tokens <= tokens // rounds for view in rollout.views)
    if use != "replay":  # what fits is the sample's own prompt
        assert opening(asking(path), renderer(), at_rounds(looks(use), 2, 16)) == renderer().prompt(asking(path))


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
    for how in (looks("iterative", context), at_rounds(looks("iterative", context), 3, 24), looks("zoom", context, rounds=2)):
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


def test_what_can_be_led() -> None:
    assert can_be_led([asking(span=(1.0, 2.0)), asking(clue_box=(0, 0, 1, 1))])
    assert not can_be_led([asking(span=(1.0, 2.0)), asking(choice="C")])


def test_described_by_hand(path: Path) -> None:
    how, render = looks("iterative", rule="window", rounds=2), renderer()
    good, _ = rolled(asking(path), [WRONG, ANSWER], how, render)  # 8 + 8 tokens
    bad, _ = rolled(asking(path), ["<clue>50 to 60</clue>"], how, render)
    none, _ = rolled(asking(path), [ANSWER], how, render)
    told = describe([good, bad, none, good], rounds=2)
    assert told == {"visual_tokens": 12.0, "turns": 1.5, "valid_clues": 0.5, "refused": 0.0}
    kept, _ = rolled(asking(path), [WRONG, "<clue>gone</clue>", ANSWER], looks("iterative"), render)
    assert describe([kept], rounds=3)["valid_clues"] == 0.5 and describe([kept], rounds=3)["refused"] == 1.0
    call = "<zoom>[0, 0, 28, 14]</zoom>"
    zoomed, _ = rolled(asking(path), [call, "<zoom>left</zoom>", ANSWER], looks("zoom"), render)
    assert describe([zoomed], rounds=3)["valid_clues"] == 0.5
    assert report({"iou": 0.25}, [good, good], 2, seconds=8.0) == {
        "iou": 0.25, "visual_tokens": 16.0, "turns": 2.0, "valid_clues": 1.0, "refused": 0.0,
        "seconds": 4.0, "seconds_per_round": 2.0,
    }  # fmt: skip
