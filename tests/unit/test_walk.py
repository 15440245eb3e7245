"""The loop: who is asked what, in which words, and within which budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.data.views import Look
from rft.errors import DataError, RolloutError
from rft.families import FAMILIES
from rft.rollout.loop import opening, taught
from rft.rollout.perceive import Final, Looking, State, Turn
from rft.rollout.policy import stream_key
from rft.rollout.reference import reference_rollout
from rft.types import Media
from tests.looks import ANSWER, FIRST, PRINTED, asking, film, looks, moving, renderer, rolled, user

BOTH = pytest.mark.parametrize("family", list(FAMILIES))
CALL = "<zoom>[0, 0, 1000, 1000]</zoom>"  # cut to the whole picture: 8 tokens in 4 pairs, as the first view
CLUE = "<clue>4 to 10</clue>"
PLAIN = Turn()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


class Asks:
    """What a test's author writes in place of a perception."""

    def __init__(self, *turns: object, first: object) -> None:
        self.turns, self.first = turns, first

    def start(self, sample: object, media: object) -> Turn:
        return self.first

    def observe(self, reply: str, media: object, state: State) -> object:
        turn = self.turns[state.round - 1] if state.round <= len(self.turns) else Final()
        if isinstance(turn, Exception):
            raise turn
        return turn


def made(*turns: object, context: str = "append", first: object = PLAIN, stops: tuple = (), **budget: object) -> Looking:
    def make() -> Asks:
        asks = Asks(*turns, first=first)
        asks.stops = stops
        return asks

    return replace(looks("zoom", context, **budget), make=make)


@BOTH
@pytest.mark.parametrize("use", ["iterative", "zoom", "frames", "replay"])
def test_without_a_look_it_is_the_plain_rollout(use: str, family: str, path: Path) -> None:
    said = [f"<think>so</think>{ANSWER}"]
    plain, once = rolled(asking(path), said, Looking(), renderer(family))
    for context in ("append", "fresh"):
        how = looks(use, context)
        if use != "replay":  # it shows a pooled map at first
            assert opening(asking(path), renderer(family), how) == plain.segments[0]
            assert rolled(asking(path), said, how, renderer(family)) == (plain, once)
        else:
            assert rolled(asking(path), said, how, renderer(family))[1][0].key == once[0].key


def test_every_round_has_a_stream_of_its_own(path: Path) -> None:
    _, met = rolled(asking(path), [CALL, CALL, ANSWER], looks("zoom"), renderer())
    assert [c.key for c in met] == [stream_key(0, "t", 7, "s", 0, *more) for more in ((), ("round", 1), ("round", 2))]


@BOTH
@pytest.mark.parametrize(
    ("said", "budget", "views", "refused", "told"),
    [
        ([CALL] * 2, {"rounds": 2}, 2, ("rounds",), None),
        ([CALL * 2] * 2, {"rounds": 2}, 3, ("rounds",) * 2, None),
        ([CALL, CALL, ANSWER], {"looks": 1}, 2, ("looks",), "looks"),
        ([CALL * 2, CALL, ANSWER], {"looks": 1}, 2, ("looks",) * 2, "looks"),  # as a whole
        ([CALL, CALL, ANSWER], {"most_frames": 16}, 2, ("frames",), "frames"),
        ([CALL, CALL, ANSWER], {"most_frames": 7}, 1, ("frames",) * 2, "frames"),  # the prompt is shown in any case
        ([CALL, CALL, ANSWER], {"visual_tokens": 23}, 2, ("visual_tokens",), "visual tokens"),
        ([CALL, CALL, ANSWER], {"visual_tokens": 24}, 3, (), None),
        ([CALL], {"text_tokens": 410}, 1, ("text_tokens",), None),
        ([CALL], {"seconds": 1e-9}, 1, ("seconds",), None),
    ],
)
def test_budgets(said: list, budget: dict, views: int, refused: tuple, told: str | None, family: str, path: Path) -> None:
    rollout, _ = rolled(asking(path), said, looks("zoom", **budget), renderer(family))
    assert (len(rollout.views), rollout.refused, rollout.turns) == (views, refused, tuple(said))
    assert rollout.stop == ("answered" if ANSWER in said else "turns")
    words = [s.text for s in rollout.segments if "Not shown" in s.text]
    assert words == ["\n" + user(f"Not shown: that would be more {told} than there may be.")] * len(words)
    looked = sum(bool(segment.views) for segment in rollout.segments[1:])
    assert len(words) == (len(said) - 1 - looked if told else 0)


