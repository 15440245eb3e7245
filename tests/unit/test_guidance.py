"""When the annotation joins, and which of its spans: decay, gate, seat, hints and jitter by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rft import geometry
from rft.algo.guidance import Guidance, drawn_index, hint_length, is_certain, opens, probability, wants_seat
from rft.data.budget import Budget
from rft.errors import RecipeError, RftError
from rft.families import FAMILIES
from rft.plugins import load_object
from rft.rollout.policy import stream_key
from rft.rollout.reference import drawn_variant, variants
from rft.rollout.render import Prompt, Renderer
from rft.strict import build
from rft.types import Rollout, Sample, Segment, View

NOTHING_SHOWN = Segment(author="world", text="", ids=())


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
    assert [drawn_index(4, u) for u in (0.0, 0.24, 0.25, 0.5, 0.75, 0.9999999)] == [0, 0, 1, 2, 3, 3]
    counts = [0] * 7
    for i in range(7000):
        counts[drawn_index(7, i / 7000)] += 1
    assert max(counts) - min(counts) <= 2
    assert drawn_index(3, 1 - 2**-54) == 2


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
        ({"spans": "jittered", "jitter": 0.0}, "jitter=0 is no least IoU"),
        ({"spans": "jittered", "jitter": 2.0}, "jitter=2 is no least IoU"),
        ({"spans": "jittered", "jitter": float("nan")}, "jitter=nan is no least IoU"),
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
    assert build(Guidance, {"spans": "jittered", "jitter": 0.8, "gate": 0.5, "hints": [0.5]}).jitter == 0.8
    with pytest.raises(RecipeError, match=r"phases\.a\.guidance\.spans: 'jitter' is not one of annotated, valid, jittered"):
        build(Guidance, {"spans": "jitter"}, "phases.a.guidance")


def test_a_near_span_by_hand() -> None:
    """Of 10 to 14 at IoU 0.5 an end moves by up to 2 inwards (u below 1/3) or up to 4 outwards; shares sum to 1 at most."""
    near = {
        (1 / 6, 1 / 12): (11, 13.5),  # half and a quarter of the way in: 2.5 / 4
        (1 / 6, 1 / 4): (11, 13.5),  # half and three quarters are folded to half and a quarter
        (1 / 6, 1 / 6): (11, 13),  # 2 / 4
        (2 / 3, 2 / 3): (8, 16),  # 4 / 8
        (2 / 3, 1 / 6): (8, 13),  # 3 / 6
        (1 / 6, 2 / 3): (11, 16),  # 3 / 6
        (1.0, 0.0): (6, 14),  # 4 / 8: all of the one way, nothing of the other
        (0.0, 0.0): (10, 14),
    }
    for (u, v), expected in near.items():
        assert geometry.near_span((10, 14), 0.5, u, v) == pytest.approx(expected)
    assert {geometry.near_span((10, 14), 1.0, u, 0.3) for u in (0.0, 0.4, 0.6, 1.0)} == {(10, 14)}


@pytest.mark.parametrize(("least", "more"), [(0.5, 0.75), (0.9, 0.95)])
def test_near_spans_are_uniform_over_all_that_are_near(least: float, more: float) -> None:
    """Those with IoU >= m fill an area of ((1 - m) + (1 - m) / m)^2 / 2 at length 1, by the four triangles."""
    grid = [(i + 0.5) / 300 for i in range(300)]
    spans = [geometry.near_span((2, 3), least, u, v) for u in grid for v in grid]
    ious = [geometry.span_iou(span, (2, 3)) for span in spans]
    assert least <= min(ious) + 1e-9 and min(ious) < least + 0.01 and max(ious) > 0.99
    share = (((1 - more) * (1 + 1 / more)) / ((1 - least) * (1 + 1 / least))) ** 2
    assert sum(iou >= more for iou in ious) / len(ious) == pytest.approx(share, abs=0.01)
    inwards = least / (1 + least)
    for moves in ([s > 2 for s, _ in spans], [e < 3 for _, e in spans], [s > 2 for s, e in spans if e < 3]):
        assert sum(moves) / len(moves) == pytest.approx(inwards, abs=0.01)


class NoTokens:
    """Of a tokenizer an answer's text needs the special tokens only."""

    all_special_tokens = ("<|im_end|>",)


