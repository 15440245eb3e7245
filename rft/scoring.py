"""What a rollout was worth: the reward protocol, weights, "does not apply", and groups.

A reward is a function. It sees one rollout and its sample, and says a number, a `Score` or None ("does not apply"):

    def temporal_iou(rollout, sample) -> float

`score` runs every reward on every rollout and returns groups; `judge` is the same without the verdict on the whole.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rft.errors import RecipeError, RewardError
from rft.types import Group, Rollout, Sample, Score, Scored

Judged = Sequence[tuple[Sample, Sequence[Rollout]]]

CHOICES = {"style": ("rft", "trl"), "per": ("rollout", "group"), "on_error": ("raise", "skip", "zero")}
TRL_RESERVED = ("prompt", "completion", "completion_ids")  # dataset columns that TRL keeps from its rewards
TRL_OFFERS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
EXCERPT = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward function and how the recipe wants it run.

    style    `rft`: f(rollout, sample, **args), or f(rollouts, sample, **args) -> list with `per="group"`.
             `trl`: an unchanged TRL reward, f(prompts=, completions=, completion_ids=, <columns>=, ...) -> list.
    on_error what follows when it raises, times out or returns what is not a reward. `raise`: a RewardError.
             `skip`: the member has no value and its group is muted. `zero`: 0.0. Every failure is counted.
    timeout  seconds for one call, and `concurrency` calls at a time: both for `async def` functions only.
    partial  it may apply to some members of a group and not to others.
    maximum  what the annotation itself must earn, and the most that anything can; None when no such number is known.
    only_if  the least that other rewards, by name, must have given before this one counts: a bonus for looking, say, only
             where the answer is right. What it said is logged either way.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    style: Literal["rft", "trl"] = "rft"
    per: Literal["rollout", "group"] = "rollout"
    on_error: Literal["raise", "skip", "zero"] = "raise"
    timeout: float | None = None
    concurrency: int = 8
    partial: bool = False
    maximum: float | None = 1.0
    only_if: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"reward {self.name!r}"
        if not self.name or "/" in self.name:
            raise RecipeError(where, "a name must not be empty or contain '/'", "'/' joins a reward and its parts in logs")
        if not callable(self.function):
            raise RecipeError(where, f"{self.function!r} cannot be called", "name a function: path/file.py:function")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise RecipeError(where, f"{key} is {getattr(self, key)!r}", f"use one of {', '.join(choices)}")
        if not math.isfinite(self.weight):
            raise RecipeError(where, f"weight is {self.weight}", "use a finite number")
        if self.concurrency < 1:
            raise RecipeError(where, f"concurrency is {self.concurrency}", "use 1 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise RecipeError(where, f"timeout is {self.timeout}", "use seconds above 0, or leave it out")
        if self.timeout is not None and not self.is_async:
            raise RecipeError(where, "a timeout cannot stop a function that is not `async def`", "leave timeout out")

    @property
    def is_async(self) -> bool:
        """True for `async def`, also under functools.partial and as the `__call__` of an object."""
        function = _without_partials(self.function)
        return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    @property
    def is_grouped(self) -> bool:
        """True when one call sees every rollout of a sample and returns one value each."""
        return self.per == "group" or self.style == "trl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one reward said of one rollout. `score` is None where it does not apply, or failed with `on_error: skip`."""

    score: Score | None = None
    error: RewardError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """What happened while scoring, as counts, so that ranks and steps can be added up."""

    num_rollouts: int
    applied: Mapping[str, int]  # by reward: rollouts that it gave a value of its own
    failed: Mapping[str, int]  # by reward: rollouts that it failed on
    errors: tuple[RewardError, ...]  # what the failures said: the first of each failing reward

    @property
    def coverage(self) -> dict[str, float]:
        """By reward, the share of rollouts in [0, 1] that it gave a value; nan when there were none."""
        return {name: n / self.num_rollouts if self.num_rollouts else math.nan for name, n in self.applied.items()}


