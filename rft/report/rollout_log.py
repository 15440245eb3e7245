r"""Every rollout with every reward part, as JSON lines. `rft trace` prints them (`trace.py`).

A line has what a rollout was worth, its last turn as `text`, and all that was said under `segments`, in order:

    {"author": "world", "text": "...<|video_pad|>*96...", "tokens": 128, "views": [...], "fresh": true}

Runs of media pads in what the world says stand there as one pad and their count; any other text is exact. A group's lines
follow each other with `member` 0, 1, ...; what the world says to all of them is written once: `{"author": "world", "same":
true}` is the segment at the same place of member 0. `advantage` is the first turn's. Where there are several turns,
`advantages` holds one each, and `turns` what each was worth, where that is known. `weight` is there where it is not 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rft.algo.credit import by_rollout
from rft.families import FAMILIES
from rft.types import Example, Group, Rollout, Scored, Segment, View

PADS = {pad for family in FAMILIES.values() for pad in (family.image_pad, family.video_pad)}
RUNS = re.compile("|".join(f"(?:{re.escape(pad)}){{2,}}" for pad in sorted(PADS)))
BREAKS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})  # lines end here for `str.splitlines`, not in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLog:
    """A file that grows by one line per rollout."""

    path: Path

    def write(
        self, step: int, groups: Sequence[Group], examples: Sequence[Sequence[Example]], *, prompts: Sequence[str]
    ) -> None:
        """Append the groups of one generation with the advantages of their examples, and whose prompts each was asked with."""
        lines = []
        for group, rows, asked in zip(groups, examples, prompts, strict=True):
            for index, (member, row) in enumerate(zip(group.members, by_rollout(rows), strict=True)):
                place = {"step": step, "sample": group.sample.id, "member": index, "prompts": asked}
                said = _segments(member.rollout, group.members[0].rollout if index else None)
                values = {**place, **_outcome(member, row), "muted": group.muted, "segments": said}
                lines.append(json.dumps(values, ensure_ascii=False).translate(BREAKS))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def _outcome(member: Scored, row: Sequence[Example]) -> dict[str, Any]:
    rollout, given = member.rollout, _advantages(member.rollout, row)
    values: dict[str, Any] = {
        "author": "reference" if rollout.is_reference else "policy",
        "text": rollout.text,
        "stop": rollout.stop,
        "tokens": rollout.num_tokens,
        "reward": member.reward,
        "parts": dict(member.parts),
        "notes": dict(member.notes),
        "advantage": given[0] if given else 0.0,
    }
    values |= {"advantages": given} if len(given) > 1 else {}
    values |= {"turns": list(member.turns)} if member.turns else {}
    values |= {"weight": row[0].weight} if row[0].weight != 1 else {}
    return {**values, "refused": list(rollout.refused)}


def _advantages(rollout: Rollout, row: Sequence[Example]) -> list[float]:
    """What the tokens of each turn carry; 0 for a turn without tokens."""
    given = []
    for segments, example in zip(rollout.contexts, row, strict=True):
        at = 0
        for is_world, run in groupby(segments, key=lambda s: s.author == "world"):
            size = sum(len(s.ids) for s in run)
            if not is_world:
                given.append(float(example.advantages_T[at]) if size else 0.0)
            at += size
    return given


def _segments(rollout: Rollout, first: Rollout | None) -> list[Mapping[str, Any]]:
    """What was said, in order; of `first` only that it is the same."""
    said = []
    for index, segment in enumerate(rollout.segments):
        is_known = first is not None and segment.author == "world" and first.segments[index : index + 1] == (segment,)
        said.append({"author": "world", "same": True} if is_known else _segment(segment))
    return said


def _segment(segment: Segment) -> Mapping[str, Any]:
    text = RUNS.sub(_counted, segment.text) if segment.author == "world" else segment.text
    values: dict[str, Any] = {"author": segment.author, "text": text, "tokens": len(segment.ids)}
    values |= {"fresh": True} if segment.is_fresh else {}
    values |= {"views": [_view(v) for v in segment.views]} if segment.views else {}
    return values


def _counted(run: re.Match[str]) -> str:
    pad = next(pad for pad in PADS if run[0].startswith(pad))
    return f"{pad}*{len(run[0]) // len(pad)}"


def _view(view: View) -> Mapping[str, Any]:
    """Seconds are presentation times of the frames, to the millisecond; sizes are height, width."""
    first, *others = (view.source,) if isinstance(view.source, str) else view.source
    name = Path(first).name + (f" (+{len(others)} frames)" if others else "")
    values: dict[str, Any] = {"media": view.media, "kind": view.kind, "source": name}
    if view.seconds:
        seconds = [round(s, 3) for s in view.seconds]
        values |= {"first": seconds[0], "last": seconds[-1], "seconds": seconds}
    values |= {"size": list(view.size), "tokens": view.tokens}
    values |= {"crop": list(view.crop)} if view.crop is not None else {}
    values |= {"region": list(view.region)} if view.region is not None else {}
    return values | ({"pool": view.pool} if view.pool != 1 else {})
