"""The decoded-frame store: every forward over a sample sees the same bytes, and each is decoded once while it stays.

Rollout, old and reference log-probs and the training forward all ask here. Only `get` is promised, so that a store on
disk may take this one's place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np

from rft.data.media import read, stamp
from rft.types import View


class FrameStore:
    """Pixels of views in memory, least recently used out first. Safe to share between threads.

    `hits`, `misses` and `bytes` (held now) are for the log. A view larger than `max_bytes` is read and not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple, Future[np.ndarray]] = OrderedDict()

    def get(self, view: View) -> np.ndarray:
        """uint8 [frames, height, width, 3] of `read(view)`, read-only. Raises what `read` raises, every time."""
        paths = (view.source,) if isinstance(view.source, str) else view.source
        key = (view.source, view.frames, view.size, view.crop, tuple(stamp(p) for p in paths))
        with self._lock:
            future = self._kept.get(key)
            if is_mine := future is None:
                self.misses += 1
                future = self._kept[key] = Future()
            else:
                self.hits += 1
                self._kept.move_to_end(key)
        if is_mine:
            self._fill(key, future, view)
        return future.result()

    def _fill(self, key: tuple, future: Future[np.ndarray], view: View) -> None:
        """Read outside the lock; whoever asks for the same view meanwhile waits on the same future."""
        try:
            pixels = read(view)
        except BaseException as error:
            with self._lock:
                del self._kept[key]
            future.set_exception(error)
            return
        pixels.flags.writeable = False
        with self._lock:
            future.set_result(pixels)
            self.bytes += pixels.nbytes
            while self.bytes > self.max_bytes:
                oldest = next(k for k, f in self._kept.items() if f.done())  # this very view, if all others are being read
                self.bytes -= self._kept.pop(oldest).result().nbytes
