"""What was asked of Slurm, kept beside the runs it is for.

FOLDER/slurm/N/            N = 1, 2, ...: one submission, never changed afterwards
    job.sbatch             the script as it was sent
    submission.json        the runs (an array's index is the place in this list) and the request
    JOB.log, ARRAY_INDEX.log   what the batch scripts say, all restarts in one file
RUN/job.json               where a run's job is: {"job", "submission", "index", "cancelled"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rft.errors import ClusterError
from rft.files import write_whole
from rft.strict import build

SLURM, SUBMISSION, SCRIPT, PLACE = "slurm", "submission.json", "job.sbatch", "job.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job shall have, and how its trainer is started. Empty or 0: as the cluster has it by default."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 0  # 0: one per GPU
    cpus_per_task: int = 0  # of a node: one task there starts all its processes
    time: str = ""  # a Slurm time limit: 4:00:00, 2-12, 90
    partition: str = ""
    account: str = ""
    sbatch: tuple[str, ...] = ()  # further options of sbatch, e.g. --constraint=h100
    setup: tuple[str, ...] = ()  # lines of bash before the launch, e.g. module load cuda
    signal_lead: int = 300  # seconds between the warning and the time limit
    max_restarts: int = 20
    config: str = "ddp"  # of launch/accelerate
    template: str = ""  # default: launch/slurm/job.sbatch
    allow_drift: bool = False
    command: tuple[str, ...] = ()  # another program in the place of the trainer; it finds its run in $RFT_RUN

    @property
    def processes(self) -> int:
        """Per node."""
        return self.processes_per_node or self.gpus_per_node or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One call of sbatch."""

    folder: Path
    runs: tuple[Path, ...]
    request: Request

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """Raises ClusterError when the folder holds none."""
        values = read_json(folder / SUBMISSION)
        if "runs" not in values:
            raise ClusterError(str(folder), "holds no submission", "name the folder that `rft slurm submit` wrote")
        return cls(folder=folder, runs=tuple(map(Path, values["runs"])), request=build(Request, values["request"]))

    def write(self) -> None:
        """Into its folder."""
        values = {"runs": [str(run) for run in self.runs], "request": asdict(self.request)}
        write_whole(self.folder / SUBMISSION, json.dumps(values, indent=1))

    def job_of(self, index: int, job: str) -> str:
        """What squeue calls the job of a run: `job`, the id that sbatch gave, or ARRAY_INDEX."""
        return f"{job}_{index}" if len(self.runs) > 1 else job


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run's job is. `job` is what squeue takes: a job id, or ARRAY_INDEX."""

    job: str = ""
    submission: str = ""
    index: int = 0
    cancelled: bool = False

    @classmethod
    def of(cls, run: Path) -> Place | None:
        """None where the run was never given to Slurm."""
        values = read_json(run / PLACE)
        return cls(**{k: v for k, v in values.items() if k in cls.__slots__}) if values else None

    def write(self, run: Path) -> None:
        """Into the run's folder."""
        write_whole(run / PLACE, json.dumps(asdict(self), indent=1))

    @property
    def log(self) -> Path:
        """What the batch script says."""
        return Path(self.submission) / f"{self.job}.log"


def new_folder(folder: Path) -> Path:
    """The next FOLDER/slurm/N, made here and now: two callers never get the same."""
    numbers = [int(p.name) for p in (folder / SLURM).glob("*") if p.name.isdigit()]
    for number in range(max(numbers, default=0) + 1, 10**6):
        try:
            (folder / SLURM / str(number)).mkdir(parents=True)
        except FileExistsError:
            continue
        return folder / SLURM / str(number)
    raise ClusterError(str(folder), "has a million submissions", "move them away")


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a file; {} where there is no file or no object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def array_range(size: int, max_running: int) -> str:
    """`0-5%2`; "" for a single run."""
    return f"0-{size - 1}" + (f"%{max_running}" if max_running else "") if size > 1 else ""
