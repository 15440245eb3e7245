"""Which view a call is about, and boxes that stand in the middle of a reply."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.rollout.loop import _ends_with, opening, roll_out
from rft.rollout.policy import Limits, Scripted
from rft.types import Media
from tests.looks import ANSWER, asking, film, looks, photo, renderer, rolled

BOX = "<sot>[0, 0, 0.5, 0.5]<eot>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return photo(tmp_path_factory.mktemp("pictures") / "a.png")


def call(box: str, more: str = "") -> str:
    return f'{{"name": "zoom", "arguments": {{"bbox_2d": {box}{more}}}}}'


@pytest.mark.parametrize("context", ["append", "fresh"])
def test_a_call_reaches_a_media_that_was_not_shown_last(context: str, path: Path, picture: Media) -> None:
    said = [call("[0, 0, 28, 14]", ', "image": 0'), call("[0, 0, 28, 14]", ', "video": 1'), ANSWER]
    rollout, _ = rolled(asking(picture, path), said, looks("zoom", context), renderer())
    assert [v.media for v in rollout.views] == [0, 1, 0, 1] and rollout.views[3].crop == (0, 0, 48, 24)
    said = [call("[0, 0, 28, 14]", ', "video": 1'), call("[0, 0, 56, 28]", ', "video": 1'), ANSWER]
    rollout, _ = rolled(asking(picture, path), said, looks("zoom", context), renderer())
    assert rollout.views[3].crop == rollout.views[2].crop == (0, 0, 48, 24)  # of what was shown of it last
    said = [call("[0, 0, 28, 14]", ', "video": 1'), "<zoom>[0, 0, 56, 28]</zoom>", ANSWER]
    rollout, _ = rolled(asking(picture, path), said, looks("zoom", context), renderer())
    assert rollout.views[3].media == 1  # nothing was named: what stands there


@pytest.mark.parametrize("context", ["append", "fresh"])
def test_a_box_keeps_to_the_window_of_what_it_is_about(context: str, path: Path) -> None:
    window = call("[0, 0, 56, 28]", ', "start": 4, "end": 6')
    said = [window, "<zoom>[0, 0, 28, 14]</zoom>", call("[0, 0, 28, 14]", ', "start": 10, "end": 12'), ANSWER]
    rollout, _ = rolled(asking(path), said, looks("zoom", context, rounds=4), renderer())
    assert [(v.seconds[0], v.seconds[-1]) for v in rollout.views[1:]] == [(4.0, 6.0), (4.0, 6.0), (10.0, 12.0)]
    whole, _ = rolled(asking(path), ["<zoom>[0, 0, 56, 28]</zoom>", *said[1:2], ANSWER], looks("zoom", context), renderer())
    assert len({v.seconds for v in whole.views}) == 1  # no window was named


class Pieces:
    """A tokenizer by hand: which token holds what is the point."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def text(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "fires"),
    [
        (("so [0]<eot", "><", "answer>"), [0, 1, 0]),
        (("so", "<eot>", " ", "more"), [0, 1, 0, 0]),
        (("<eot><eot", ">", "x<eot>y", "z"), [1, 1, 1, 0]),
        (("<e", "o", "t", "x", ">"), [0] * 5),
    ],
)
def test_a_stop_may_end_inside_a_token(pieces: tuple, fires: list) -> None:
    until = _ends_with(("<eot>",), Pieces(*pieces))
    assert [until(list(range(n + 1))) for n in range(len(pieces))] == [bool(f) for f in fires]


def test_what_stands_behind_a_box_in_its_token_is_kept(picture: Media) -> None:
    """Of a policy whose tokens are not this tokenizer's: cut two characters behind the mark."""
    render, how, sample = renderer(), looks("replay"), asking(picture, choice="C")

    class Merging(Scripted):
        def extend(self, contexts, limits):
            cut = limits.until
            late = None if cut is None else (lambda ids: len(ids) > 2 and cut(ids[:-2]))
            return super().extend(contexts, Limits(max_tokens=limits.max_tokens, until=late))

    said = iter([f"It is {BOX}><not said", "answer>C</answer>"])
    policy = Merging(lambda index, context: next(said), render.encode, render.eos)
    given = {"policy": policy, "renderer": render, "limits": Limits(max_tokens=400), "draw": (0,), "looking": how}
    ((rollout,),) = roll_out([sample], [opening(sample, render, how)], [1], **given)
    assert rollout.segments[1].text.startswith(f"It is {BOX}>") and len(rollout.views) == 2
    assert rollout.refused == () and len(rollout.turns) == 2


def test_a_box_that_nothing_answered_is_unread(picture: Media) -> None:
    """The annotation's hint ends inside the mark, and nobody sees the policy complete it."""
    render, how, sample = renderer(), looks("replay"), asking(picture, choice="C")
    for cut, refused, views in ((BOX[:-5], (), 2), (BOX[:-3], ("unread",), 1)):
        said = iter([f"{BOX[len(cut) :]} so <answer>C</answer>", "<answer>C</answer>"])
        policy = Scripted(lambda index, context, said=said: next(said), render.encode, render.eos)
        given = {"policy": policy, "renderer": render, "limits": Limits(max_tokens=400), "draw": (0,), "looking": how}
        hints = [render.reply("reference", render.encode(cut))]
        ((rollout,),) = roll_out([sample], [opening(sample, render, how)], [1], hints=hints, **given)
        assert (rollout.refused, len(rollout.views), rollout.answer, rollout.stop) == (refused, views, "C", "answered"), cut
    last, _ = rolled(sample, [BOX, f"{BOX} so <answer>C</answer>"], looks("replay", rounds=2), render)
    assert (last.refused, last.answer) == (("unread",), "C")  # no turn was left to show it in
    behind, _ = rolled(sample, [f"<answer>C</answer>{BOX} more"], looks("replay"), render)
    assert (behind.refused, behind.answer) == ((), "C")