def score(
    rollouts_by_sample: Judged, rewards: Sequence[Reward], *, trainer_state: Any = None
) -> tuple[tuple[Group, ...], ScoreReport]:
    """Rewards every rollout: sum of weight x value over the rewards that apply to it; weights are not renormalised.

    Returns one group per sample, in order, and the report. A group is muted when a reward with `on_error: skip` failed
    on a member, or when partial rewards left a member without any value; its members still sum what there is.
    `trainer_state` goes to TRL rewards and to nobody else.

    Raises RewardError when a reward with `on_error: raise` fails, when one that is not `partial` applies to some
    members of a group only, and when none applies to a sample.
    """
    verdicts = judge(rollouts_by_sample, rewards, trainer_state=trainer_state)
    groups = [_group(sample, rollouts, v, rewards) for (sample, rollouts), v in zip(rollouts_by_sample, verdicts)]
    by_reward = {r.name: [v for sample_verdicts in verdicts for v in sample_verdicts[r.name]] for r in rewards}
    failures = {name: [v.error for v in vs if v.error is not None] for name, vs in by_reward.items()}
    report = ScoreReport(
        num_rollouts=sum(len(rollouts) for _, rollouts in rollouts_by_sample),
        applied={name: sum(v.score is not None and v.error is None for v in vs) for name, vs in by_reward.items()},
        failed={name: len(errors) for name, errors in failures.items()},
        errors=tuple(errors[0] for errors in failures.values() if errors),
    )
    return tuple(groups), report


