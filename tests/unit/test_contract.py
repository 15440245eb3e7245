"""What `rft check` finds in rewards that are wrong, and that it is silent about those that are right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from trl.rewards import get_repetition_penalty_reward, think_format_reward

from rft.evaluation.contract import (
    HOSTILE,
    Best,
    check_hostile,
    check_rewards,
    check_signatures,
    hostile_rollouts,
    reference_earns_maximum,
)
from rft.scoring import Reward
from rft.types import Rollout, Sample, Score, Segment, View

SAMPLES = tuple(
    Sample(id=i, messages=(), media=(), answer={"span": (3.0, 5.0)}, task="grounding", row={"span": 3, "lang": "en"})
    for i in ("s1", "s2")
)
REFERENCES = tuple(
    Rollout(
        sample_id=s.id,
        segments=(
            Segment(author="world", text="When?", ids=(1, 2)),
            Segment(author="reference", text="<answer>3.00 to 5.00</answer>", ids=(3, 4, 5)),
        ),
        stop="answered",
    )
    for s in SAMPLES
)
NUMBER = re.compile(r"[0-9]{1,6}\.[0-9]{1,3}")


def exact(rollout: Rollout, sample: Sample, *, credit: float = 1.0) -> float:
    """A careful reward: full credit for the annotated span, as the last two numbers of the text."""
    numbers = [float(n) for n in NUMBER.findall(rollout.text)]
    return credit if tuple(numbers[-2:]) == sample.answer["span"] else 0.0


def reward(function: Callable[..., Any], name: str = "r", **settings: Any) -> Reward:
    return Reward(name=name, function=function, **settings)


def test_rewards_that_keep_the_contract_have_no_findings() -> None:
    async def judged(rollout: Rollout, sample: Sample) -> Score:
        return Score(value=exact(rollout, sample), note="ok")

    def best(rollouts: tuple[Rollout, ...], sample: Sample) -> list[float]:
        return [exact(r, sample) for r in rollouts]

    rewards = [
        reward(exact, "exact", args={"credit": 1.0}),
        reward(judged, "judged", timeout=5.0),
        reward(best, "best", per="group"),
        reward(get_repetition_penalty_reward(), "repetition", style="trl", maximum=0.0),
    ]
    assert [str(f) for f in check_rewards(rewards, SAMPLES, REFERENCES)] == []


def test_the_corpus_has_the_ways_of_going_wrong() -> None:
    texts = list(HOSTILE.values())
    assert "" in texts
    assert max(map(len, texts)) >= 10_000
    assert any(c.isdigit() and not c.isascii() for t in texts for c in t)
    assert any("nan" in t for t in texts)
    assert len(set(texts)) == len(texts)
    assert [r.text for r in hostile_rollouts(SAMPLES[0])] == texts


@pytest.mark.parametrize(
    ("function", "args", "what", "do"),
    [
        (lambda rollout: 1.0, {}, "takes (rollout) and not (rollout, sample)", "write def r(rollout, sample)"),
        (lambda completions, **kw: 1.0, {}, "takes (completions) and not", "set style: trl"),
        (exact, {"credits": 1}, "does not take the argument 'credits'", "did you mean credit?"),
        (exact, {"sample": 1}, "does not take the argument 'sample'", "known: credit"),
        (lambda r, s: 1.0, {"x": 1}, "does not take the argument 'x'", "it takes none"),
        (lambda r, s, sigma: 1.0, {}, "needs 'sigma', which nothing gives it", "give it as args.sigma in the recipe"),
    ],
)
def test_a_signature_that_does_not_fit(function: Callable, args: dict[str, Any], what: str, do: str) -> None:
    (finding,) = [f for f in check_signatures([reward(function, args=args)], SAMPLES) if what in f.what]
    assert (finding.level, finding.where, finding.do) == ("error", "reward 'r'", do)


def test_signatures_that_fit() -> None:
    def plain(rollout: Rollout, sample: Sample, sigma: float, **more: Any) -> float: ...

    def trl(completions, span, lang, sigma, log_extra=None): ...

    def anything(*args, **kwargs): ...

    rewards = [
        reward(plain, args={"sigma": 1, "other": 2}),
        reward(trl, style="trl", args={"sigma": 1}),
        reward(anything),
        reward(think_format_reward, style="trl"),
    ]
    assert check_signatures(rewards, SAMPLES) == []


def test_a_trl_reward_needs_columns() -> None:
    def solved(completions, spam, **kwargs): ...

    (finding,) = check_signatures([reward(solved, style="trl")], SAMPLES)
    assert finding.where == "reward 'r', sample 's1'"
    assert (finding.what, finding.do) == ("needs 'spam', which nothing gives it", "did you mean span?")


def test_a_signature_that_does_not_fit_is_not_run() -> None:
    findings = check_rewards([reward(lambda rollout: 1 / 0), reward(exact, "exact")], SAMPLES, REFERENCES)
    assert [f.what for f in findings] == ["takes (rollout) and not (rollout, sample)"]


def test_what_breaks_on_hostile_text_is_told_once_per_sample_with_the_texts() -> None:
    def naive(rollout: Rollout, sample: Sample) -> float:
        return float(rollout.text.split("<answer>")[1].split(" ")[0] == "3.00")

    findings, _ = check_hostile([reward(naive, "naive")], SAMPLES)
    assert [f.where for f in findings] == ["reward 'naive', sample 's1'", "reward 'naive', sample 's2'"]
    assert "IndexError" in findings[0].what and "test_contract.py" in findings[0].what
    affected = [label for label, text in HOSTILE.items() if "<answer>" not in text]
    assert f"[{len(affected)} of {len(HOSTILE)} hostile texts: {', '.join(affected)}]" in findings[0].what


def test_a_trl_group_that_breaks_is_asked_again_text_by_text() -> None:
    def naive(completions, **kwargs):
        return [float(c[0]["content"][0] == "<") for c in completions]

    findings, _ = check_hostile([reward(naive, style="trl")], SAMPLES[:1])
    assert "IndexError" in findings[0].what
    assert f"[1 of {len(HOSTILE)} hostile texts: empty]" in findings[0].what


@pytest.mark.parametrize(
    ("function", "settings", "said"),
    [
        (lambda r, s: float("nan") if "nan" in r.text else 0.0, {}, "returned nan"),
        (lambda r, s: "good", {}, "returned 'good' (str)"),
        (lambda completions, **kw: [1.0], {"style": "trl"}, "returned 1 values for"),
        (lambda r, s: len(r.text) / 100, {}, "above its maximum 1"),
        (lambda r, s: 1.0 if r.answer else None, {}, "applies to some texts and not to others"),
    ],
)
def test_values_that_break_the_contract(function: Callable, settings: dict[str, Any], said: str) -> None:
    findings, _ = check_hostile([reward(function, **settings)], SAMPLES[:1])
    assert [f.level for f in findings] == ["error"]
    assert said in findings[0].what


def test_partial_rewards_may_apply_to_some_texts() -> None:
    findings, _ = check_hostile([reward(lambda r, s: 1.0 if r.answer else None, partial=True)], SAMPLES[:1])
    assert findings == []


def test_nothing_applies() -> None:
    never, first = reward(lambda r, s: None), reward(lambda r, s: 0.0 if s.id == "s1" else None, "x")
    findings, ceiling = check_hostile([never, first], SAMPLES)
    assert [(f.level, f.where) for f in findings] == [("warning", "reward 'r'"), ("error", "sample 's2'")]
    assert "columns span, lang" in findings[1].what
    assert list(ceiling) == [("s1", "x")]


def test_the_ceiling_is_what_hostile_text_earns_at_best() -> None:
    def length(rollout: Rollout, sample: Sample) -> float:
        return float(len(rollout.text))

    rewards = [reward(length, "up", maximum=None), reward(length, "down", weight=-1.0, maximum=None)]
    _, ceiling = check_hostile(rewards, SAMPLES[:1])
    longest = max(HOSTILE, key=lambda label: len(HOSTILE[label]))
    assert ceiling["s1", "up"] == Best(value=len(HOSTILE[longest]), text=longest)
    assert ceiling["s1", "down"] == Best(value=0.0, text="empty")


def test_an_annotation_below_the_maximum_is_an_error() -> None:
    # a template in minutes: 3.00 is read as 180 s, so the annotation itself does not match
    def minutes(rollout: Rollout, sample: Sample) -> float:
        return float([60 * float(n) for n in NUMBER.findall(rollout.text)] == list(sample.answer["span"]))

    findings = reference_earns_maximum([reward(minutes, "iou")], SAMPLES, REFERENCES, {})
    assert [f.where for f in findings] == ["reward 'iou', sample 's1'", "reward 'iou', sample 's2'"]
    assert findings[0].level == "error"
    assert findings[0].what == (
        "the annotation earns 0 and not the maximum 1; the annotation reads '<answer>3.00 to 5.00</answer>'"
    )
    assert reference_earns_maximum([reward(exact, args={"credit": 1 + 1e-9})], SAMPLES, REFERENCES, {}) == []
    assert len(reference_earns_maximum([reward(exact, args={"credit": 0.999})], SAMPLES, REFERENCES, {})) == 2
    assert reference_earns_maximum([reward(exact, args={"credit": 2}, maximum=2.0)], SAMPLES, REFERENCES, {}) == []


def test_the_annotation_must_not_fail_or_be_left_out() -> None:
    def fails(rollout: Rollout, sample: Sample) -> float:
        return 1 / 0 if rollout.is_reference else 0.0

    def leaves_out(rollout: Rollout, sample: Sample) -> float | None:
        return None if rollout.is_reference else 0.0

    findings = check_rewards([reward(fails, "fails"), reward(leaves_out, "leaves")], SAMPLES[:1], REFERENCES[:1])
    assert [(f.level, f.what.split(":")[0].split(";")[0]) for f in findings] == [
        ("error", "fails on the annotation itself"),
        ("error", "applies to hostile text and not to the annotation itself"),
    ]
    assert reference_earns_maximum([reward(leaves_out)], SAMPLES, REFERENCES, {}) == []  # it applies to nothing here


def test_without_a_known_maximum_hostile_text_that_earns_more_is_a_warning() -> None:
    def length(rollout: Rollout, sample: Sample) -> float:
        return float(len(rollout.text))

    longest = max(HOSTILE, key=lambda label: len(HOSTILE[label]))
    up, down, logged = (
        check_rewards([reward(length, weight=w, maximum=None)], SAMPLES[:1], REFERENCES[:1]) for w in (1.0, -1.0, 0.0)
    )
    assert [(f.level, f.what.split(";")[0]) for f in up] == [
        ("warning", f"{longest!r} earns {len(HOSTILE[longest]):g} and the annotation 29")
    ]
    assert [f.what.split(";")[0] for f in down] == ["'empty' earns 0 and the annotation 29"]
    assert logged == []


def test_hostile_texts_stand_after_what_the_reference_was_shown() -> None:
    view = View(
        media=0, kind="video", source="v.mp4", frames=(0, 1), seconds=(0.0, 0.5), pair_seconds=(0.0,), size=(28, 28),
        original=(56, 56), grid=(1, 2, 2), tokens=1, duration=1.0,
    )  # fmt: skip
    prompt = Segment(author="world", text="When?", ids=(1, 2), views=(view,))
    answer = REFERENCES[0].segments[-1]
    reference = Rollout(sample_id="s1", segments=(prompt, answer), stop="answered")

    def looks(rollout: Rollout, sample: Sample) -> float:
        return rollout.views[0].duration * rollout.is_reference

    assert check_rewards([reward(looks)], SAMPLES[:1], [reference]) == []
    assert "IndexError" in check_rewards([reward(looks)], SAMPLES[:1])[0].what


def test_two_rewards_of_one_name() -> None:
    findings = check_rewards([reward(exact), reward(exact)], SAMPLES, REFERENCES)
    assert [(f.level, f.where, f.what) for f in findings] == [("error", "reward 'r'", "two rewards share this name")]
