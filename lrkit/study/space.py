"""The values that tuning tries: lists, ranges and their combinations. No torch here."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.strict import strict_converter, structured

FIRST_SEED = 1000
"""The first tuning seed if only their number is given: test seeds count from 0."""

_LOG = re.compile(r"log\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*(?:,\s*(\d+)\s*)?\)")


@attrs.frozen
class Log:
    """A range of positive numbers, even in their logarithm: ``log(1e-4,1e-2,5)``.

    Args:
        low: the lower end.
        high: the upper end.
        points: how many values a grid takes, the ends among them; None if it is for a sampler alone.
    """

    low: float
    high: float
    points: int | None = None

    def values(self) -> list[float]:
        """Return a grid's values, to three digits. Raise LrkitError if their number is not given."""
        if self.points is None:
            raise LrkitError(f"{self} has no number of values for a grid: log({self.low:g},{self.high:g},5)")
        steps = [index / (self.points - 1) for index in range(self.points)]
        return [float(f"{self.low ** (1 - at) * self.high**at:.3g}") for at in steps]

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"log({self.low:g},{self.high:g}" + (f",{self.points})" if self.points else ")")


Domain = Log | list[Any]


def domain(value: Any, path: str) -> Domain:
    """Read the values of a setting: a list, or ``"log(low,high,points)"``.

    Raises:
        LrkitError: it is neither, or values repeat.
    """
    if isinstance(value, str) and (found := _LOG.fullmatch(value.strip())):
        try:
            low, high = float(found[1]), float(found[2])
        except ValueError:
            low = high = math.nan
        points = None if found[3] is None else int(found[3])
        if not 0 < low < high < math.inf or (points is not None and not 2 <= points <= 1000):
            raise LrkitError(
                f"tune {path}: {value} must be log(LOW,HIGH,POINTS) with 0 < LOW < HIGH and 2 points or more"
            )
        tried = Log(low, high, points)
        if points is not None and len({*tried.values()}) < points:
            raise LrkitError(f"tune {path}: {value}: to three digits the ends are too near for {points} values")
        return tried
    if not isinstance(value, list) or not value:
        raise LrkitError(f'tune {path}: must be a list of values to try, or "log(1e-4,1e-2,5)", not {shown(value)}')
    for each in value:
        if not isinstance(each, str | int | float | None) or (isinstance(each, float) and not math.isfinite(each)):
            raise LrkitError(f"tune {path}: {shown(each)} is no value of a setting: a number, a text, true or false")
    if len({(type(each) is bool, each) for each in value}) < len(value):
        raise LrkitError(f"tune {path}: a value is there twice: {shown(value)}")
    return value


def values_of(tried: Domain) -> list[Any]:
    """List the values that a grid tries. Raise LrkitError if a range has no number of them."""
    return tried.values() if isinstance(tried, Log) else tried


