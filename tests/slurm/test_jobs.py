"""Jobs on a real Slurm, with a trainer of one number: what follows from every way in which an attempt can end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import pytest

from rft.cluster import queue
from rft.cluster.job import PORTS, free_port
from rft.cluster.slurm import cancel, resume, submit
from rft.errors import ClusterError
from tests.slurm.conftest import Cluster, Run, asking, planned
from tests.slurm.stand_in import trained

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("looping")]


@pytest.fixture(scope="module")
def looping(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that dies at step 3 whenever it gets there. It is looked at last: its requeues take a while."""
    run = planned(tmp_path_factory.mktemp("looping"), steps=9, save_every=1, die_at=3)
    submit([run.folder], asking(), folder=run.folder)
    return run


def check_whole(run: Run, steps: int) -> None:
    """The run is finished and is what it would be without interruptions."""
    assert run.state["status"] == "finished"
    assert (run.folder / "weights").read_text() == trained(steps)
    assert len(set(run.steps)) == steps


def test_a_job_runs_on_every_node(start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2, "gpus_per_node": 2}, steps=3)
    run.until_status("finished")
    run.until_gone()
    check_whole(run, 3)
    assert queue.ended(run.job) == "COMPLETED"
    assert [a.ended for a in run.attempts] == ["finished"] and run.attempts[0].nodes == ("n1", "n2")
    assert {p.name for p in (run.folder / "attempts" / "1").glob("node-*.log")} == {"node-0.log", "node-1.log"}


def test_a_warning_saves_and_the_job_comes_back(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2}, steps=40, save_every=0)
    run.until_step(5)
    cluster.warn(run.job)
    run.until_status("stopped")
    assert run.state["reason"] == "SIGUSR1 to the job"
    run.until_status("finished")
    check_whole(run, 40)
    assert run.steps == list(range(1, 41)), "a step was lost or trained twice"
    assert len(run.began) == 2 and run.began[1] >= 5
    assert [a.restart for a in run.attempts] == [0, 1]


def test_a_finished_run_needs_no_job(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(steps=2)
    run.until_status("finished")
    script = next(run.folder.glob("slurm/1/job.sbatch"))
    again = cluster.call("sbatch", "--parsable", f"--dependency=afterany:{run.job}", str(script))
    run.until(lambda run: queue.ended(again) == "COMPLETED")
    assert len(run.attempts) == 1
    with pytest.raises(ClusterError, match="is finished"):
        submit([run.folder], asking(), folder=run.folder)


def test_two_jobs_never_train_one_run(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(steps=45)
    run.until_step(1)
    with pytest.raises(ClusterError, match=r"is training this run|is running for this run"):
        submit([run.folder], asking(), folder=run.folder)
    script = next(run.folder.glob("slurm/1/job.sbatch"))
    second = cluster.call("sbatch", "--parsable", str(script))  # past the refusal, by hand
    run.until(lambda run: queue.ended(second) == "FAILED")
    assert run.state["status"] == "running" and len(run.attempts) == 1
    run.until_status("finished")
    check_whole(run, 45)


def test_what_fails_is_not_tried_again(start: Callable[..., Run]) -> None:
    run = start(steps=5, fail_at=2)
    run.until_gone()
    assert run.state["status"] == "failed" and run.state["reason"] == "ValueError: it went wrong"
    assert len(run.attempts) == 1 and queue.ended(run.job) == "FAILED"


def test_what_never_begins_says_why(start: Callable[..., Run]) -> None:
    run = start(request={"command": (sys.executable, "-c", "import no_such_module")})
    run.until_gone()
    assert run.state["status"] == "failed" and "No module named 'no_such_module'" in run.state["reason"]
    assert len(run.attempts) == 1


def test_restarts_are_counted(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"max_restarts": 0}, steps=50)
    run.until_step(2)
    cluster.warn(run.job)
    run.until_gone()
    assert run.state["status"] == "stopped" and "all 0 restarts are used up" in run.state["reason"]
    assert len(run.attempts) == 1


def test_a_users_stop_file_is_not_overruled(start: Callable[..., Run]) -> None:
    run = start(steps=50)
    run.until_step(2)
    (run.folder / "stop").write_text("lunch")
    run.until_gone()
    assert run.state["status"] == "stopped" and run.state["reason"] == "lunch"
    assert queue.ended(run.job) == "COMPLETED" and len(run.attempts) == 1


def test_cancel_leaves_nothing_and_resume_goes_on(start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2}, steps=40)
    run.until_step(5)
    assert run.processes()
    first = run.job
    assert cancel(run.folder) == first
    assert not queue.queued([first]) and not run.processes()
    assert run.state["status"] == "cancelled"
    assert resume(run.folder) != first
    run.until_status("finished")
    check_whole(run, 40)
    assert run.began[1] >= 5


