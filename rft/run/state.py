"""`state.json`: what a run is doing, for whoever looks at its folder.

submitted   a job waits for it, no trainer has begun
running     a trainer is at it (or was killed: its lock and heartbeat tell)
stopped     ended on request at a place from which it goes on
finished    all phases are done
failed      an error ended it; `reason` says which
cancelled   taken back by its user; it can be resumed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.errors import DataError
from rft.files import write_whole

STATE, STOP, ATTEMPTS = "state.json", "stop", "attempts"
UNBEGUN = ("", "submitted")


def read_state(folder: Path) -> dict[str, Any]:
    """What the run's folder says; {} where no run has been.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(str(path), f"not readable: {error}", "restore it, or choose another --output") from error
    return state if isinstance(state, dict) else {}


def write_state(folder: Path, **values: Any) -> None:
    """Replace the state. `time` is when it was written."""
    write_whole(folder / STATE, json.dumps({**values, "time": round(time.time(), 1)}, indent=1))


def status(folder: Path) -> str:
    """One of the words above; "" where no run has been."""
    return str(read_state(folder).get("status", ""))


def next_attempt(folder: Path, environment: Mapping[str, str] = os.environ) -> int:
    """The number of the attempt that begins now: `RFT_ATTEMPT`, or one more than there were."""
    if given := environment.get("RFT_ATTEMPT", ""):
        return int(given)
    numbers = [int(p.name) for p in (folder / ATTEMPTS).glob("*") if p.name.isdigit()]
    return max(numbers, default=0) + 1


def attempt_folder(folder: Path, attempt: int) -> Path:
    """Where one attempt keeps its logs and what it restored."""
    path = folder / ATTEMPTS / str(attempt)
    path.mkdir(parents=True, exist_ok=True)
    return path
