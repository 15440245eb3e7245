"""Two real processes that lose each other: the odd rank is named with its sample, and nobody waits for one that is gone."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

import rft.hf  # noqa: F401  # isort: skip  (makes torchvision importable for transformers)
from rft.errors import ClusterError
from rft.hf.together import Together
from rft.hf.watchdog import Meeting, Now, Watchdog, patience

PATIENCE = 2.0
PROCESSES = multiprocessing.get_context("forkserver")  # imports once, for all ranks of all scenes
PROCESSES.set_forkserver_preload([__name__])
SELF = Path(__file__).name


def agrees(together: Together) -> None:
    """Both do the same: control."""
    assert together.gather(together.rank) == [0, 1]
    assert together.total([1.0, together.rank]) == [2.0, 1.0]


def one_more(together: Together) -> None:
    """Rank 0 asks something that rank 1 does not."""
    if together.rank == 0:
        together.any(True)
    together.wait()


def leaves(together: Together) -> None:
    """Rank 1 believes that it is done."""
    if together.rank == 1:
        together.doing("saving")
        together.unwatch()
        time.sleep(60)
    together.wait()


def naps(together: Together, seconds: float = 2.6 * PATIENCE) -> None:
    """Rank 1 needs long for a sample."""
    together.doing("rolling out", [f"clip{together.rank}", f"clip{together.rank + 2}"])
    if together.rank == 1:
        time.sleep(seconds)
    assert together.gather(together.rank) == [0, 1]


def stuck(together: Together) -> None:
    """Rank 1 is in the middle of a sample when the world does something to it."""
    naps(together, 60)


def apart(together: Together) -> None:
    """Both are in a stage in which a framework lets them meet, and rank 1 is lost in it."""
    together.doing("training", [f"clip{together.rank}"], meets=True)
    time.sleep(60)


SCENES = {f.__name__: f for f in (agrees, one_more, leaves, naps, stuck, apart)}


def play(scene: str, rank: int, folder: Path, environment: dict[str, str]) -> None:
    """One rank of a scene, in a process of its own."""
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "ACCELERATE_"))]:
        del os.environ[name]
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    together = Together.join()
    together.watch(folder / "ranks", ended=lambda reason: (folder / "reason").write_text(reason) and None)
    try:
        SCENES[scene](together)
    except ClusterError as error:
        sys.exit(f"ClusterError: {error}")
    finally:
        atexit._run_exitfuncs()  # as in a program of its own


class Pair:
    """Both ranks of a scene."""

    def __init__(self, scene: str, folder: Path, watchdog: str = str(PATIENCE)) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.folder = folder
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RFT_WATCHDOG": watchdog}
        self.ranks = [PROCESSES.Process(target=play, args=(scene, k, folder, environment)) for k in range(2)]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def said(self, rank: int) -> tuple[int, str]:
        """Exit code and stderr of a rank, once it has ended."""
        self.ranks[rank].join(40)
        code = self.ranks[rank].exitcode
        assert code is not None, "still waiting"
        return code, (self.folder / f"stderr-{rank}").read_text()

    def wait_for(self, rank: int, doing: str) -> None:
        """Return when a rank's file says that it does something."""
        path, until = self.folder / "ranks" / f"rank-{rank}.json", time.monotonic() + 40
        while not path.exists() or json.loads(path.read_text())["doing"] != doing:
            assert time.monotonic() < until and self.ranks[rank].is_alive()
            time.sleep(0.05)


def test_ranks_that_agree_say_nothing(tmp_path: Path) -> None:
    with Pair("agrees", tmp_path) as pair:
        for rank in (0, 1):
            code, text = pair.said(rank)
            assert code == 0 and "watchdog" not in text
    assert json.loads((tmp_path / "ranks" / "rank-1.json").read_text())["has_left"]


def test_one_collective_more_is_named_at_once(tmp_path: Path) -> None:
    with Pair("one_more", tmp_path) as pair:
        for rank in (0, 1):
            code, text = pair.said(rank)
            assert code == 1
            asked = re.search(rf"rank 0 in {SELF}:(\d+) in one_more, rank 1 in {SELF}:(\d+) in one_more", text)
            assert asked and int(asked[1]) == int(asked[2]) - 1, text


