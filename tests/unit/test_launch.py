"""What a launch renders, as accelerate itself reads it; and the launches that would silently run something else."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import rft.cluster.launch as subject
from rft import launch_cli
from rft.cluster.launch import check_machine, command, quoted
from rft.errors import ClusterError, RecipeError
from rft.hf.together import check_launch

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/quickstart.yaml"
MANY = {"processes": 4, "nodes": 2, "machine_rank": "1", "address": "10.0.0.1", "port": 29511}
SHARDED = ("zero2", "zero3", "zero3_offload")


def read_by_accelerate(words: list[str]) -> Any:
    """The launcher's own reading of a command that `command` rendered."""
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[3:]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


def test_one_process_needs_no_launcher() -> None:
    assert command(RECIPE, arguments=["--output", "x"]) == [sys.executable, "-m", "rft.train", RECIPE, "--output", "x"]
    assert "accelerate.commands.launch" in command(RECIPE, config="zero3_offload")  # but what was asked for does


@pytest.mark.parametrize("config", ["ddp", *SHARDED, "fsdp2"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_accelerate_reads_what_was_meant(config: str, nodes: int) -> None:
    size = MANY if nodes == 2 else {"processes": 4}
    args = read_by_accelerate(command(RECIPE, config=config, arguments=["--set", "seed=1"], **size))
    assert (args.module, args.training_script) == (True, "rft.train")
    assert args.training_script_args == [RECIPE, "--set", "seed=1"]
    assert (args.num_processes, args.num_machines) == (4 * nodes, nodes)
    assert [args.use_deepspeed, args.use_fsdp, args.multi_gpu] == [config in SHARDED, config == "fsdp2", config == "ddp"]
    words, environment = None, {}
    if config in SHARDED:
        words, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    assert words is None  # DeepSpeed's own launcher, with pdsh and a hostfile, is not asked
    assert args.nproc_per_node == "4"
    if nodes == 2:
        assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 1, "10.0.0.1:29511")
    else:
        assert int(args.master_port) > 1023  # a free one: two runs on one machine do not meet
    asked = {k: v for k, v in environment.items() if os.environ.get(k) != v}
    stage = {"ddp": None, "zero2": "2", "zero3": "3", "zero3_offload": "3", "fsdp2": None}[config]
    assert asked.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == stage
    offload = "cpu" if config == "zero3_offload" else "none"
    for part in ("OPTIMIZER", "PARAM"):
        assert asked.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE") == (offload if stage else None)
    if stage == "3":
        assert asked["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == asked["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert (asked.get("ACCELERATE_USE_FSDP"), asked.get("FSDP_VERSION")) == (
        ("true", "2") if config == "fsdp2" else (None, None)
    )


def test_what_a_config_does_not_say_comes_from_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping and accumulation stay `auto`, which the trainer fills in; a number here would win in silence."""
    deepspeed = pytest.importorskip("accelerate.utils").DeepSpeedPlugin
    for config in SHARDED:
        _, environment = prepare_deepspeed_cmd_env(read_by_accelerate(command(RECIPE, config=config, processes=2)))
        for name, value in environment.items():
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, value)
        settings = deepspeed().deepspeed_config
        assert settings["gradient_clipping"] == settings["gradient_accumulation_steps"] == "auto"
        assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] == "auto"


def test_the_shipped_fsdp_is_refused_by_a_rank_without_a_gpu() -> None:
    """In the environment that accelerate itself makes: on a CPU it would train with plain DDP, and say nothing."""
    environment = prepare_multi_gpu_env(read_by_accelerate(command(RECIPE, config="fsdp2", processes=2)))
    with pytest.raises(ClusterError, match="plain DDP"):
        check_launch({**environment, **RANK}, 0)
    check_launch({**environment, **RANK}, 2)


def test_a_variable_of_the_shell_stays_one() -> None:
    words = command("my recipe.yaml", config="zero3", **{**MANY, "machine_rank": "$SLURM_NODEID"})
    line = quoted([w for w in words if w != sys.executable])
    assert '--machine_rank "$SLURM_NODEID" ' in line and line.endswith("-m rft.train 'my recipe.yaml'")
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, env={"SLURM_NODEID": "3"})
    printed = done.stdout.splitlines()
    assert printed[printed.index("--machine_rank") + 1] == "3" and printed[-1] == "my recipe.yaml"


REFUSED = {
    "no processes": ({"processes": 0}, "at least one"),
    "no address": ({"processes": 2, "nodes": 2, "port": 29500}, "--address HOST"),
    "no port": ({"processes": 2, "nodes": 2, "address": "a"}, "--port"),
    "rank too large": ({**MANY, "machine_rank": "2"}, "0 to 1"),
    "rank is no number": ({**MANY, "machine_rank": "first"}, "SLURM_NODEID"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    values, do = REFUSED[name]
    with pytest.raises(ClusterError, match=do.replace("$", r"\$")):
        command(RECIPE, **values)


CONFIGS = {
    "one process in silence": ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "MULTI_GPU"),
    "nothing distributed": ({"distributed_type": "NO"}, "MULTI_GPU"),
    "the first FSDP": ({"distributed_type": "FSDP", "fsdp_config": {}}, "fsdp_version: 2"),
    "a launcher of its own": ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "standard"),
    "unknown": ({"distributed_type": "MEGATRON_LM"}, "MULTI_GPU, DEEPSPEED or FSDP"),
    "no mapping": (["MULTI_GPU"], "launch/accelerate"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_start_something_else_are_refused(name: str, tmp_path: Path) -> None:
    values, do = CONFIGS[name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ClusterError, match=do):
        command(RECIPE, config=str(path), **MANY)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"zero3\.yaml"):
        command(RECIPE, config="zero33", processes=2)


def test_what_this_machine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "count_gpus", lambda: 2)
    check_machine("fsdp2", 2)
    with pytest.raises(ClusterError, match="2 GPUs: some would share one"):
        check_machine("ddp", 3)
    monkeypatch.setattr(subject, "count_gpus", lambda: 0)
    check_machine("ddp", 3)
    with pytest.raises(ClusterError, match="plain DDP"):
        check_machine("fsdp2", 2)
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"rft\[deepspeed\]"):
        check_machine("zero2", 2)


RANK = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
INSIDE = {
    "accelerate --cpu": ({"MASTER_ADDR": "127.0.0.1"}, 0, "one process"),
    "srun without a launcher": ({"SLURM_STEP_NUM_TASKS": "2"}, 0, "no launcher"),
    "mpirun on GPUs": ({"OMPI_COMM_WORLD_SIZE": "2"}, 2, "no launcher"),
    "FSDP on a CPU": ({**RANK, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 0, "plain DDP"),
    "FSDP of the first version": ({**RANK, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, 2, "fsdp_version: 2"),
    "deepspeed's own launcher": ({**RANK, "CROSS_SIZE": "1"}, 2, "ZeRO"),
    "more ranks than GPUs": (RANK, 1, "--processes 1"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_only_the_process_can_see_is_refused(name: str) -> None:
    environment, gpus, do = INSIDE[name]
    with pytest.raises(ClusterError, match=do):
        check_launch(environment, gpus)


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, 0),
        ({}, 1),
        (RANK, 0),
        (RANK, 2),
        ({**RANK, "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({**RANK, "CROSS_SIZE": "1", "ACCELERATE_USE_DEEPSPEED": "true"}, 2),
        ({**RANK, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 2),
    ],
)
def test_honest_launches_pass(environment: dict[str, str], gpus: int) -> None:
    check_launch(environment, gpus)


def cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    launch_cli.add(parser.add_subparsers())
    options = parser.parse_args(["launch", *words])
    return options.run(options)


def test_dry_run_prints_every_machine(capsys: pytest.CaptureFixture[str]) -> None:
    several = (RECIPE, "--nodes", "2", "--processes", "4", "--address", "gpu01", "--set", "seed=3", "--config", "zero3")
    assert cli(*several, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == ["# on machine 0", "# on machine 1"]
    assert "--machine_rank 0 --main_process_ip gpu01 --main_process_port 29500" in lines[1]
    assert lines[3] == lines[1].replace("--machine_rank 0", "--machine_rank 1")
    assert "--num_processes 8 --num_machines 2" in lines[1] and lines[1].endswith(f"rft.train {RECIPE} --set seed=3")
    assert cli(*several, "--dry-run", "--machine-rank", "1") == 0
    assert capsys.readouterr().out.splitlines() == lines[2:]
    with pytest.raises(ClusterError, match="which of the 2 machines"):
        cli(*several)


def test_dry_run_of_one_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "count_gpus", lambda: 0)
    assert cli(RECIPE, "--dry-run") == 0
    assert capsys.readouterr().out == f"{quoted([sys.executable])} -m rft.train {RECIPE}\n"
    monkeypatch.setattr(subject, "count_gpus", lambda: 8)
    assert cli(RECIPE, "--dry-run") == 0  # a process per GPU
    assert "--num_processes 8" in capsys.readouterr().out


def test_a_recipe_is_read_once_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match="sede"):
        cli(RECIPE, "--set", "sede=3", "--processes", "2")


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(8))
print("up", flush=True)
time.sleep(30)
"""
PARENT = """
import sys
from pathlib import Path
from rft.cluster.launch import run
sys.exit(run([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2])))
"""


def started(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGUSR1, 8)])
def test_signals_are_passed_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    assert process.wait(20) == code
    assert not (tmp_path / "stop").exists()  # nobody holds the run


def test_a_trainer_that_holds_the_run_is_asked_by_its_stop_file(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("{}")
    process = started(tmp_path)
    process.send_signal(signal.SIGUSR1)
    until = time.monotonic() + 20
    while not (tmp_path / "stop").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "SIGUSR1" in (tmp_path / "stop").read_text()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # whoever asks twice does not wait for a save
    assert process.wait(20) == 7
