"""A search: Optuna proposes the next setting from what the finished ones were worth.

    search: {trials: 40, sampler: tpe}

    SWEEP/search.journal    what the sampler knows. A number of its journal is that of one trial, for good: who was cut goes on
                            with its own setting, and asks for no other.

What finished is told by its metric, what a rule stopped by its last validation. A trial that failed stays open, and is tried
again by `resume`. Lists and pairs are searched by place, since their values may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rft.cluster.metrics import final, validated
from rft.cluster.plan import with_trial
from rft.cluster.space import Setting
from rft.cluster.sweep import Job, print_now
from rft.cluster.trials import DONE, Swept, standing
from rft.errors import RecipeError

JOURNAL = "search.journal"
PAIRED = "paired"  # name of the place among the pairs
REFUSED = 50  # proposals in a row that the recipe may refuse
FAR = 10**6  # between the seeds of two samplers


class Proposals:
    """A sweep's search, opened where it was left. Raises RecipeError without Optuna."""

    def __init__(self, swept: Swept, say: Callable[[str], None] = print_now) -> None:
        self._optuna = _optuna()
        self.swept, self._say = swept, say
        backend = self._optuna.storages.journal.JournalFileBackend(str(swept.folder / JOURNAL))
        self._study = self._optuna.create_study(
            storage=self._optuna.storages.JournalStorage(backend),
            study_name="sweep",
            direction="maximize" if swept.sweep.goal == "max" else "minimize",
            load_if_exists=True,
        )
        self._space = _distributions(self._optuna, swept)
        self._told: set[int] = set()
        for asked in self._study.get_trials(deepcopy=False):
            if not asked.state.is_finished() and asked.number not in {t.number for t in swept.trials}:
                self._add(asked.number, self._setting(asked.params))  # asked for, and cut before it had a folder

    def next(self) -> Job | None:
        """The job of a new trial; None where there are as many as were wanted.

        Raises:
            RecipeError: the recipe refuses whatever is proposed.
        """
        if len(self.swept.trials) >= self.swept.sweep.search.trials:
            return None
        self.hear()
        for _ in range(REFUSED):
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self._sampler(number)
            asked = self._study.ask(self._space)
            if error := self._add(asked.number, self._setting(asked.params)):
                refused = error
                continue
            return self.swept.trials[-1].job
        raise RecipeError(
            "sweep.search", f"{REFUSED} proposals in a row were refused; the last: {refused}", "narrow the values"
        )

    def hear(self) -> None:
        """Tell the sampler what has come to an end since."""
        for trial in self.swept.trials:
            if trial.number in self._told or (status := standing(trial.folder)[0]) not in DONE:
                continue
            self._told.add(trial.number)
            if self._study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                continue
            metric = self.swept.sweep.metric
            if status == "finished":
                value = final(trial.folder, metric).get(metric)
            else:
                points = validated(trial.folder, metric)
                value = points[-1][1] if points else None
            if value is None or not math.isfinite(value):
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial.number, value)

    def _add(self, number: int, setting: Setting) -> RecipeError | None:
        """Give a proposal its folder, or turn it down."""
        try:
            self.swept = with_trial(self.swept, setting, number)
        except RecipeError as error:
            self._say(f"proposal {number} is refused: {error.where}: {error.what}")
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            return error
        return None

    def _sampler(self, number: int) -> Any:
        """One per proposal: what it draws depends on its number, not on how often the search was taken up again."""
        seed = self.swept.sweep.seed * FAR + number
        if self.swept.sweep.search.sampler == "random":
            return self._optuna.samplers.RandomSampler(seed=seed)
        return self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _setting(self, params: dict[str, Any]) -> Setting:
        space = self.swept.sweep.space
        found = dict(space.paired[params[PAIRED]]) if space.paired else {}
        for key, values in space.grids.items():
            found[key] = values[params[key]]
        for key, draw in space.draws.items():
            found[key] = draw.choice[params[key]] if draw.choice is not None else params[key]
        return {key: found[key] for key in space.keys}


def _distributions(optuna: Any, swept: Swept) -> dict[str, Any]:
    space, kinds = swept.sweep.space, optuna.distributions
    found: dict[str, Any] = {}
    places = {**space.grids, **{k: d.choice for k, d in space.draws.items() if d.choice is not None}}
    for key, values in {**places, **({PAIRED: space.paired} if space.paired else {})}.items():
        found[key] = kinds.CategoricalDistribution(tuple(range(len(values))))
    for key, draw in space.draws.items():
        if draw.integers is not None:
            found[key] = kinds.IntDistribution(*draw.integers)
        elif draw.choice is None:
            found[key] = kinds.FloatDistribution(*draw.ends, log=draw.log_uniform is not None)
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RecipeError("sweep.search", "needs Optuna, which is not installed", 'pip install "rft[optuna]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
