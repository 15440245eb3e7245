"""When the annotation joins a group, and how much of it: pure decisions, for whoever rolls out.

Uniform numbers in [0, 1) come from the caller, who hashes them from what the group is, so that a decision depends on nothing
else. Evaluation knows nothing of guidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rft.errors import RftError

Fill = Literal["answer_only", "empty_think", "splice_think", "from_field", "off"]
Spans = Literal["annotated", "valid", "jittered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The annotation as a member of a group. The defaults are the paper's: in every group, at every step.

    Accuracy is how right a member's answer is, 1 at best; which rewards say so is the caller's to know.

    probability  that a group is guided at all; `decay` lets it fall to 0 at step `until` of the phase.
    until        the first step of the phase without guidance; 0 never ends, and needs decay "none".
    gate         above 0, the seat is taken only where no member of the policy reaches this accuracy, and never where one
                 does. Such a group samples all its members first, and a drawn one gives way. 0 is no gate: the group
                 samples one fewer.
    fill         what stands before the annotation's answer where the policy thinks. splice_think: what the best member
                 thought, else nothing; from_field: the row's column `field`; off: no seat.
    hints        shares of the annotation's completion, rising, that the policy is given to go on from where the gate is
                 open, each one where all failed with the one before (GHPO, arXiv:2507.10628). Empty: the whole annotation
                 takes the seat.
    spans        which span the annotation's completion names, drawn for every group. valid: one of `span` and
                 `valid_spans`; jittered: one near the annotated `span`, of `spans` one near each. An annotation that has
                 none of these stays as it is.
    jitter       the least IoU with the annotated span that a jittered one has, as it is read back from the completion.
    """

    probability: float = 1.0
    decay: Literal["none", "linear", "cosine"] = "none"
    until: int = 0
    gate: float = 0.0
    fill: Fill = "splice_think"
    field: str = ""
    hints: tuple[float, ...] = ()
    spans: Spans = "annotated"
    jitter: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise RftError("guidance", f"probability={self.probability:g} is not in [0, 1]", "use e.g. 1.0")
        if self.until < 0 or self.gate < 0:
            raise RftError("guidance", f"until={self.until}, gate={self.gate:g}: one is below 0", "use 0 to turn it off")
        if self.decay != "none" and not self.until:
            raise RftError("guidance", f"decay={self.decay} has no end", "set until to the step at which it reaches 0")
        if (self.fill == "from_field") != bool(self.field):
            raise RftError("guidance", f"fill={self.fill} with field={self.field!r}", "set both fill: from_field and field")
        if self.hints and not self.gate:
            raise RftError("guidance", "hints are for groups that fail, and there is no gate", "set gate to e.g. 0.5")
        if list(self.hints) != sorted(set(self.hints)) or not all(0 < level < 1 for level in self.hints):
            raise RftError("guidance", f"hints={list(self.hints)} do not rise inside (0, 1)", "use e.g. [0.25, 0.5, 0.75]")
        if not 0 < self.jitter <= 1:
            raise RftError("guidance", f"jitter={self.jitter:g} is no least IoU: it is not in (0, 1]", "use e.g. 0.9")


def probability(guidance: Guidance, step: int) -> float:
    """That a group of this step (from 0, within the phase) is guided."""
    if guidance.fill == "off":
        return 0.0
    if guidance.until and step >= guidance.until:
        return 0.0
    if guidance.decay == "linear":
        return guidance.probability * (1 - step / guidance.until)
    if guidance.decay == "cosine":
        return guidance.probability * (1 + math.cos(math.pi * step / guidance.until)) / 2
    return guidance.probability


def wants_seat(guidance: Guidance, step: int, uniform: float) -> bool:
    """Whether this group is guided, by its own uniform number; a gate may still say no."""
    return uniform < probability(guidance, step)


def is_certain(guidance: Guidance) -> bool:
    """True when nothing about the policy's members can refuse the seat: a guided group samples one fewer."""
    return guidance.gate == 0


def opens(guidance: Guidance, accuracies: Sequence[float]) -> bool:
    """Whether a guided group lets the annotation in, by the accuracies of the members that the policy wrote alone."""
    return is_certain(guidance) or not any(accuracy >= guidance.gate for accuracy in accuracies)


def drawn_index(count: int, uniform: float) -> int:
    """One of `count`, each as likely as any other."""
    return min(int(uniform * count), count - 1)  # a hash divided by its range can round to 1


def hint_length(level: float, num_tokens: int) -> int:
    """Tokens of a completion of `num_tokens` that a hint gives away: at least 1, and at least 1 is left to the policy.

    A completion of one token cannot be divided: 0.
    """
    return min(max(1, math.floor(level * num_tokens)), num_tokens - 1)
