"""ActivityNet Captions (Krishna et al. 2017): JSON keyed by video id. `phrases`, of another annotator, are passed over."""

from __future__ import annotations

from pathlib import Path

from rft.data.importers.folder import Folder
from rft.data.importers.mend import Reversed
from rft.data.importers.moments import outcomes_of, read_keyed
from rft.data.importers.outcome import Outcome


def read(path: Path, folder: Folder, reversed: Reversed) -> list[Outcome]:
    """Every sentence of the file. Raises DataError with file and line for a file of another layout."""
    return outcomes_of(read_keyed(path), folder, reversed)
