"""How far the memory of a fresh process rises over one train step: `python -m rft.bench.memory REQUEST.json`.

CUDA: bytes that torch allocated. CPU: resident bytes, at the process's high-water mark. Large blocks must go back to the
system when they are freed, or what was there before the step hides a part of it: `measure` starts the process so.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rft.bench.arms import ARMS
from rft.bench.measure import Stopwatch
from rft.bench.stand import open_stand
from rft.bench.work import Work
from rft.errors import RftError

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc; bytes


def measure(arm: str, model: str, work: Work, device: str) -> int:
    """Bytes that one train step of an arm takes at its peak, in a process of its own.

    Raises:
        RftError: the process failed; out of memory, as a rule.
    """
    request = json.dumps({"arm": arm, "model": model, "work": asdict(work), "device": device})
    done = subprocess.run(
        [sys.executable, "-m", "rft.bench.memory", request], env=os.environ | GIVE_BACK, capture_output=True, text=True
    )
    if done.returncode:
        raise RftError(f"memory of {arm}", (done.stderr.strip().splitlines() or ["it was killed"])[-1])
    return int(done.stdout.split()[-1])


def rise(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes by which `work` raises the peak over what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:  # not Linux
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(request: Mapping) -> int:
    """Bytes, for a request of `measure`."""
    torch.set_num_threads(1)
    work = Work(**{**request["work"], "size": tuple(request["work"]["size"])})
    name, device = request["arm"], torch.device(request["device"])
    with tempfile.TemporaryDirectory() as folder:
        stand = open_stand(request["model"], work, device, Path(folder))
        small = stand.with_work(replace(work, frames=min(work.frames, 2), group=2, completion=2))
        watch = Stopwatch(device)
        if name in ARMS:
            warm = small.runner(name)
            warm.prepare()
            warm.train(warm.look(watch), watch)
        stand.optimizer.zero_grad(set_to_none=True)
        runner = stand.runner(name)
        runner.prepare()
        given = runner.look(watch)
        if name not in ARMS:
            runner.trainer.model.train()
            given = runner.trainer._prepare_inputs(given)
        return rise(device, lambda: runner.train(given, watch))


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
