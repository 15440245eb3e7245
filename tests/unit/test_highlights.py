"""Highlights: what is read from an answer, what it earns, and what it measures; numbers by hand."""

from __future__ import annotations

import random
import time

import pytest

from rft import Rollout, Sample, Segment, parsing
from rft.evaluation import highlights
from rft.evaluation.contract import HOSTILE, check_rewards
from rft.evaluation.metrics import measure
from rft.plugins import load_object
from rft.scoring import Reward

reward = load_object("rewards/highlights.py:highlights")

# Ten clips; the query is about the second to the fourth (seconds 2 to 8) and the seventh (12 to 14).
TRUTH = ((2.0, 2.0), (4.0, 4.0), (6.0, 1.0), (12.0, 3.0))
SAMPLE = Sample(
    id="s",
    answer={"highlights": [list(pair) for pair in TRUTH], "windows": [[2, 8], [12, 14]]},
    row={
        "duration": 20,
        "relevant_clip_ids": [1, 2, 3, 6],
        "saliency_scores": [[2, 2, 2], [4, 4, 4], [1, 1, 1], [4, 4, 1]],
    },
)


def sentence(pairs: object) -> str:
    seconds, scores = (", ".join(f"{x:g}" for x in column) for column in zip(*pairs))
    return f"The highlight timestamps are in the {seconds} seconds. Their saliency scores are {scores}"


def wrote(text: str) -> Rollout:
    return Rollout(sample_id="s", segments=(Segment(author="policy", text=text, ids=()),), stop="answered")


def earned(pairs: object, sample: Sample = SAMPLE, **args: float) -> float:
    return reward(wrote(f"<answer>{sentence(pairs)}</answer>"), sample, **args)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (sentence([(82, 1.3), (84, 1.7)]), [(82, 1.3), (84, 1.7)]),
        (
            "The highlight timestamps are in the 82, and 84 seconds. Their saliency scores are 1.3 and 1.7.",
            [(82, 1.3), (84, 1.7)],
        ),
        ("  the HIGHLIGHT timestamps\nare in the 82.0 second. Their saliency scores are 2. ", [(82, 2.0)]),
        (sentence([(83, 1), (83.5, 2)]), [(82, 1), (84, 2)]),  # 83 lies in the clip from 82 on; 83.5 is nearer to 84
        (sentence([(1, 1), (0.2, 2)]), [(0, 1), (0, 2)]),
        ("The highlight timestamps are in the 82, 84 seconds. Their saliency scores are 1.3", None),
        ("The highlight timestamps are in the seconds. Their saliency scores are ", None),
        ("The highlight timestamps are in the -2 seconds. Their saliency scores are 1", None),
        ("The highlight timestamps are in the 2 seconds. Their saliency scores are -1", None),
        ("The highlight timestamps are in the 2 seconds. Their saliency scores are nan", None),
        ("The highlight timestamps are in the 2 seconds. Their saliency scores are 1e9", None),
        (f"The highlight timestamps are in the 2 seconds. Their saliency scores are {'9' * 400}", None),
        (f"The highlight timestamps are in the {'9' * 400} seconds. Their saliency scores are 1", None),
        ("Well. " + sentence([(82, 1)]), None),
        ("82, 84", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_read(text: str | None, read: list | None) -> None:
    assert parsing.highlights(text) == read


def test_what_is_earned() -> None:
    assert earned(TRUTH) == 1.0
    # Two of four, scores 4 -> 3 and 12 not listed: P = 1, R = 1/2, F2 = 2.5 / 4.5. Weights 4 16 1 9 sum to 30; errors
    # 0 (2 listed right), 1 (4 as 3), 1 (6 missing), 9 (12 missing): WMSE = (16 + 1 + 81) / 30.
    assert earned([(2, 2), (4, 3)]) == pytest.approx(0.6 * 2.5 / 4.5 + 0.4 / (1 + 98 / 30))
    assert reward(wrote(sentence(TRUTH)), SAMPLE) == 0.0  # outside the tag
    assert reward(wrote("<answer>2 to 8</answer>"), SAMPLE) == 0.0
    assert reward(wrote(""), SAMPLE) == 0.0
    assert reward(wrote(f"<answer>{sentence(TRUTH)}</answer>"), Sample(id="s", answer={"span": (0.0, 1.0)})) is None


def test_where_nothing_is_salient() -> None:
    flat = Sample(id="s", answer={"highlights": [[2, 0.0], [4, 0.0]]})
    assert earned([(2, 0), (4, 0)], flat) == 1.0
    assert earned([(2, 0), (4, 0.1)], flat) == pytest.approx(0.6)


def test_what_a_policy_would_try_does_not_pay() -> None:
    # A timestamp said twice is right once: P = 4/8. What counts is the score that was said first.
    twice = 0.6 * (5 * 0.5 / (4 * 0.5 + 1))
    assert earned([*TRUTH, *TRUTH]) == pytest.approx(twice + 0.4)
    assert earned([*TRUTH, *((second, 0) for second, _ in TRUTH)]) == earned([*TRUTH, *TRUTH])
    assert earned([*((second, 0) for second, _ in TRUTH), *TRUTH]) < twice + 0.4
    assert earned([(2, 2)] * 50) < earned([(2, 2)])
    # Two seconds of one clip are that clip twice.
    assert earned([(2, 2), (3, 2)]) == earned([(2, 2), (2, 2)])
    everything = [(2 * clip, 2.5) for clip in range(10)]  # P = 0.4, R = 1, F2 = 2 / 2.6
    assert earned(everything) < 0.6 * 2 / 2.6 + 0.4
    assert earned(everything) > 0 == earned(everything, max_ratio=2)
    assert earned(everything, max_ratio=2.5) == earned(everything)
    vast = sentence([(second, 7) for second, _ in TRUTH]).replace("7", "9" * 200)  # an endless error, and no overflow
    assert reward(wrote(f"<answer>{vast}</answer>"), SAMPLE) == pytest.approx(0.6)
    assert earned([(10**6 + 2 * k, 4) for k in range(4)]) < 0.1  # long after the video


def test_any_text_earns_a_number_between_0_and_1_and_soon() -> None:
    rng = random.Random(0)
    pieces = [
        "The highlight timestamps are in the ",
        " seconds. ",
        "Their saliency scores are ",
        "2, ",
        "4",
        ".",
        " and ",
        "-",
        "9" * 400,
    ]
    drawn = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(2000)]
    long = [sentence([(2, 2)] * 20_000), sentence(TRUTH) * 2_000, "The highlight timestamps are in the " + "2, " * 50_000]
    for text in (*HOSTILE.values(), *drawn, *long):
        for said in (text, f"<answer>{text}</answer>"):
            start = time.perf_counter()
            value = reward(wrote(said), SAMPLE)
            metrics = measure([SAMPLE], [wrote(said)])
            assert time.perf_counter() - start < 1.0
            assert isinstance(value, float) and 0.0 <= value <= 1.0
            assert all(0.0 <= number <= 1.0 for number in metrics.values())


