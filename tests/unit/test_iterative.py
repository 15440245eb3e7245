"""What `iterative` may look at, and in how many tokens: the reach of a row, prompts that had to shrink, fine frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.data.budget import Budget
from rft.families import FAMILIES
from rft.types import Media
from tests.looks import ANSWER, asking, film, looks, renderer, rolled
from tests.videos import spaced, write_video

CLUED = "<answer>3 to 4</answer><clue>4 to 10</clue>"
RULES = pytest.mark.parametrize("rule", ["two_streams", "videochat_r1_5"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "large.mp4", spaced(4, 80), size=(112, 112))


@RULES
def test_what_was_sampled_is_no_end_of_the_film(rule: str, path: Path) -> None:
    render = replace(renderer(), budget=Budget(fps=0.25, min_frames=2, min_pixels=784, max_pixels=3136))
    how = looks("iterative", "fresh", rule=rule, frames=8, rounds=2, share=0.0)
    rollout, _ = rolled(asking(path, span=(13.0, 16.0)), ["<clue>13 to 18</clue>", ANSWER], how, render)
    first, then = (view.seconds for view in rollout.views)
    assert first == (0.0, 4.0, 8.0, 12.0)
    assert sum(13 <= second <= 18 for second in then) >= 3 and rollout.refused == ()  # all of it behind what was sampled


@RULES
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_the_reach_is_the_row_s_own_window(context: str, rule: str, path: Path) -> None:
    part = Media(kind="video", source=str(path), budget={"video_start": 5.0, "video_end": 10.0})
    how = looks("iterative", context, rule=rule, rounds=3, frames=4)
    said = ["<clue>6 to 9</clue>", "<clue>12 to 14</clue>", ANSWER]
    rollout, _ = rolled(asking(part), said, how, renderer())
    assert rollout.refused == ("outside",) and rollout.answer == "6 to 9"
    assert all(5.0 <= second <= 10.0 for view in rollout.views for second in view.seconds)
    assert "Not shown: the clue is outside of the video, 5 to 10 s." in rollout.segments[4].text
    kept, _ = rolled(
        asking(part), [*said[:2], "no clue", ANSWER], looks("iterative", rule=rule, rounds=4, frames=4), renderer()
    )
    assert kept.views[-1] == kept.views[1] and kept.refused == ("outside", "absent")  # the clue that could be used stays


@RULES
def test_a_part_that_holds_less_than_a_patch_is_refused_at_worst(rule: str, path: Path) -> None:
    for start, end in ((5.05, 5.2), (5.0, 5.1), (19.8, 19.9)):
        part = Media(kind="video", source=str(path), budget={"video_start": start, "video_end": end})
        sample = asking(part, span=(start, end))
        rollout, _ = rolled(
            sample, [f"<clue>{start} to {end}</clue>", ANSWER], looks("iterative", rule=rule, rounds=2), renderer()
        )
        assert rollout.answer == "6 to 9" and set(rollout.refused) <= {"outside"}


@pytest.mark.parametrize("rule", ["two_streams", "window"])
def test_after_a_prompt_that_had_to_shrink_looks_fit_too(rule: str, path: Path, large: Path) -> None:
    budget = Budget(nframes=16, min_pixels=784, max_pixels=12544)
    for media in ((large,), (large, path), (path, large, path)):
        how = looks("iterative", "fresh", rounds=2, rule=rule)
        small = replace(renderer(max_prompt_tokens=64), budget=budget)
        rollout, _ = rolled(asking(*media), [CLUED, ANSWER], how, small)
        first, then = rollout.views[: len(media)], rollout.views[len(media) :]
        assert rollout.refused == () and len(then) == len(media)
        assert all(b.tokens <= a.tokens for a, b in zip(first, then, strict=True))
        roomy = replace(renderer(), budget=budget)
        rollout, _ = rolled(
            asking(*media), [CLUED, ANSWER], looks("iterative", "fresh", rounds=2, rule=rule, fine=25088), roomy
        )
        film = max(range(len(media)), key=lambda i: rollout.views[i].duration)
        assert rollout.views[len(media) + film].tokens > rollout.views[film].tokens  # nothing had to shrink


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("rule", ["two_streams", "window"])
def test_fine_frames_are_fewer_where_tokens_are(rule: str, family: str, path: Path) -> None:
    for fine, tokens, fewest in ((12544, 40, 2), (6272, 40, 4), (784, 40, 8), (50176, 40, 2)):
        how = looks("iterative", "fresh", rule=rule, rounds=2, fine=fine, visual_tokens=2 * tokens)
        rollout, _ = rolled(asking(path), [CLUED, ANSWER], how, renderer(family))
        assert rollout.refused == () and len(rollout.views) == 2, (fine, rollout.refused)
        then = rollout.views[1]
        assert then.tokens <= tokens and len(then.frames) >= fewest and len(then.frames) % 2 == 0
        if fine < 50176:  # of which not one patch fits
            assert then.size[0] * then.size[1] >= 0.9 * fine
