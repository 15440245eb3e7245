"""What a sweep has shown so far: who is where, which setting is best, and tables and pictures over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rft.cluster.metrics import VALIDATION, final, validated
from rft.cluster.paired import Spread
from rft.cluster.space import label, plain, short_keys
from rft.cluster.table import COLUMNS, BySeed, row_json, spread_of, table
from rft.cluster.trials import Swept, Trial, standing
from rft.errors import RecipeError
from rft.files import write_whole
from rft.run.state import read_state
from rft.strict import nearest

SHOWN = 10  # settings with a curve in the picture, as there are colours


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A setting: its finished trials' metrics by seed, and whether every seed is there."""

    setting: str
    trials: tuple[Trial, ...]
    by_seed: BySeed

    @property
    def is_whole(self) -> bool:
        """All its trials finished."""
        return len(self.by_seed) == len(self.trials)


def status(swept: Swept) -> str:
    """A line per trial: how far it is, its last validation, why it ended."""
    lines, counts = [], {}
    wide = max([8, *(len(t.name) for t in swept.trials)])
    for trial in swept.trials:
        word, why = standing(trial.folder)
        counts[word] = counts.get(word, 0) + 1
        state = read_state(trial.folder)
        points = validated(trial.folder, swept.sweep.metric)
        seen = f"{points[-1][1]:.3f} at step {points[-1][0]}" if points else ""
        note = f"step {state.get('step', 0)} of {state.get('phase', '')}" if word == "running" else why.partition("\n")[0]
        lines.append(f"{trial.name:<{wide}}  {word:<9}  {seen:<20}  {note}".rstrip())
    told = ", ".join(f"{number} {word}" for word, number in counts.items()) or "none yet"
    return "\n".join([*lines, f"{len(swept.trials)} of {swept.num_wanted} trials: {told}"])


def ranked(swept: Swept) -> list[Row]:
    """Settings with at least one result, the best first; those that lack a seed come after those that do not.

    Raises:
        RecipeError: trials have finished, and none of them has the metric.
    """
    rows = _rows(swept)
    metric, sign = swept.sweep.metric, -1 if swept.sweep.goal == "min" else 1  # times which more is better
    with_metric = [row for row in rows if spread_of(row.by_seed, metric)]
    if rows and not with_metric:
        known = {name for row in rows for metrics in row.by_seed.values() for name in metrics}
        raise RecipeError("sweep.metric", f"no finished trial has {metric!r}", nearest(metric, known))
    return sorted(with_metric, key=lambda row: (not row.is_whole, -sign * spread_of(row.by_seed, metric).mean))


def best(swept: Swept) -> str:
    """The best setting in words, with its recipe. Raises RecipeError where nothing has finished yet."""
    rows = ranked(swept)
    if not rows:
        raise RecipeError(str(swept.folder), "no trial has finished", "look at them: rft sweep status DIR")
    row, metric = rows[0], swept.sweep.metric
    values = "\n".join(f"  {key}: {plain(value)}" for key, value in row.trials[0].values.items())
    seen = spread_of(row.by_seed, metric)
    lacks = "" if row.is_whole else f" ({len(row.by_seed)} of {len(row.trials)} seeds so far)"
    of = f"best of {len(rows)} settings{lacks}"
    return f"{row.setting}: {metric} {_in_words(seen)}, {of}\n{values}\n  recipe: {row.trials[0].file}"