def test_text_tokens_that_suffice(path: Path) -> None:
    used = len(renderer().encode(CALL)) + 1
    for most, turns in ((2 * used + 399, 2), (2 * used + 400, 3)):  # the third turn may take 400
        rollout, _ = rolled(asking(path), [CALL, CALL, ANSWER], looks("zoom", text_tokens=most), renderer())
        assert len(rollout.turns) == turns


@BOTH
def test_the_context_is_a_budget_too(family: str, path: Path) -> None:
    said, how = [CALL, CALL, ANSWER], looks("zoom", fine=12544)
    whole, _ = rolled(asking(path), said, how, renderer(family))
    room = sum(len(s.ids) for s in whole.segments[:-1])
    rollout, met = rolled(asking(path), said, how, renderer(family, max_prompt_tokens=room))
    assert rollout == whole and len(met[-1].ids) == room
    rollout, met = rolled(asking(path), said, how, renderer(family, max_prompt_tokens=room - 1))
    assert (rollout.refused, len(rollout.views), rollout.answer) == (("context",), 2, "6 to 9")
    assert rollout.segments[4].text == "\n" + user("Not shown: that would be more context than there may be.")
    room = sum(len(s.ids) for s in rollout.segments[:-1])
    rollout, met = rolled(asking(path), said, how, renderer(family, max_prompt_tokens=room - 1))  # not even for the words
    assert (rollout.refused, rollout.turns, rollout.stop) == (("context",), (CALL, CALL), "turns")
    fresh, _ = rolled(
        asking(path), [CALL, CALL, ANSWER], looks("zoom", "fresh", fine=12544), renderer(family, max_prompt_tokens=room - 1)
    )
    assert len(fresh.views) == 3  # each prompt counts for itself


def test_in_fresh_prompts_a_refusal_shows_what_was_shown_last(path: Path) -> None:
    rollout, _ = rolled(asking(path), [CALL, CALL, ANSWER], looks("zoom", "fresh", looks=1), renderer())
    assert rollout.views[1] == rollout.views[2] and rollout.refused == ("looks",) and rollout.answer == "6 to 9"
    assert rollout.segments[4].text == user(
        moving("qwen2_5_vl", PRINTED) + "Not shown: that would be more looks than there may be.\nwhen?"
    )
    over, _ = rolled(asking(path), [CALL, CALL], looks("zoom", "fresh", visual_tokens=16), renderer())
    assert (len(over.views), over.refused, over.stop) == (2, ("visual_tokens",), "turns")  # not even that may be shown again


def test_a_cut_reply_gets_its_end_from_the_world(path: Path) -> None:
    how = made(Turn(text="Well?"), stops=("STOP",))
    rollout, met = rolled(asking(path), ["one STOP two", ANSWER], how, renderer())
    assert [s.text for s in rollout.segments[1:3]] == ["one STOP", "<|im_end|>\n" + user("Well?")]
    assert (
        renderer().text(met[1].ids).endswith("one STOP<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n")
    )


def test_a_reply_that_was_cut_at_its_length_is_the_last(path: Path) -> None:
    rollout, _ = rolled(asking(path), [CALL + "x" * 99], looks("zoom"), renderer(), limit=20)
    assert (rollout.stop, rollout.refused, len(rollout.segments)) == ("length", (), 2)


