"""What a reward owes before anything trains: `rft check` runs these without a model and without a GPU.

    check_signatures          it takes what it will be given
    check_hostile             it survives every text that a model can write, with a value that is a value
    reference_earns_maximum   the annotation itself earns the most that can be earned

`check_rewards` is the three in order. They return findings and raise nothing.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rft.scoring import TRL_OFFERS, TRL_RESERVED, Reward, Verdict, excerpt, judge
from rft.strict import nearest
from rft.types import Rollout, Sample, Segment

TOLERANCE = 1e-6

# What policies really write, and what a parser or a judge trips over. One text per way of going wrong.
HOSTILE: Mapping[str, str] = {
    "empty": "",
    "blank": " \n\t ",
    "no tag": "The person opens the door near the end of the video, from about 12.0 to 15.5 seconds.",
    "empty answer": "<think></think><answer></answer>",
    "unclosed answer": "<think>It starts early.</think><answer>2.0 to 5.0",
    "closed only": "2.0 to 5.0</answer>",
    "tags in the wrong order": "</answer>2.0 to 5.0<answer>",
    "nested answer": "<answer><answer>2.0 to 5.0</answer></answer>",
    "answer inside think": "<think><answer>2.0 to 5.0</answer></think>",
    "repeated answer": "<answer>2.0 to 5.0</answer>" * 40,
    "contradicting answers": "<answer>A</answer> no, wait: <answer>B</answer><answer>7.0 to 9.0</answer>",
    "every option": "<answer>A B C D E</answer>",
    "reversed span": "<answer>9.5 to 2.0</answer>",
    "empty span": "<answer>0.0 to 0.0</answer>",
    "negative span": "<answer>-4.0 to -1.0</answer>",
    "endless span": "<answer>0.0 to 99999999999999999999.0</answer>",
    "half a span": "<answer>3.0 to</answer>",
    "nan": "<answer>nan to nan</answer>",
    "infinity": "<answer>-inf to inf</answer>",
    "overflow": "<answer>1e999 to 2e999</answer>",
    "long number": f"<answer>{'9' * 10_000}</answer>",
    "long text": "and then " * 1_200,
    "many open tags": "<think><answer>" * 700,
    "arabic digits": "<answer>\u0663.\u0660 to \u0665.\u0660</answer>",
    "full-width digits": "<answer>\uff13.\uff10 to \uff15.\uff10</answer>",
    "superscript digits": "<answer>² to ³</answer>",
    "clock time": "<answer>01:75:99 to 00:61</answer>",
    "code": "<answer>__import__('os').getcwd()</answer>",
    "sum": "<answer>1/0 to 2**9999999</answer>",
    "broken json": '<answer>[{"bbox_2d": [1, 2, 3], </answer>',
    "json of nulls": '<answer>{"start": null, "end": null, "bbox_2d": null}</answer>',
    "empty json": "<answer>[]</answer>",
    "deep json": f"<answer>{'[' * 5_000}</answer>",
    "box of text": '<answer>["a", "b", "c", "d"]</answer>',
    "box without area": "<answer>[10, 10, 10, 10]</answer>",
    "reversed box": "<answer>[90, 80, 10, 20]</answer>",
    "null byte": "<answer>\x00</answer>",
    "lone surrogate": "<answer>\ud800</answer>",
    "regex": "<answer>(((.*)+)+$[[\\</answer>",
    "format string": "<answer>{} %s {0.__class__}</answer>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a check saw. An `error` should stop a run; a `warning` should be read."""

    level: Literal["error", "warning"]
    where: str
    what: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}" + (f"\n  what to do: {self.do}" if self.do else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The most that hostile text can earn from a reward on a sample, and the label of the text that earns it."""

    value: float
    text: str


Ceiling = Mapping[tuple[str, str], Best]  # by (sample id, reward name); for a negative weight, best is lowest


def check_rewards(rewards: Sequence[Reward], samples: Sequence[Sample], references: Sequence[Rollout] = ()) -> list[Finding]:
    """All checks; a reward whose signature does not fit is not run.

    `references` are rollouts that the annotation wrote, matched to `samples` by id. The world segments that they open
    with stand before the hostile texts too, so that a reward which looks at what was shown finds it.
    """
    findings: list[Finding] = []
    fit: list[Reward] = []
    for reward in rewards:
        misfits = check_signatures([reward], samples)
        if any(reward.name == earlier.name for earlier in fit):
            misfits.append(_finding("error", reward, None, "two rewards share this name", "give each its own"))
        findings += misfits
        if all(f.level == "warning" for f in misfits):
            fit.append(reward)
    hostile, ceiling = check_hostile(fit, samples, references)
    return findings + hostile + reference_earns_maximum(fit, samples, references, ceiling)


