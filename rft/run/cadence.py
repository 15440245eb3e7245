"""How often: `30m`, `90 s`, `10 generations`. Read by a grammar of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rft.errors import RecipeError

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """Every so many seconds, or every so many generations; never where both are 0.

    A generation is what is trained on between two rollouts: one optimizer step, or as many as the phase has updates.
    """

    seconds: float = 0.0
    generations: int = 0

    @classmethod
    def parse(cls, text: str, where: str = "save_every") -> Cadence:
        """Raises RecipeError when `text` is neither empty, nor a time (s, m, h), nor a number of generations."""
        if not text.strip():
            return cls()
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text):
            cadence = cls(seconds=float(match[1]) * SECONDS[match[2]])
        elif match := re.fullmatch(r"\s*(\d+)\s*generations?\s*", text):
            cadence = cls(generations=int(match[1]))
        else:
            cadence = cls()
        if cadence == cls():
            raise RecipeError(where, f"cannot read {text!r}", 'write e.g. "30m", "2h" or "10 generations"; "" is never')
        return cadence

    def is_due(self, *, seconds: float, generations: int) -> bool:
        """Whether so many seconds and generations after the last time it is time again."""
        return bool(self.seconds and seconds >= self.seconds) or bool(self.generations and generations >= self.generations)
