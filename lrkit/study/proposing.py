"""Let Optuna propose settings to try. No torch here.

Proposals come in batches of one size: those of a batch know the results of the batches before, and of nothing else. So
they follow from these results and a seed alone, and whoever needs them computes them anew, in memory: there is no
journal that a killed process could damage, and a study that was killed proposes as one that was not.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrkit.study.space import Log, domain

if TYPE_CHECKING:
    import optuna


def proposals(
    space: Mapping[str, Any], means: Sequence[float], count: int, *, batch: int, seed: int
) -> list[dict[str, Any]]:
    """Propose settings by Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).

    Args:
        space: path to a list of values, or to a range as text.
        means: mean scores of the first trials, of all batches before the one that the last proposal is in; minus infinity
            if a run diverged.
        count: how many proposals, the earlier ones included.
        batch: how many are proposed at a time.
        seed: of the sampler.

    Returns:
        Path to value for each.
    """
    import optuna

    found: list[dict[str, Any]] = []
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the constant liar is called experimental
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            study = optuna.create_study(sampler=sampler, direction="maximize")
            while len(found) < count:
                asked = [study.ask() for _ in range(min(batch, count - len(found)))]
                found += [_suggested(trial, space) for trial in asked]
                if len(found) < count:
                    for trial in asked:
                        study.tell(trial, _told(means[: len(found)], trial.number))
    finally:
        optuna.logging.set_verbosity(before)
    return found


def _told(means: Sequence[float], number: int) -> float:
    """Return a trial's mean score; if it diverged, one that is below all others by as much as they spread.

    Args:
        means: of all trials up to the end of its batch.
        number: which trial.
    """
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    mean = means[number]
    return mean if math.isfinite(mean) else 2 * min(finite) - max(finite) - 1e-6


def _suggested(trial: "optuna.Trial", space: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in space.items():
        tried = domain(value, path)
        if isinstance(tried, Log):
            found[path] = float(f"{trial.suggest_float(path, tried.low, tried.high, log=True):.6g}")
        else:
            # By its index: a category of Optuna's may be a plain value alone, and 1 and 1.0 are one there.
            found[path] = tried[trial.suggest_categorical(path, list(range(len(tried))))]
    return found
