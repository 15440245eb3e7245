"""When the annotation joins: decay, gate, seat and hints by hand."""

from __future__ import annotations

import pytest

from rft.algo.guidance import Guidance, drawn_seat, hint_length, is_certain, opens, probability, wants_seat
from rft.errors import RecipeError, RftError
from rft.strict import build


def test_the_default_is_the_papers_every_group_at_every_step() -> None:
    always = Guidance()
    assert is_certain(always) and all(wants_seat(always, step, u) for step in (0, 10**6) for u in (0.0, 0.999999))
    assert opens(always, [1.0, 1.0])
    assert not wants_seat(Guidance(probability=0.0), 0, 0.0)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.8, 0.8, 0.8, 0.8, 0.0, 0.0]),
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        ("cosine", [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0, 0.0]),
    ],
)
def test_probability_falls_to_zero_and_stays_there(decay: str, expected: list[float]) -> None:
    guidance = Guidance(probability=0.8, decay=decay, until=100)
    assert [probability(guidance, step) for step in (0, 25, 50, 75, 100, 500)] == pytest.approx(expected)


def test_the_draw_is_the_callers_number() -> None:
    half = Guidance(probability=0.5)
    assert wants_seat(half, 0, 0.49) and not wants_seat(half, 0, 0.5)
    share = sum(wants_seat(Guidance(probability=0.5, decay="linear", until=4), 2, i / 1000) for i in range(1000)) / 1000
    assert share == 0.25


def test_a_gate_opens_only_where_nobody_passes() -> None:
    """Also the answer to tied groups: rows at 0.99 beside the annotation's 1 would be pushed down as hard as rows at 0."""
    gated = Guidance(gate=0.5)
    assert not is_certain(gated)
    assert opens(gated, [0.0, 0.0, 0.0]) and opens(gated, [0.1, 0.49])
    assert not opens(gated, [0.0, 0.5]) and not opens(gated, [0.99, 0.99, 0.99])
    assert opens(gated, [])


def test_any_member_gives_way() -> None:
    assert [drawn_seat(4, u) for u in (0.0, 0.24, 0.25, 0.5, 0.75, 0.9999999)] == [0, 0, 1, 2, 3, 3]
    counts = [0] * 7
    for i in range(7000):
        counts[drawn_seat(7, i / 7000)] += 1
    assert max(counts) - min(counts) <= 2
    assert drawn_seat(3, 1 - 2**-54) == 2


def test_a_hint_gives_something_and_leaves_something() -> None:
    assert [hint_length(level, 20) for level in (0.25, 0.5, 0.75)] == [5, 10, 15]
    assert hint_length(0.25, 3) == 1 and hint_length(0.99, 2) == 1 and hint_length(0.5, 1) == 0
    assert hint_length(0.999, 10) == 9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"probability": 1.5}, "not in"),
        ({"until": -1}, "below 0"),
        ({"gate": -0.1}, "below 0"),
        ({"decay": "cosine"}, "has no end"),
        ({"hints": (0.5,)}, "no gate"),
        ({"gate": 0.5, "hints": (0.5, 0.25)}, "do not rise"),
        ({"gate": 0.5, "hints": (0.5, 1.0)}, "do not rise"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(RftError, match=said):
        Guidance(**wrong)


def test_a_recipe_builds_it_and_names_the_key() -> None:
    guidance = build(Guidance, {"gate": 0.5, "hints": [0.25, 0.5], "decay": "linear", "until": 10}, "phases.a.guidance")
    assert guidance.hints == (0.25, 0.5)
    with pytest.raises(RecipeError, match=r"phases\.a\.guidance: decay=linear has no end"):
        build(Guidance, {"decay": "linear"}, "phases.a.guidance")
