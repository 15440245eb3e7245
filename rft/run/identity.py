"""What a run is a run of: its recipe, its data and its rewards. A run that goes on must be of the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.errors import DataError, RecipeError
from rft.files import write_whole
from rft.run.state import UNBEGUN, status
from rft.strict import differing

IDENTITY = "identity.json"
# Where a run lives, how often it saves, how fast it reads: none of it changes what is computed.
FREE = (
    "name", "output", "save_every", "keep_last", "keep_best", "best_by", "log_rollouts", "trackers",
    "data.workers", "data.frame_cache", "data.frame_cache_gb",
)  # fmt: skip


def identity(recipe: Mapping[str, Any], data: Mapping[str, Path], rewards: Mapping[str, str]) -> dict[str, Any]:
    """Plain values that are equal for equal runs.

    `recipe` is the resolved tree, `data` the file of each split, `rewards` each reward's path.py:function or
    module:function; perceptions are found in the tree. Files count by their contents and not by their names.
    """
    values = json.loads(json.dumps(recipe))  # tuples and lists alike
    for key in FREE:
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    for split in data:
        values["data"].pop(split, None)
    for name in rewards:
        function = values["rewards"][name]["use"].rpartition(":")[2]
        values["rewards"][name]["use"] = function
    perceptions = sorted({use for node in _perceptions(values) if ":" in (use := node["use"])})
    for node in _perceptions(values):
        node["use"] = node["use"].rpartition(":")[2]
    return {
        "recipe": values,
        "data": {split: _digest(path) for split, path in data.items()},
        "rewards": {name: _digest(source) if (source := _source(use)) else use for name, use in rewards.items()},
        "perceptions": [_digest(source) if (source := _source(use)) else use for use in perceptions],
    }


def _perceptions(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every perception of a resolved tree, in order."""
    phases = list((recipe.get("phases") or {}).values())
    found = [recipe.get("perception"), *(p.get(key) for p in phases for key in ("perception", "eval_perception"))]
    return [node for node in (*found, *((p.get("mix") or {}).get("perception") for p in phases)) if node]


def settle(folder: Path, mine: Mapping[str, Any], *, allow_drift: bool) -> str:
    """Compare with what the folder's run is of, or write it there first. Returns what drifted, "" for nothing.

    Raises:
        RecipeError: something differs, and `allow_drift` is not set; the folder is as it was.
        DataError: the folder's own record is damaged.
    """
    path = folder / IDENTITY
    where = drift(folder, mine)
    if where and not allow_drift:
        raise RecipeError(
            str(folder), f"holds a run in which {where} was another",
            "go on with what it was begun with, choose another --output, or give --allow-drift (it is recorded)",
        )  # fmt: skip
    if where or not path.exists():
        write_whole(path, json.dumps(mine, indent=1))
    return where


def drift(folder: Path, mine: Mapping[str, Any]) -> str:
    """The first dotted key in which the folder's run is another; "" for none, or where there was no run."""
    path = folder / IDENTITY
    if not path.exists():
        return "" if status(folder) in UNBEGUN else f"its recipe ({IDENTITY} is missing)"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(str(path), f"not readable: {error}", "restore it, or choose another --output") from error
    return differing(json.loads(json.dumps(mine)), theirs)


def fingerprint(folder: Path) -> str:
    """A hash of what the folder's run is of; "" where nothing says so."""
    path = folder / IDENTITY
    return _digest(path) if path.exists() else ""


def _digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(use: str) -> Path | None:
    """The file behind path.py:function or module:function."""
    place = use.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
