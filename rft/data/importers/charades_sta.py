"""Charades-STA (Gao et al. 2017): the original text lines `VIDEO start end##sentence`, or JSON keyed by video id.

The text has no durations, so the files are asked. Which of the two a file is, its first character tells.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rft.data.importers.folder import Folder
from rft.data.importers.mend import Reversed
from rft.data.importers.moments import Moment, outcomes_of, read_keyed, read_text
from rft.data.importers.outcome import Outcome
from rft.errors import DataError

_NUMBER = r"-?[0-9]+(?:\.[0-9]*)?"
_LINE = re.compile(rf"(\S+)\s+({_NUMBER})\s+({_NUMBER})\s*##(.*)")


def read(path: Path, folder: Folder, reversed: Reversed) -> list[Outcome]:
    """Every sentence of the file. Raises DataError with file and line for a file of another layout."""
    text = read_text(path)
    moments = read_keyed(path) if text.lstrip()[:1] in ("{", "[") else list(_lines(text, path))
    return outcomes_of(moments, folder, reversed)


def _lines(text: str, path: Path) -> Iterator[Moment]:
    seen: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.rstrip("\r"))
        if not found:
            raise DataError(f"{path}:{number}", f"cannot read {line[:80]!r}", "a line is VIDEO start end##sentence")
        video, start, end, sentence = found.groups()
        yield Moment(video=video, index=seen[video], start=float(start), end=float(end), sentence=sentence)
        seen[video] += 1
