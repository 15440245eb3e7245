"""The shipped perceptions: what they show for what is said, as text, seconds and tokens worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.data.media import read
from rft.errors import RecipeError
from rft.families import FAMILIES
from rft.rollout.reference import reference_rollout
from rft.types import Media
from tests.looks import ANSWER, FIRST, PRINTED, asking, film, looks, moving, photo, renderer, rolled, user
from tests.videos import mark

BOTH = pytest.mark.parametrize("family", list(FAMILIES))
CLUED = "<answer>3 to 4</answer><clue>4 to 10</clue>"
CLOSE = (3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5)  # 4 to 10 reaches out by a tenth of 6 s, to 3.4 and 10.6
CLOSE_PRINTED = ("4.0", "6.0", "8.0", "10.0")
DENSE = (0.0, 3.25, 4.75, 6.25, 7.5, 9.0, 10.5, 19.75)  # of 8 frames 6 to the 30 on screen then, from the one at 3.25 on


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return photo(tmp_path_factory.mktemp("pictures") / "a.png")


def texts(rollout) -> list[str]:
    return [segment.text for segment in rollout.segments]


@BOTH
def test_iterative_in_one_conversation(family: str, path: Path) -> None:
    how = looks("iterative", rule="window", rounds=2)
    rollout, met = rolled(asking(path), [CLUED, ANSWER], how, renderer(family))
    again = "\n" + user(moving(family, CLOSE_PRINTED) + "when?")
    assert texts(rollout) == [user(moving(family, PRINTED) + "when?"), CLUED, again, ANSWER]
    assert [s.author for s in rollout.segments] == ["world", "policy", "world", "policy"]
    assert not any(s.is_fresh for s in rollout.segments) and rollout.contexts == (rollout.segments,)
    assert [(v.seconds, v.tokens) for v in rollout.views] == [(FIRST, 8), (CLOSE, 8)]
    assert [mark(frame) for frame in read(rollout.views[1])] == [int(4 * s) for s in CLOSE]  # what is told is what is shown
    assert (rollout.turns, rollout.answer, rollout.stop, rollout.refused) == ((CLUED, ANSWER), "6 to 9", "answered", ())
    assert [c.segments for c in met] == [rollout.segments[:1], rollout.segments[:3]]


@BOTH
def test_iterative_with_fresh_prompts(family: str, path: Path) -> None:
    how = looks("iterative", "fresh", "answer", rule="window", rounds=3, again="{question} Again.", last="{question} Now.")
    rollout, met = rolled(asking(path), [CLUED, CLUED, ANSWER], how, renderer(family))
    told = [f"Your last answer: 3 to 4\nwhen? {word}." for word in ("Again", "Now")]
    close = moving(family, CLOSE_PRINTED)
    world = [user(moving(family, PRINTED) + "when?"), *(user(close + text) for text in told)]
    assert [s.text for s in rollout.segments[::2]] == world
    assert [s.is_fresh for s in rollout.segments] == [False, False, True, False, True, False]
    assert rollout.contexts == tuple(rollout.segments[i : i + 2] for i in (0, 2, 4))
    assert [c.segments for c in met] == [rollout.segments[i : i + 1] for i in (0, 2, 4)]  # nothing of what came before
    assert rollout.turns == (CLUED, CLUED, ANSWER)


@BOTH
def test_iterative_shows_the_film_more_densely_where_it_matters(family: str, path: Path) -> None:
    rollout, _ = rolled(asking(path), [CLUED, ANSWER], looks("iterative", rounds=2), renderer(family))
    assert [v.seconds for v in rollout.views] == [FIRST, DENSE]
    released = looks("iterative", rounds=2, rule="videochat_r1_5", share=0.0)
    rollout, _ = rolled(asking(path), [CLUED, ANSWER], released, renderer(family))
    # frames 16 to 40 are the clue; round(8 x 25 x 1.5 / (25 x 1.5 + 54)) = 3 of them, 5 of the 54 others of 79
    assert rollout.views[1].frames == (0, 13, 16, 28, 40, 51, 64, 78)


def test_iterative_in_a_part_of_a_file(path: Path) -> None:
    part = Media(kind="video", source=str(path), budget={"video_start": 5.0, "video_end": 15.0})
    said = ["<clue>6 to 9</clue>", ANSWER]
    for rule in ("window", "two_streams", "videochat_r1_5"):
        rollout, _ = rolled(asking(part), said, looks("iterative", rounds=2, rule=rule), renderer())
        assert rollout.refused == () and all(5.0 <= s <= 15.0 for v in rollout.views for s in v.seconds), rule
        assert sum(5.7 <= s <= 9.3 for s in rollout.views[1].seconds) > 2, rule


def test_iterative_shares_its_tokens_and_sizes(path: Path) -> None:
    two = ["<clue>[(1, 3), (12, 14)]</clue>", ANSWER]
    rollout, _ = rolled(asking(path), two, looks("iterative", rule="window", rounds=2, visual_tokens=16), renderer())
    assert [(v.tokens, len(v.frames)) for v in rollout.views] == [(8, 8), (4, 4), (4, 4)]
    rollout, _ = rolled(asking(path), two, looks("iterative", rule="window", rounds=2, visual_tokens=12), renderer())
    assert [len(v.frames) for v in rollout.views] == [6, 4, 4] and rollout.refused == ()  # 6 tokens, and 3 for each window
    assert rollout.views[0].tokens <= 6 and all(v.tokens <= 3 for v in rollout.views[1:])
    how = looks("iterative", rule="window", rounds=2, coarse=784, fine=3136, frames=4)
    rollout, _ = rolled(asking(path), [CLUED, ANSWER], how, renderer())
    assert [(v.size, len(v.frames)) for v in rollout.views] == [((28, 28), 8), ((28, 56), 4)]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("replace", (12.0, 14.0)), ("union", (4.0, 14.0)), ("intersect", (12.0, 13.0))],
)
def test_iterative_memory(memory: str, expected: tuple[float, float], path: Path) -> None:
    how = looks("iterative", rule="window", share=0.0, memory=memory)
    rollout, _ = rolled(asking(path), ["<clue>4 to 13</clue>", "<clue>12 to 14</clue>", ANSWER], how, renderer())
    assert (rollout.views[2].seconds[0], rollout.views[2].seconds[-1]) == expected


@pytest.mark.parametrize(
    ("said", "turns", "args"),
    [
        ([CLUED, "<answer>3 to 4</answer><clue>9 to 11</clue>"], 2, {"agree": True}),
        ([CLUED, "<answer>3 to 5</answer><clue>9 to 11</clue>", ANSWER], 3, {"agree": True}),
        ([CLUED, "<answer>7 to 8</answer><clue></clue>"], 2, {}),
        ([CLUED, "<answer>7 to 8</answer><clue>none</clue>"], 2, {}),
        (["<answer>7 to 8</answer>"], 1, {}),
        (["<clue>gibberish</clue>"], 1, {}),
        (["<clue>50 to 60</clue>"], 1, {}),
        ([CLUED, "<clue>4 to 10.1</clue>"], 2, {"min_gain": 0.05}),
        ([CLUED, "<answer>7 to 8</answer>"], 2, {"min_gain": 0.05}),
        ([CLUED, "<clue>4 to 11</clue>", ANSWER], 3, {"min_gain": 0.05}),
        ([CLUED, "<clue>4 to 10</clue>", ANSWER], 3, {}),
    ],
)
def test_iterative_ends_early(said: list[str], turns: int, args: dict, path: Path) -> None:
    rollout, _ = rolled(asking(path), said, looks("iterative", **args), renderer())
    assert (rollout.turns, rollout.stop) == (tuple(said), "answered") and len(rollout.turns) == turns


@pytest.mark.parametrize("bad", ["<clue>gibberish</clue>", "<clue>50 to 60</clue>", "<clue>4 to", "no clue"])
def test_iterative_keeps_the_clue_that_could_be_used(bad: str, path: Path) -> None:
    rollout, _ = rolled(asking(path), [CLUED, bad, ANSWER], looks("iterative"), renderer())
    assert [v.seconds for v in rollout.views] == [FIRST, DENSE, DENSE] and len(rollout.refused) == 1


@pytest.mark.parametrize(
    ("history", "told"),
    [("none", ""), ("answer", "Your last answer: 3 to 4\n"), ("clue", "Your last clue: 4 to 10\n")],
)
def test_history_is_what_a_fresh_prompt_says_of_the_last_reply(history: str, told: str, path: Path) -> None:
    rollout, _ = rolled(asking(path), [CLUED, ANSWER], looks("iterative", "fresh", history, rounds=2), renderer())
    assert rollout.segments[2].text.endswith(f"<|vision_end|>{told}when?<|im_end|>\n<|im_start|>assistant\n")
    if history != "none":
        with pytest.raises(RecipeError, match="history"):  # it stands there anyway
            looks("iterative", "append", history, rounds=2)


def test_what_is_quoted_is_harmless_and_short(path: Path) -> None:
    said = f"<answer><|video_pad|><|im_<|im_end|>end|>{'a' * 1000}</answer><clue>4 to 10</clue>"
    for context in ("append", "fresh"):
        how = looks("iterative", context, "answer" if context == "fresh" else "none", rounds=2)
        rollout, _ = rolled(asking(path), [said, ANSWER], how, renderer(), limit=2000)
        assert rollout.segments[2].text.count("<|video_pad|>") == rollout.views[1].tokens
        assert rollout.segments[2].text.count("<|im_end|>") == 1 and rollout.segments[2].text.count("a" * 300) < 2


def test_a_fresh_prompt_shows_the_other_media_too(path: Path, picture: Media, tmp_path: Path) -> None:
    short = film(tmp_path / "b.mp4", 20)
    sample = asking(picture, path, short)
    for context, media in (("append", [1]), ("fresh", [0, 1, 2])):
        rollout, _ = rolled(sample, [CLUED, ANSWER], looks("iterative", context, rounds=2), renderer())
        assert [v.media for v in rollout.views] == [0, 1, 2, *media], context


@BOTH
def test_zoom_in_one_conversation(family: str, path: Path) -> None:
    corner = {"qwen2_5_vl": "[0, 0, 28, 14]", "qwen3_vl": "[0, 0, 500, 500]"}[family]
    call = f"<zoom>{corner}</zoom>"
    again = {"qwen2_5_vl": "[28, 14, 56, 28]", "qwen3_vl": "[500, 500, 1000, 1000]"}[family]
    deeper = f'<tool_call>{{"name": "zoom", "arguments": {{"bbox_2d": {again}}}}}</tool_call>'
    rollout, met = rolled(asking(path), [call, deeper, ANSWER], looks("zoom", told="Look."), renderer(family))
    assert [v.crop for v in rollout.views] == [None, (0, 0, 48, 24), (24, 12, 48, 24)]  # of 96 x 48; then of the crop
    assert [v.seconds for v in rollout.views] == [FIRST] * 3 and [v.tokens for v in rollout.views] == [8, 8, 4]
    shown = ["\n" + user(moving(family, PRINTED, each) + "Look.") for each in (2, 1)]
    assert texts(rollout)[2:5:2] == shown
    assert [len(c.segments) for c in met] == [1, 3, 5] and (rollout.answer, rollout.refused) == ("6 to 9", ())


def test_zoom_in_a_fresh_prompt_asks_again(path: Path) -> None:
    rollout, _ = rolled(asking(path), ["<zoom>[0, 0, 28, 14]</zoom>", "<zoom>", ANSWER], looks("zoom", "fresh"), renderer())
    assert texts(rollout)[2] == user(moving("qwen2_5_vl", PRINTED) + "when?")
    rollout, _ = rolled(asking(path), ["<zoom>left</zoom>", ANSWER], looks("zoom", "fresh", failed="No."), renderer())
    assert texts(rollout)[2] == user(moving("qwen2_5_vl", PRINTED) + "No.\nwhen?") and rollout.views[0] == rollout.views[1]
    grown, _ = rolled(asking(path), ["<zoom>left</zoom>", ANSWER], looks("zoom", failed="No."), renderer())
    assert texts(grown)[2] == "\n" + user("No.") and len(grown.views) == 1
    assert grown.refused == rollout.refused == ("unparsable",)


def test_zoom_with_a_window(path: Path) -> None:
    call = '{"name": "zoom", "arguments": {"bbox_2d": [0, 0, 28, 14], "start": 4, "end": 10}}'
    rollout, _ = rolled(asking(path), [call, ANSWER], looks("zoom", frames=8, share=0.1, fine=6272), renderer())
    assert (rollout.views[1].seconds, rollout.views[1].crop, rollout.views[1].tokens) == (CLOSE, (0, 0, 48, 24), 32)


@BOTH
def test_zoom_names_one_of_several_pictures(family: str, picture: Media, path: Path) -> None:
    box = {"qwen2_5_vl": "[0, 0, 28, 14]", "qwen3_vl": "[0, 0, 500, 500]"}[family]

    def call(more: str) -> str:
        return f'{{"name": "zoom", "arguments": {{"bbox_2d": {box}{more}}}}}'

    for more, expected in (("", 0), (', "image": 0', 0), (', "image": 1', 1)):
        rollout, _ = rolled(asking(picture, path), [call(more), ANSWER], looks("zoom"), renderer(family))
        assert [v.media for v in rollout.views] == [0, 1, expected], more
    rollout, _ = rolled(asking(picture, path), [call(', "image": 7'), ANSWER], looks("zoom"), renderer(family))
    assert (len(rollout.views), rollout.refused) == (2, ("media",))


@BOTH
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_frames_of_the_strip(family: str, context: str, path: Path) -> None:
    how = looks("frames", context, strip=8, coarse=784, fine=3136, told="{question} Now.")
    rollout, _ = rolled(asking(path), ["<frames>[2, 5]</frames>", ANSWER], how, renderer(family))
    strip, picked = rollout.views
    assert strip.seconds == FIRST and strip.size == (FAMILIES[family].unit,) * 2
    assert picked.seconds == (5.75, 5.75, 14.0, 14.0)  # each alone in its pair
    assert picked.tokens > strip.tokens / 4 and [mark(f) for f in read(picked)] == [23, 23, 56, 56]
    shown = user(moving(family, ("5.8", "14.0"), picked.tokens // 2) + "when? Now.")
    assert texts(rollout)[2] == ("" if context == "fresh" else "\n") + shown
    assert rollout.segments[2].is_fresh == (context == "fresh") and rollout.answer == "6 to 9"


def test_frames_that_are_not_there_may_be_named_again(path: Path) -> None:
    said = ["<frames>[99]</frames>", "<frames>[1]</frames>", ANSWER]
    for context in ("append", "fresh"):
        rollout, _ = rolled(asking(path), said, looks("frames", context), renderer())
        assert rollout.turns == tuple(said) and rollout.refused == ("out of range",)
        assert "Name frames of the strip by their number, from 0 to 7, in <frames>" in texts(rollout)[2]
        assert ("when?" in texts(rollout)[2]) == (context == "fresh")
        assert rollout.views[-1].seconds == (2.75, 2.75)


def test_frames_of_the_longest_of_several_videos(path: Path, picture: Media, tmp_path: Path) -> None:
    short = film(tmp_path / "b.mp4", 20)
    for media in ([path, short], [short, path], [picture, path], [path, picture]):
        sample = asking(*media)
        rollout, _ = rolled(sample, ["<frames>[1]</frames>", ANSWER], looks("frames"), renderer())
        assert rollout.views[-1].media == media.index(path) and rollout.views[-1].seconds == (2.75, 2.75)


@BOTH
@pytest.mark.parametrize("back_end", ["features", "crop"])
def test_replay_goes_on_in_the_same_message(family: str, back_end: str, picture: Media) -> None:
    how = looks("replay", back_end=back_end)
    sample = asking(picture, choice="C")
    said = ["It is <sot>[0, 0, 0.5, 0.5]<eot> and never said", " there. <answer>C</answer>"]
    rollout, met = rolled(sample, said, how, renderer(family, answer="<answer>{choice}</answer>"))
    whole, region = rollout.views
    assert (whole.pool, rollout.segments[1].text) == (2, "It is <sot>[0, 0, 0.5, 0.5]<eot>")
    assert rollout.segments[2].text == f"<|vision_start|>{'<|image_pad|>' * region.tokens}<|vision_end|>"
    assert (region.crop, region.region is None) == ((None, False) if back_end == "features" else ((0, 0, 112, 56), True))
    assert (rollout.answer, len(rollout.turns), rollout.refused) == ("C", 2, ())
    assert rollout.segments[1].ids[-1] != TOKEN_END != rollout.segments[2].ids[-1] and rollout.segments[3].ids[-1] == TOKEN_END
    assert [len(c.segments) for c in met] == [1, 3]


TOKEN_END = renderer().eos


@pytest.mark.parametrize("box", ["left", "[0.5, 0.5, 0.5, 0.5]", "[2e9, 0, 1, 1]", "[nan, 0, 1, 1]", ""])
def test_replay_of_a_box_that_is_none_adds_nothing(box: str, picture: Media) -> None:
    said = [f"<sot>{box}<eot>", "so <answer>C</answer>"]
    rollout, met = rolled(asking(picture), said, looks("replay"), renderer())
    assert [s.author for s in rollout.segments] == ["world", "policy", "policy"] and len(rollout.refused) == 1
    assert (rollout.turns, rollout.answer, len(met)) == ((said[0] + said[1],), "C", 2)  # one turn, in two breaths


def test_replay_of_a_speck_shows_where_it_is(picture: Media) -> None:
    rollout, _ = rolled(asking(picture), ["<sot>[0.0000001, 0, 0.0000002, 1]<eot>", ANSWER], looks("replay"), renderer())
    assert rollout.views[1].region[2:] == (1, 1) and rollout.refused == ()


def test_a_last_reply_is_not_cut_and_an_answer_is_the_end(picture: Media) -> None:
    box = "<sot>[0, 0, 0.5, 0.5]<eot>"
    rollout, _ = rolled(asking(picture), [box, f"{box} <answer>C</answer>"], looks("replay", rounds=2), renderer())
    assert (rollout.turns[1], rollout.answer, rollout.stop) == (f"{box} <answer>C</answer>", "C", "answered")
    rollout, _ = rolled(asking(picture), [f"<answer>C</answer>{box} more"], looks("replay"), renderer())
    assert (rollout.turns, rollout.answer, rollout.stop) == ((f"<answer>C</answer>{box}",), "C", "answered")
    rollout, _ = rolled(asking(picture), ["[0, 0, 1, 1]<eot>", ANSWER], looks("replay"), renderer())
    assert rollout.refused == ("unparsable",)  # nothing began


@BOTH
@pytest.mark.parametrize("use", ["iterative", "zoom", "frames", "replay"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_samples_without_a_video(use: str, kind: str, family: str, picture: Media) -> None:
    sample = asking(*([picture] if kind == "image" else []), choice="C", clue=[(1.0, 2.0)], clue_box=(20, 20, 90, 90))
    call = "<clue>1 to 2</clue><zoom>[1, 1, 20, 20]</zoom><frames>[1]</frames><sot>[0.1, 0.1, 0.5, 0.5]<eot>"
    sees = kind == "image" and use in ("zoom", "replay")
    render = renderer(family, answer="<answer>{choice}</answer>")
    for context in ("append", "fresh"):
        rollout, _ = rolled(sample, [call, "<answer>C</answer>"], looks(use, context), render)
        assert len(rollout.views) == len(sample.media) + sees
        taught = reference_rollout(sample, render, looking=looks(use, context))
        assert (taught.answer, len(taught.turns), len(taught.views)) == ("C", 1 + sees, len(sample.media) + sees)
