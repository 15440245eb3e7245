"""When a phase may end: `miou >= best_constant + 0.05`. A comparison of named numbers, read by a grammar of its own."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rft.errors import RecipeError

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip
NAME = r"[A-Za-z_][\w@./]*"
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
TERM = rf"\s*(?:{NAME}|{NUMBER})\s*"
SUM = rf"\s*[+-]?{TERM}(?:[+-]{TERM})*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`left comparison right`, where right is a sum of (sign, name or number)."""

    text: str
    left: str
    comparison: str
    right: tuple[tuple[int, str], ...]

    @classmethod
    def parse(cls, text: str, where: str = "until") -> Condition:
        """Raises RecipeError when `text` is not `metric >= number or metric [+ or - number or metric ...]`."""
        match = re.fullmatch(rf"\s*({NAME})\s*(>=|<=|>|<)({SUM})", text)
        if match is None:
            raise RecipeError(where, f"cannot read {text!r}", 'write e.g. "miou >= best_constant + 0.05"')
        terms = tuple((-1 if sign == "-" else 1, word) for sign, word in re.findall(rf"([+-]?)\s*({NAME}|{NUMBER})", match[3]))
        return cls(text=text, left=match[1], comparison=match[2], right=terms)

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Raises RecipeError when a metric it names is not there."""
        right = sum(sign * self._number(word, metrics) for sign, word in self.right)
        return COMPARISONS[self.comparison](self._number(self.left, metrics), right)

    def _number(self, word: str, metrics: Mapping[str, float]) -> float:
        if word[0].isdigit():
            return float(word)
        if word not in metrics:
            raise RecipeError("until", f"{self.text!r} names {word!r}", f"known: {', '.join(sorted(metrics))}")
        return metrics[word]