def grid(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List every combination of a row's space: path to value each; the last setting changes fastest."""
    domains = [domain(value, path) for path, value in space.items()]
    values = [*map(values_of, domains)]
    return [dict(zip(space, each, strict=True)) for each in itertools.product(*values)]


def ends(tried: Domain) -> tuple[Any, Any]:
    """Return two values of a domain: the ends of a range, the first and the last of a list."""
    return (tried.low, tried.high) if isinstance(tried, Log) else (tried[0], tried[-1])


@attrs.frozen(kw_only=True)
class TuneSpec:
    """How the settings of a study's rows are chosen: ``[tune]`` in a study file.

    Args:
        space: setting to the values that are tried: a list, or ``"log(1e-4,1e-2,5)"``. A setting is one of a run
            (``"run.lr"``), one of the method (``"parameterization.alpha"``) or an argument of a named method
            (``"alpha"``).
        seeds: how many seeds each trial has (1000, 1001, ...), or which: never one of the study's.
        seed: of the split that sets training rows aside, by which settings are chosen, and of the sampler.
        sampler: ``"grid"``: every combination; ``"tpe"``: so many trials, proposed by Optuna's TPE.
        trials: how many, for ``"tpe"``.
        batch: how many are proposed at a time: a trial's proposal knows the results of the batches before it.
        halving: successive halving of a grid by a factor η: all trials have T/η² of the test's T steps, the best one in η
            T/η, the best of these T; of fewer than η² trials all have T/η. None: all have T.
        defaults: also run the rows at the settings given, so that the report has both tables.
    """

    space: dict[str, Any]
    seeds: int | list[int] = 2
    seed: int = 0
    sampler: str = "grid"
    trials: int | None = None
    batch: int = 4
    halving: int | None = None
    defaults: bool = False

    @property
    def domains(self) -> dict[str, Domain]:
        """Return what is tried, by setting as it is asked for."""
        return {path: domain(value, path) for path, value in self.space.items()}

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Return the seeds of each trial."""
        if isinstance(self.seeds, int):
            return tuple(range(FIRST_SEED, FIRST_SEED + self.seeds))
        return tuple(self.seeds)

    @property
    def count(self) -> int:
        """Count the trials of each row on a task."""
        if self.sampler == "tpe":
            return self.trials or 0
        return math.prod(len(values_of(each)) for each in self.domains.values())

    @property
    def rungs(self) -> tuple[int, ...]:
        """Return how many trials each rung has: all in the only one; with halving by η all, one in η and one in η²."""
        if self.halving is None or self.halving < 2:  # which `check_tune` refuses
            return (self.count,)
        return tuple(self.count // self.halving**k for k in range(3) if self.count >= self.halving**k)

    @property
    def cells(self) -> int:
        """Count the cells of a row's trials on a task."""
        return sum(self.rungs) * len(self.tuning_seeds)

    def told(self) -> str:
        """Say in words how many trials there are, and on what."""
        seeds = "one seed" if len(self.tuning_seeds) == 1 else f"{len(self.tuning_seeds)} seeds"
        halved = f", of which {' and '.join(map(str, self.rungs[1:]))} go on" if self.rungs[1:] else ""
        return f"{self.count} trials of each row with {seeds}{halved}, on rows set aside from training"

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return attrs.asdict(self)


def space_of(tune: TuneSpec, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return a row's space as plain data: path to a list of values, or to a range as text; sorted by path."""
    return dict(sorted((paths[name], tried) for name, tried in tune.space.items() if name in paths))


def flat_space(space: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """Return a space by full paths: in TOML ``run.lr = [...]`` without quotes is a table in a table."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        path = f"{owner}.{key}" if owner else key
        flat |= flat_space(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def tune_from(plain: Any, where: str) -> TuneSpec:
    """Make a `TuneSpec` from plain data.

    Args:
        plain: a table, as in a study file.
        where: what errors call it.

    Raises:
        LrkitError: an unknown key, or a value of the wrong type.
    """
    if isinstance(plain, Mapping) and "space" not in plain:
        raise LrkitError(f"{where}.space is missing: the settings to tune and their values, or --tune PATH=A,B,...")
    converter = strict_converter(forbid_extra_keys=True)
    converter.register_structure_hook(int | list[int], lambda value, _: value)
    spec = structured(plain, TuneSpec, converter, root=where)
    numbers = spec.seeds if isinstance(spec.seeds, list) else [spec.seeds]
    if not numbers or any(type(number) is not int or not 0 <= number < 2**32 for number in numbers) or spec.seeds == 0:
        raise LrkitError(f"{where}.seeds must be a number of seeds (2), or a list of seeds, not {shown(spec.seeds)}")
    if len({*numbers}) < len(numbers) or len(spec.tuning_seeds) > 1000:
        raise LrkitError(f"{where}.seeds must be different seeds, and at most 1,000")
    return attrs.evolve(spec, space=flat_space(spec.space))


def optuna_version() -> str:
    """Return the version of Optuna, on which proposals depend. Raise LrkitError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise LrkitError('sampler = "tpe" needs Optuna: pip install "lrkit[tune]"') from None
    return str(optuna.__version__)