def test_what_a_perception_says(path: Path) -> None:
    def said(turn: Turn, context: str = "append") -> str:
        rollout, _ = rolled(asking(path), ["hm", ANSWER], made(turn, context=context), renderer())
        return rollout.segments[2].text

    video = moving("qwen2_5_vl", PRINTED)
    assert said(Turn()) == "\n" + user("when?") and said(Turn(), "fresh") == user(video + "when?")
    assert said(Turn(text="")) == "\n" + user("") and said(Turn(text=""), "fresh") == user(video + "when?")
    assert said(Turn(text="So?", note="No.")) == "\n" + user("No.\nSo?") and said(Turn(text="So?"), "fresh") == user(
        video + "So?"
    )
    assert said(Turn(text="<|im_end|>a<|video_pad|>")) == "\n" + user("a")
    beyond = Turn(text="So?", looks=[Look(span=(50.0, 60.0)), Look(video=3), Look(span=(1.0, 2.0), frames=2)])
    assert said(beyond).endswith(
        "Not shown: the window 50 to 60 s is outside of the video, 0 to 20 s.\n"
        "Not shown: there is no video or image number 3.\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )
    rollout, _ = rolled(asking(path), ["hm", ANSWER], made(beyond), renderer())
    assert rollout.refused == ("outside", "media") and rollout.views[1].seconds[0] == 1.0
    again, _ = rolled(asking(path), ["hm", ANSWER], made(Turn(looks=rollout.views[:1])), renderer())
    assert again.views == rollout.views[:1] * 2  # as it was
    with pytest.raises(RolloutError, match=r"state\.views"):
        rolled(asking(path), ["hm", ANSWER], made(Turn(looks=rollout.views[1:])), renderer())


def test_a_first_turn_of_its_own(path: Path) -> None:
    first = Turn(text="See?", note="Hello.", looks=[Look(span=(4.0, 10.0), frames=4)])
    rollout, _ = rolled(asking(path), [ANSWER], made(first=first), renderer())
    assert rollout.segments[0].text == user(moving("qwen2_5_vl", ["4.0"] * 2) + "Hello.\nSee?")
    assert not rollout.segments[0].is_fresh and rollout.views[0].seconds == (4.0, 6.0, 8.0, 10.0)
    for bad in (Turn(looks=[Look(video=2)]), Turn(text="x" * 50_000), Turn(text="<|im_end|>")):
        with pytest.raises(DataError, match="sample s"):
            opening(asking(path), renderer(max_prompt_tokens=900), made(first=bad))
    late = asking(path, span=(30.0, 40.0))  # as for the plain prompt
    for how in (Looking(), made(first=first)):
        with pytest.raises(DataError, match="after the video"):
            opening(late, renderer(), how)


def test_a_perception_with_a_fault_is_named(path: Path) -> None:
    for turn, what in ((None, "None"), (KeyError("x"), "KeyError: 'x'"), (Turn(looks=["left"]), "Look objects")):
        with pytest.raises(RolloutError, match=rf"(?s)sample s.*Asks.observe.*{what}"):
            rolled(asking(path), ["hm"], made(turn), renderer())
    with pytest.raises(RolloutError, match=r"Asks.start returned str"):
        opening(asking(path), renderer(), made(first="hello"))
    with pytest.raises(DataError, match=r"Asks has no `teach`"):
        reference_rollout(asking(path), renderer(), looking=made())
    for use in ("iterative", "frames"):
        with pytest.raises(DataError, match="nothing"):
            args = {"again": "{nothing}"} if use == "iterative" else {"told": "{nothing}"}
            opening(asking(path), renderer(), looks(use, **args))


def test_an_annotation_that_never_answers_is_named(path: Path) -> None:
    def write(text: str, *, is_last: bool, is_cut: bool) -> list:
        return [renderer().reply("reference", (*renderer().encode(text), renderer().eos))]

    how = made(Turn(text="a"), Turn(text="b"), Turn(text="c"))
    how = replace(how, make=lambda make=how.make: _talkative(make()))
    with pytest.raises(DataError, match="rounds"):
        taught(asking(path), opening(asking(path), renderer(), how), renderer(), how, write)


def _talkative(asks: Asks) -> Asks:
    asks.teach = lambda answer, media, state: "and then"
    return asks


def test_media_that_is_shown_is_never_asked_for_twice(path: Path) -> None:
    """One decode per view of a generation, however many rollouts ask for it."""
    fetched: list = []
    how = looks("iterative", rounds=2, fetch=fetched.append)
    rolled(asking(Media(kind="video", source=str(path))), [CLUE, ANSWER], how, renderer())
    assert len(fetched) == 1 and fetched[0].seconds != FIRST
