"""A logged trajectory, turn by turn: who wrote what, what of it is trained, what was looked at, what it was worth.

What a model wrote is data: its lines begin with "| ", so that they cannot be taken for ours, and characters that a terminal
would act upon are printed escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rft.errors import DataError, RecipeError

KEYS = {"step", "sample", "member", "segments"}  # without which a line is no rollout
NAMED = 12  # steps that an error names
NEAR = 3  # samples that it names
TIMED = 64  # frames of a look whose seconds are all printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """The lines of one group, in order; one that is damaged is missing."""

    phase: str
    file: str
    step: int
    lines: tuple[Mapping[str, Any], ...]

    @property
    def first(self) -> Mapping[str, Any] | None:
        """Member 0, which holds what the world said to all."""
        return next((line for line in self.lines if line["member"] == 0), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run's logs hold of one sample."""

    groups: tuple[Met, ...]
    samples: frozenset[str]  # all that were met
    damaged: tuple[str, ...]  # file:line of lines that cannot be read


def trace(run: Path, sample: str, *, step: int | None = None, rollout: int | None = None, phase: str = "") -> Iterator[str]:
    """Lines to print: the rollouts of `sample` in the last step in which it was met, of the last phase, or in those named.

    Raises:
        RecipeError: there is no such run, or it has not logged what is asked for. Nothing has been printed then.
        DataError: after the last line: the log is damaged, and what the damaged lines told is missing.
    """
    found = _read(run, sample)
    for group in _chosen(run, found, sample, step, rollout, phase):
        for line in _group(group, sample, rollout):
            yield escaped(line)
    if found.damaged:
        more = f", and {len(found.damaged) - 1} more" if found.damaged[1:] else ""
        do = "the rest is printed; a run that goes on cuts off what was half written"
        raise DataError(found.damaged[0], f"is not a line of a rollout log{more}", do)


def escaped(text: str) -> str:
    """The text with everything but printable characters written as in a Python string."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _read(run: Path, sample: str) -> Found:
    if not run.is_dir():
        raise RecipeError(str(run), "there is no such folder", "name the folder of a run, e.g. runs/quickstart")
    if not (run / "rollouts").is_dir():
        raise RecipeError(str(run), "is not the folder of a run: it has no rollouts/", "name the folder that was trained in")
    groups, samples, damaged = [], set(), []
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        place = {"phase": path.stem.rpartition("-")[0], "file": f"rollouts/{path.name}"}
        last: Mapping[str, Any] | None = None  # the line before, where it is one of the same group
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, 1):
                line = _parsed(text)
                if line is None:
                    damaged.append(f"{path}:{number}")
                    last = None
                    continue
                samples.add(line["sample"])
                if line["sample"] != sample:
                    last = None
                    continue
                if last is None or line["step"] != last["step"] or line["member"] <= last["member"]:
                    groups.append(Met(**place, step=line["step"], lines=()))
                groups[-1] = replace(groups[-1], lines=(*groups[-1].lines, line))
                last = line
    return Found(groups=tuple(groups), samples=frozenset(samples), damaged=tuple(damaged))


def _parsed(text: str) -> Mapping[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.keys() >= KEYS else None


def _chosen(run: Path, found: Found, sample: str, step: int | None, rollout: int | None, phase: str) -> Sequence[Met]:
    """The groups that are asked for, with the members that are."""
    groups, where = found.groups, f"sample {escaped(sample)}"
    if not found.samples and not found.damaged:
        raise RecipeError(str(run), "no rollouts were logged", "train with log_rollouts: true")
    if not groups:
        lost = f" (and {found.damaged[0]} is damaged)" if found.damaged else ""
        known = sorted(found.samples)
        near = get_close_matches(sample, known, n=NEAR, cutoff=0.5)
        do = f"the nearest that are: {', '.join(near)}" if near else f"there are {len(known)}, e.g. {', '.join(known[:NEAR])}"
        raise RecipeError(where, f"is in no rollout of {run}{lost}", escaped(do))
    if phase:
        met = sorted({g.phase for g in groups})
        groups = tuple(g for g in groups if g.phase == phase)
        if not groups:
            raise RecipeError(where, f"was not met in phase {phase!r}", f"it was in: {', '.join(met)}")
    if step is not None:
        steps = sorted({g.step for g in groups})
        groups = tuple(g for g in groups if g.step == step)
        if not groups:
            more = "..., " if steps[NAMED:] else ""
            raise RecipeError(where, f"was not met at step {step}", f"it was at: {more}{', '.join(map(str, steps[-NAMED:]))}")
    order = {name: i for i, name in enumerate(_phases(run))}
    last = max(groups, key=lambda g: (order.get(g.phase, -1), g.phase, g.step))
    groups = tuple(g for g in groups if (g.phase, g.step) == (last.phase, last.step))
    members = sorted({line["member"] for g in groups for line in g.lines})
    if rollout is not None and rollout not in members:
        what = f"has no rollout {rollout} at step {last.step} of {last.phase}"
        raise RecipeError(where, what, f"there are: {', '.join(map(str, members))}")
    return [g for g in groups if rollout is None or any(line["member"] == rollout for line in g.lines)]


def _phases(run: Path) -> list[str]:
    """In order, as the run's recipe has them."""
    path = run / "recipe.yaml"
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["phases"]) if path.exists() else []


