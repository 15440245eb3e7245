"""Results over seeds, as a table and as JSON: rows are trials or settings, columns are metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rft.cluster.paired import ENOUGH, Spread, spread

COLUMNS = ("miou", "r1@0.3", "r1@0.5", "r1@0.7")
LOOKED = ("valid_clues", "visual_tokens", "turns")  # where rollouts look again: no score, and not compared
BySeed = Mapping[int, Mapping[str, float]]  # seed -> metric -> value


def table(rows: Mapping[str, Mapping[str, Spread | None]], columns: Sequence[str], *, signed: bool = False) -> str:
    """A line per row: how many seeds, then mean and interval per metric, the interval from three seeds on.

    `signed` is for differences: the mean has its sign, and the interval is shown by its bounds.
    """
    columns = [c for c in columns if any(by.get(c) for by in rows.values())]
    cells = {name: [_cell(by.get(c), signed) for c in columns] for name, by in rows.items()}
    wide = max([14, *(len(cell) + 3 for row in cells.values() for cell in row)])
    first = max([14, *map(len, rows)])
    lines = [f"{'':<{first}}  seeds" + "".join(f"{c:>{wide}}" for c in columns)]
    for name, row in cells.items():
        num = max((s.num for s in rows[name].values() if s), default=0)
        lines.append(f"{name:<{first}}{num:>7}" + "".join(f"{cell:>{wide}}" for cell in row))
    return "\n".join(lines)


def spread_of(by_seed: BySeed, column: str) -> Spread | None:
    """Mean and interval of a metric over the seeds that have it; None where none has."""
    values = column_of(by_seed, column)
    return spread(list(values.values())) if values else None


def row_json(by_seed: BySeed, columns: Sequence[str]) -> dict[str, Any]:
    """A row of the table with every value behind it, for a report's JSON."""
    found = {c: s for c in columns if (s := spread_of(by_seed, c))}
    return {"seeds": {str(k): dict(v) for k, v in by_seed.items()}, **{c: asdict(s) for c, s in found.items()}}


def column_of(by_seed: BySeed, column: str) -> dict[int, float]:
    """A metric by seed, of the seeds that have it."""
    return {seed: metrics[column] for seed, metrics in by_seed.items() if column in metrics}


def _cell(seen: Spread | None, signed: bool) -> str:
    if seen is None:
        return "-"
    if seen.num < ENOUGH:
        return f"{seen.mean:+.3f} sign only" if signed else f"{seen.mean:.3f}"
    return f"{seen.mean:+.3f} [{seen.low:+.3f}, {seen.high:+.3f}]" if signed else f"{seen.mean:.3f} ± {seen.half:.3f}"