def report(swept: Swept) -> str:
    """Write `table.txt`, `report.json` and, where there is something to draw, `curves.png` and `values.png`; the table."""
    metric = swept.sweep.metric
    rows = ranked(swept)
    columns = list(dict.fromkeys((metric, *COLUMNS)))
    lines = [table({row.setting: {c: spread_of(row.by_seed, c) for c in columns} for row in rows}, columns)]
    if rows and not rows[0].is_whole:
        lines += ["", "no setting has finished with every seed"]
    elif rows:
        lines += ["", f"best by {metric}: {rows[0].setting}"]
    standings = {t.name: standing(t.folder) for t in swept.trials}
    lines += [f"{word}: {name}{f': {why}' if why else ''}" for name, (word, why) in standings.items() if word != "finished"]
    if not metric.startswith(VALIDATION):
        lines += [f"chosen by {metric} on the test split: its best is a little flattered; metric: {VALIDATION}{metric} is not"]
    text = "\n".join(["mean over seeds and half of its 95 % t interval", *lines]) + "\n"
    write_whole(swept.folder / "table.txt", text)
    write_whole(swept.folder / "report.json", json.dumps(_json(swept, rows, columns, standings), indent=1))
    _draw(swept, rows)
    return text


def _rows(swept: Swept) -> list[Row]:
    by_setting: dict[str, list[Trial]] = {}
    for trial in swept.trials:
        by_setting.setdefault(trial.setting, []).append(trial)
    rows = []
    for setting, trials in by_setting.items():
        done = {t.seed: final(t.folder, swept.sweep.metric) for t in trials if standing(t.folder)[0] == "finished"}
        rows += [Row(setting=setting, trials=tuple(trials), by_seed=done)] if done else []
    return rows


def _json(swept: Swept, rows: list[Row], columns: list[str], standings: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    trials = {}
    for trial in swept.trials:
        word, why = standings[trial.name]
        points = validated(trial.folder, swept.sweep.metric)
        trials[trial.name] = {
            "setting": trial.setting,
            "values": {key: plain(value) for key, value in trial.values.items()},
            "seed": trial.seed,
            "status": word,
            "why": why,
            "seconds": read_state(trial.folder).get("seconds"),
            "validation": points[-1] if points else None,
            "final": final(trial.folder) if word == "finished" else None,
        }
    return {
        "metric": swept.sweep.metric,
        "goal": swept.sweep.goal,
        "settings": {
            row.setting: {
                "values": {k: plain(v) for k, v in row.trials[0].values.items()},
                "is_whole": row.is_whole,
                **row_json(row.by_seed, columns),
            }
            for row in rows
        },
        "order": [row.setting for row in rows],
        "best": rows[0].setting if rows and rows[0].is_whole else None,
        "trials": trials,
    }


def _draw(swept: Swept, rows: list[Row]) -> None:
    from rft.cluster.chart import draw, draw_values

    metric, shown = swept.sweep.metric, [row.setting for row in rows[:SHOWN]]
    by_setting: dict[str, dict[int, Any]] = {}
    for trial in swept.trials:  # who has finished first, then who was stopped
        if points := validated(trial.folder, metric):
            by_setting.setdefault(trial.setting, {})[trial.seed] = points
    names = [*shown, *(name for name in by_setting if name not in shown)][:SHOWN]
    if curves := {name: by_setting[name] for name in names if name in by_setting}:
        of = f", the best {len(curves)} of {len(by_setting)}" if len(by_setting) > len(curves) else ""
        title = f"{swept.folder.name}{of}"
        draw(curves, swept.folder / "curves.png", metric=metric.removeprefix(VALIDATION), title=title)
    points = [(row.trials[0].values, [m[metric] for m in row.by_seed.values() if metric in m]) for row in rows]
    keys = list(dict.fromkeys(key for t in swept.trials for key in t.values))
    varying = [key for key in keys if len({label(t.values.get(key)) for t in swept.trials}) > 1]
    if points and varying:
        columns = {short: [plain(values.get(key)) for values, _ in points] for key, short in short_keys(varying).items()}
        draw_values(columns, [scores for _, scores in points], swept.folder / "values.png", metric=metric)


def _in_words(seen: Spread) -> str:
    return f"{seen.mean:.3f}" if seen.half is None else f"{seen.mean:.3f} ± {seen.half:.3f} over {seen.num} seeds"