def writes(answer: str) -> Renderer:
    prompts = {"default": Prompt(answer=answer)}
    return Renderer(tokenizer=NoTokens(), family=FAMILIES["qwen2_5_vl"], prompts=prompts, budget=Budget())


FINE = writes("<answer>{span[0]:.2f} to {span[1]:.2f}</answer>")
COARSE = writes("<answer>{span[0]:.0f} to {span[1]:.0f}</answer>")
LISTED = writes("<answer>{spans}</answer>")
JITTERED = Guidance(spans="jittered")


def sample_of(name: str = "s", duration: float | None = None, **answer: Any) -> Sample:
    return Sample(id=name, answer=answer, row={"id": name, "duration": duration, "answer": answer})


def hashed(*draw: object) -> Callable[..., float]:
    return lambda *why: stream_key(*draw, *why) / 2**64


def says(renderer: Renderer, sample: Sample) -> Rollout:
    answer = Segment(author="reference", text=renderer.answer_text(sample), ids=())
    return Rollout(sample_id=sample.id, segments=(NOTHING_SHOWN, answer))


def jittered(renderer: Renderer, sample: Sample, count: int, guidance: Guidance = JITTERED) -> list[Rollout]:
    """What the annotation says in `count` groups of one sample."""
    draws = [hashed("seed", step, sample.id) for step in range(count)]
    return [says(renderer, drawn_variant(sample, guidance, renderer, NOTHING_SHOWN, uniform)) for uniform in draws]


TEMPORAL_IOU = load_object("rewards/grounding.py:temporal_iou")


@pytest.mark.parametrize("renderer", [FINE, COARSE], ids=["fine", "coarse"])
@pytest.mark.parametrize("span", [(3.0, 17.0), (0.0, 12.0), (22.0, 60.0), (0.0, 60.0), (20.5, 31.25)])
@pytest.mark.parametrize("least", [0.9, 0.7])
def test_a_jitter_is_near_as_it_is_read_back(renderer: Renderer, span: tuple[float, float], least: float) -> None:
    sample = sample_of(span=span, duration=60.0)
    told = jittered(renderer, sample, 500, Guidance(spans="jittered", jitter=least))
    ious = [TEMPORAL_IOU(rollout, sample) for rollout in told]
    assert min(ious) >= least and sum(ious) / 500 < 0.99
    read = {span_of(rollout) for rollout in told}
    assert all(0 <= start < end <= 60 for start, end in read)
    if renderer is FINE:
        assert len(read) > 300
    else:
        near = {(s, e) for s in range(61) for e in range(61) if geometry.span_iou((s, e), span) >= least}
        assert read <= near and 1 < len(near) < len(read) / 0.6  # nearly all whole seconds that are near


def span_of(rollout: Rollout) -> tuple[float, float]:
    start, end = rollout.answer.split(" to ")
    return float(start), float(end)


def test_without_reading_back_a_coarse_template_would_tell_less() -> None:
    """The negative control of the one above: the same draws, rounded, are not near."""
    spans = [geometry.near_span((3.0, 17.0), 0.9, i / 40, j / 40) for i in range(40) for j in range(40)]
    assert min(geometry.span_iou((round(s), round(e)), (3.0, 17.0)) for s, e in spans) < 0.9


def test_a_jitter_stays_in_the_video_that_is_shown() -> None:
    sample = sample_of(span=(2.0, 19.0), duration=60.0)
    view = View(
        media=0, kind="video", source="v.mp4", frames=(0, 1), seconds=(0.0, 10.0), pair_seconds=(0.0,), size=(28, 28),
        original=(28, 28), grid=(1, 2, 2), tokens=1, duration=20.0,
    )  # fmt: skip
    shown = replace(NOTHING_SHOWN, views=(view,))
    ends = []
    for prompt in (NOTHING_SHOWN, shown):
        told = [drawn_variant(sample, JITTERED, FINE, prompt, hashed(i)) for i in range(500)]
        ends.append(max(t.answer["span"][1] for t in told))
    assert ends[0] > 20.2 and 19.5 < ends[1] <= 20.005
    assert max(t[1] for t in map(span_of, jittered(FINE, replace(sample, row={}), 500))) > 20.2  # no end is known


