"""Decoding ahead of need: worker processes fill the frame store while the device works.

Each thread here keeps one worker: a fresh interpreter (never a fork, since this process may hold a device) that reads
pickled views from its standard input and answers each with one byte once the store has been filled. A worker that dies
closes its pipe, so the view it died over is known for certain.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import torch

from rft.data.frames import FrameStore, entry_name, num_bytes
from rft.errors import DataError
from rft.types import View

MAX_QUEUED = 64  # views that wait for a worker
MAX_STILLBORN = 3  # workers in a row that did not even start
DONE = b"."


class Prefetcher:
    """Fills `store` from `workers` processes; with none, everything is read on demand. One to a store.

    `restarts` counts the workers that died and were replaced. A view over which two died is left to whoever needs it.
    """

    def __init__(self, store: FrameStore, workers: int) -> None:
        self.restarts = 0
        self._store = store
        self._queue: OrderedDict[str, View] = OrderedDict()
        self._running: dict[str, Future[None]] = {}
        self._deaths: Counter[str] = Counter()
        self._processes: dict[int, subprocess.Popen] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._serve, args=(n,), daemon=True) for n in range(workers)]
        if self._threads:
            store.pending = self._take_over
            atexit.register(self.close)  # before the store removes its folder
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ahead(self, views: Iterable[View]) -> None:
        """Have the views decoded that the store does not hold, in this order. Returns at once.

        While 64 wait no more are taken: those are needed first. What cannot be read is left to whoever gets it.
        """
        for view in views if self._threads else ():
            if self._store.is_full or num_bytes(view) > self._store.max_bytes or self._store.has(view):
                continue  # what is not kept would be decoded twice
            with suppress(DataError), self._changed:
                name = entry_name(view)
                if name not in self._running and self._deaths[name] < 2 and len(self._queue) < MAX_QUEUED:
                    self._queue.setdefault(name, view)
                    self._changed.notify()

    def close(self) -> None:
        """Stop the workers, whatever they do."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            for process in self._processes.values():
                process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(5)  # but not for one that the kernel holds
        atexit.unregister(self.close)
        self._store.sweep()

    def _take_over(self, name: str) -> Future[None] | None:
        """The future of a view that a worker decodes now. One that still waits for a worker leaves the queue."""
        with self._changed:
            self._queue.pop(name, None)
            return self._running.get(name)

    def _serve(self, number: int) -> None:
        """The life of one worker and of its successors."""
        stillborn = 0
        while stillborn < MAX_STILLBORN:
            with self._changed:
                if self._is_closed:
                    return
                process = self._processes[number] = _start(self._store)
            with process:
                # It imports for seconds: until it says that it is ready nothing waits for it.
                is_alive = process.stdout.read(1) == DONE
                stillborn = 0 if is_alive else stillborn + 1
                while is_alive and (claim := self._claim()):
                    is_alive = self._decode(process, *claim)
                process.kill()
                with suppress(OSError):
                    process.stdin.close()  # may hold what the dead one did not take
            with self._changed:
                self.restarts += not self._is_closed
        print(f"prefetch: {MAX_STILLBORN} workers in a row did not start; one less decodes ahead", file=sys.stderr)

    def _claim(self) -> tuple[str, View, Future[None]] | None:
        """The next view, from now on running; None when closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return None
                name, view = self._queue.popitem(last=False)
                if not self._store.has(view):
                    future = self._running[name] = Future()
                    return name, view, future

    def _decode(self, process: subprocess.Popen, name: str, view: View, future: Future[None]) -> bool:
        """Whether the worker lived through it. If not the view is first in the queue again, the first time."""
        is_alive, is_blamed = False, process.poll() is None  # one that died while it was idle died of something else
        with suppress(OSError):
            pickle.dump(view, process.stdin)
            process.stdin.flush()
            is_alive = process.stdout.read(1) == DONE
        with self._changed:
            del self._running[name]
            if not is_alive and not self._is_closed:
                self._deaths[name] += is_blamed
                if self._deaths[name] < 2:
                    self._queue[name] = view
                    self._queue.move_to_end(name, last=False)
                    self._changed.notify()
        future.set_result(None)
        return is_alive


def _start(store: FrameStore) -> subprocess.Popen:
    """A worker that imports from where this process does, but not what it does. Ctrl-C is not for it."""
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rft.data.prefetch", str(store.folder), str(store.max_bytes), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RFT_DECODE_THREADS": "1"},
        process_group=0,
    )


def work(folder: Path, max_bytes: int, parent: int) -> None:
    """A worker's life: views in, a byte each out, until the parent is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    store = FrameStore(max_bytes, folder)
    store.max_maps = 0  # it looks at nothing
    os.write(answers, DONE)
    with suppress(EOFError, BrokenPipeError):
        while True:
            view = pickle.load(sys.stdin.buffer)
            with suppress(Exception):  # whoever needs the frames reads them and meets the error
                store.get(view)
            os.write(answers, DONE)


def _die_with(parent: int) -> None:
    """Also in the middle of a file that hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
