"""Why a run should stop now: a signal, a file, a clock, or enough generations. Nothing happens here but the saying so.

A handler only remembers the signal. The trainer asks at its boundaries, and all its ranks decide together.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rft.run.state import STOP

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARGIN = 1.3  # of the longest step and the last save, which must still fit before the deadline


class Stops:
    """What asks this process to stop.

    `deadline` is the unix time at which it will be killed, `generations` how many it shall train now; 0 is no limit.
    """

    def __init__(self, folder: Path, *, deadline: float = 0.0, generations: int = 0) -> None:
        self._file, self._deadline = folder / STOP, deadline
        self._left = generations or None
        self._signal = ""
        self._longest = self._save = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a stop inside; what they did before comes back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: Any) -> None:
            self._signal = signal.Signals(number).name

        before = {number: signal.signal(number, remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def took(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """How long a generation with its updates, or a save, has taken (seconds)."""
        self._longest = max(self._longest, step)
        self._save = save or self._save

    def trained(self) -> None:
        """One more generation is done."""
        if self._left is not None:
            self._left -= 1

    def reason(self, *, first_rank: bool) -> str:
        """Why this rank thinks that the run should stop; "" for no reason. Files and clocks are the first rank's to read."""
        if self._signal:
            return self._signal
        if not first_rank:
            return ""
        if self._file.exists():
            return self._file.read_text(encoding="utf-8", errors="replace").strip()[:200] or "the stop file"
        if self._left is not None and self._left <= 0:
            return "as many generations as were asked for"
        needed = MARGIN * (self._longest + self._save)
        if self._deadline and self._deadline - time.time() < needed:
            left = max(0.0, self._deadline - time.time())
            return f"the time limit: {left:.0f} s are left, a step and a save need {needed:.0f} s"
        return ""

    def forget_file(self) -> None:
        """A new attempt begins: what an earlier one was asked is done."""
        self._file.unlink(missing_ok=True)


def deadline(environment: Mapping[str, str] = os.environ) -> float:
    """`RFT_DEADLINE`: the unix time at which this process will be killed; 0 where nobody says."""
    try:
        return float(environment.get("RFT_DEADLINE", "") or 0.0)
    except ValueError:
        return 0.0
