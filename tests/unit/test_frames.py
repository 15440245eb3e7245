"""The decoded-frame store: same bytes, decoded once, within its bytes, and never a wrong byte from a damaged folder."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft.data import frames
from rft.data.budget import Budget
from rft.data.frames import HEADER, FrameStore
from rft.data.media import read, view
from rft.errors import DataError
from rft.families import FAMILIES
from rft.types import Media, View
from tests import videos

ROOT = Path(__file__).parents[2]


def clip(path: Path, num_frames: int = 50) -> View:
    videos.write_video(path, videos.spaced(25, num_frames))
    budget = Budget(nframes=4, min_pixels=28 * 28, max_pixels=1600)
    return view(Media(kind="video", source=str(path)), 0, family=FAMILIES["qwen2_5_vl"], budget=budget)


BYTES = 4 * 28 * 56 * 3  # of one clip: 48 x 96 scaled to 1600 pixels is 28.3 x 56.6


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.frames"))


def marks(pixels_FHWC: np.ndarray) -> list[int]:
    return [videos.mark(frame) for frame in pixels_FHWC]


def test_a_second_look_is_the_same_array(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    assert not store.has(shown)
    first = store.get(shown)
    assert store.has(shown)
    assert store.get(replace(shown, media=7)) is first  # where it stands in the sample is not what it shows
    assert (store.hits, store.misses, store.bytes) == (1, 1, BYTES)
    np.testing.assert_array_equal(first, read(shown))


def test_nobody_can_write_into_what_is_returned(tmp_path: Path) -> None:
    shown = clip(tmp_path / "a.mp4")
    for max_bytes in (10 * BYTES, 0):
        store = FrameStore(max_bytes)
        for _ in range(2):
            with pytest.raises(ValueError, match="read-only"):
                store.get(shown)[0] = 0


def test_a_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, folder = clip(tmp_path / "a.mp4"), tmp_path / "store"
    wanted = FrameStore(10 * BYTES, folder).get(shown)
    monkeypatch.setattr(frames, "read", lambda view: pytest.fail("decoded again"))
    store = FrameStore(10 * BYTES, folder)
    assert (store.bytes, store.has(shown)) == (BYTES, True)
    np.testing.assert_array_equal(store.get(shown), wanted)
    assert (store.hits, store.misses, store.rebuilt) == (1, 0, 0)


def test_what_determines_the_pixels_names_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = clip(tmp_path / "a.mp4")
    others = [
        replace(shown, frames=(0, 1, 2, 3)),
        replace(shown, size=(28, 28)),
        replace(shown, crop=(0.0, 0.0, 48.0, 48.0)),
        replace(shown, kind="image"),
    ]
    names = {frames.entry_name(v) for v in (shown, *others)}
    assert len(names) == 5
    assert frames.entry_name(replace(shown, seconds=(), tokens=1, media=3)) in names
    assert frames.entry_name(replace(others[2], crop=(0, 0, 48, 48))) in names  # the same crop in other numbers
    monkeypatch.setattr(frames, "DECODER", "another")
    frames._digest.cache_clear()
    assert frames.entry_name(shown) not in names
    frames._digest.cache_clear()


def test_of_a_list_of_frames_only_those_shown_count(tmp_path: Path) -> None:
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(4))
    for i, path in enumerate(paths):
        Image.fromarray(videos.painted(i)).save(path)
    media = Media(kind="frames", source=paths, seconds=(0.0, 1.0, 2.0, 3.0))
    shown = view(media, 0, family=FAMILIES["qwen2_5_vl"], budget=Budget(nframes=2, min_pixels=28 * 28, max_pixels=1600))
    store = FrameStore(10 * BYTES)
    assert (shown.frames, marks(store.get(shown))) == ((0, 3), [0, 3])
    os.remove(paths[1])  # shown to nobody
    store.get(shown)
    assert store.hits == 1
    Image.fromarray(videos.painted(9)).save(paths[3])
    assert marks(store.get(shown)) == [0, 9]


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    store = FrameStore(2 * BYTES)
    a, b, c = (clip(tmp_path / f"{name}.mp4") for name in "abc")
    for shown in (a, b, a, c):  # c drives out b
        store.get(shown)
    assert (store.hits, store.misses, store.bytes) == (1, 3, 2 * BYTES)
    assert [store.has(v) for v in (a, b, c)] == [True, False, True]
    store.get(a)
    assert store.hits == 2
    np.testing.assert_array_equal(store.get(b), read(b))
    assert (store.hits, store.misses, store.bytes) == (2, 4, 2 * BYTES)


def test_a_second_run_knows_what_was_used_last(tmp_path: Path) -> None:
    first = clip(tmp_path / "a.mp4")
    shown = [replace(first, frames=(0, 1, 2, k)) for k in range(3, 10)]
    before = FrameStore(6 * BYTES, tmp_path / "store")
    for k in (0, 1, 2, 3, 4, 5, 3, 0, 4, 1, 5, 2):
        before.get(shown[k])
    FrameStore(4 * BYTES, tmp_path / "store").get(shown[6])
    assert [before.has(v) for v in shown] == [k in (1, 5, 2, 6) for k in range(7)]


def test_a_full_store_of_small_entries_is_not_listed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = clip(tmp_path / "a.mp4")
    store, listings = FrameStore(100 * BYTES), []
    original = store._entries
    monkeypatch.setattr(store, "_entries", lambda: listings.append(store.bytes) or original())
    for end in range(140):
        store.get(replace(shown, frames=(0, 1, 2, end % 46 + 4), crop=(0.0, 0.0, 96.0, 48.0 - end // 46)))
    on_disk = sum(p.stat().st_size - HEADER.size for p in entries(store.folder))
    assert 96 * BYTES <= on_disk <= 100 * BYTES == store.max_bytes
    assert len(listings) <= 140 / 3 + 1


def test_a_clip_that_does_not_fit_is_read_and_not_kept(tmp_path: Path) -> None:
    shown = clip(tmp_path / "a.mp4")
    for max_bytes in (BYTES - 1, 0):
        store = FrameStore(max_bytes)
        np.testing.assert_array_equal(store.get(shown), read(shown))
        assert (store.get(shown).shape, store.misses, store.bytes) == ((4, 28, 56, 3), 2, 0)
        assert not list(store.folder.iterdir())


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    before = store.get(shown)
    videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 100), options={"preset": "veryfast", "crf": "51"})
    after = read(shown)  # these frame numbers in the new file
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(store.get(shown), after)
    assert (store.hits, store.misses) == (0, 2)


def test_a_file_that_changes_while_it_is_read_is_an_error_and_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")

    def slow(view: View) -> np.ndarray:
        pixels = read(view)
        os.utime(tmp_path / "a.mp4")
        return pixels

    monkeypatch.setattr(frames, "read", slow)
    with pytest.raises(DataError, match=r"a\.mp4: changed while it was read"):
        store.get(shown)
    assert not entries(store.folder)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_header(path: Path) -> None:
    os.truncate(path, HEADER.size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(offset: int) -> None:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return damage


def other_entry(path: Path) -> None:
    """A sound entry of other pixels under this name."""
    shutil.copy(path.parent / "other", path)


DAMAGES = [
    truncate,
    cut_header,
    empty,
    lengthen,
    flip(0),
    flip(10),
    flip(30),
    flip(40),
    flip(HEADER.size),
    flip(-1),
    other_entry,
]


@pytest.mark.parametrize("is_fresh", [True, False], ids=["another process", "held open"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__qualname__)
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, damage, is_fresh: bool) -> None:
    shown, folder = clip(tmp_path / "a.mp4"), tmp_path / "store"
    wanted, store = read(shown), FrameStore(10 * BYTES, folder)
    store.get(replace(shown, frames=(0, 1, 2, 3)))
    entries(folder)[0].rename(folder / "other")
    store.get(shown)
    (entry,) = entries(folder)
    sound = entry.read_bytes()
    damage(entry)
    if is_fresh:
        store = FrameStore(10 * BYTES, folder)
    np.testing.assert_array_equal(store.get(shown), wanted)
    assert (store.rebuilt, entry.read_bytes()) == (1, sound)
    store.get(shown)
    assert store.rebuilt == 1


def test_an_entry_is_checked_once_by_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (clip(tmp_path / f"{name}.mp4") for name in "ab")
    FrameStore(10 * BYTES, tmp_path / "store").get(a)
    checked, original = [], frames._is_sound
    monkeypatch.setattr(frames, "_is_sound", lambda file, *rest: checked.append(file.name) or original(file, *rest))
    monkeypatch.setattr(FrameStore, "max_maps", 1)
    store = FrameStore(10 * BYTES, tmp_path / "store")
    for shown in (a, b, a, b):  # each closes the other; what this process wrote it need not check
        store.get(shown)
    assert (len(checked), len(store._maps)) == (1, 1)


def test_an_entry_that_somebody_else_evicted_is_rebuilt(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    first = store.get(shown)
    entries(store.folder)[0].unlink()
    np.testing.assert_array_equal(first, read(shown))  # who holds it keeps it
    assert store.get(shown) is not first
    assert (store.misses, store.rebuilt, store.has(shown)) == (2, 0, True)


def test_maps_of_evicted_entries_are_let_go(tmp_path: Path) -> None:
    a, b = (clip(tmp_path / f"{name}.mp4") for name in "ab")
    store = FrameStore(10 * BYTES)
    store.get(a)
    entries(store.folder)[0].unlink()
    store.get(b)
    assert len(store._maps) == 1


def test_a_full_disk_costs_the_entry_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    shown, store = clip(tmp_path / "a.mp4"), FrameStore(10 * BYTES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, limits[1]))  # every write stops in the middle
    try:
        for _ in range(3):
            np.testing.assert_array_equal(store.get(shown), read(shown))
        assert (list(store.folder.iterdir()), store.misses, store.bytes) == ([], 3, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err.count("not stored") == 1


def test_storing_goes_on_when_the_disk_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, store, free = clip(tmp_path / "a.mp4"), FrameStore(10 * BYTES), BYTES // 2
    monkeypatch.setattr(frames, "_free", lambda folder: free)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, limits[1]))
    try:
        store.get(shown)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.get(shown)
    assert not store.has(shown)  # nothing was freed: not even tried
    free += BYTES
    store.get(shown)
    assert store.has(shown)


def test_a_folder_that_vanishes_costs_the_entries(tmp_path: Path) -> None:
    shown, store = clip(tmp_path / "a.mp4"), FrameStore(10 * BYTES, tmp_path / "store")
    store.get(shown)
    shutil.rmtree(tmp_path / "store")
    np.testing.assert_array_equal(store.get(shown), read(shown))


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    parts = [tmp_path / f"part@{pid}@{on}@x.1" for pid, on in ((dead.pid, host), (os.getpid(), host), (dead.pid, "elsewhere"))]
    old = tmp_path / "part@1@elsewhere@x.1"
    for path in (*parts, old, tmp_path / "something else"):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert FrameStore(10 * BYTES, tmp_path).bytes == 0
    assert set(tmp_path.iterdir()) == {parts[1], parts[2], tmp_path / "something else"}


def test_a_private_folder_goes_with_its_store_or_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = "import os; from rft.data.frames import FrameStore; s = FrameStore(9); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, other = FrameStore(9), FrameStore(9)  # the second leaves the first alone, whose process lives
    assert set(tmp_path.iterdir()) == {store.folder, other.folder} and not left.exists()
    del store
    assert list(tmp_path.iterdir()) == [other.folder]


HAMMER = """
import pickle
import sys
import numpy as np
from pathlib import Path
from rft.data.frames import FrameStore
views, wanted, max_bytes, seed = pickle.loads(Path(sys.argv[1]).read_bytes())[:3] + (int(sys.argv[2]),)
store = FrameStore(max_bytes, Path(sys.argv[3]))
for i in np.random.default_rng(seed).integers(0, len(views), 400):
    assert np.array_equal(store.get(views[i]), wanted[i]), "wrong pixels"
