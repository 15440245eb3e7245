"""A real Slurm of two virtual nodes on this machine, and runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rft.cluster import queue
from rft.cluster.attempts import Attempt, attempts_of
from rft.cluster.slurm import submit
from rft.cluster.submission import Place, Request
from rft.run.state import read_state

SCRIPT = Path(__file__).with_name("cluster")
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
RFT = (sys.executable, "-m", "rft.cli")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The cluster in `folder`, and short words for what tests do with it."""

    folder: Path

    def control(self, *words: str) -> str:
        """The test cluster's own script."""
        done = subprocess.run([SCRIPT, "-d", self.folder, *words], capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def warn(self, job: str) -> None:
        """What Slurm sends before a time limit."""
        self.call("scancel", "--batch", "--signal=USR1", job)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder of the stand-in trainer."""

    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        return read_state(self.folder)

    @property
    def job(self) -> str:
        place = Place.of(self.folder)
        assert place
        return place.job

    @property
    def log(self) -> str:
        """What its jobs' batch scripts have said."""
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("slurm/*/*.log")))

    @property
    def attempts(self) -> list[Attempt]:
        return attempts_of(self.folder)

    @property
    def began(self) -> list[int]:
        """The step from which each attempt went on."""
        files = sorted(self.folder.glob("attempts/*/resume.json"), key=lambda p: int(p.parent.name))
        return [json.loads(p.read_text())["step"] for p in files]

    @property
    def steps(self) -> list[int]:
        """The steps that were trained, in order."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, what: Callable[[Run], Any], seconds: float = 180.0) -> None:
        """Wait until something holds; fail with what the run's logs say."""
        end = time.monotonic() + seconds
        while not what(self):
            if time.monotonic() > end:
                pytest.fail(f"not within {seconds:.0f} s: {self.state}\n{self.attempts}\n{self.log}\n{self.printed}")
            time.sleep(0.1)

    def until_status(self, *status: str, seconds: float = 180.0) -> None:
        self.until(lambda run: run.state.get("status") in status, seconds)

    def until_step(self, step: int, seconds: float = 180.0) -> None:
        self.until(lambda run: run.state.get("status") == "running" and step <= max(run.steps, default=0), seconds)

    def until_gone(self, seconds: float = 180.0) -> None:
        """Until Slurm has forgotten the job."""
        self.until(lambda run: not queue.queued([run.job]), seconds)

    @property
    def printed(self) -> str:
        return "\n".join(f"{p}: {p.read_text()}" for p in sorted(self.folder.glob("attempts/*/*.log")))

    def processes(self) -> list[str]:
        """Command lines of living processes that belong to this run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"RFT_RUN={self.folder}\0".encode() in path.read_bytes():
                    found.append((path.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return [line for line in found if line]


@contextmanager
def running(*settings: str) -> Iterator[Cluster]:
    """A cluster of its own, which the environment points at; `settings` are lines of slurm.conf."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}): {INSTALL}")
    folder = Path(tempfile.mkdtemp(prefix="rft-slurm-", dir="/tmp"))  # short: its sockets live there
    made, patch = Cluster(folder=folder), pytest.MonkeyPatch()
    try:
        made.control("up", *(word for line in settings for word in ("--set", line)))
        patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
        yield made
    finally:
        patch.undo()
        made.control("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2, with 8 CPUs and 4 pretended GPUs each; partitions main and high, which evicts main."""
    with running() as made:
        yield made


@pytest.fixture
def prepare(cluster: Cluster, tmp_path: Path) -> Callable[..., Run]:
    """A run folder of the stand-in trainer; keywords are those of its plan."""

    return lambda name="run", **plan: planned(tmp_path / name, **plan)


@pytest.fixture
def start(prepare: Callable[..., Run]) -> Callable[..., Run]:
    """A run of the stand-in trainer, submitted; `request` holds what to ask of Slurm beside that."""

    def begun(name: str = "run", request: dict[str, Any] | None = None, **plan: Any) -> Run:
        run = prepare(name, **plan)
        submit([run.folder], asking(**(request or {})), folder=run.folder)
        return run

    return begun


def rft(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`rft slurm ...` as a user types it."""
    command = [*RFT, "slurm", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env={**os.environ, **environment})


def planned(folder: Path, **plan: Any) -> Run:
    """A run folder of the stand-in trainer; keywords are those of its plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: stand-in\n")
    (folder / "stand_in.json").write_text(json.dumps(plan))
    return Run(folder=folder)


def asking(**changes: Any) -> Request:
    """A small request for the stand-in trainer."""
    return Request(**{"cpus_per_task": 1, "time": "10", "signal_lead": 60, "command": STAND_IN, **changes})