def test_scancel_by_hand_is_a_cancel(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(steps=50)
    run.until_step(2)
    cluster.call("scancel", run.job)
    run.until_status("cancelled")
    run.until_gone()
    assert len(run.attempts) == 1


def test_where_a_requeue_is_refused_another_job_goes_on(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"sbatch": ("--no-requeue",)}, steps=40)
    run.until_step(2)
    first = run.job
    cluster.warn(first)
    run.until(lambda run: run.job != first)
    run.until_status("finished")
    check_whole(run, 40)
    assert [a.job for a in run.attempts] == [first, run.job] and [a.restart for a in run.attempts] == [0, 0]


def test_a_port_in_use_is_passed_over() -> None:
    job = 4711
    with socket.create_server(("127.0.0.1", PORTS[job])):
        port = free_port(job)
        assert port != PORTS[job]
        with socket.create_server(("", port)):
            assert free_port(job) not in (PORTS[job], port)
    assert free_port(job) == PORTS[job]


def test_an_array_runs_so_many_at_once_and_one_failure_stops_no_other(
    cluster: Cluster, prepare: Callable[..., Run], tmp_path: os.PathLike[str]
) -> None:
    runs = [prepare(f"trial-{i}", steps=12, **({"fail_at": 2} if i == 1 else {})) for i in range(4)]
    job = submit([run.folder for run in runs], asking(), folder=tmp_path, max_running=2)
    seen = 0
    while jobs := queue.queued([job]):
        running = [j for j in jobs.values() if j.state == "RUNNING"]
        seen = max(seen, len(running))
        assert len(running) <= 2, running
    assert seen == 2
    assert [run.state["status"] for run in runs] == ["finished", "failed", "finished", "finished"]
    assert [run.job for run in runs] == [f"{job}_{i}" for i in range(4)]
    # what is left is submitted alone
    (runs[1].folder / "stand_in.json").write_text('{"steps": 12}')
    submit([runs[1].folder], asking(), folder=tmp_path)
    runs[1].until_status("finished")
    check_whole(runs[1], 12)
    assert [len(run.attempts) for run in runs] == [1, 2, 1, 1]


def test_an_element_that_bears_the_arrays_id_comes_back_alone(
    cluster: Cluster, prepare: Callable[..., Run], tmp_path: os.PathLike[str]
) -> None:
    runs = [prepare(f"trial-{i}", steps=40) for i in range(3)]
    job = submit([run.folder for run in runs], asking(), folder=tmp_path)
    for run in runs:
        run.until_step(1)
    own = cluster.call("squeue", "-h", "-r", "-j", job, "-o", "%A %i").splitlines()
    same = [run for run in runs if f"{job} {run.job}" in own]
    assert len(same) == 1, "Slurm gives the array's id to one of its elements"
    cluster.warn(same[0].job)
    for run in runs:
        run.until_status("finished")
        check_whole(run, 40)
        assert len(run.attempts) == (2 if run is same[0] else 1)


def test_a_crash_loop_ends(looping: Run) -> None:
    looping.until_status("failed")
    assert "2 attempts in a row brought nothing new: each began from only-000003" in looping.state["reason"]
    # the first reaches step 3, two more begin there and get nowhere
    assert looping.began == [0, 3, 3]
    assert [a.mark for a in looping.attempts] == ["", "only-000003", "only-000003"]