def test_the_reward_keeps_its_contract() -> None:
    reference = Rollout(
        sample_id="s", segments=(Segment(author="reference", text=f"<answer>{sentence(TRUTH)}</answer>", ids=(1,)),)
    )
    shipped = Reward(name="highlights", function=reward)
    assert check_rewards([shipped], [SAMPLE], [reference]) == []
    off_grid = Sample(id="s", answer={"highlights": [[2.5, 1.0]]})  # the annotation cannot be said: that is found
    wrong = Rollout(sample_id="s", segments=(Segment(author="reference", text=f"<answer>{sentence([(2.5, 1)])}</answer>"),))
    assert any(finding.level == "error" for finding in check_rewards([shipped], [off_grid], [wrong]))


def test_seconds_and_clips_map_to_each_other() -> None:
    """Second 2c is clip c, exactly; shifting every clip by one, as a published converter does, is not right."""
    truth = [(2.0 * clip, clip / 8) for clip in range(75)]
    read = parsing.highlights(sentence(truth))
    assert highlights.clip_saliency(read, 75) == [score for _, score in truth]
    labels = [(4, 4, 4) if clip == 41 else (0, 0, 0) for clip in range(75)]
    at = {second: highlights.clip_saliency([(second, 3.0)], 75) for second in (80.0, 82.0, 84.0)}
    assert [highlights.highlight_detection([(at[s], labels)])["hit@1"] for s in at] == [0.0, 1.0, 0.0]


def test_moments_of_highlights() -> None:
    assert highlights.windows_of([(12, 3.0), (2, 2.0), (4, 4.0), (6, 1.0)]) == [(12, 14, 3.0), (2, 8, pytest.approx(7 / 3))]
    assert highlights.windows_of([(2, 1.0), (2, 4.0)]) == [(2, 4, 1.0)]  # the first score of a repeated second


def test_what_is_measured() -> None:
    said = measure([SAMPLE], [wrote(f"<answer>{sentence(TRUTH)}</answer>")])
    # Ranking: clips 2, 6, 1, 3 and the rest. Very good: clips 2 and 6 for two annotators (AP 1), clip 2 for the third (AP 1).
    assert said == {
        "mr_map": 1.0, "mr_map@0.5": 1.0, "mr_map@0.75": 1.0, "mr_r1@0.5": 1.0, "mr_r1@0.7": 1.0,
        "hl_map": 1.0, "hit@1": 1.0, "format": 1.0,
    }  # fmt: skip
    # Clip 6 alone: the third annotator's clip 2 comes in with the nine others that are at 0, at precision 1/10; the first
    # two have clip 6 at precision 1 and clip 2 at 2/10.
    one = measure([SAMPLE], [wrote(f"<answer>{sentence([(12, 3)])}</answer>")])
    assert one["hl_map"] == pytest.approx(((1 + 0.2) / 2 * 2 + 0.1) / 3) and one["hit@1"] == 1.0
    assert one["mr_map"] == 0.5 and one["mr_r1@0.7"] == 1.0  # one of two windows
    # A list of windows answers the moments and not the highlights; what cannot be read answers nothing, a layout included.
    listed = measure([SAMPLE], [wrote("<answer>[(2, 8), (12, 14)]</answer>")])
    assert (listed["mr_map"], listed["hl_map"], listed["hit@1"], listed["format"]) == (1.0, 0.0, 0.0, 0.0)
    assert not any(measure([SAMPLE], [wrote("<answer>2 to 8</answer>")]).values())
    half = measure([SAMPLE, SAMPLE], [wrote(f"<answer>{sentence(TRUTH)}</answer>"), wrote("no idea")])
    assert half == dict.fromkeys(said, 0.5)


def test_rows_without_the_annotators_measure_moments_only() -> None:
    bare = Sample(id="s", answer=SAMPLE.answer, row={"duration": 20})
    assert "hl_map" not in measure([bare], [wrote("")]) and "mr_map" in measure([bare], [wrote("")])
