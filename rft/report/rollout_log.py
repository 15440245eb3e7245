"""Every rollout with every reward part, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rft.types import WORLD, Example, Group


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
            for member, row in zip(group.members, rows, strict=True):
                trained = row.advantages_T[row.authors_T != WORLD]
                lines.append(
                    json.dumps(
                        {
                            "step": step,
                            "sample": group.sample.id,
                            "prompts": asked,
                            "author": "reference" if member.rollout.is_reference else "policy",
                            "text": member.rollout.text,
                            "stop": member.rollout.stop,
                            "tokens": member.rollout.num_tokens,
                            "reward": member.reward,
                            "parts": dict(member.parts),
                            "notes": dict(member.notes),
                            "advantage": float(trained[0]) if len(trained) else 0.0,
                            "muted": group.muted,
                        },
                        ensure_ascii=False,
                    )
                )
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
