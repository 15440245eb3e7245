"""Media files by id: a folder of videos whose names are those of the annotations, with any usual extension."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rft.errors import DataError

EXTENSIONS = frozenset((".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ts", ".wmv"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The video files under a folder, subfolders included, by name without extension."""

    files: Mapping[str, tuple[Path, ...]]
    base: Path  # rows name files below it relative to it, so that a data set can be moved as a whole

    @classmethod
    def open(cls, root: Path, base: Path) -> Folder:
        """List `root` once. Raises DataError when there is no such folder."""
        if not root.is_dir():
            raise DataError(str(root), "there is no such folder", "give the folder of the videos as --media")
        files: dict[str, tuple[Path, ...]] = {}
        for at, _, names in os.walk(root):
            for path in map(Path(at).joinpath, sorted(names)):
                if path.suffix.lower() in EXTENSIONS:
                    files[path.stem] = (*files.get(path.stem, ()), path)
        return cls(files=files, base=base.resolve())

    def find(self, name: str) -> str | None:
        """How a row calls the file of this id; None when there is none. Raises DataError when there are several."""
        found = self.files.get(name, ())
        if len(found) > 1:
            both = " and ".join(map(str, sorted(found)[:2]))
            raise DataError(name, f"{both} are both the video of this id", "give the one folder that is meant as --media")
        if not found:
            return None
        path = found[0].absolute()
        return str(path.relative_to(self.base)) if path.is_relative_to(self.base) else str(path)
