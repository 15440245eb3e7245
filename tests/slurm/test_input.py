"""What is wrong is said before anything is submitted, and leaves nothing behind; and what the commands print."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rft.cluster.slurm import check_request, refusal, script, seconds_of
from rft.cluster.submission import Request
from rft.errors import ClusterError
from tests.slurm.conftest import Cluster, Run, rft

slurm = pytest.mark.slurm
RECIPE = "recipes/quickstart.yaml"


@slurm
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "nope"], r"--partition: 'nope': .*\n.*partitions here: high, main"),
        (["--gpus-per-node", "5"], r"Requested node configuration is not available.*5 GPUs.*\n.*main: 2 nodes.*gpu:4"),
        (["--nodes", "3"], r"node configuration.*3 nodes"),
        (["--time", "soon"], r"--time: 'soon' is no time limit\n.*4:00:00"),
        (["--time", "4:00"], r"--signal-lead: a warning 300 s before the end comes at once where the limit is 240 s"),
        (["--nodes", "0"], r"--nodes: 0 is too small"),
        (["--sbatch=--constraint=h100"], r"Invalid feature specification"),
        (["--sbatch=--array=0-3"], r"--array=0-3 is set by rft itself"),
        (["--sbatch=h100"], r"'h100' is no option"),
        (["--gpus-per-node", "2", "--processes-per-node", "4"], r"4 processes on 2 GPUs"),
        (["--config", "zero9"], r"zero9.*not found"),
        (["--set", "phases.warmup.stepps=3"], r"unknown key"),
    ],
)
def test_a_refused_request_leaves_nothing(cluster: Cluster, tmp_path: Path, words: list[str], said: str) -> None:
    done = rft("submit", RECIPE, "--output", tmp_path / "deep" / "run", *words)
    assert done.returncode == 1 and re.search(said, done.stderr, re.S), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()) and not cluster.call("squeue", "-h", "-n", "quickstart")


@slurm
def test_a_folder_that_cannot_be_written(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = rft("submit", RECIPE, "--output", tmp_path / "file" / "run")
    assert done.returncode == 1 and "cannot be written" in done.stderr and "another --output" in done.stderr
    assert (tmp_path / "file").read_text() == "mine" and not cluster.call("squeue", "-h", "-n", "quickstart")


def test_without_slurm(tmp_path: Path) -> None:
    only = tmp_path / "bin"
    only.mkdir()
    done = rft("submit", RECIPE, "--output", tmp_path / "run", PATH=str(only))
    assert done.returncode == 1 and "there is no sbatch on the path" in done.stderr
    assert not (tmp_path / "run").exists()
    # what the script would be can be seen anywhere
    done = rft("submit", RECIPE, "--output", tmp_path / "run", "--dry-run", "--time", "4:00:00", PATH=str(only))
    assert done.returncode == 0 and "#SBATCH --time=4:00:00" in done.stdout
    assert not (tmp_path / "run").exists()


@slurm
def test_a_dry_run_submits_nothing_and_its_script_is_the_one_that_is_sent(cluster: Cluster, tmp_path: Path) -> None:
    words = ["submit", RECIPE, "--output", tmp_path / "run", "--nodes", "2", "--gpus-per-node", "2", "--setup", "echo loaded"]
    before = cluster.call("squeue", "-h")
    dry = rft(*words, "--dry-run")
    assert dry.returncode == 0 and cluster.call("squeue", "-h") == before and not (tmp_path / "run").exists()
    sent = rft(*words, "--sbatch=--hold")
    assert sent.returncode == 0, sent.stderr
    job = re.match(r"job (\d+): (.*)\n", sent.stdout)
    assert job and job[2] == str(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "submitted"
    script = (tmp_path / "run" / "slurm" / "1" / "job.sbatch").read_text()
    assert script == dry.stdout.replace("/slurm/N", "/slurm/1").replace("--requeue\n", "--requeue\n#SBATCH --hold\n")
    assert "\necho loaded\nexec " in script
    shown = rft("status", tmp_path / "run")
    assert re.search(rf"run +submitted +{job[1]} pending", shown.stdout) and "JobHeldUser" in shown.stdout
    twice = rft(*words)
    assert twice.returncode == 1 and f"job {job[1]} is pending for this run" in twice.stderr
    gone = rft("cancel", tmp_path / "run")
    assert gone.returncode == 0 and f"job {job[1]} is cancelled" in gone.stdout
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "cancelled"
    assert "rft slurm resume" in rft(*words).stderr


@slurm
def test_status_and_logs(cluster: Cluster, start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(request={"nodes": 2}, steps=2)
    followed = rft("logs", run.folder, "--follow")  # returns when the run has ended
    assert run.state["status"] == "finished"
    assert "attempt 1 begins at step 0" in followed.stdout and "supervise: finished" in followed.stdout
    done = rft("status", run.folder)
    assert re.search(r"run +finished +(-|\d+ completing) +only +2 +1 ", done.stdout) and "Slurm:" not in done.stdout
    assert "no such log" in rft("logs", run.folder, "--attempt", "7").stderr
    assert rft("status", tmp_path / "none").returncode == 1
    # no command, and a controller that does not answer
    done = rft("status", run.folder, PATH="/nowhere")
    assert done.returncode == 0 and "finished" in done.stdout and "no squeue on the path" in done.stdout
    conf = cluster.folder / "etc" / "dead.conf"
    text = (cluster.folder / "etc" / "slurm.conf").read_text()
    conf.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text))
    done = rft("status", run.folder, SLURM_CONF=str(conf))
    assert done.returncode == 0 and "finished" in done.stdout and "controller does not answer" in done.stdout
    done = rft("cancel", run.folder)
    assert done.returncode == 1 and "is finished" in done.stderr


def test_the_script_says_what_was_asked_and_ends_in_the_supervisor(tmp_path: Path) -> None:
    request = Request(
        nodes=2, gpus_per_node=4, time="1-12", partition="p", account="a", signal_lead=120,
        sbatch=("--constraint=h100", "-C x"), setup=("module load cuda", 'export A="$HOME"'),
    )  # fmt: skip
    text = script(request, tmp_path / "a b%c" / "1", name="my run", array="0-3%2")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=4", "#SBATCH --time=1-12",
        "#SBATCH --signal=B:USR1@120", "#SBATCH --open-mode=append", "#SBATCH --requeue", "#SBATCH --array=0-3%2",
        '#SBATCH --job-name="my run"', "#SBATCH --constraint=h100", "#SBATCH -C x", "module load cuda", 'export A="$HOME"',
        f'#SBATCH --output="{tmp_path}/a b%%c/1/%A_%a.log"',
    ):  # fmt: skip
        assert line in lines, line
    assert lines[-1] == f"exec {sys.executable} -m rft.cluster.supervise '{tmp_path}/a b%c/1'"
    assert "--cpus-per-task" not in text and "--gpus-per-node" not in script(Request(), tmp_path, name="x")


def test_a_users_template(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sbatch"
    mine.write_text("#!/bin/bash -l\n@options@\nulimit -n 65536\n@setup@\n@supervise@\n")
    assert "\nulimit -n 65536\n" in script(Request(template=str(mine)), tmp_path, name="x")
    mine.write_text("#!/bin/bash\n@options@\n@setup@\n")
    with pytest.raises(ClusterError, match="needs @supervise@ once, and has it 0 times"):
        script(Request(template=str(mine)), tmp_path, name="x")


def test_time_limits() -> None:
    seconds = {"90": 5400, "1:30": 90, "4:00:00": 14400, "2-12": 216000, "1-0:30": 88200, "1-1:1:1": 90061}
    assert {limit: seconds_of(limit) for limit in seconds} == seconds
    for wrong in ("4h", "1:2:3:4", "", "-1", "1-"):
        if wrong:
            with pytest.raises(ClusterError, match="no time limit"):
                check_request(Request(time=wrong))


def test_what_slurm_says_is_handed_on() -> None:
    error = refusal("sbatch: error: Batch job submission failed: Invalid account or account/partition combination\n", Request())
    assert "Invalid account" in error.what


def test_the_supervisor_needs_no_torch() -> None:
    import subprocess

    program = "import sys, rft.cluster.supervise, rft.cluster.rank, rft.cluster.slurm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "False\n", done.stderr