print(store.misses, store.rebuilt)
"""


def test_two_processes_on_one_folder_that_holds_half(tmp_path: Path) -> None:
    first = clip(tmp_path / "a.mp4")
    views = [first, *(replace(first, frames=(k, k + 1, k + 2, k + 3)) for k in range(7))]
    (tmp_path / "job").write_bytes(pickle.dumps((views, [read(v) for v in views], 4 * BYTES)))
    args = [sys.executable, "-c", HAMMER, str(tmp_path / "job")]
    jobs = [
        subprocess.Popen(
            [*args, seed, str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for seed in "12"
    ]
    for job in jobs:
        out, err = job.communicate(timeout=60)
        assert (job.returncode, err) == (0, "")
        misses, rebuilt = map(int, out.split())
        assert 8 < misses < 400 and rebuilt == 0
    assert len(entries(tmp_path / "store")) <= 5  # both may make room for the same one
    assert not list((tmp_path / "store").glob("part@*"))


def test_threads_wait_for_one_decode(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(store.get, [shown] * 32))
    assert (store.hits, store.misses, store.bytes) == (31, 1, BYTES)
    assert all(array is arrays[0] for array in arrays)


def test_an_error_is_raised_every_time_and_not_kept(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.mp4"):
            store.get(shown)
    assert (store.misses, store.bytes) == (2, 0)
    os.remove(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="cannot be opened"):
        store.get(shown)
    assert not store.has(shown)
