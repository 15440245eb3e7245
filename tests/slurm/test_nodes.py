"""What Slurm does to jobs: preemption with and without notice, nodes that go, limits that end a job."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rft.cluster import queue
from tests.slurm.conftest import Cluster, Run, running
from tests.slurm.test_jobs import check_whole

pytestmark = pytest.mark.slurm
EVICT = ("sbatch", "-p", "high", "-N2", "--exclusive", "--mem=0", "-o", "/dev/null", "--wrap", "sleep 2")


def test_preemption_with_the_users_signal(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2}, steps=40, save_every=0)
    run.until_step(3)
    cluster.call(*EVICT)
    run.until_status("finished")
    check_whole(run, 40)
    assert run.steps == list(range(1, 41)) and run.began[1] >= 3
    assert [a.preempted for a in run.attempts] == [True, False]


def test_preemption_that_tells_the_tasks_alone(start: Callable[..., Run]) -> None:
    """A site without preempt_send_user_signal: SIGTERM to the trainer, nothing to the batch script."""
    with running("SlurmctldParameters=idle_on_node_suspend") as cluster:
        run = start(request={"nodes": 2}, steps=40, save_every=0)
        run.until_step(3)
        cluster.call(*EVICT)
        run.until_status("stopped")
        assert run.state["reason"] == "SIGTERM"
        run.until_status("finished")
    check_whole(run, 40)
    assert run.steps == list(range(1, 41)) and run.began[1] >= 3


def test_preemption_without_notice(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2}, steps=100, save_every=10, deaf=True)
    cluster.call("scontrol", "update", "partitionname=main", "gracetime=0")
    try:
        run.until_step(15)
        cluster.call(*EVICT)
        run.until(lambda run: len(run.attempts) == 2)
    finally:
        cluster.call("scontrol", "update", "partitionname=main", "gracetime=15")
    run.until_status("finished")
    check_whole(run, 100)
    assert run.began[1] >= 10 and run.began[1] % 10 == 0, "it goes on from the last checkpoint"
    again = list(range(run.began[1] + 1, 101))  # none was lost twice, and what came after that checkpoint is done again
    before = run.steps[: -len(again)]
    assert run.steps[-len(again) :] == again and before == list(range(1, len(before) + 1)) and len(before) >= run.began[1]
    assert [a.preempted for a in run.attempts] == [True, False]


def test_a_lost_node_brings_the_job_back(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2}, steps=40, save_every=5)
    run.until_step(8)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    run.until(lambda run: len(run.began) == 2)
    run.until_status("finished")
    check_whole(run, 40)
    assert run.began[1] >= 5 and run.attempts[0].failed_nodes == ("n2",)


def test_a_lost_node_where_requeue_is_refused(cluster: Cluster, start: Callable[..., Run]) -> None:
    run = start(request={"nodes": 2, "sbatch": ("--no-requeue",)}, steps=40, save_every=5)
    run.until_step(8)
    first = run.job
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    run.until_status("finished", seconds=120)
    check_whole(run, 40)
    assert run.job != first and run.began[1] >= 5


def test_a_node_that_failed_twice_is_avoided(cluster: Cluster, start: Callable[..., Run]) -> None:
    cluster.call("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        run = start(steps=80, save_every=1)
        for failures in (1, 2):
            run.until(lambda run, n=failures: len(run.began) == n and run.state["status"] == "running" and run.steps)
            assert run.attempts[-1].nodes == ("n1",)
            if failures == 1:
                cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    finally:
        cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    run.until(lambda run: len(run.began) == 3)
    assert run.attempts[-1].nodes == ("n2",)
    assert [a.failed_nodes for a in run.attempts[:2]] == [("n1",), ("n1",)]
    assert queue_excludes(run) == "n1"
    run.until_status("finished")
    check_whole(run, 80)


def queue_excludes(run: Run) -> str:
    """The nodes that a run's job stays away from."""
    job = queue.shown(run.job)
    assert job
    return job.excluded


@pytest.mark.slow
def test_a_crash_during_a_save_costs_that_save_only(cluster: Cluster, start: Callable[..., Run]) -> None:
    """Power cut on the node that writes: after it is called down the job begins elsewhere, from the last whole checkpoint."""
    run = start(steps=12, save_every=4, save_seconds=3.0)
    run.until(lambda run: (run.folder / "checkpoints" / ".saving-only-000008").is_dir())
    node = run.attempts[0].nodes[0]
    cluster.control("crash", node)
    try:
        run.until(lambda run: len(run.began) == 2, seconds=150)
        run.until_status("finished")
    finally:
        cluster.control("boot", node)
    check_whole(run, 12)
    assert run.began == [0, 4] and run.attempts[0].failed_nodes == (node,)
    assert run.attempts[1].nodes != (node,)


@pytest.mark.slow
def test_a_real_limit_of_one_minute(start: Callable[..., Run]) -> None:
    """One run saves when it is warned; one does not listen, is killed at the limit, and goes on from its last checkpoint."""
    heard = start("heard", request={"time": "1", "signal_lead": 20}, steps=100, seconds=0.7, save_every=0)
    deaf = start("deaf", request={"time": "1", "signal_lead": 20}, steps=100, seconds=1.2, save_every=10, deaf=True)
    for run in (heard, deaf):
        run.until_status("finished", seconds=280)
        check_whole(run, 100)
    assert heard.steps == list(range(1, 101)), "a step was lost or trained twice"
    assert len(heard.began) >= 2 and len(deaf.began) >= 2 and deaf.began[1] % 10 == 0
