"""The decoded-frame store: a view is decoded once, then it is a file that every forward maps into memory.

An entry holds raw uint8 pixels behind a short header, and its name is a digest of all that determines them: source files
and their stamps, frames, sizes, crop, and what decodes. It is written beside its place and renamed, so that a reader finds
all of it or nothing, and it is checked the first time a process opens it. Several processes may share a folder.

A file whose content changes while its time of change and its size do not is taken for the same file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import PIL
import torch

from rft.data import media
from rft.data.media import read, stamp
from rft.errors import DataError
from rft.types import View

HEADER = struct.Struct("<8s20s3II20x")  # magic, digest, frames, height, width, CRC-32 of what precedes and of the pixels
MAGIC = b"rftfrm01"
SUFFIX = ".frames"
# Other code or libraries may give other pixels: their entries have other names.
CODE = hashlib.blake2b(Path(media.__file__).read_bytes()).hexdigest()
DECODER = repr((CODE, av.__version__, av.library_versions, torch.__version__, PIL.__version__))
OLD = 3600.0  # seconds after which nobody still writes a temporary file
PATIENCE = 120.0  # seconds to wait for another process that decodes what is wanted now


def entry_name(view: View) -> str:
    """The digest that names the pixels of a view. Raises DataError when a file that it shows is not there."""
    paths = (view.source,) if isinstance(view.source, str) else tuple(view.source[i] for i in view.frames)
    crop = view.crop and tuple(map(int, view.crop))
    return _digest((view.kind, paths, tuple(map(stamp, paths)), view.frames, view.size, view.original, crop))


@lru_cache(maxsize=4096)
def _digest(key: tuple) -> str:
    return hashlib.blake2b(repr((DECODER, key)).encode(), digest_size=20).hexdigest()


def num_bytes(view: View) -> int:
    """Of the pixels of a view."""
    return len(view.frames) * view.size[0] * view.size[1] * 3


class FrameStore:
    """Pixels of views in the files of a folder, the least recently used out first. Safe to share between threads.

    `folder` may outlive the process and be shared with others; None is a private one that is removed at exit. A view that
    is larger than `max_bytes`, or that the disk has no room for, is read and not kept. For the log: `misses` (decoded by
    this process because somebody waited for it), `hits` (all others), `rebuilt` (entries found damaged), `bytes` (of
    pixels held; what other processes wrote is seen after a while).

    `pending` is asked for the future of whoever decodes an entry at this moment, before this process would.
    """

    max_maps = 256  # files held open; a caller may hold an array for longer
    max_names = 16_384  # views whose entries are remembered, for when their files go away

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self.max_bytes = max_bytes
        self.folder = Path(folder) if folder else _private_folder()
        if not folder:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        self.hits = self.misses = self.rebuilt = 0
        self.bytes = sum(size for _, size, _ in self._entries())
        self.pending: Callable[[str], Future | None] = _nobody
        self._lock = threading.Lock()
        self._reading: dict[str, Future[np.ndarray]] = {}
        self._maps: OrderedDict[str, tuple[tuple, np.ndarray]] = OrderedDict()
        self._names: OrderedDict[View, str] = OrderedDict()  # the entry that each view was last found in
        self._sound: dict[str, tuple] = {}  # which version of an entry was checked
        self._unseen = 0  # bytes written since the folder was last listed
        self._full_at: int | None = None  # free bytes of the disk when writing failed

    def get(self, view: View) -> np.ndarray:
        """uint8 [frames, height, width, 3] of `read(view)`, read-only.

        A file may go away between two looks at it: what this process was shown of it before is shown again, while the entry
        is kept. Else raises what `read` raises, every time.
        """
        try:
            name = entry_name(view)
            frames = self._get(name, view)
        except DataError:
            with self._lock:
                name = self._names.get(view, "")
                frames = self._held(name)
            frames = self._open(name, view) if name and frames is None else frames
            if frames is None:
                raise
        with self._lock:
            self._names[view] = name
            self._names.move_to_end(view)
            while len(self._names) > self.max_names:
                self._names.popitem(last=False)
        return frames

    def _get(self, name: str, view: View) -> np.ndarray:
        with self._lock:
            frames = self._held(name)
            future = self._reading.get(name)
            if is_mine := frames is None and future is None:
                future = self._reading[name] = Future()
            else:
                self.hits += 1
        if is_mine:
            self._fill(name, view, future)
        return future.result() if frames is None else frames

    @property
    def is_full(self) -> bool:
        """Whether the disk refused the last entry. Storing goes on once its bytes are free."""
        return self._full_at is not None

    def has(self, view: View) -> bool:
        """Whether a whole entry lies there. Its pixels are not looked at."""
        with suppress(DataError, OSError):
            return os.stat(self._path(entry_name(view))).st_size == HEADER.size + num_bytes(view)
        return False

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for path in self.folder.glob("part@*"):
            with suppress(OSError):
                if _is_orphan(path) or time.time() - path.stat().st_mtime > OLD:
                    path.unlink()

    def _fill(self, name: str, view: View, future: Future[np.ndarray]) -> None:
        """Outside the lock; whoever asks for the same view meanwhile waits on the same future."""
        try:
            while (other := self.pending(name)) and wait([other], PATIENCE).done:
                pass  # it may have died over it, and another taken its place
            frames = self._open(name, view)
            with self._lock:
                self.misses += frames is None
                self.hits += frames is not None
            if frames is None:
                frames = read(view)
                if entry_name(view) != name:
                    source = view.source if isinstance(view.source, str) else view.source[0]
                    raise DataError(source, "changed while it was read", "wait until nobody writes to it")
                frames.flags.writeable = False
                if self._write(name, frames):
                    mapped = self._open(name, view)
                    frames = frames if mapped is None else mapped
            future.set_result(frames)
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._reading[name]

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name + SUFFIX)

    def _held(self, name: str) -> np.ndarray | None:
        """The map of an entry that is open already, provided that it is still the file it was."""
        if name not in self._maps:
            return None
        identity, frames = self._maps[name]
        if self._touch(name) != identity:
            del self._maps[name]
            return None
        self._maps.move_to_end(name)
        return frames

    def _touch(self, name: str) -> tuple[int, int, int] | None:
        """Mark as used now, for all processes: by the time of access. Gives what `_seen` gives."""
        if identity := self._seen(name):
            with suppress(OSError):
                os.utime(self._path(name), ns=(time.time_ns(), identity[1]))
        return identity

    def _seen(self, name: str) -> tuple[int, int, int] | None:
        """The identity of the file, None where there is none."""
        with suppress(OSError):
            return _identity(os.stat(self._path(name)))
        return None

    def _open(self, name: str, view: View) -> np.ndarray | None:
        """Map an entry, checked when this process has not yet. A damaged one is removed."""
        shape = (len(view.frames), *view.size, 3)
        try:
            with open(self._path(name), "rb") as file:
                identity = _identity(os.fstat(file.fileno()))
                if self._sound.get(name) != identity and not _is_sound(file, name, shape):
                    self.rebuilt += 1
                    os.unlink(self._path(name))
                    return None
                frames = np.memmap(file, np.uint8, "r", HEADER.size, shape).view(np.ndarray)
        except (OSError, ValueError):  # evicted, cut short or unreadable in between: a miss
            return None
        self._touch(name)
        with self._lock:
            self._sound[name], self._maps[name] = identity, (identity, frames)
            self._let_go()
        return frames

    def _let_go(self) -> None:
        """Close maps: too many, or of entries that others evicted, which keep their place on the disk while mapped."""
        gone = [name for name, (identity, _) in self._maps.items() if identity != self._seen(name)]
        for name in [*gone, *list(self._maps)[: max(len(self._maps) - self.max_maps, 0)]]:
            self._maps.pop(name, None)

    def _write(self, name: str, frames: np.ndarray) -> bool:
        """Store an entry. A reader sees nothing or the whole; no fsync, since the check finds what a power cut leaves."""
        if frames.nbytes > self.max_bytes:
            return False
        part = self.folder / f"part@{_owner()}@{name}.{threading.get_ident()}"
        head = HEADER.pack(*_heading(name, frames.shape), 0)
        head = HEADER.pack(*_heading(name, frames.shape), zlib.crc32(frames, zlib.crc32(head)))
        try:
            if self._full_at is not None:
                with self._lock:
                    self._let_go()
                if _free(self.folder) < self._full_at + frames.nbytes:
                    return False
            self._make_room(frames.nbytes)
            try:
                with open(part, "wb") as file:
                    file.write(head)
                    file.write(frames)
                    file.flush()
                    now = time.time_ns()  # the file system's own clock ticks in milliseconds
                    os.utime(file.fileno(), ns=(now, now))
                    identity = _identity(os.fstat(file.fileno()))
                os.replace(part, self._path(name))
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            if self._full_at is None:
                print(f"decoded frames are not stored in {self.folder} for now: {error.strerror}", file=sys.stderr)
            self._full_at = _free(self.folder)
            return False
        with self._lock:
            self._full_at, self._sound[name] = None, identity
            self.bytes += frames.nbytes
        return True

    def _make_room(self, need: int) -> None:
        """Evict until `need` bytes fit. Others write too, so the folder is listed again after every 1/32 of the budget."""
        spare = self.max_bytes // 32
        with self._lock:
            self._unseen += need
            if self.bytes + need <= self.max_bytes and self._unseen <= spare:
                return
            entries = sorted(self._entries())
            self.bytes, self._unseen = sum(size for _, size, _ in entries), 0
            if self.bytes + need <= self.max_bytes:
                return
            for _, size, name in entries:
                # Small entries leave room for more of them, so that a full store is not listed at every write.
                total = self.bytes + need
                if total <= self.max_bytes and total - size < self.max_bytes - spare:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(self._path(name))
                self.bytes -= size
                self._maps.pop(name, None)
                self._sound.pop(name, None)

    def _entries(self) -> list[tuple[int, int, str]]:
        """(last use in ns, bytes of pixels, name) of every entry."""
        found = []
        with os.scandir(self.folder) as listed:
            for entry in listed:
                if entry.name.endswith(SUFFIX):
                    with suppress(FileNotFoundError):
                        info = entry.stat()
                        found.append((info.st_atime_ns, info.st_size - HEADER.size, entry.name.removesuffix(SUFFIX)))
        return found


def _nobody(name: str) -> None:
    """Nobody decodes ahead."""


def _heading(name: str, shape: tuple[int, ...]) -> tuple:
    return MAGIC, bytes.fromhex(name), *shape[:3]


def _is_sound(file: BinaryIO, name: str, shape: tuple[int, ...]) -> bool:
    """Header, size and checksum. Read and not mapped: a bad disk then gives an error and not a signal.

    CRC-32 is four times as fast as blake2b here, and sees every burst of up to 32 bits; nobody forges entries.
    """
    head = file.read(HEADER.size)
    if len(head) != HEADER.size or os.fstat(file.fileno()).st_size != HEADER.size + int(np.prod(shape)):
        return False
    *heading, checksum = HEADER.unpack(head)
    crc, buffer = zlib.crc32(HEADER.pack(*heading, 0)), bytearray(1 << 20)
    while num_read := file.readinto(buffer):
        crc = zlib.crc32(memoryview(buffer)[:num_read], crc)
    return crc == checksum and tuple(heading) == _heading(name, shape)


def _identity(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_ino, info.st_mtime_ns, info.st_size


def _free(folder: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def _owner() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def _is_orphan(path: Path) -> bool:
    """Whether the process that named the file ran on this host and lives no more."""
    found = re.match(r"[^@]+@(\d+)@([^@]+)@", path.name)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _private_folder() -> Path:
    """A new folder; those of killed processes go."""
    for path in Path(tempfile.gettempdir()).glob("rft-frames@*"):
        if _is_orphan(path):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"rft-frames@{_owner()}@"))