def test_a_rank_that_has_left_is_not_waited_for(tmp_path: Path) -> None:
    with Pair("leaves", tmp_path) as pair:
        code, text = pair.said(0)
        assert code == 1
        assert re.search(r"ClusterError: rank 0, collective 2 \(test_watchdog.py:\d+ in leaves\): nobody will come", text), text
        assert "rank 1" in text and "has left" in text and "it was saving" in text
        assert (tmp_path / "reason").read_text().startswith("ClusterError: rank 0")  # what a run's state will say


def test_a_slow_rank_is_named_and_waited_for(tmp_path: Path) -> None:
    with Pair("naps", tmp_path) as pair:
        code, text = pair.said(0)
        assert code == 0, text
        lines = [line for line in text.splitlines() if line.startswith("watchdog")]
        assert len(lines) in (1, 2), text  # once per patience
        here = rf"rank 1 \(.+, pid {pair.ranks[1].pid}\), rolling out of samples clip1, clip3 for \d+ s, at {SELF}:\d+ in naps"
        assert re.search(rf"rank 0 has waited \d+ s in collective 2 \({SELF}:\d+ in naps\), for {here}", lines[0]), lines[0]
        assert pair.said(1)[0] == 0


def test_off_is_silent(tmp_path: Path) -> None:
    with Pair("agrees", tmp_path, watchdog="0") as pair:
        assert pair.said(0)[0] == 0 and not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("scene", ["stuck", "apart"])
def test_a_rank_that_stands_still_is_given_up(scene: str, tmp_path: Path) -> None:
    with Pair(scene, tmp_path) as pair:
        pair.wait_for(1, "rolling out" if scene == "stuck" else "training")
        os.kill(pair.ranks[1].pid, signal.SIGSTOP)
        code, text = pair.said(0)
        assert code == 1
        what = "rolling out of samples clip1, clip3" if scene == "stuck" else "training of sample clip1"
        assert re.search(rf"rank 1 \(.+\) has given no sign of life for \d+ s and is stopped; it was {what} for", text), text


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    with Pair("stuck", tmp_path) as pair:
        pair.wait_for(1, "rolling out")
        pair.wait_for(0, "rolling out")
        pair.ranks[1].kill()
        code, text = pair.said(0)
        assert code == 1
        assert re.search(r"ClusterError: rank 0, collective 2 .*: rank 1 \(.+\) is gone.*samples clip1, clip3", text), text


def test_what_is_certain(tmp_path: Path) -> None:
    """A rank that waits in the same collective, or works, may come; one that waits in another never does."""
    now = Now()
    dog = Watchdog(tmp_path, 0, 2, 60.0, now=now)
    mine = Meeting(number=7, call="a.py:1 in f")
    other = {"has_left": False, "host": "elsewhere", "pid": 1, "number": 7, "call": "a.py:1 in f", "waits": 61.0}
    dog._seen[1] = (1, 0)
    assert dog._loss(1, other, mine) == ""
    assert dog._loss(1, {**other, "number": 0}, mine) == ""
    assert dog._loss(1, {**other, "number": 6, "waits": 59.0}, mine) == ""
    assert "collective 6 (a.py:1 in f)" in dog._loss(1, {**other, "number": 6}, mine)
    here = {**other, "host": socket.gethostname(), "pid": os.getpid()}
    dog._seen[1] = (1, 119)  # looks, one every 5 s
    assert dog._loss(1, other, mine) == ""
    dog._seen[1] = (1, 120)
    assert "no sign of life for 600 s" in dog._loss(1, other, mine)
    assert dog._loss(1, here, mine) == ""  # it runs, and only keeps the interpreter busy
    assert "is gone" in dog._loss(1, {**here, "pid": 2**22 + 1}, mine)


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_patience_is_a_number_of_seconds(text: str) -> None:
    assert patience({"RFT_WATCHDOG": "90"}) == 90.0 and patience({"RFT_WATCHDOG": "0"}) == 0.0 and patience({}) == 50.0
    with pytest.raises(ClusterError, match="0 to turn it off"):
        patience({"RFT_WATCHDOG": text})