def judge(
    rollouts_by_sample: Judged, rewards: Sequence[Reward], *, trainer_state: Any = None
) -> list[dict[str, tuple[Verdict, ...]]]:
    """Runs every reward; returns per sample, by reward name, one verdict per rollout.

    Async rewards run on an event loop in a thread of its own, so that a running loop (a notebook) is no obstacle and a
    client that a judge keeps open stays on one loop; meanwhile the others run in order in the calling thread.

    Raises RewardError at the first failure of a reward with `on_error: raise`, and RecipeError on a name used twice.
    """
    names = [r.name for r in rewards]
    if len(set(names)) < len(names):
        raise RecipeError("rewards", f"two rewards share a name: {', '.join(names)}", "give each a `name` of its own")
    calls: list[_Call] = []
    for i, (sample, rollouts) in enumerate(rollouts_by_sample):
        strangers = {r.sample_id for r in rollouts} - {sample.id}
        if strangers:
            raise RewardError(_where(sample), f"was given rollouts of {', '.join(sorted(strangers))}")
        for reward in rewards:
            parts = [rollouts] if reward.is_grouped and rollouts else [(r,) for r in rollouts]
            calls += [_Call(i, reward, sample, tuple(part), trainer_state) for part in parts]

    waiting = [c for c in calls if c.reward.is_async]
    future = asyncio.run_coroutine_threadsafe(_run_async(waiting), _event_loop(os.getpid())) if waiting else None
    try:
        for call in calls:
            if not call.reward.is_async:
                call.run()
        if future:
            future.result()
    except BaseException:
        if future:
            future.cancel()
        raise

    verdicts: list[dict[str, tuple[Verdict, ...]]] = [dict.fromkeys(names, ()) for _ in rollouts_by_sample]
    for call in calls:
        verdicts[call.index][call.reward.name] += call.verdicts
    return verdicts


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """The loop of this process's async rewards; keyed by process id because threads do not survive a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rft-rewards", daemon=True).start()
    return loop


async def _run_async(calls: Sequence[_Call]) -> None:
    gates = {call.reward.name: asyncio.Semaphore(call.reward.concurrency) for call in calls}
    try:
        async with asyncio.TaskGroup() as tasks:  # the first failure that raises cancels its siblings
            for call in calls:
                tasks.create_task(call.run_async(gates[call.reward.name]))
    except BaseExceptionGroup as group:
        raise group.exceptions[0]  # noqa: B904  its cause is the reward's own exception


class _NotAReward(Exception):
    """(member, what, do): a reward returned something else."""


@dataclass(slots=True)
class _Call:
    """One call of a reward function: on one rollout, or on all rollouts of a sample."""

    index: int  # of the sample
    reward: Reward
    sample: Sample
    rollouts: tuple[Rollout, ...]
    trainer_state: Any
    metrics: dict[str, float] = field(default_factory=dict)  # what a TRL reward logs about the group
    extras: dict[str, list] = field(default_factory=dict)  # ... and about each member
    verdicts: tuple[Verdict, ...] = ()

    def run(self) -> None:
        try:
            self._accept(self._start())
        except Exception as exc:  # code of the user's: on_error decides
            self._fail(exc)

    async def run_async(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                async with asyncio.timeout(self.reward.timeout):
                    raw = await self._start()
                self._accept(raw)
            except Exception as exc:
                self._fail(exc)

    def _start(self) -> Any:
        reward = self.reward
        if reward.style == "trl":
            return reward.function(**self._trl_arguments())
        return reward.function(self.rollouts if reward.is_grouped else self.rollouts[0], self.sample, **reward.args)

    def _trl_arguments(self) -> dict[str, Any]:
        """What `GRPOTrainer._calculate_rewards` (TRL 1.16) passes for conversational prompts, one entry per member.

        A completion has one assistant message per turn, without what the world said in between.
        """
        num = len(self.rollouts)
        offered: dict[str, Any] = {k: [v] * num for k, v in self.sample.row.items() if k not in TRL_RESERVED}
        offered |= {
            "prompts": [[dict(m) for m in self.sample.messages] for _ in self.rollouts],
            "completions": [[{"role": "assistant", "content": t} for t in r.turns] for r in self.rollouts],
            "completion_ids": [[i for s in r.segments if s.author != "world" for i in s.ids] for r in self.rollouts],
            "trainer_state": self.trainer_state,
            "log_extra": lambda column, values: self.extras.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: self.metrics.__setitem__(name, float(value)),
        }
        parameters = inspect.signature(self.reward.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            offered = {k: v for k, v in offered.items() if k in parameters}
        return offered | dict(self.reward.args)

    def _accept(self, raw: Any) -> None:
        if not self.reward.is_grouped:
            self.verdicts = (Verdict(score=_score_of(raw, 0, self.rollouts[0])),)
            return
        if not (isinstance(raw, (list, tuple)) or getattr(raw, "ndim", None) == 1):
            raise _NotAReward(None, f"returned {excerpt(repr(raw))} ({type(raw).__name__})", "return a list")
        if len(raw) != len(self.rollouts):
            what = f"returned {len(raw)} values for {len(self.rollouts)} rollouts"
            raise _NotAReward(None, what, "return one value per rollout, in order; None where it does not apply")
        scores = [_score_of(value, member, self.rollouts[member]) for member, value in enumerate(raw)]
        self.verdicts = tuple(Verdict(score=self._with_logs(s, member)) for member, s in enumerate(scores))

    def _with_logs(self, value: Score | None, member: int) -> Score | None:
        if value is None or not (self.metrics or self.extras):
            return value
        note = "; ".join(f"{k}: {values[member]}" for k, values in self.extras.items() if member < len(values))
        return replace(value, parts={**value.parts, **self.metrics}, note=note)

    def _fail(self, exc: Exception) -> None:
        where = f"reward {self.reward.name!r}, {_where(self.sample)}"
        text: str | None = self.rollouts[0].text if len(self.rollouts) == 1 else None
        if isinstance(exc, _NotAReward):
            member, what, do = exc.args
            text = text if member is None else self.rollouts[member].text
        elif isinstance(exc, TimeoutError) and self.reward.timeout is not None and not exc.args:
            what, do = f"gave no value within {self.reward.timeout:g} s", "raise `timeout`, or set on_error: skip"
        else:
            what = f"{type(exc).__name__}: {excerpt(str(exc))} {_line_of(self.reward.function, exc)}"
            do = "make it return 0.0 or None for text it cannot read, or set on_error: skip or zero"
        if text is not None:
            what += f"; the text was {excerpt(text)!r}"
        error = RewardError(where, what, do)
        error.__cause__ = None if isinstance(exc, _NotAReward) else exc
        if self.reward.on_error == "raise":
            raise error
        value = Score(value=0.0) if self.reward.on_error == "zero" else None
        self.verdicts = (Verdict(score=value, error=error),) * len(self.rollouts)


def _group(
    sample: Sample, rollouts: Sequence[Rollout], verdicts: Mapping[str, tuple[Verdict, ...]], rewards: Sequence[Reward]
) -> Group:
    muted = []
    for reward in rewards:
        told = verdicts[reward.name]
        missing = [i for i, v in enumerate(told) if v.score is None and v.error is None]
        if not reward.partial and missing and any(v.score is not None and v.error is None for v in told):
            raise RewardError(
                f"reward {reward.name!r}, {_where(sample)}",
                f"applies to some members of the group and not to others: None for {missing} of {len(told)}; "
                f"the text of member {missing[0]} was {excerpt(rollouts[missing[0]].text)!r}",
                "return 0.0 for an answer that is wrong or cannot be read, or set partial: true",
            )
        if reward.on_error == "skip" and any(v.error is not None for v in told):
            muted.append(f"reward {reward.name} failed")
    if rollouts and all(v == Verdict() for told in verdicts.values() for v in told):
        raise RewardError(
            _where(sample),
            f"no reward applies to it; task {sample.task!r}, columns {', '.join(map(str, sample.row)) or '(none)'}",
            "add a reward for this task, or filter such rows out of the data",
        )
    members = tuple(_scored(rollout, [(r, verdicts[r.name][i].score) for r in rewards]) for i, rollout in enumerate(rollouts))
    if not muted and any(all(part is None for part in m.parts.values()) for m in members):
        muted.append("no reward applies to a member")
    return Group(sample=sample, members=members, muted="; ".join(muted))


def _scored(rollout: Rollout, scores: Sequence[tuple[Reward, Score | None]]) -> Scored:
    parts: dict[str, float | None] = {}
    for reward, said in scores:
        parts[reward.name] = None if said is None else said.value
        if said is not None:
            parts |= {f"{reward.name}/{part}": value for part, value in said.parts.items()}
    counted = [(r, said) for r, said in scores if said is not None and _is_met(r.only_if, parts)]
    turns: tuple[float, ...] = ()
    if any(said.turns for _, said in counted):
        each = [[r.weight * v for v in said.turns or (said.value,) * len(rollout.turns)] for r, said in counted]
        turns = tuple(map(sum, zip(*each, strict=True)))
    return Scored(
        rollout=rollout,
        reward=sum((reward.weight * said.value for reward, said in counted), 0.0),
        parts=parts,
        turns=turns,
        notes={reward.name: said.note for reward, said in scores if said is not None and said.note},
    )


def _is_met(least: Mapping[str, float], parts: Mapping[str, float | None]) -> bool:
    return all((value := parts.get(name)) is not None and value >= bound for name, bound in least.items())


def _score_of(value: Any, member: int, rollout: Rollout) -> Score | None:
    if value is None:
        return None
    given = value if isinstance(value, Score) else Score(value=value)
    parts = {part: _number(number, member, f" as part {part!r}") for part, number in given.parts.items()}
    turns = tuple(_number(number, member, f" for turn {turn}") for turn, number in enumerate(given.turns))
    if turns and len(turns) != len(rollout.turns):
        what = f"returned {len(turns)} values for the {len(rollout.turns)} turns of a rollout"
        raise _NotAReward(member, what, "give `turns` one value per turn, or leave it out")
    return Score(value=_number(given.value, member), turns=turns, parts=parts, note=given.note)


def _number(value: Any, member: int, where: str = "") -> float:
    plain = value.item() if getattr(value, "shape", None) == () else value  # numpy and 0-d torch scalars
    if not isinstance(plain, (bool, int, float)):
        what = f"returned {excerpt(repr(value))} ({type(value).__name__}){where}"
        raise _NotAReward(member, what, "return a float, a Score or None; a function that awaits is `async def`")
    if not math.isfinite(plain):
        what = f"returned {plain}{where}"
        raise _NotAReward(member, what, "return a finite number: 0.0 for a wrong answer, None for does not apply")
    return float(plain)


def _where(sample: Sample) -> str:
    return f"sample {sample.id!r}" + (f" ({sample.origin})" if sample.origin else "")


def excerpt(text: str) -> str:
    """One line of at most EXCERPT characters."""
    line = " ".join(text[: 4 * EXCERPT].split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 3] + "..."


def _without_partials(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _line_of(function: Callable[..., Any], exc: BaseException) -> str:
    """Where in the user's file it happened: the innermost frame of that file, or the innermost of all."""
    function = inspect.unwrap(_without_partials(function))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    frames = traceback.extract_tb(exc.__traceback__)
    mine = [f for f in frames if code is not None and f.filename == code.co_filename]
    frame = (mine or frames)[-1]
    return f"at {frame.filename}:{frame.lineno} `{frame.line}`"