def check_signatures(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[Finding]:
    """Whether each function accepts what it will be called with; names the argument that does not fit."""
    findings: list[Finding] = []
    for reward in rewards:
        try:
            parameters = list(inspect.signature(reward.function).parameters.values())
        except (TypeError, ValueError):
            findings.append(_finding("warning", reward, None, "has no signature that can be read"))
            continue
        findings += _trl_misfits(reward, parameters, samples) if reward.style == "trl" else _misfits(reward, parameters)
    return findings


def check_hostile(
    rewards: Sequence[Reward], samples: Sequence[Sample], references: Sequence[Rollout] = ()
) -> tuple[list[Finding], Ceiling]:
    """Runs each reward on every sample with every hostile text.

    A finding where it raises, or answers with something else than a finite number, a Score or None; where a value is
    above `maximum`; where it applies to some texts of a sample only; for a reward that applies to no sample and for a
    sample to which no reward applies. Returns the findings, and what the texts earned at best.
    """
    findings: list[Finding] = []
    ceiling: dict[tuple[str, str], Best] = {}
    prompts = {r.sample_id: _prompt(r) for r in references}
    judged: set[str] = set()  # samples that some reward has a say about
    for reward in rewards:
        applies = False
        for sample in samples:
            rollouts = hostile_rollouts(sample, prompts.get(sample.id, ()))
            told = dict(zip(HOSTILE, _verdicts(reward, sample, rollouts)))
            values = {text: v.score.value for text, v in told.items() if v.score is not None}
            findings += _hostile_findings(reward, sample, told, values)
            if values:
                text = max(values, key=lambda text: math.copysign(1.0, reward.weight) * values[text])
                ceiling[sample.id, reward.name] = Best(value=values[text], text=text)
            if values or any(v.error for v in told.values()):
                applies = True
                judged.add(sample.id)
        if samples and not applies:
            what = f"applies to none of the {len(samples)} samples it was shown"
            findings.append(_finding("warning", reward, None, what, "check the task or column that it asks for"))
    for sample in samples:
        if rewards and sample.id not in judged:
            what = f"no reward applies to it; task {sample.task!r}, columns {', '.join(map(str, sample.row))}"
            findings.append(_finding("error", None, sample, what, "add a reward for this task, or filter it out"))
    return findings, ceiling


def reference_earns_maximum(
    rewards: Sequence[Reward], samples: Sequence[Sample], references: Sequence[Rollout], ceiling: Ceiling
) -> list[Finding]:
    """Whether the annotation, written as a rollout, earns `maximum` from every reward that applies to it.

    Where no maximum is known, or the weight is negative, hostile text that is worth more than the annotation is a
    warning. Rewards of weight 0 are only logged and owe nothing. A reward with `per: group` sees the annotation among
    the hostile rollouts.
    """
    findings: list[Finding] = []
    by_id = {s.id: s for s in samples}
    for reference, reward in itertools.product(references, rewards):
        sample = by_id.get(reference.sample_id)
        if sample is None or reward.weight == 0:
            continue
        siblings = hostile_rollouts(sample, _prompt(reference)) if reward.per == "group" else ()
        verdict = _verdicts(reward, sample, (reference, *siblings))[0]
        best = ceiling.get((sample.id, reward.name))
        text = f"; the annotation reads {excerpt(reference.text)!r}"
        if verdict.error is not None:
            what = f"fails on the annotation itself: {verdict.error.what}"
            findings.append(_finding("error", reward, sample, what, verdict.error.do))
        elif verdict.score is None:
            if best is not None and not reward.partial:
                what = f"applies to hostile text and not to the annotation itself{text}"
                findings.append(_finding("error", reward, sample, what, "return a number for the annotation"))
        elif reward.maximum is not None and reward.weight > 0:
            if abs(verdict.score.value - reward.maximum) > TOLERANCE:
                what = f"the annotation earns {verdict.score.value:g} and not the maximum {reward.maximum:g}{text}"
                do = "check the answer template, the annotation's units and the parser, or declare another `maximum`"
                findings.append(_finding("error", reward, sample, what, do))
        elif best is not None and reward.weight * (best.value - verdict.score.value) > TOLERANCE:
            what = f"{best.text!r} earns {best.value:g} and the annotation {verdict.score.value:g}{text}"
            findings.append(_finding("warning", reward, sample, what, "a policy will find that: is it meant?"))
    return findings


def hostile_rollouts(sample: Sample, prompt: Sequence[Segment] = ()) -> tuple[Rollout, ...]:
    """One rollout per hostile text, in the order of `HOSTILE`, after the world segments of `prompt`."""
    return tuple(
        Rollout(
            sample_id=sample.id,
            segments=(*prompt, Segment(author="policy", text=text, ids=tuple(range(1 + len(text) // 4)))),
            stop="answered" if "</answer>" in text else "length",
        )
        for text in HOSTILE.values()
    )


def _prompt(rollout: Rollout) -> tuple[Segment, ...]:
    return tuple(itertools.takewhile(lambda s: s.author == "world", rollout.segments))


def _verdicts(reward: Reward, sample: Sample, rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
    """One verdict per rollout. A group that fails as a whole is asked again one by one, to learn on which text."""
    lenient = replace(reward, on_error="skip")
    together = judge([(sample, rollouts)], [lenient])[0][reward.name]
    if not reward.is_grouped or not any(v.error for v in together):
        return together
    alone = tuple(v[reward.name][0] for v in judge([(sample, (r,)) for r in rollouts], [lenient]))
    return alone if any(v.error for v in alone) else together


def _hostile_findings(
    reward: Reward, sample: Sample, told: Mapping[str, Verdict], values: Mapping[str, float]
) -> list[Finding]:
    findings: list[Finding] = []
    errors = {text: v.error for text, v in told.items() if v.error is not None}
    if errors:
        first = next(iter(errors.values()))
        what = f"{first.what} [{len(errors)} of {len(told)} hostile texts: {', '.join(errors)}]"
        findings.append(_finding("error", reward, sample, what, first.do))
    above = [t for t, v in values.items() if reward.maximum is not None and v > reward.maximum + TOLERANCE]
    if above:
        what = f"{values[above[0]]:g} for {above[0]!r} is above its maximum {reward.maximum:g}"
        findings.append(_finding("error", reward, sample, what, "declare its true `maximum`, or null for none"))
    silent = [text for text, v in told.items() if v == Verdict()]
    if values and silent and not reward.partial:
        what = f"applies to some texts and not to others: None for {', '.join(silent)}"
        do = "return 0.0 for an answer that is wrong or cannot be read, or set partial: true"
        findings.append(_finding("error", reward, sample, what, do))
    return findings


def _misfits(reward: Reward, parameters: Sequence[inspect.Parameter]) -> list[Finding]:
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        subject = "(rollouts, sample)" if reward.is_grouped else "(rollout, sample)"
        is_trl = any(p.name == "completions" for p in parameters)
        do = "set style: trl" if is_trl else f"write def {reward.name}{subject}"
        return [_finding("error", reward, None, f"takes ({', '.join(positional)}) and not {subject}", do)]
    rest = [p for p in parameters if p.name not in positional[:2]]
    return _argument_misfits(reward, rest, set(reward.args), set(positional[:2]))


def _trl_misfits(reward: Reward, parameters: Sequence[inspect.Parameter], samples: Sequence[Sample]) -> list[Finding]:
    """What does not fit on the first sample on which something does not: its columns are arguments."""
    for sample in samples:
        given = {*TRL_OFFERS, *(set(sample.row) - set(TRL_RESERVED)), *reward.args}
        findings = _argument_misfits(reward, parameters, given, set(TRL_OFFERS), sample)
        if findings:
            return findings
    return []


def _argument_misfits(
    reward: Reward,
    parameters: Sequence[inspect.Parameter],
    given: set[str],
    closed: set[str],
    sample: Sample | None = None,
) -> list[Finding]:
    """Arguments of the recipe that the function does not know, and those that it needs and is not given."""
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = {p.name for p in by_name} - closed
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    findings = []
    for name in reward.args:
        if name in closed or (name not in known and not is_open):
            do = nearest(name, known) if known else "it takes none"
            findings.append(_finding("error", reward, None, f"does not take the argument {name!r}", do))
    for p in by_name:
        if p.default is p.empty and p.name not in given:
            do = nearest(p.name, given) if given else f"give it as args.{p.name} in the recipe"
            findings.append(_finding("error", reward, sample, f"needs {p.name!r}, which nothing gives it", do))
    return findings


def _finding(
    level: Literal["error", "warning"], reward: Reward | None, sample: Sample | None, what: str, do: str = ""
) -> Finding:
    where = [f"reward {reward.name!r}"] if reward is not None else []
    where += [f"sample {sample.id!r}" + (f" ({sample.origin})" if sample.origin else "")] if sample is not None else []
    return Finding(level=level, where=", ".join(where), what=what, do=do)
