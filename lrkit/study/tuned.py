"""Read what a tuned study tried and chose: `trials_of` and `chosen_of`. No torch here."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import at
from lrkit.study.choosing import best_of, survivors
from lrkit.study.run_settings import RunSettings, settings_from
from lrkit.study.space import Domain, Log, TuneSpec, grid, space_of, tune_from

if TYPE_CHECKING:
    import pandas

    from lrkit.study.results import CellRecord, StudyRecord


@attrs.frozen(kw_only=True)
class TrialRecord:
    """One trial of a row on a task: some settings, on all tuning seeds.

    Args:
        number: which one, counted from 0.
        settings: path to value; a setting that is not known yet is left out.
        scores: seed to the primary score on the rows set aside, of the furthest rung; NaN if the run diverged.
        mean: over the tuning seeds; None until all are done, NaN if one diverged.
        stopped: the step after which halving stopped it; None if it went to the end.
    """

    number: int
    settings: dict[str, Any]
    scores: dict[int, float]
    mean: float | None
    stopped: int | None = None


@attrs.frozen(kw_only=True)
class Choice:
    """What the trials of a row on a task chose.

    Args:
        trial: the trial that was chosen.
        settings: path to value.
        default: path to the value that the row has without tuning.
        edges: paths whose chosen value is the least or the greatest that was tried.
        widen: what the same command is given to try further values, ``--tune run.lr=...``; empty if none is at an edge
            beyond which there is something, as below a rank of 1 there is not.
            Where trials depend on one another, by TPE or halving, a wider range begins a study anew: with ``--out ANOTHER``.
    """

    trial: int
    settings: dict[str, Any]
    default: dict[str, Any]
    edges: tuple[str, ...] = ()
    widen: str = ""


def trials_of(record: "StudyRecord", row: int, task: str) -> tuple[TrialRecord, ...]:
    """List the trials of a row on a task, by number; empty if the study is not tuned.

    With successive halving a trial has the scores of the furthest rung that it came to.
    """
    places: dict[tuple[int, int], list[CellRecord]] = {}
    for cell in record.trials_in(row, task):
        if cell.number is not None:
            places.setdefault((cell.rung, cell.number), []).append(cell)
    if not places:
        return ()
    tune, paths = _tune(record), record.rows[row].tuned
    listed = grid(space_of(tune, paths)) if tune.sampler == "grid" else None

    def trial(number: int, cells: "list[CellRecord]") -> TrialRecord:
        return _trial(number, cells, _settings(listed, paths, number, cells))

    sizes = [sum(rung == each for rung, _ in places) for each in range(1 + max(rung for rung, _ in places))]
    found = {number: trial(number, places[0, number]) for number in range(sizes[0])}
    means = [found[number].mean for number in range(sizes[0])]
    for rung in range(1, len(sizes)):
        if any(mean is None for mean in means):
            break
        known = [_comparable(mean, record.higher_is_better(task)) for mean in means]
        *_, before, here = survivors(known, sizes[: rung + 1])
        step = places[rung - 1, 0][0].steps
        found |= {number: attrs.evolve(found[number], stopped=step) for number in {*before} - {*here}}
        for slot, number in enumerate(here):
            found[number] = trial(number, places[rung, slot])
            means.append(found[number].mean)
    return tuple(found.values())


def _comparable(mean: float | None, higher_is_better: bool) -> float:
    """Return a mean so that more is better."""
    if mean is None or not math.isfinite(mean):
        return -math.inf
    return mean if higher_is_better else -mean


def _trial(number: int, cells: "list[CellRecord]", settings: dict[str, Any]) -> TrialRecord:
    scores = {cell.seed: cell.score for cell in cells if cell.score is not None}
    return TrialRecord(
        number=number,
        settings=settings,
        scores=scores,
        mean=statistics.fmean(scores.values()) if len(scores) == len(cells) else None,
    )


def _settings(
    listed: list[dict[str, Any]] | None, paths: dict[str, str], number: int, cells: "list[CellRecord]"
) -> dict[str, Any]:
    """Find the settings of a trial: by its number in a grid; if they were proposed, in what was trained."""
    if listed is not None:
        return listed[number] if number < len(listed) else {}
    return _trained(paths, next((cell.config for cell in cells if cell.result is not None), {}))


def chosen_of(record: "StudyRecord", row: int, task: str) -> Choice | None:
    """Return what was chosen for a row on a task; None until all of its trials are done, and if all of them diverged."""
    trials = trials_of(record, row, task)
    if not trials or any(trial.mean is None for trial in trials):
        return None
    last = [trial for trial in trials if trial.stopped is None]
    try:
        best = last[best_of([_comparable(trial.mean, record.higher_is_better(task)) for trial in last])]
    except LrkitError:
        return None
    tune, paths = _tune(record), record.rows[row].tuned
    edges, words, wider = [], [], False
    for name, path in paths.items():
        tried = tune.domains[name]
        end = _end(tried, best.settings.get(path))
        if end:
            edges.append(path)
        said = _wider(tried, end, path)
        words.append(f"--tune {name}={said}")
        wider |= said != _wider(tried, 0, path)
    if tune.sampler == "tpe" or tune.halving is not None:  # `retuned` refuses the range in a folder that has trials
        words.append("--out ANOTHER")
    return Choice(
        trial=best.number,
        settings=best.settings,
        default={path: _default(record, row, task, path) for path in paths.values()},
        edges=tuple(edges),
        widen=" ".join(words) if wider else "",
    )


def lr_of(record: "StudyRecord", row: int, task: str) -> str:
    """Show a row's learning rate on a task: the chosen one if it is tuned, and empty until it is chosen."""
    own = record.rows[row].rates.get(task, {}).get("lr")
    if record.tune is not None and "run.lr" in record.rows[row].tuned.values():
        choice = chosen_of(record, row, task)
        if choice is None:
            return ""
        chosen = choice.settings["run.lr"]  # None is the method's own rate, which may have been tried as well
        own = own if chosen is None else chosen
    return "" if own is None else f"{own:g}"


