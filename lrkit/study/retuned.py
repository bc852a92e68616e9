"""A folder's tuning stays as it is, or grows: what was tried is tried again, and something beside it.

For example, ``run.lr = [1e-3, 3e-3]`` may become ``[3e-4, 1e-3, 3e-3]`` if the least value was chosen. Trials that are
there keep their cells, and the test cells are made anew with the choice among all. Another split, other tuning seeds or
fewer values would make one table of rows that were not chosen alike, and are refused.
"""

import warnings
from pathlib import Path

import attrs

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.space import Domain, TuneSpec, tune_from, values_of
from lrkit.study.study_file import StudyFile


def with_tuning(there: StudyFile, mine: StudyFile, folder: Path) -> StudyFile:
    """Return the study that is there without the trials and the tuned cells that further values put out of date.

    A warning says so.

    Args:
        there: the study in the folder.
        mine: the one that is asked for.
        folder: the folder.

    Raises:
        LrkitError: it is tuned in another way, or it has rows, tasks or seeds that would be left behind.
    """
    if there.tune is None or mine.tune is None:
        return there
    before, now = (attrs.evolve(tune_from(study.tune, "tune"), defaults=False) for study in (there, mine))
    if before == now:
        return there
    hint = "leave --tune as it was, or choose another --out"
    if not _grown(before, now):
        raise LrkitError(
            f"{folder} is tuned over {_told(before)}, and not over {_told(now)}: a folder's tuning may get further values, "
            f"and nothing else may change; {hint}"
        )
    seeds = {*mine.seeds} or {*there.seeds}  # trials alone leave no test seed behind
    here = {(mine.rows[trial.row].label, trial.task) for trial in mine.trials}
    kept = [
        *((cell, True) for cell in there.trials),
        *((cell, cell.seed in seeds) for cell in there.cells if cell.tuned),
    ]
    for cell, asked in kept:
        # The base is the base, whatever it is called.
        label = mine.rows[0].label if cell.row == there.base else there.rows[cell.row].label
        if (label, cell.task) not in here or not asked:
            raise LrkitError(
                f"{folder} has tuned cells of {label}, {cell.task}, seed {cell.seed}, which is not asked for now: give all "
                f"rows, tasks and seeds with further values, or {hint}"
            )
    warnings.warn(
        f"{folder} was tuned over {_told(before)}, and is now over {_told(now)}: its trials are kept, and the test cells "
        "are run anew with what is chosen among all",
        LrkitWarning,
        stacklevel=5,
    )
    return attrs.evolve(there, trials=(), cells=tuple(cell for cell in there.cells if not cell.tuned))


def _grown(before: TuneSpec, now: TuneSpec) -> bool:
    """Tell if all that was tried is tried now, in the same way."""
    same = ("seed", "tuning_seeds", "sampler", "halving")
    if any(getattr(before, name) != getattr(now, name) for name in same) or before.space.keys() != now.space.keys():
        return False
    if before.sampler == "tpe":
        return before.space == now.space and before.batch == now.batch and (before.trials or 0) <= (now.trials or 0)
    if before.halving is not None:
        return False
    return all(_within(tried, now.domains[name]) for name, tried in before.domains.items())


def _within(tried: Domain, wider: Domain) -> bool:
    return {*map(repr, values_of(tried))} <= {*map(repr, values_of(wider))}


def _told(tune: TuneSpec) -> str:
    space = ", ".join(f"{name}={tried}" for name, tried in tune.space.items())
    trials = f" with {tune.trials} trials of {tune.sampler}" if tune.trials else ""
    halving = f", halving {tune.halving}" if tune.halving else ""
    return f"{space}{trials}{halving} (seeds {', '.join(map(str, tune.tuning_seeds))}, split {tune.seed})"
