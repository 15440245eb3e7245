"""What became of the attempts at a run: RUN/attempts/N/attempt.json, by which the next one decides whether to go on at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rft.cluster.submission import read_json
from rft.files import write_whole
from rft.run.checkpoints import CHECKPOINTS, LAST_GOOD
from rft.run.state import ATTEMPTS
from rft.strict import build

RECORD = "attempt.json"
FRUITLESS = 2  # attempts in a row without a new checkpoint, after which another would be no better
FAILURES = 2  # of one node, after which a run stays away from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the trainer under a job. `mark` is the checkpoint that it began from, "" for none.

    `ended` is empty while it runs, and stays so where nobody could write any more: its first node is gone.
    """

    number: int
    submission: str
    job: str
    restart: int
    nodes: tuple[str, ...]
    mark: str
    ended: str = ""
    preempted: bool = False
    lost: tuple[str, ...] = ()

    def write(self, run: Path) -> None:
        """Into its folder."""
        write_whole(run / ATTEMPTS / str(self.number) / RECORD, json.dumps(asdict(self), indent=1))

    @property
    def failed_nodes(self) -> tuple[str, ...]:
        """Nodes that were lost under it."""
        return self.lost if self.ended else self.nodes[:1]


def attempts_of(run: Path) -> list[Attempt]:
    """All that ran under a job, the first one first."""
    found = [read_json(path) for path in (run / ATTEMPTS).glob(f"*/{RECORD}")]
    return sorted((build(Attempt, values) for values in found if values), key=lambda attempt: attempt.number)


def mark_of(run: Path) -> str:
    """The checkpoint that a next attempt begins from, as far as a look at the folder tells; "" for none."""
    try:
        return (run / CHECKPOINTS / LAST_GOOD).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def fruitless(attempts: Sequence[Attempt], mark: str) -> int:
    """How many of the last attempts in a row brought no new checkpoint; `mark` is where the run is now.

    An attempt that was preempted or lost its node says nothing about the run: it neither counts nor ends the row.
    """
    count = 0
    for attempt, after in zip(reversed(attempts), [mark, *(a.mark for a in reversed(attempts))], strict=False):
        if attempt.mark != after:
            return count
        count += not (attempt.preempted or attempt.failed_nodes)
    return count


def unlucky_nodes(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes that failed twice under this run."""
    counts = Counter(node for attempt in attempts for node in attempt.failed_nodes)
    return sorted(node for node, count in counts.items() if count >= FAILURES)
