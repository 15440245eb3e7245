"""A study's finished runs as a table, a chart and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rft.cluster.metrics import SUMMARY, Curve, final, validated
from rft.cluster.paired import Claim, differences, judge, spread
from rft.cluster.sweep import Ended, Job
from rft.cluster.table import COLUMNS, LOOKED, BySeed, column_of, row_json, spread_of, table
from rft.files import write_whole
from rft.recipe import Recipe
from rft.run.state import read_state

Values = Mapping[str, BySeed]  # by row of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of a study: what it trains (`file` holds the recipe) and the job that does."""

    trial: str
    seed: int
    recipe: Recipe
    file: Path
    job: Job


def conclude(
    planned: Sequence[Planned],
    ended: Ended,
    *,
    folder: Path,
    title: str,
    trials: Sequence[str],
    shared: str,
    claims: Sequence[Claim],
    metric: str,
    is_judged: bool,
) -> int:
    """Write `table.txt`, `study.json` and `curves.png` under `folder`, print the table, return the exit code."""
    done = [p for p in planned if p.job.name in ended.finished]
    values = results(done, trials, shared)
    columns = list(dict.fromkeys((metric, *COLUMNS)))
    worse = list(dict.fromkeys(claim.worse for claim in claims))
    paired = {w: {n: paired_with(values, n, w, columns) for n in trials if n in values and n != w} for w in worse}
    spreads = {w: {n: {c: spread(list(d.values())) for c, d in by.items()} for n, by in paired[w].items()} for w in worse}
    shown = [*columns, *LOOKED]
    lines = [table({name: {c: spread_of(rows, c) for c in shown} for name, rows in values.items()}, shown)]
    for w in worse:
        if w in values:
            lines += ["", f"minus {w}, seed by seed", table(spreads[w], columns, signed=True)]
    means = {name: spread_of(values[name], metric) for name in trials if name in values}
    order = sorted((n for n, s in means.items() if s), key=lambda n: -means[n].mean)
    lines += ["", f"by {metric}: {' > '.join(order) or 'no run finished'}"]
    verdicts = [judge(paired[c.worse].get(c.better, {}).get(metric, {})) if is_judged else None for c in claims]
    judged = []
    for claim, verdict in zip(claims, verdicts, strict=True):
        said = f"{'holds' if verdict.holds else 'does not hold'} ({verdict.grounds})" if verdict else "not judged: a smoke run"
        judged.append({"text": str(claim), "holds": verdict.holds if verdict else None, "grounds": said})
        lines += [f"claim: {claim} in {metric}: {said}"]
    holds = all(verdict.holds for verdict in verdicts) if is_judged else None
    lines += [f"missing: {name}: {why}" for name, why in ended.failed.items()]
    text = "\n".join(["test split: mean over seeds and half of its 95 % t interval", *lines]) + "\n"
    write_whole(folder / "table.txt", text)
    in_pairs = [
        {"with": w}
        | {
            name: {c: {"seeds": {str(k): v for k, v in d.items()}, **asdict(spreads[w][name][c])} for c, d in by.items()}
            for name, by in paired[w].items()
        }
        for w in worse
    ]
    report = {
        "study": title,
        "metric": metric,
        "rows": {name: row_json(rows, shown) for name, rows in values.items()},
        "paired": in_pairs[0],
        "paired_also": in_pairs[1:],
        "order": order,
        "claim": {k: ", ".join(c[k] for c in judged) for k in ("text", "grounds")} | {"holds": holds},
        "claims": judged,
        "seconds": {p.job.name: read_state(p.job.folder)["seconds"] for p in done},
        "failed": dict(ended.failed),
    }
    write_whole(folder / "study.json", json.dumps(report, indent=1))
    curves = {name: {p.seed: curve_of(p, done, shared, metric) for p in done if p.trial == name} for name in trials}
    if curves := {name: by for name, by in curves.items() if any(by.values())}:
        from rft.cluster.chart import draw

        draw(curves, folder / "curves.png", metric=metric, title=title, after=shared)
    print(f"\n{text}\neverything is in {folder}", flush=True)
    return int(bool(ended.failed) or holds is False)


def results(done: Sequence[Planned], trials: Sequence[str], shared: str) -> Values:
    """Metrics on the test split; what needs no training and the shared start come first."""
    rows: dict[str, dict[int, Mapping[str, float]]] = {"random": {}, "best constant": {}}
    rows |= {f"after {shared}": {}} if shared else {}
    for p in done:
        summary = json.loads((p.job.folder / SUMMARY).read_text(encoding="utf-8"))
        rows.setdefault(f"after {shared}" if p.trial == shared else p.trial, {})[p.seed] = final(p.job.folder)
        for label in ("random", "best constant"):
            if label.replace(" ", "_") in summary:
                rows[label].setdefault(p.seed, summary[label.replace(" ", "_")])
    names = [*(n for n in rows if n not in trials), *(n for n in trials if n in rows)]
    return {name: rows[name] for name in names if rows[name]}


def paired_with(values: Values, name: str, baseline: str, columns: Sequence[str]) -> dict[str, dict[int, float]]:
    """metric -> seed -> how far a trial is above the baseline, for the seeds that both have."""
    mine, theirs = values.get(name, {}), values.get(baseline, {})
    by_metric = {c: differences(column_of(mine, c), column_of(theirs, c)) for c in columns}
    return {c: by_seed for c, by_seed in by_metric.items() if by_seed}


def curve_of(planned: Planned, done: Sequence[Planned], shared: str, metric: str) -> Curve:
    """The validation metric over the steps of all phases of a run, from the end of the shared phase, step 0, on."""
    points: list[tuple[int, float]] = []
    for p in done:
        if p.seed == planned.seed and p.trial == shared and (before := validated(p.job.folder, metric)):
            points = [(0, before[-1][1])]
    return [*points, *validated(planned.job.folder, metric)]
