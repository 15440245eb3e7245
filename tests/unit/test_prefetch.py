"""Decoding ahead: real workers on real files, stopped and killed at every bad moment."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from rft.data import prefetch
from rft.data.frames import FrameStore
from rft.data.media import read
from rft.data.prefetch import Prefetcher
from rft.errors import DataError
from rft.types import View
from tests.unit.test_frames import BYTES, ROOT, clip


class Deadly(View):
    """A view that kills the worker that is given it."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> View:
    return clip(tmp_path_factory.mktemp("clip") / "a.mp4")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, shown: View) -> Iterator[Prefetcher]:
    """One worker that has started, for all tests: a start costs seconds."""
    with Prefetcher(FrameStore(1000 * BYTES, tmp_path_factory.mktemp("store")), 1) as prefetcher:
        first = replace(shown, size=(28, 28))
        prefetcher.ahead([first])
        until(lambda: prefetcher._store.has(first))
        yield prefetcher


def idle(prefetcher: Prefetcher) -> None:
    """Wait until nothing runs: a view is in the store before its worker says so, and one that is stopped never does."""

    def is_idle() -> bool:
        with prefetcher._changed:
            return not prefetcher._queue and not prefetcher._running

    until(is_idle)


def views(shown: View, number: int) -> list[View]:
    """Eight views that no other test asks for."""
    return [replace(shown, frames=(k, number + 10, number + 20, number + 21)) for k in range(8)]


def worker(prefetcher: Prefetcher) -> int:
    return prefetcher._processes[0].pid


def test_what_is_decoded_ahead_is_there(ready: Prefetcher, shown: View) -> None:
    store, wanted = ready._store, views(shown, 0)
    ready.ahead(wanted)
    until(lambda: all(map(store.has, wanted)))
    misses = store.misses
    for view in wanted:
        np.testing.assert_array_equal(store.get(view), read(view))
    assert (store.misses, ready.restarts) == (misses, 0)


def test_what_runs_is_waited_for_and_what_waits_is_not(ready: Prefetcher, shown: View) -> None:
    store, (running, queued, later, *_) = ready._store, views(shown, 1)
    idle(ready)
    misses, pid = store.misses, worker(ready)
    os.kill(pid, signal.SIGSTOP)
    try:
        ready.ahead([running, queued, later])
        until(lambda: ready._running)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(store.get, running) for _ in range(2)]
            np.testing.assert_array_equal(store.get(queued), read(queued))
            assert store.misses == misses + 1
            assert len(ready._queue) == 1  # nobody decodes it a second time
            assert not any(future.done() for future in waiting)
            os.kill(pid, signal.SIGCONT)
            for future in waiting:
                np.testing.assert_array_equal(future.result(30), read(running))
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: store.has(later))
    assert store.misses == misses + 1


def test_what_is_needed_first_is_not_pushed_out(ready: Prefetcher, shown: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "MAX_QUEUED", 3)
    store, (first, *rest) = ready._store, views(shown, 2)
    idle(ready)
    pid = worker(ready)
    os.kill(pid, signal.SIGSTOP)
    try:
        ready.ahead([first])
        until(lambda: ready._running)
        ready.ahead([*rest, *rest])  # twice: no view waits twice
        assert list(ready._queue.values()) == rest[:3]
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: all(map(store.has, rest[:3])))
    assert not any(map(store.has, rest[3:]))


