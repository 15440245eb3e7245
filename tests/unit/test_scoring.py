"""Rewards: values, weights, what does not apply, what fails, and what TRL's own rewards see."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from rft.errors import RecipeError, RewardError
from rft.scoring import Reward, judge, score
from rft.types import Rollout, Sample, Score, Segment


def sample(name: str = "s1", **row: Any) -> Sample:
    messages = ({"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]},)
    return Sample(id=name, messages=messages, media=(), answer={}, task="grounding", row=row, origin="train.jsonl:7")


def rollout(text: str, name: str = "s1", ids: tuple[int, ...] = (1, 2, 3)) -> Rollout:
    prompt = Segment(author="world", text="When?", ids=(9, 9))
    return Rollout(sample_id=name, segments=(prompt, Segment(author="policy", text=text, ids=ids)), stop="answered")


def reward(function: Callable[..., Any], name: str = "r", **settings: Any) -> Reward:
    return Reward(name=name, function=function, **settings)


def score_texts(texts: list[str], *rewards: Reward, **row: Any):
    (group,), report = score([(sample(**row), [rollout(t) for t in texts])], rewards)
    return group, report


def length(rollout: Rollout, sample: Sample) -> float:
    return len(rollout.text) / 10


# values and weights


def test_the_reward_is_the_weighted_sum_and_parts_hold_the_unweighted_values() -> None:
    # lengths 4 and 2: 2 * 0.4 - 0.5 * 1 = 0.3 and 2 * 0.2 - 0.5 * 0 = 0.4
    group, report = score_texts(
        ["long", "ab"], reward(length, "length", weight=2.0), reward(lambda r, s: "g" in r.text, "has_g", weight=-0.5)
    )
    assert [m.reward for m in group.members] == pytest.approx([0.3, 0.4])
    assert group.members[0].parts == {"length": 0.4, "has_g": 1.0}
    assert [m.rollout.text for m in group.members] == ["long", "ab"]
    assert group.muted == ""
    assert report.applied == {"length": 2, "has_g": 2}
    assert report.errors == ()


def test_args_come_from_the_recipe() -> None:
    def scaled(rollout: Rollout, sample: Sample, *, by: float) -> float:
        return by * sample.row["gain"]

    group, _ = score_texts(["x"], reward(scaled, args={"by": 3.0}), gain=2.0)
    assert group.members[0].reward == 6.0


def test_what_does_not_apply_is_left_out_without_renormalising_and_counted() -> None:
    # weights 1 and 3: the second does not apply to s2, so 1 * 0.5 stays 0.5 (renormalised it would be 2.0)
    half = reward(lambda r, s: 0.5, "half")
    boxes = reward(lambda r, s: 1.0 if s.row["task"] == "box" else None, "boxes", weight=3.0)
    groups, report = score(
        [(sample("s1", task="box"), [rollout("a", "s1")]), (sample("s2", task="span"), [rollout("b", "s2")])],
        [half, boxes],
    )
    assert [g.members[0].reward for g in groups] == [3.5, 0.5]
    assert groups[1].members[0].parts == {"half": 0.5, "boxes": None}
    assert report.coverage == {"half": 1.0, "boxes": 0.5}


def test_a_score_brings_parts_and_a_note() -> None:
    say = reward(lambda r, s: Score(value=0.5, parts={"start": 1, "end": np.float32(0.0)}, note="late"), "span")
    group, _ = score_texts(["x"], say)
    assert group.members[0].parts == {"span": 0.5, "span/start": 1.0, "span/end": 0.0}
    assert group.members[0].notes == {"span": "late"}


@pytest.mark.parametrize(
    "value",
    [
        1,
        True,
        1.0,
        np.float64(1),
        np.bool_(True),
        np.array(1),
        torch.tensor(1),
        torch.tensor(1.0, dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_every_kind_of_number_is_a_float(value: Any) -> None:
    group, _ = score_texts(["x"], reward(lambda r, s: value))
    assert group.members[0].reward == 1.0
    assert type(group.members[0].reward) is float


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "returned nan"),
        (np.float32("inf"), "returned inf"),
        ("0.5", "returned '0.5' (str)"),
        ([0.5], "returned [0.5] (list)"),
        (torch.ones(2), "returned tensor([1., 1.]) (Tensor)"),
        (1j, "returned 1j (complex)"),
        (np.str_("1"), "(str_)"),
        (Score(value=math.nan), "returned nan"),
        (Score(value=1.0, parts={"start": None}), "returned None (NoneType) as part 'start'"),
    ],
)
def test_what_is_not_a_reward_names_reward_sample_and_text(value: Any, said: str) -> None:
    with pytest.raises(RewardError) as caught:
        score_texts(["<answer>\n" + "x" * 500], reward(lambda r, s: value, "iou"))
    error = caught.value
    assert error.where == "reward 'iou', sample 's1' (train.jsonl:7)"
    assert said in error.what
    quoted = re.search(r"the text was '(.*)'$", error.what)
    assert quoted and len(quoted.group(1)) == 120 and quoted.group(1).startswith("<answer> xxx")
    assert "finite" in error.do or "return a float" in error.do


# what applies


def test_applying_to_some_members_only_is_an_error_unless_partial() -> None:
    some = reward(lambda r, s: 1.0 if r.text == "a" else None, "some")
    rest = reward(lambda r, s: 0.25, "rest")
    with pytest.raises(RewardError, match=r"some members.*None for \[1\] of 2.*'b'"):
        score_texts(["a", "b"], some, rest)
    group, report = score_texts(["a", "b"], reward(some.function, "some", partial=True), rest)
    assert [m.reward for m in group.members] == [1.25, 0.25]
    assert report.coverage == {"some": 0.5, "rest": 1.0}
    assert group.muted == ""


def test_a_member_without_any_value_mutes_its_group() -> None:
    group, _ = score_texts(["a", "b"], reward(lambda r, s: 1.0 if r.text == "a" else None, partial=True))
    assert group.muted == "no reward applies to a member"


def test_a_sample_without_a_reward_is_an_error_with_its_columns() -> None:
    with pytest.raises(RewardError, match=r"sample 's1'.*no reward applies.*task 'grounding', columns video, gt"):
        score_texts(["a", "b"], reward(lambda r, s: None), video="v.mp4", gt=1)


def test_rollouts_of_another_sample_are_refused() -> None:
    with pytest.raises(RewardError, match="rollouts of s2"):
        score([(sample("s1"), [rollout("x", "s2")])], [reward(length)])


# what fails


def fragile(rollout: Rollout, sample: Sample) -> float:
    return float(rollout.text)  # fails on words


def test_a_failure_names_sample_line_and_text_and_keeps_its_cause() -> None:
    with pytest.raises(RewardError) as caught:
        score_texts(["0.5", "five"], reward(fragile, "fragile"))
    assert caught.value.where == "reward 'fragile', sample 's1' (train.jsonl:7)"
    assert "ValueError: could not convert string to float: 'five'" in caught.value.what
    line = fragile.__code__.co_firstlineno + 1
    assert f"test_scoring.py:{line} `return float(rollout.text)" in caught.value.what
    assert caught.value.what.endswith("the text was 'five'")
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_line_is_that_of_the_users_file_also_when_a_library_raises() -> None:
    def parse(rollout: Rollout, sample: Sample) -> float:
        return re.compile(rollout.text).groups

    with pytest.raises(RewardError, match=r"test_scoring\.py:\d+ `return re\.compile"):
        score_texts(["((("], reward(functools.partial(parse), "parse"))


def test_zero_gives_zero_and_counts() -> None:
    group, report = score_texts(["0.5", "five"], reward(fragile, on_error="zero"), reward(lambda r, s: 1.0, "one"))
    assert [m.reward for m in group.members] == [1.5, 1.0]
    assert group.members[1].parts["r"] == 0.0
    assert group.muted == ""
    assert report.failed == {"r": 1, "one": 0}
    assert report.applied == {"r": 1, "one": 2}
    assert "five" in report.errors[0].what


def test_a_failure_beside_members_it_does_not_apply_to_is_only_a_failure() -> None:
    lookup = reward(lambda r, s: {"a": None}[r.text], "lookup", on_error="zero")
    group, report = score_texts(["a", "b"], lookup, reward(length, "length"))
    assert [m.parts["lookup"] for m in group.members] == [None, 0.0]
    assert (report.applied["lookup"], report.failed["lookup"]) == (0, 1)


def test_skip_mutes_the_group_of_the_failure_and_no_other() -> None:
    groups, report = score(
        [(sample("s1"), [rollout("0.5"), rollout("five")]), (sample("s2"), [rollout("1", "s2"), rollout("0", "s2")])],
        [reward(fragile, "fragile", on_error="skip")],
    )
    assert [g.muted for g in groups] == ["reward fragile failed", ""]
    assert groups[0].members[1].parts == {"fragile": None}
    assert report.failed == {"fragile": 1}
    assert report.coverage == {"fragile": 0.75}


def test_a_value_that_is_not_a_reward_is_a_failure_like_any_other() -> None:
    group, report = score_texts(["x"], reward(lambda r, s: math.nan, on_error="skip"))
    assert group.muted == "reward r failed"
    assert "returned nan" in report.errors[0].what


# async


def test_async_rewards_and_samples_run_together_below_the_concurrency_limit() -> None:
    running, peak = 0, 0

    async def slow(rollout: Rollout, sample: Sample) -> float:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.05)
        running -= 1
        return 1.0

    work = [(sample(n), [rollout("x", n)] * 4) for n in ("s1", "s2")]
    start = time.perf_counter()
    groups, _ = score(work, [reward(slow, "a", concurrency=3), reward(slow, "b", concurrency=3)])
    # 8 calls each, 3 at a time: 3 rounds of 0.05 s, both rewards side by side; one after the other would take 0.8 s
    assert 0.15 <= time.perf_counter() - start < 0.6
    assert peak == 6
    assert [m.reward for g in groups for m in g.members] == [2.0] * 8


def test_async_values_stay_with_their_rollout() -> None:
    async def by_length(rollout: Rollout, sample: Sample) -> float:
        await asyncio.sleep(0.03 / len(rollout.text))  # the last one comes back first
        return len(rollout.text)

    group, _ = score_texts(["a", "bb", "ccc"], reward(by_length))
    assert [m.reward for m in group.members] == [1.0, 2.0, 3.0]


def test_async_works_inside_a_running_loop_and_keeps_one_loop() -> None:
    loops = []

    async def judged(rollout: Rollout, sample: Sample) -> float:
        loops.append(asyncio.get_running_loop())
        return 1.0

    async def notebook() -> float:
        group, _ = score_texts(["x"], reward(judged))
        return group.members[0].reward

    assert asyncio.run(notebook()) == 1.0
    score_texts(["x"], reward(judged))
    assert loops[0] is loops[1]


def test_sync_rewards_run_in_the_calling_thread() -> None:
    threads = []
    score_texts(["x"], reward(lambda r, s: threads.append(threading.current_thread()) or 1.0))
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize(("on_error", "muted"), [("skip", "reward r failed"), ("zero", "")])
def test_a_timeout_is_a_failure(on_error: Any, muted: str) -> None:
    async def hangs(rollout: Rollout, sample: Sample) -> float:
        await asyncio.sleep(60 if rollout.text == "hang" else 0)
        return 1.0

    group, report = score_texts(["x", "hang"], reward(hangs, timeout=0.05, on_error=on_error))
    assert group.muted == muted
    assert "gave no value within 0.05 s" in report.errors[0].what
    with pytest.raises(RewardError, match=r"gave no value within 0\.05 s"):
        score_texts(["hang"], reward(hangs, timeout=0.05))


def test_the_first_async_failure_cancels_the_rest() -> None:
    async def judged(rollout: Rollout, sample: Sample) -> float:
        if rollout.text == "bad":
            raise ConnectionError("refused")
        await asyncio.sleep(60)
        return 1.0

    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"ConnectionError: refused.*'bad'") as caught:
        score_texts(["ok", "bad", "ok"], reward(judged))
    assert time.perf_counter() - start < 10
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_async_objects_and_partials_are_recognised() -> None:
    class Judge:
        async def __call__(self, rollout: Rollout, sample: Sample, by: float = 1.0) -> float:
            return by

    group, _ = score_texts(["x"], reward(Judge(), "a"), reward(functools.partial(Judge(), by=2.0), "b"))
    assert group.members[0].parts == {"a": 1.0, "b": 2.0}


# groups


def test_a_group_reward_sees_siblings() -> None:
    def rank(rollouts: tuple[Rollout, ...], sample: Sample, best: float) -> list[float | None]:
        return [best if len(r.text) == max(len(x.text) for x in rollouts) else 0.0 for r in rollouts]

    group, _ = score_texts(["a", "ccc", "bb"], reward(rank, per="group", args={"best": 0.5}))
    assert [m.reward for m in group.members] == [0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("value", "said"),
    [([1.0], "returned 1 values for 2 rollouts"), (1.0, "returned 1.0 (float)"), ([0.0, "b"], "returned 'b' (str)")],
)
def test_a_group_reward_must_return_one_value_per_rollout(value: Any, said: str) -> None:
    with pytest.raises(RewardError, match=re.escape(said)) as caught:
        score_texts(["first", "second"], reward(lambda rs, s: value, per="group"))
    assert ("the text was 'second'" in caught.value.what) == (value == [0.0, "b"])


def test_a_failing_group_reward_fails_for_each_member() -> None:
    group, report = score_texts(["a", "b"], reward(lambda rs, s: 1 / 0, per="group", on_error="zero"))
    assert [m.reward for m in group.members] == [0.0, 0.0]
    assert report.failed == {"r": 2}


# style: trl


def test_real_trl_rewards_work_unchanged() -> None:
    texts = ["<think>a</think> b", "no thought"]
    repeated = rollout("x", ids=(5, 5, 5, 5, 5))
    distinct = rollout("<think></think>", ids=(1, 2, 3, 4))
    group, _ = score_texts(texts, reward(think_format_reward, style="trl"))
    assert [m.reward for m in group.members] == [1.0, 0.0]
    # repetition: of the four bigrams of 5 5 5 5 5 one is unique, -(1 - 1/4) = -0.75
    # overlong: free up to 6 - 2 = 4 tokens, then linear to -1 at 6: five tokens cost -(5 - 4) / 2 = -0.5
    (group,), _ = score(
        [(sample(), [repeated, distinct])],
        [
            reward(get_repetition_penalty_reward(ngram_size=2), "repetition", style="trl"),
            reward(get_soft_overlong_punishment(6, 2), "overlong", style="trl"),
            reward(think_format_reward, "format", style="trl"),
        ],
    )
    assert group.members[0].parts == {"repetition": -0.75, "overlong": -0.5, "format": 0.0}
    assert group.members[1].parts == {"repetition": 0.0, "overlong": 0.0, "format": 1.0}


def test_a_trl_reward_sees_what_the_trl_trainer_passes() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts, completions, completion_ids, solution, gain, trainer_state=None, **kwargs):
        seen.update(locals())
        return [gain, None]

    state = object()
    (group,), _ = score(
        [(sample(prompt="raw", solution="4", video="v.mp4"), [rollout("a", ids=(1,)), rollout("b", ids=(2, 3))])],
        [reward(spy, style="trl", args={"gain": 0.5}, partial=True), reward(length, "length")],
        trainer_state=state,
    )
    assert [m.parts["r"] for m in group.members] == [0.5, None]
    assert seen["prompts"] == [[dict(m) for m in sample().messages]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    assert seen["completion_ids"] == [[1], [2, 3]]
    assert seen["solution"] == ["4", "4"]
    assert seen["trainer_state"] is state
    assert sorted(seen["kwargs"]) == ["log_extra", "log_metric", "video"]  # `prompt` stays out, as in TRL


def test_a_trl_reward_without_kwargs_gets_only_what_it_takes() -> None:
    def plain(completions, solution):
        return [float(c[0]["content"] == s) for c, s in zip(completions, solution)]

    group, _ = score_texts(["4", "5"], reward(plain, style="trl"), solution="4", other=1)
    assert [m.reward for m in group.members] == [1.0, 0.0]


def test_what_a_trl_reward_logs_is_kept() -> None:
    def logging(completions, log_extra, log_metric, **kwargs):
        log_extra("read", [c[0]["content"].upper() for c in completions])
        log_metric("mean_length", 1.5)
        return [0.0, 1.0]

    group, _ = score_texts(["a", "b"], reward(logging, style="trl"))
    assert [m.notes for m in group.members] == [{"r": "read: A"}, {"r": "read: B"}]
    assert group.members[1].parts == {"r": 1.0, "r/mean_length": 1.5}


def test_an_async_trl_reward_is_called_once_per_sample() -> None:
    calls = []

    async def judged(completions, **kwargs):
        calls.append(len(completions))
        await asyncio.sleep(0)
        return torch.arange(len(completions))

    work = [(sample(n), [rollout("x", n)] * 3) for n in ("s1", "s2")]
    groups, _ = score(work, [reward(judged, style="trl")])
    assert calls == [3, 3]
    assert [m.reward for m in groups[1].members] == [0.0, 1.0, 2.0]


def test_a_trl_completion_has_one_message_per_turn() -> None:
    segments = (
        Segment(author="world", text="When?", ids=(9,)),
        Segment(author="reference", text="<think>hint", ids=(1, 2)),
        Segment(author="policy", text=" more</think>", ids=(3,)),
        Segment(author="world", text="look again", ids=(8, 8)),
        Segment(author="policy", text="<answer>1</answer>", ids=(4,)),
    )
    seen = {}

    def spy(completions, completion_ids):
        seen.update(completions=completions, ids=completion_ids)
        return [1.0]

    score([(sample(), [Rollout(sample_id="s1", segments=segments, stop="answered")])], [reward(spy, style="trl")])
    assert [m["content"] for m in seen["completions"][0]] == ["<think>hint more</think>", "<answer>1</answer>"]
    assert seen["ids"] == [[1, 2, 3, 4]]


# declarations


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "a/b"},
        {"name": ""},
        {"on_error": "ignore"},
        {"per": "batch"},
        {"style": "verl"},
        {"weight": math.inf},
        {"concurrency": 0},
        {"timeout": 5.0},  # a function that is not async cannot be stopped
        {"function": "length"},
    ],
    ids=str,
)
def test_a_declaration_that_cannot_be_kept_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Reward(**{"name": "r", "function": length, **settings})


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="share a name"):
        score_texts(["x"], reward(length), reward(fragile))


def test_judge_keeps_samples_apart_and_nothing_is_lost_without_rollouts() -> None:
    assert judge([(sample(), [])], [reward(length), reward(think_format_reward, "f", style="trl")]) == [{"r": (), "f": ()}]
    groups, report = score([(sample(), [])], [reward(length)])
    assert groups[0].members == () and math.isnan(report.coverage["r"])


# what counts only where another reward is met, and turns


def twice(first: str, last: str) -> Rollout:
    world, more = Segment(author="world", text="?", ids=(9,)), Segment(author="world", text="again?", ids=(8,), is_fresh=True)
    said = [Segment(author="policy", text=text, ids=(1,)) for text in (first, last)]
    return Rollout(sample_id="s1", segments=(world, said[0], more, said[1]))


def test_a_bonus_counts_only_where_the_answer_is_right_and_is_logged_either_way() -> None:
    right = reward(lambda r, s: float(r.text == "yes"), "right")
    bonus = reward(lambda r, s: 1.0, "bonus", weight=0.5, only_if={"right": 0.5})
    group, _ = score_texts(["yes", "no"], right, bonus)
    assert [m.reward for m in group.members] == [1.5, 0.0]
    assert [m.parts["bonus"] for m in group.members] == [1.0, 1.0]
    absent = reward(lambda r, s: None, "right")
    (group,), _ = score([(sample(), [rollout("yes")])], [absent, bonus, reward(length, "length")])
    assert group.members[0].reward == pytest.approx(0.3)  # what does not apply opens no gate


def test_a_reward_that_knows_turns_apart_gives_each_its_own() -> None:
    """Turn by turn the one that knows counts with its own value, the others with the trajectory's."""
    turns = reward(lambda r, s: Score(value=0.5, turns=(1.0, 0.0)), "turns", weight=2.0)
    (group,), _ = score([(sample(), [twice("a", "long")])], [turns, reward(length, "length")])
    member = group.members[0]
    assert member.reward == pytest.approx(2 * 0.5 + 0.4) and member.turns == pytest.approx((2.4, 0.4))
    (plain,), _ = score([(sample(), [twice("a", "long")])], [reward(length, "length")])
    assert plain.members[0].turns == ()


def test_as_many_values_as_turns() -> None:
    with pytest.raises(RewardError, match="3 values for the 2 turns"):
        score([(sample(), [twice("a", "b")])], [reward(lambda r, s: Score(value=0.0, turns=(0.0,) * 3))])
