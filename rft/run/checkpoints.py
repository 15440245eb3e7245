"""Checkpoints that are whole or absent: written beside their place, synced, described by a manifest, renamed.

    RUN/checkpoints/PHASE-000120/   what the trainer saved, record.json (where the run was), manifest.json (what belongs to it)
    RUN/checkpoints/last-good       the name of the newest one

A manifest has the size of every file and a checksum of its two ends: a file that was cut, left empty or mixed up shows; a
bit that flips in the middle of some gigabytes does not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rft.files import write_whole

CHECKPOINTS, LAST_GOOD, MANIFEST, RECORD = "checkpoints", "last-good", "manifest.json", "record.json"
UNDER_WAY, GOING = ".saving-", ".deleting-"
END = 8 * 2**20  # bytes at either end of a file that its checksum covers


def name_of(phase: str, step: int) -> str:
    """Name of a phase's checkpoint after `step` optimizer steps."""
    return f"{phase}-{step:06d}"


def model_of(run: Path, phases: Sequence[str], phase: str) -> Path:
    """Where a phase leaves its model; `phases` are all names in order."""
    return run / "checkpoint" if phase == list(phases)[-1] else run / "phases" / phase


def staging(run: Path, name: str) -> Path:
    """Where something is written before it is whole; emptied by whoever begins."""
    return run / CHECKPOINTS / f"{UNDER_WAY}{name}"


def seal(written: Path, place: Path, record: Mapping[str, Any]) -> None:
    """Make what was `written` appear at `place`, whole and for good. An older one there is replaced.

    Raises:
        OSError: it cannot be written; `place` is as it was.
    """
    (written / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    sync(written)
    (written / MANIFEST).write_text(json.dumps(dict(_described(written)), indent=1), encoding="utf-8")
    _sync(written / MANIFEST)
    _sync(written)
    place.parent.mkdir(parents=True, exist_ok=True)
    _discard(place)
    os.replace(written, place)
    _sync(place.parent)


def sync(folder: Path) -> None:
    """Wait until every file below `folder`, as far as this machine wrote it, is on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)


def fault(folder: Path) -> str:
    """What is wrong with a sealed folder, in a few words; "" when it is as it was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        record_of(folder)
        found = dict(_described(folder))
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    for name, (size, checksum) in manifest.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != [size, checksum]:
            return f"{name} has {found[name][0]} bytes of {size}" if found[name][0] != size else f"{name} has other contents"
    return ""


def record_of(folder: Path) -> dict[str, Any]:
    """Where the run was when this folder was sealed. Raises OSError or ValueError when nothing readable says so."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"{RECORD} is no object")
    return record


def is_of_another(folder: Path, phase: str) -> str:
    """Which phase left this sound model, where that was not `phase`: a recipe that drifted may have another last one."""
    left_by = record_of(folder).get("phase", phase)
    return "" if left_by == phase else f"phase {left_by} left it"


def of_phase(run: Path, phase: str) -> list[Path]:
    """Checkpoints of a phase, the oldest first. Nobody has looked whether they are sound."""
    found = [p for p in (run / CHECKPOINTS).glob(f"{phase}-*") if re.fullmatch(re.escape(phase) + r"-\d+", p.name)]
    return sorted(found, key=_step)


def last_good(run: Path, phase: str, say: Callable[[str], None] = print) -> Path | None:
    """The newest sound checkpoint of a phase; each one that is not sound gets a line."""
    for path in reversed(of_phase(run, phase)):
        if not (why := fault(path)):
            return path
        say(f"checkpoint {path.name} cannot be used ({why}); looking for the one before")
    return None


def point_to(run: Path, checkpoint: Path) -> None:
    """Let `last-good` name a checkpoint."""
    write_whole(run / CHECKPOINTS / LAST_GOOD, checkpoint.name + "\n")


def prune(run: Path, phase: str, *, keep_last: int, keep_best: int) -> None:
    """Keep a phase's newest checkpoints and those with the highest `score` in their record; 0 `keep_last` keeps all."""
    found = of_phase(run, phase)
    if not keep_last:
        return
    score = scores(run, phase)
    keep = {*found[-keep_last:], *sorted(score, key=lambda path: score[path], reverse=True)[:keep_best]}
    for path in found:
        if path not in keep:
            _discard(path)


def cut_back(run: Path, phases: Sequence[str], phase: str, step: int, aside: Path) -> list[str]:
    """Leave only what was saved up to `step` optimizer steps of `phase`; what came later goes to the folder `aside`.

    Later ones of this phase were not sound, and would be taken for its newest. Those of later phases (in `phases`, the
    names in order) grew from a model that is made again. Returns the names of what was moved.
    """
    later = phases[list(phases).index(phase) + 1 :]
    found = [path for path in of_phase(run, phase) if _step(path) > step] + [p for name in later for p in of_phase(run, name)]
    found += [path for name in later if (path := model_of(run, phases, name)).exists()]
    for path in found:
        aside.mkdir(parents=True, exist_ok=True)
        _discard(aside / path.name)
        os.replace(path, aside / path.name)
    return [path.name for path in found]


def clear_leftovers(run: Path) -> None:
    """Remove what a killed save or removal left."""
    for place in (run / CHECKPOINTS, run / "phases", run):
        for pattern in (f"{UNDER_WAY}*", f"{GOING}*"):
            for path in place.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def scores(run: Path, phase: str) -> dict[Path, float]:
    """`score` of those checkpoints whose record has one."""
    found = {}
    for path in of_phase(run, phase):
        with suppress(OSError, ValueError):
            if (score := record_of(path).get("score")) is not None:
                found[path] = score
    return found


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _discard(path: Path) -> None:
    """First out of sight, then away: a removal that is cut leaves no half checkpoint under a good name."""
    if not path.exists():
        return
    going = path.with_name(f"{GOING}{path.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(path, going)
    shutil.rmtree(going, ignore_errors=True)


def _described(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """(relative name, [size, checksum]) of every file but the manifest."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix(), [path.stat().st_size, _checksum(path)]


def _checksum(path: Path) -> int:
    """CRC-32 of the first and the last `END` bytes."""
    with path.open("rb") as file:
        crc = zlib.crc32(file.read(END))
        size = path.stat().st_size
        if size > END:
            file.seek(max(END, size - END))
            crc = zlib.crc32(file.read(), crc)
    return crc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