def _group(group: Met, sample: str, rollout: int | None) -> Iterator[str]:
    size, told = len(group.lines), group.lines[0]
    mixed = ", asked as what the phase mixes in" if told["prompts"] == "mix" else ""
    muted = f", muted: {told['muted']}" if told["muted"] else ""
    many = f"{size} rollout{'s'[: size != 1]}"
    yield f"sample {sample}, step {group.step} of {group.phase} ({group.file}): {many}{mixed}{muted}"
    for line in group.lines:
        if rollout is None or line["member"] == rollout:
            yield ""
            yield from _rollout(line, group.first, is_first_shown=rollout is None)


def _rollout(line: Mapping[str, Any], first: Mapping[str, Any] | None, *, is_first_shown: bool) -> Iterator[str]:
    segments = line["segments"]
    authors = " and ".join(dict.fromkeys(s["author"] for s in segments if s["author"] != "world"))
    parts = ", ".join(f"{name} {'does not apply' if x is None else format(x, '.4g')}" for name, x in line["parts"].items())
    worth = f"reward {line['reward']:.4g}" + (f" ({parts})" if parts else "")
    given = line.get("advantages", [line["advantage"]])
    gains = f"{given[0]:+.4g}" if len(set(given)) == 1 else "by turn " + ", ".join(f"{x:+.4g}" for x in given)
    left_out = ", left out of the loss" if line.get("weight") == 0 else ""
    yield f"rollout {line['member']} by {authors or 'nobody'}: {worth}, advantage {gains}, stop: {line['stop']}{left_out}"
    yield from (f"  note of {name}: {note}" for name, note in line["notes"].items() if note)
    if line["refused"]:
        yield f"  refused: {', '.join(line['refused'])}"
    turns, turn, was_world, told = line.get("turns", []), 0, False, []
    for index, segment in enumerate(segments):
        is_world, is_same = segment["author"] == "world", segment.get("same", False)
        turn += is_world and not was_world
        if is_same and first is not None:
            segment = {**first["segments"][index], "is_shown": is_first_shown}
        begins = not is_world and was_world
        known = [f"reward {turns[turn - 1]:.4g}"] if begins and len(turns) >= turn else []
        known += [f"advantage {given[turn - 1]:+.4g}"] if begins and len(given) > 1 else []
        yield from _segment(segment, turn, known)
        told.append(segment)
        was_world = is_world
    lost = " but for what is lost" if any("text" not in s for s in told) else ""
    yield f"  in all{lost}: {_totals(told)}"


def _segment(segment: Mapping[str, Any], turn: int, known: Sequence[str]) -> Iterator[str]:
    if "text" not in segment:
        yield f"  turn {turn}, world, masked: as in rollout 0, whose line is damaged"
        return
    views, is_world = segment.get("views", []), segment["author"] == "world"
    visual = sum(v["tokens"] for v in views)
    tokens = f"{segment['tokens']} tokens" + (f" ({visual} visual)" if views else "")
    anew = ", a new prompt" if segment.get("fresh") else ""
    mask = "masked" if is_world else "trained"
    yield f"  turn {turn}, {segment['author']}, {mask}{anew}: {', '.join([tokens, *known])}"
    for view in views:
        yield f"    look at {_look(view)}"
        if len(set(seconds := view.get("seconds", []))) > 2 and len(seconds) <= TIMED:
            yield f"      at {' '.join(f'{s:.3f}' for s in seconds)}"
    lines = [f"    | {text}" if text else "    |" for text in segment["text"].split("\n")]
    yield from ["    (the same words as in rollout 0)"] if segment.get("is_shown") else lines


def _look(view: Mapping[str, Any]) -> str:
    words = [f"{view['kind']} {view['media']} ({view['source']})"]
    if seconds := view.get("seconds"):
        count, different = len(seconds), len(set(seconds))
        words.append(f"{count} frame{'s'[: count != 1]}" + (f" ({different} different)" if different < count else ""))
        words.append(f"{view['first']:.3f} to {view['last']:.3f} s")
    words += ["{} x {} pixels (height x width)".format(*view["size"]), f"{view['tokens']} tokens"]
    words += ["crop ({:g}, {:g}) to ({:g}, {:g})".format(*view["crop"])] if "crop" in view else []
    words += ["rows {0} to {2} and columns {1} to {3} of its tokens".format(*view["region"])] if "region" in view else []
    return ", ".join(words + ([f"pooled by {view['pool']}"] if "pool" in view else []))


def _totals(segments: Sequence[Mapping[str, Any]]) -> str:
    """Rounds are turns of whoever answers."""
    written: dict[str, int] = {}
    rounds, was_world, visual = 0, True, 0
    for segment in segments:
        is_world = segment["author"] == "world"
        rounds += was_world and not is_world
        was_world = is_world
        visual += sum(v["tokens"] for v in segment.get("views", []))
        if not is_world:
            written[segment["author"]] = written.get(segment["author"], 0) + segment["tokens"]
    by = " + ".join(f"{n} {author}" for author, n in written.items())
    fresh = sum(s.get("fresh", False) for s in segments)
    prompts = f" of {1 + fresh} prompts" if fresh else ""
    tokens = sum(written.values())
    told = f" ({by})" if len(written) > 1 else ""
    return f"{rounds} round{'s'[: rounds != 1]}{prompts}, {visual} visual tokens, {tokens} text tokens written{told}"
