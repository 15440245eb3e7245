"""A perception of one's own, by path, and recipes that get one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.errors import DataError, RecipeError
from rft.families import FAMILIES
from rft.perceiving import looking
from rft.rollout.perceive import PerceptionSpec
from rft.rollout.reference import reference_rollout
from tests.looks import ANSWER, asking, film, looks, moving, renderer, rolled, user

BOTH = pytest.mark.parametrize("family", list(FAMILIES))
HALF = '''
from dataclasses import dataclass
from rft import parsing
from rft.data.views import Look
from rft.rollout.perceive import Allowance, Final, Turn


@dataclass(kw_only=True)
class Half:
    """Looks at the half of the film that the model names."""

    budget: Allowance
    frames: int = 4

    def start(self, sample, media):
        return Turn()

    def observe(self, reply, media, state):
        half = parsing.tagged(reply, "half")
        if state.round >= self.budget.rounds or half not in ("first", "second"):
            return Final()
        middle = media[0].duration / 2
        span = (0.0, middle) if half == "first" else (middle, 2 * middle)
        return Turn(text="Now answer.", looks=[Look(span=span, frames=self.frames)])

    def teach(self, answer, media, state):
        early = state.sample.answer["span"][0] < media[0].duration / 2
        return answer if state.round else f"<half>{'first' if early else 'second'}</half>"


class Plain(Half):
    def __init__(self, frames=4):
        self.frames = frames
        self.budget = Allowance(rounds=9)


class Blind:
    def start(self, sample, media):
        return Turn()


class Silent:
    def start(self, sample, media):
        return Turn()

    def observe(self, reply, media, state):
        return Final()


class Picky(Silent):
    def __init__(self, number):
        if number < 0:
            raise ValueError("a number below zero")
'''


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "half.py"
    file.write_text(HALF)
    return file


@BOTH
def test_a_perception_of_ones_own(family: str, own: Path, path: Path) -> None:
    assert len(HALF.partition("class Plain")[0].strip().splitlines()) <= 40
    for name, args in (("Half", {"frames": 4}), ("Plain", {"frames": 4}), ("Half", {})):
        how = looks(f"{own}:{name}", **args)
        rollout, _ = rolled(asking(path), ["<half>second</half>", ANSWER], how, renderer(family))
        assert rollout.views[1].seconds == (10.0, 13.25, 16.5, 19.75) and rollout.answer == "6 to 9"
        assert rollout.segments[2].text == "\n" + user(moving(family, ("11.6", "18.1")) + "Now answer.")
        assert reference_rollout(asking(path), renderer(family), looking=how).turns == ("<half>first</half>", ANSWER)
    near = looking(PerceptionSpec(use="half.py:Half"), "perception", near=own.parent)
    assert near.make().budget.rounds == 2
    with pytest.raises(DataError, match="Silent has no `teach`"):
        reference_rollout(asking(path), renderer(family), looking=looks(f"{own}:Silent"))


@pytest.mark.parametrize(
    ("use", "args", "where", "what"),
    [
        ("iteratve", {}, "perception.use", "did you mean iterative"),
        ("{own}:Nobody", {}, "", "no 'Nobody'"),
        ("{own}:Blind", {}, "perception.use", "no method 'observe'"),
        ("{own}:Half", {"frame": 3}, "perception.args.frame", "did you mean frames"),
        ("{own}:Half", {"frames": "many"}, "perception.args.frames", "a whole number"),
        ("{own}:Plain", {"frame": 3}, "perception.args", "takes: frames"),
        ("{own}:Picky", {"number": -1}, "perception.args", "a number below zero"),
        ("{own}:Picky", {}, "perception.args", "number"),
        ("single", {"rounds": 2}, "perception.args", "takes no arguments"),
        ("iterative", {"rule": "best"}, "perception.args.rule", "two_streams"),
        ("iterative", {"ratio": 0.5}, "perception.args", "ratio"),
        ("iterative", {"rule": "window", "ratio": 2.0}, "perception.args", "ratio"),
        ("iterative", {"frames": 1}, "perception.args", "frames"),
        ("iterative", {"write": "{clues}"}, "perception.args", "clues"),
        ("zoom", {"fine": 0}, "perception.args.fine", "positive"),
        ("zoom", {"frames": -1}, "perception.args.frames", "positive"),
        ("zoom", {"max_tokens": 0}, "perception.args.max_tokens", "positive"),
        ("zoom", {"share": -0.1}, "perception.args.share", "below 0"),
        ("zoom", {"tool": " "}, "perception.args.tool", "empty"),
        ("frames", {"strip": 0}, "perception.args.strip", "positive"),
        ("frames", {"coarse": 0}, "perception.args.coarse", "positive"),
        ("frames", {"fine": 0}, "perception.args.fine", "positive"),
        ("frames", {"most": 0}, "perception.args.most", "below 1"),
        ("frames", {"tag": ""}, "perception.args.tag", "empty"),
        ("replay", {"pool": 0}, "perception.args.pool", "below 1"),
        ("replay", {"max_tokens": 0}, "perception.args.max_tokens", "positive"),
        ("replay", {"begin": ""}, "perception.args.begin", "empty"),
        ("replay", {"end": ""}, "perception.args.end", "empty"),
        ("zoom", {"failed": "{what}"}, "perception.args", "what"),
        ("frames", {"failed": "{what}"}, "perception.args", "what"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_wrong_names_its_key(use: str, args: dict, where: str, what: str, own: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        looking(PerceptionSpec(use=use.replace("{own}", str(own)), args=args), "perception")
    assert caught.value.where.startswith(where) and what in str(caught.value)
