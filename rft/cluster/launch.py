"""From a recipe to the processes that train it: one command per machine, and the launches that would run something else.

A launch is `processes` per machine on `nodes` machines under one of `launch/accelerate/*.yaml`. Several processes go through
`accelerate launch` in its static form: every machine is told its rank, and where the first one listens.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rft.errors import ClusterError
from rft.files import write_whole
from rft.plugins import find_file
from rft.run.lock import LOCK
from rft.run.state import STOP

FOLDER = "launch/accelerate"
PORT = 29500  # of the first machine, where several have to agree on one; one machine alone takes any that is free
VARIABLE = re.compile(r"\$\w+|\$\{\w+\}")


def command(
    recipe: str,
    *,
    config: str = "ddp",
    processes: int = 1,
    nodes: int = 1,
    machine_rank: str = "0",
    address: str = "",
    port: int = 0,
    arguments: Sequence[str] = (),
) -> list[str]:
    """The words that train `recipe` on one machine; `arguments` go to `rft.train`.

    `processes` is per node. `machine_rank` may be a variable of the shell that will run it (`$SLURM_NODEID`): see `quoted`.

    Raises:
        ClusterError: this would silently run something else, or never start.
    """
    train = ["rft.train", str(recipe), *arguments]
    if config == "ddp" and processes == nodes == 1:
        return [sys.executable, "-m", *train]
    prefix = launcher(config, processes=processes, nodes=nodes, machine_rank=machine_rank, address=address, port=port)
    return [*prefix, *train]


def launcher(
    config: str, *, processes: int, nodes: int = 1, machine_rank: str = "0", address: str = "", port: int = 0
) -> list[str]:
    """The words that come before a module's name. Raises what `command` raises."""
    if processes < 1 or nodes < 1:
        raise ClusterError("launch", f"{processes} processes on each of {nodes} machines", "ask for at least one of both")
    path = config_file(config)
    _check_config(path, processes, nodes)
    rendezvous = ["--main_process_port", str(port)]
    if nodes > 1:
        if not address:
            do = "name the machine of rank 0 as the others reach it: --address HOST"
            raise ClusterError("launch", f"{nodes} machines, and none of them knows where the first one is", do)
        if not port:
            raise ClusterError("launch", f"{nodes} machines, and no port to meet at", f"name a free one: --port {PORT}")
        is_rank = machine_rank.isdecimal() and int(machine_rank) < nodes
        if not is_rank and not VARIABLE.fullmatch(machine_rank):
            do = f"number the machines 0 to {nodes - 1}, or give a variable of the shell: '$SLURM_NODEID'"
            raise ClusterError("launch", f"{machine_rank!r} is no rank of {nodes} machines", do)
        rendezvous = ["--machine_rank", machine_rank, "--main_process_ip", address, *rendezvous]
    sizes = ["--num_processes", str(processes * nodes), "--num_machines", str(nodes)]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *sizes, *rendezvous, "-m"]


def config_file(name: str) -> Path:
    """The file of an accelerate config: `zero3` is `launch/accelerate/zero3.yaml`, anything else is a path."""
    return find_file(name if name.endswith((".yaml", ".yml", ".json")) or "/" in name else f"{FOLDER}/{name}.yaml")


def kind_of(path: Path) -> str:
    """What a config file starts: MULTI_GPU, DEEPSPEED, FSDP..."""
    return str(_read(path).get("distributed_type", "NO")).upper()


def _read(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ClusterError(str(path), "is no accelerate config", f"take one of {FOLDER}")
    return values


def _check_config(path: Path, processes: int, nodes: int) -> None:
    """Refuse what accelerate would turn into something else without a word."""
    values, kind = _read(path), kind_of(path)
    if processes * nodes > 1 and kind in ("NO", "MULTI_CPU"):
        what = f"distributed_type {kind} starts one process, whatever number is asked for"
        raise ClusterError(str(path), what, "write distributed_type: MULTI_GPU, on machines without a GPU as well")
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP"):
        raise ClusterError(str(path), f"distributed_type {kind} is not known here", "use MULTI_GPU, DEEPSPEED or FSDP")
    if kind == "FSDP" and int((values.get("fsdp_config") or {}).get("fsdp_version", 1)) != 2:
        what = "FSDP of the first version: its parameters are flat, and rollouts would not find them"
        raise ClusterError(str(path), what, "write fsdp_version: 2, as in fsdp2.yaml")
    deepspeed = values.get("deepspeed_config") or {}
    if kind == "DEEPSPEED" and nodes > 1 and deepspeed.get("deepspeed_multinode_launcher") != "standard":
        what = "DeepSpeed would start several machines by its own launcher, with pdsh and a hostfile"
        raise ClusterError(str(path), what, "write deepspeed_config: {deepspeed_multinode_launcher: standard}")


def check_machine(config: str, processes: int) -> None:
    """Refuse what this machine cannot run, before anything starts.

    Raises:
        ClusterError: more processes than GPUs, FSDP without a GPU, or DeepSpeed that is not installed.
    """
    kind, gpus = kind_of(config_file(config)), count_gpus()
    if gpus and processes > gpus:
        what = f"{processes} processes, and this machine has {gpus} GPU{'s' * (gpus > 1)}: some would share one"
        raise ClusterError("launch", what, f"--processes {gpus}")
    if kind == "FSDP" and not gpus:
        what = "no GPU here: accelerate would run plain DDP in the place of FSDP"
        raise ClusterError("launch", what, "--config ddp, or --config zero3, which shards on a CPU as well")
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ClusterError("launch", f"{config} needs DeepSpeed, which is not installed", "pip install 'rft[deepspeed]'")


def count_gpus() -> int:
    """GPUs that a process on this machine can see."""
    import torch

    return torch.cuda.device_count()


def quoted(words: Sequence[str]) -> str:
    """A command as a line for the shell: every word as it is, but `$NAME`, which the shell fills in."""
    return " ".join(f'"{word}"' if VARIABLE.fullmatch(word) else shlex.quote(word) for word in words)


def run(words: Sequence[str], folder: Path | None = None) -> int:
    """Run a command, pass stop requests on, and return its exit code (128 + number, where a signal ended it).

    SIGTERM and SIGUSR1 ask for a stop with a save. Launchers die of the one and give the ranks half a minute after the other,
    so where a trainer holds the run `folder` it is asked by a file; only a second signal, or a run that is not known, gets
    the signal. An interrupt from the keyboard reaches all processes by itself.
    """
    process = subprocess.Popen(words)
    is_launcher = "accelerate.commands.launch" in words

    def stop(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if folder is not None and (folder / LOCK).exists() and not (folder / STOP).exists():
            write_whole(folder / STOP, f"{name} to rft launch\n")
        else:
            process.send_signal(signal.SIGTERM if is_launcher else number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue  # the child has had it too: it ends, and says so
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
