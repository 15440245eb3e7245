"""Whatever a model writes and whatever becomes of a file: refusals, and never more than may be shown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rft.data.media import read
from rft.errors import DataError
from rft.evaluation.contract import HOSTILE
from rft.rollout.loop import opening
from tests.looks import ANSWER, asking, film, looks, renderer, rolled

CALL = "<zoom>[0, 0, 1000, 1000]</zoom>"  # cut to the whole picture: 8 tokens in 4 pairs, as the first view
CLUE = "<clue>4 to 10</clue>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


def test_nothing_is_ever_shown_beyond_a_budget(path: Path) -> None:
    rng = random.Random(0)
    hostile = [text for text in HOSTILE.values() if "\ud800" not in text]  # which no tokenizer writes
    calls = [
        CALL,
        CLUE,
        "<zoom>[5, 5, 9, 9]</zoom>",
        "<frames>[1, 2, 5]</frames>",
        "<zoom>[",
        "[0.1, 0.2, 0.5, 0.5]<eot>",
        "<sot>",
    ]
    pieces = [*calls * 4, *hostile]
    sample, first = asking(path), 8
    for trial in range(120):
        use, context = rng.choice(["iterative", "zoom", "frames", "replay"]), rng.choice(["append", "fresh"])
        budget = {"rounds": rng.randint(1, 4), "looks": rng.randint(0, 3), "text_tokens": rng.choice([0, 3000])}
        budget |= {"visual_tokens": rng.choice([0, 8, 20, 40]), "most_frames": rng.choice([0, 8, 20, 40])}
        render = renderer(max_prompt_tokens=rng.choice([150, 500, 8192]))
        history = rng.choice(["none", "answer", "clue"])
        how = looks(use, context, history if context == "fresh" else "none", **budget)
        said = [rng.choice(["", ANSWER[:-1]]) + "".join(rng.choices(pieces, k=rng.randint(0, 3))) for _ in range(4)]
        rollout, met = rolled(sample, said, how, render)
        tokens, frames = sum(v.tokens for v in rollout.views), sum(len(v.frames) for v in rollout.views)
        assert len(met) <= budget["rounds"], trial
        assert not budget["visual_tokens"] or tokens <= max(budget["visual_tokens"], first), trial
        assert not budget["most_frames"] or frames <= max(budget["most_frames"], first), trial
        assert all(len(c.ids) <= render.max_prompt_tokens for c in met[1:] if c.segments[-1].author == "world"), trial
        looked = [s for s in rollout.segments[1:] if s.views]
        assert context == "fresh" or not budget["looks"] or sum(len(s.views) for s in looked) <= budget["looks"], trial
        assert context == "append" or use == "replay" or all(round[0].views for round in rollout.contexts), (
            trial
        )  # none is blind
        assert rollout.stop in ("answered", "length", "turns")
        assert (rollout.stop != "turns") or rollout.refused, trial


@pytest.mark.parametrize(
    "said",
    [
        "<zoom></zoom>", "<zoom>[]</zoom>", "<zoom>[9, 9, 2, 2]</zoom>", "<zoom>[500, 500, 600, 600]</zoom>",
        "<zoom>[5, 5, 5, 9]</zoom>", "<zoom>[nan, 0, inf, 9]</zoom>", "<zoom>[1e99, 0, 2e99, 9]</zoom>",
        f"<zoom>[0, 0, {'9' * 500}, 9]</zoom>", '{"name": "search", "arguments": {}}', "<tool_call>{</tool_call>",
        '<tool_call>{"name": "zoom"}</tool_call>', CALL * 40,
    ],
)  # fmt: skip
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_calls_that_cannot_be_answered_are_refused(said: str, context: str, path: Path) -> None:
    rollout, _ = rolled(asking(path), [said, ANSWER], looks("zoom", context), renderer(), limit=3000)
    assert rollout.answer == "6 to 9" and rollout.stop == "answered" and all(s.views for s in rollout.segments[:1])
    assert bool(rollout.refused) != (said == "<zoom>[9, 9, 2, 2]</zoom>")  # which is swapped


@pytest.mark.parametrize("rule", ["window", "two_streams", "videochat_r1_5"])
@pytest.mark.parametrize(
    "clue",
    [
        "10 to 4",
        "[(4, 6), (5, 9), (8, 12)]",
        "19.99 to 40",
        "5 to 5",
        "-3 to 0.0001",
        "0 to 20",
        "nan to inf",
        "[(1, 2), (30, 40)]",
    ],
)
def test_clues_of_any_kind(clue: str, rule: str, path: Path) -> None:
    for context in ("append", "fresh"):
        how = looks("iterative", context, rule=rule, looks=8, rounds=2)
        rollout, _ = rolled(asking(path), [f"<clue>{clue}</clue>", ANSWER], how, renderer())
        assert rollout.stop == "answered" and len(rollout.turns) == (1 if clue == "nan to inf" else 2)
        assert all(0 <= s <= 19.75 for v in rollout.views for s in v.seconds)


def test_ten_thousand_windows_are_as_many_as_may_be_looked_at(path: Path) -> None:
    clue = "<clue>[" + ", ".join(f"({k}, {k + 1})" for k in range(0, 20_000, 2)) + "]</clue>"
    for looked, most in ((8, 8), (0, 7)):
        how = looks("iterative", rule="window", share=0.0, looks=most, rounds=2)
        rollout, _ = rolled(asking(path), [clue, ANSWER], how, renderer(max_prompt_tokens=10**6), limit=10**6)
        assert len(rollout.views) == 1 + looked and rollout.refused == ("looks",) * (8 - looked)


def test_windows_that_overlap_are_one(path: Path) -> None:
    how = looks("iterative", rule="window", share=0.0, rounds=2)
    rollout, _ = rolled(asking(path), ["<clue>[(4, 6), (5, 9), (8, 12)]</clue>", ANSWER], how, renderer())
    assert [(v.seconds[0], v.seconds[-1]) for v in rollout.views[1:]] == [(4.0, 12.0)]


@pytest.mark.parametrize("use", ["iterative", "zoom", "frames"])
@pytest.mark.parametrize("context", ["append", "fresh"])
@pytest.mark.parametrize("harm", ["deleted", "truncated", "emptied"])
def test_a_film_that_breaks_between_rounds_is_a_refusal(harm: str, context: str, use: str, tmp_path: Path) -> None:
    broken = film(tmp_path / "b.mp4")

    def breaks(turn: int) -> None:
        if harm == "deleted":
            broken.unlink(missing_ok=True)
        else:
            whole = broken.read_bytes()
            broken.write_bytes(whole[: len(whole) // 2] if harm == "truncated" else b"")

    kept = {v: read(v) for v in opening(asking(broken), renderer(), looks(use)).views}

    def fetch(view):  # a store that still has the first view, or does not
        return kept[view] if has_first and view in kept else read(view)

    said = [CALL + CLUE + "<frames>[1]</frames>", ANSWER]
    for has_first in (True, False):
        film(broken)
        how = (
            looks(use, context, fetch=fetch, rule="window", rounds=2)
            if use == "iterative"
            else looks(use, context, fetch=fetch)
        )
        rollout, _ = rolled(asking(broken), said, how, renderer(), between=breaks)
        assert set(rollout.refused) == {"unreadable"} and all(s.views for round in rollout.contexts for s in round[:1])
        if context == "append":
            assert "Not shown: it cannot be read." in rollout.segments[2].text and rollout.answer == "6 to 9"
        else:
            assert (rollout.answer, rollout.stop) == (("6 to 9", "answered") if has_first else (None, "turns"))


def test_a_resampled_film_that_goes_away_is_a_refusal(tmp_path: Path) -> None:
    gone = film(tmp_path / "b.mp4")
    how = looks("iterative", rounds=2)
    rollout, _ = rolled(asking(gone), [CLUE, ANSWER], how, renderer(), between=lambda turn: gone.unlink(missing_ok=True))
    assert rollout.refused == ("unreadable",) and rollout.answer == "6 to 9"


@pytest.mark.parametrize("context", ["append", "fresh"])
def test_a_view_that_opens_and_does_not_decode_is_refused_for_all_who_asked(context: str, path: Path) -> None:
    asked: list = []

    def fetch(view):
        asked.append(view)
        if len(view.frames) != 8:
            raise DataError("a.mp4", "2 of 4 wanted frames do not decode", "")

    how = looks("iterative", context, rule="window", fetch=fetch, frames=4, rounds=2)
    rollout, _ = rolled(asking(path), [CLUE, ANSWER], how, renderer())
    assert (rollout.refused, rollout.answer, {len(v.frames) for v in rollout.views}) == (("unreadable",), "6 to 9", {8})
    assert "Not shown: it cannot be read.\nwhen?" in rollout.segments[2].text
    assert [len(v.frames) for v in asked] == [4] + [8] * (context == "fresh")