def test_what_has_no_readable_neighbour_stays_as_annotated() -> None:
    short = sample_of(span=(3.0, 5.0), duration=8.0)
    assert {r.text for r in jittered(COARSE, short, 50)} == {"<answer>3 to 5</answer>"}
    off = sample_of(span=(3.4, 6.4), duration=8.0)  # 3 to 6 as it is written: 2.6 / 3.4
    assert {r.text for r in jittered(COARSE, off, 5)} == {"<answer>3 to 6</answer>"}
    assert {r.text for r in jittered(FINE, short, 50, Guidance(spans="jittered", jitter=1.0))} == {
        "<answer>3.00 to 5.00</answer>"
    }
    unread = writes("from {span[0]:.2f} to {span[1]:.2f}")  # no answer block: nothing is read back
    assert {r.text for r in jittered(unread, short, 5)} == {"from 3.00 to 5.00"}


def test_a_jitter_is_drawn_by_the_group_and_the_sample_only() -> None:
    one, other = sample_of("one", span=(3.0, 17.0)), sample_of("other", span=(3.0, 17.0))
    assert jittered(FINE, one, 20) == jittered(FINE, one, 20)
    pairs = list(zip(jittered(FINE, one, 20), jittered(FINE, other, 20), strict=True))
    assert sum(a.text != b.text for a, b in pairs) > 15


def test_each_span_of_a_list_is_moved_for_itself() -> None:
    sample = sample_of(spans=((0.0, 6.0), (10.0, 14.0), (20.0, 40.0)), duration=40.0)
    told = [drawn_variant(sample, JITTERED, LISTED, NOTHING_SHOWN, hashed(i)).answer["spans"] for i in range(200)]
    for spans in told:
        assert all(geometry.span_iou(a, b) >= 0.9 for a, b in zip(spans, sample.answer["spans"], strict=True))
        assert all(0 <= start < end <= 40 for start, end in spans)
    assert all(len({spans[i] for spans in told}) == 200 for i in range(3))
    moves = [[s[i][1] - t[1] for s in told] for i, t in enumerate(sample.answer["spans"][:2])]
    together = sum((a > 0) == (b > 0) for a, b in zip(*moves, strict=True))
    assert 60 < together < 140  # half of the time, as it must be by chance


def test_a_template_may_name_the_column_itself() -> None:
    sample = sample_of(span=(3.0, 17.0), valid_spans=((30.0, 40.0),))
    named = writes("<answer>{answer[span][0]:.2f} to {answer[span][1]:.2f}</answer>")
    assert [r.text for r in jittered(named, sample, 9)] == [r.text for r in jittered(FINE, sample, 9)]
    told = [named.answer_text(t) for t in variants(sample, Guidance(spans="valid"))]
    assert told == ["<answer>3.00 to 17.00</answer>", "<answer>30.00 to 40.00</answer>"]


def test_every_valid_span_is_as_likely_and_has_to_earn_the_maximum() -> None:
    sample = sample_of(span=(1.0, 2.0), valid_spans=((4.0, 5.0), (7.0, 9.0)), duration=10.0)
    valid = Guidance(spans="valid")
    told = [FINE.answer_text(drawn_variant(sample, valid, FINE, NOTHING_SHOWN, hashed(i))) for i in range(900)]
    expected = [FINE.answer_text(t) for t in variants(sample, valid)]
    assert expected == [f"<answer>{a:.2f} to {b:.2f}</answer>" for a, b in ((1, 2), (4, 5), (7, 9))]
    assert all(240 < told.count(text) < 360 for text in expected)  # 300 each, with a deviation of 14
    assert [TEMPORAL_IOU(says(FINE, t), sample) for t in variants(sample, valid)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("spans", ["annotated", "valid", "jittered"])
def test_an_annotation_without_spans_is_what_it_is(spans: str) -> None:
    guidance, which = Guidance(spans=spans), sample_of(choice="B")
    assert drawn_variant(which, guidance, writes("{choice}"), NOTHING_SHOWN, hashed(0)) is which
    assert variants(which, guidance) == (which,)
    one = sample_of(span=(1.0, 9.0), valid_spans=((10.0, 19.0),))
    assert (drawn_variant(one, guidance, FINE, NOTHING_SHOWN, hashed(0)) is one) == (spans == "annotated")
    assert variants(one, guidance)[0].answer["span"] == one.answer["span"]  # what a jitter falls back to