def _tune(record: "StudyRecord") -> TuneSpec:
    return tune_from(record.tune, "tune")


def _default(record: "StudyRecord", row: int, task: str, path: str) -> Any:
    """Return the value that a row has on a task without tuning; of an older study, without the task's own settings."""
    own, name = record.rows[row], path.removeprefix("run.")
    if path in own.given.get(task, {}):
        return own.given[task][path]
    if not path.startswith("run."):
        return at(own.method, path)
    given = {**attrs.asdict(RunSettings()), **record.run, **own.run, **own.rates.get(task, {})}
    return given.get(name)


def _end(tried: Domain, value: Any) -> int:
    """Tell at which end of what was tried a value lies: -1 for the lower, 1 for the upper, 0 for neither."""
    if isinstance(tried, Log):
        low, high, tenth = tried.low, tried.high, (tried.high / tried.low) ** 0.1
        if tried.points is None:
            return -1 if value <= low * tenth else 1 if value >= high / tenth else 0
        tried = tried.values()
    numbers = [each for each in tried if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < max(2, len(tried)):
        return 0
    return -1 if value <= min(numbers) else 1 if value >= max(numbers) else 0


def _wider(tried: Domain, end: int, path: str) -> str:
    """Write what is to be tried: if a value at an end was chosen, with up to two more beyond it that may be."""
    if isinstance(tried, Log):
        if tried.points is None:
            return str(Log(tried.low / 10 if end < 0 else tried.low, tried.high * 10 if end > 0 else tried.high))
        if not end:
            return str(tried)
        tried = tried.values()
    if not end:
        return ",".join(map(str, tried))
    numbers = sorted(tried, reverse=end < 0)
    last, before = numbers[-1], numbers[-2]
    if last > 0 and before > 0:
        more = [float(f"{last * (last / before) ** k:.3g}") for k in (1, 2)]
    else:
        more = [last + k * (last - before) for k in (1, 2)]
    if all(isinstance(each, int) for each in tried):  # ranks and steps are whole, and 1 is the least
        more = [*{max(round(each), min(1, last)) for each in more} - {*tried}]
    return ",".join(map(str, sorted([*tried, *(each for each in more if _may_be(path, each, tried))])))


def _may_be(path: str, value: float, tried: Sequence[Any]) -> bool:
    """Return whether a setting may have a value: by its own check if it is a run's, else unless it is the first below 0."""
    if not path.startswith("run."):
        return value >= 0 or min(tried) < 0
    try:
        settings_from({path.removeprefix("run."): value})
    except LrkitError:
        return False
    return True


def _tried(
    record: "StudyRecord", cell: "CellRecord", settings: dict[tuple[int, str, int], dict[str, Any]]
) -> dict[str, Any]:
    """Find the settings of a trial's cell: of a further rung, in what was trained."""
    if not cell.rung:
        return settings[cell.row, cell.task, cell.number or 0]
    return _trained(record.rows[cell.row].tuned, cell.config)


def _trained(paths: dict[str, str], config: dict[str, Any]) -> dict[str, Any]:
    return {
        path: at(config if path.startswith("run.") else config["method"], path) for path in paths.values() if config
    }


def trial_frame(record: "StudyRecord") -> "pandas.DataFrame":
    """Return the trials of a study as a tidy table, one line per cell, in the study's order.

    Returns:
        Columns ``row`` (the label), ``task``, ``trial``, ``rung``, ``settings.PATH`` for every setting that is tuned,
        ``seed``, ``score`` (on the rows set aside; NaN if the run diverged or is not done), ``status`` and ``key``.
    """
    import pandas

    settings = {
        (row, task.name, trial.number): trial.settings
        for row in range(len(record.rows))
        for task in record.tasks
        for trial in trials_of(record, row, task.name)
    }
    paths = list(dict.fromkeys(path for row in record.rows for path in row.tuned.values()))
    table = [
        [
            record.rows[cell.row].label,
            cell.task,
            cell.number,
            cell.rung,
            *(_tried(record, cell, settings).get(path) for path in paths),
            cell.seed,
            cell.score,
            cell.status,
            cell.key,
        ]
        for cell in record.trials
    ]
    named = [f"settings.{path}" for path in paths]
    columns = ["row", "task", "trial", "rung", *named, "seed", "score", "status", "key"]
    return pandas.DataFrame(table, columns=columns).astype({"score": "float64"})