def test_bad_media_is_the_error_of_whoever_gets_it(ready: Prefetcher, tmp_path: Path) -> None:
    store, broken = ready._store, clip(tmp_path / "broken.mp4")
    gone = replace(broken, source=str(tmp_path / "gone.mp4"))
    data = (tmp_path / "broken.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(data[: len(data) // 2])

    def messages() -> list[str]:
        found = []
        for view in (broken, gone):
            with pytest.raises(DataError) as caught:
                store.get(view)
            found.append(str(caught.value))
        return found

    before = messages()
    ready.ahead([broken, gone])
    idle(ready)
    assert messages() == before
    assert (ready.restarts, store.has(broken)) == (0, False)


def test_what_cannot_be_kept_is_not_decoded(shown: View) -> None:
    store = FrameStore(BYTES - 1)
    with Prefetcher(store, 1) as prefetcher:
        prefetcher.ahead([shown])
        assert not prefetcher._queue
    store = FrameStore(10 * BYTES)
    with Prefetcher(store, 1) as prefetcher:
        store._full_at = 1 << 60  # the disk was full, and is
        prefetcher.ahead([shown])
        assert not prefetcher._queue


def test_without_workers_everything_is_read_on_demand(shown: View) -> None:
    store = FrameStore(10 * BYTES)
    with Prefetcher(store, 0) as prefetcher:
        prefetcher.ahead([shown])
        assert (store.get(shown).shape, store.misses, prefetcher.restarts) == ((4, 28, 56, 3), 1, 0)


def test_killed_workers_lose_nothing(shown: View) -> None:
    """In the middle of a view, while idle, and by the view itself."""
    store, (first, *rest) = FrameStore(1000 * BYTES), views(shown, 3)
    deadly = Deadly(**{f.name: getattr(shown, f.name) for f in fields(View)})
    with Prefetcher(store, 1) as prefetcher, ThreadPoolExecutor(1) as pool:
        until(lambda: prefetcher._processes)
        os.kill(worker(prefetcher), signal.SIGSTOP)  # while it starts
        os.kill(worker(prefetcher), signal.SIGKILL)
        until(lambda: prefetcher.restarts == 1)
        prefetcher.ahead([rest[0]])
        until(lambda: store.has(rest[0]))
        idle(prefetcher)
        os.kill(worker(prefetcher), signal.SIGSTOP)
        prefetcher.ahead([first, deadly, *rest])
        until(lambda: prefetcher._running)
        waiting = pool.submit(store.get, first)
        until(lambda: store._reading)
        os.kill(worker(prefetcher), signal.SIGKILL)
        np.testing.assert_array_equal(waiting.result(30), read(first))
        until(lambda: all(map(store.has, rest)))
        assert prefetcher.restarts == 4  # one at the start, one with `first`, two by `deadly`
        prefetcher.ahead([deadly])
        assert not prefetcher._queue and not store.has(deadly)
        np.testing.assert_array_equal(store.get(deadly), read(shown))
        assert store.misses <= 2 and not list(store.folder.glob("part@*"))


def test_workers_that_never_start_are_given_up(
    shown: View, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    store = FrameStore(10 * BYTES)
    with Prefetcher(store, 2) as prefetcher:
        prefetcher.ahead([shown])
        until(lambda: not any(thread.is_alive() for thread in prefetcher._threads))
        assert store.get(shown).shape == (4, 28, 56, 3)
    assert capfd.readouterr().err.count("did not start") == 2


PARENT = """
import os, pickle, sys, time
from pathlib import Path
from rft.data.frames import FrameStore
from rft.data.prefetch import Prefetcher
view = pickle.loads(Path(sys.argv[1]).read_bytes())
p = Prefetcher(FrameStore(2**20), 1)
p.ahead([view])
while not p._running: time.sleep(0.01)
print(p._processes[0].pid, *{name.split(".")[0] for name in sys.modules}, flush=True)
if sys.argv[2] == "kill": os.kill(os.getpid(), 9)
"""


def test_workers_die_with_the_parent_even_over_a_file_that_hangs(shown: View, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs")
    (tmp_path / "view").write_bytes(pickle.dumps(replace(shown, source=str(tmp_path / "hangs"))))
    for end in ("kill", "leave"):
        args = [sys.executable, "-c", PARENT, str(tmp_path / "view"), end]
        parent = subprocess.run(args, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
        pid, *loaded = parent.stdout.split()
        assert not {"transformers", "torchvision", "trl"} & set(loaded)
        until(lambda pid=pid: not is_alive(pid))


def is_alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
