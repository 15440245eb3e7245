"""Samples that cannot be used: each is named with its reason, counted, and past a share the run stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rft.errors import DataError


class Quarantine:
    """Ids and reasons, appended to `path` as JSON lines. `total` is the number of samples they are a share of."""

    def __init__(self, path: Path | None, *, total: int, max_share: float) -> None:
        self._path, self._total, self._max_share = path, total, max_share
        self._told = set(path.read_text(encoding="utf-8").splitlines()) if path and path.exists() else set()
        self.reasons: dict[str, DataError] = {}
        self._news: list[tuple[str, DataError]] = []

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.reasons

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, sample_id: str, reason: DataError) -> None:
        """Put one aside, with a line on the terminal; one that is aside already stays as it is.

        Raises:
            DataError: more than `max_share` of the samples are now set aside.
        """
        if sample_id in self.reasons:
            return
        self._news.append((sample_id, reason))
        self._tell({"sample": sample_id, "where": reason.where, "reason": reason.what, "do": reason.do})
        print(f"quarantined {len(self) + 1} of {self._total}, {sample_id}: {reason.where}: {reason.what}", flush=True)
        self._count(sample_id, reason)

    def refuse(self, sample_id: str, reason: DataError, phase: str) -> None:
        """Say that one phase leaves a sample out. Other phases may use it, and it is not counted."""
        self._tell({"sample": sample_id, "phase": phase, "where": reason.where, "reason": reason.what, "do": reason.do})
        print(f"phase {phase} leaves out {sample_id}: {reason.where}: {reason.what}", flush=True)

    def news(self) -> list[tuple[str, DataError]]:
        """What was put aside here since the last call, for the other ranks."""
        news, self._news = self._news, []
        return news

    def hear(self, news: list[tuple[str, DataError]]) -> None:
        """Count what another rank put aside. Raises what `add` raises."""
        for sample_id, reason in news:
            if sample_id not in self.reasons:
                self._count(sample_id, reason)

    def kept(self) -> list[list[str]]:
        """What is set aside, as plain values: `restore` takes them."""
        return [[sample_id, r.where, r.what, r.do] for sample_id, r in self.reasons.items()]

    def restore(self, kept: list[list[str]]) -> None:
        """Set aside what an earlier attempt did; it was told then."""
        for sample_id, where, what, do in kept:
            if sample_id not in self.reasons:
                self._count(sample_id, DataError(where, what, do))

    def _tell(self, line: Mapping[str, str]) -> None:
        """Append a line, unless an earlier attempt has."""
        text = json.dumps(line, ensure_ascii=False)
        if self._path and text not in self._told:
            self._told.add(text)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _count(self, sample_id: str, reason: DataError) -> None:
        self.reasons[sample_id] = reason
        if len(self) > self._max_share * self._total + 1e-9:  # 0.29 x 100 is less than 29
            raise DataError(
                str(self._path or "data"),
                f"{len(self)} of {self._total} samples cannot be used, more than data.max_bad_share={self._max_share:g}; "
                f"the last: {reason.where}: {reason.what}",
                "repair or drop these samples, or raise data.max_bad_share",
            )
