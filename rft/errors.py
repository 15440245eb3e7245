"""Every error this package raises on purpose.

    RftError
    +-- RecipeError    a recipe, a flag or a file it names is wrong; raised before anything runs
    +-- DataError      a sample, its annotation or its media cannot be used; names the sample and the file
    +-- RewardError    a reward raised or returned something that is not a reward
    +-- RolloutError   a rollout breaks a rule of its own grammar (authors, placeholders, budgets)
    +-- CompatError    an installed library does not behave as this package needs
    +-- ClusterError   processes were launched wrongly, lost each other, or met another run's or a cluster's refusal

A message has three parts: where it happened, what is wrong, what to do. Text written by a model is data and never raises.
"""

from __future__ import annotations


class RftError(Exception):
    """Base class. `RftError(where, what, do)` prints as three short parts."""

    def __init__(self, where: str, what: str, do: str = "") -> None:
        self.where, self.what, self.do = where, what, do
        super().__init__(where, what, do)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n  what to do: {self.do}" if self.do else "")


class RecipeError(RftError):
    """A recipe, a flag or a file it names is wrong."""


class DataError(RftError):
    """A sample, its annotation or its media cannot be used."""


class RewardError(RftError):
    """A reward raised, or returned something that is not a reward."""


class RolloutError(RftError):
    """A rollout breaks a rule of its own grammar."""


class CompatError(RftError):
    """An installed library does not behave as this package needs."""


class ClusterError(RftError):
    """Processes were launched wrongly, lost each other, or a run, a disk or a cluster refused them."""
