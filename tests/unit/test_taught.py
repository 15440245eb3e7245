"""The annotation in the policy's place where rollouts look: what it writes, and what it is shown for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.errors import DataError
from rft.families import FAMILIES
from rft.rollout.reference import reference_rollout
from rft.types import Media
from tests.looks import ANSWER, asking, film, looks, photo, renderer, rolled

BOTH = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return photo(tmp_path_factory.mktemp("pictures") / "a.png")


@BOTH
@pytest.mark.parametrize(
    ("use", "args", "asks"),
    [
        ("single", {}, ()),
        ("iterative", {"rule": "window"}, (f"{ANSWER}<clue>4 to 10</clue>",)),
        ("iterative", {"rounds": 3}, (f"{ANSWER}<clue>4 to 10</clue>",) * 2),
        ("iterative", {"rounds": 3, "agree": True}, (f"{ANSWER}<clue>4 to 10</clue>",)),
        ("iterative", {"rounds": 3, "min_gain": 0.1}, (f"{ANSWER}<clue>4 to 10</clue>",)),
        ("zoom", {}, ({"qwen2_5_vl": "<zoom>[5, 5, 35, 24]</zoom>", "qwen3_vl": "<zoom>[104, 208, 625, 834]</zoom>"},)),
        ("frames", {}, ("<frames>[2, 3]</frames>",)),
        ("frames", {"most": 1}, ("<frames>[2]</frames>",)),
        ("replay", {}, ("<sot>[0.10, 0.20, 0.63, 0.84]<eot>",)),
        (
            "replay",
            {"unit": "family"},
            ({"qwen2_5_vl": "<sot>[5, 5, 35, 24]<eot>", "qwen3_vl": "<sot>[104, 208, 625, 834]<eot>"},),
        ),
    ],
)
def test_the_annotation_teaches_what_its_perception_reads(use: str, args: dict, asks: tuple, family: str, path: Path) -> None:
    sample = asking(path, span=(6.0, 9.0), clue=((4.0, 10.0),), clue_box=(10.0, 10.0, 60.0, 40.0))
    render = renderer(family)
    wrote = [one[family] if isinstance(one, dict) else one for one in asks]
    for context in ("append", "fresh"):
        given = {"rounds": 2, **args} if use != "single" else {}
        how = looks(use, context, **given)
        rollout = reference_rollout(sample, render, looking=how)
        assert rollout.turns == (*wrote, ANSWER) and rollout.refused == ()
        assert {s.author for s in rollout.segments} == {"world", "reference"} and len(rollout.views) == 1 + len(wrote)
        ends = [s.ids[-1] == render.eos for s in rollout.segments if s.author == "reference"]
        assert ends == [use != "replay"] * len(wrote) + [True]
        said, _ = rolled(sample, [*wrote, ANSWER], how, render)  # the policy, which says the same, is shown the same
        assert [s.text for s in said.segments] == [s.text for s in rollout.segments] and said.views == rollout.views


def test_a_small_box_is_taught_with_an_area(picture: Media) -> None:
    for use in ("zoom", "replay"):
        sample = asking(picture, choice="C", clue_box=(100.0, 50.0, 100.4, 50.3))
        rollout = reference_rollout(sample, renderer(answer="<answer>{choice}</answer>"), looking=looks(use))
        assert len(rollout.views) == 2 and rollout.refused == ()


def test_an_annotation_that_asks_for_nothing_answers(path: Path) -> None:
    for use in ("iterative", "zoom", "frames", "replay"):
        sample = asking(path, choice="C")
        rollout = reference_rollout(sample, renderer(answer="<answer>{choice}</answer>"), looking=looks(use))
        assert rollout.turns == ("<answer>C</answer>",)


@pytest.mark.parametrize(
    ("use", "answer"),
    [("iterative", {"clue": [[50.0, 60.0]]}), ("frames", {"frames": [99]}), ("zoom", {"clue_box": (500, 500, 600, 600)}),
     ("iterative", {"clue": [4.0, 10.0]}), ("zoom", {"clue_box": "left"}), ("replay", {"clue_boxes": [[1]]})],
)  # fmt: skip
def test_an_annotation_that_cannot_be_shown_is_named(use: str, answer: dict, path: Path) -> None:
    with pytest.raises(DataError, match="sample s"):
        sample = asking(path, span=(6.0, 9.0), **answer)
        reference_rollout(sample, renderer(), looking=looks(use))
