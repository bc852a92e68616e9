"""Compose a component under test with lrkit's own parts, or with a plug-in that is known to this process alone."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import attrs

from lrkit import actions, metrics, parameterizations, registry, schedulers
from lrkit.actions import Action
from lrkit.errors import LrkitError
from lrkit.fit import budget_in_costs
from lrkit.hookspecs import Kind
from lrkit.method import Method
from lrkit.metrics import Metric
from lrkit.parameterizations import Parameterization
from lrkit.registry import BASES, Registry
from lrkit.testing.findings import expect

_CUBIC = schedulers.Cubic(target=0.5, warmup=2, final=2, interval=2)


def kind_of(component: object) -> Kind:
    """Return which part of a method a component is."""
    return next(kind for kind, base in BASES.items() if isinstance(component, base))


def method_with(component: Any, **others: Any) -> Method:
    """Compose the component with lrkit's own in the other places, or with those that `others` names."""
    parts: dict[str, Any] = {
        "parameterization": parameterizations.SVD(rank=4),
        "metric": metrics.SensitivityUncertainty(),
        "scheduler": _schedule(component),
        "action": actions.Prune(),
    }
    return Method(**{**parts, kind_of(component): component, **others})


def _schedule(component: object) -> schedulers.Scheduler:
    """Return a schedule for a component: one that counts costs if it is an action that ranks by them."""
    alone = isinstance(component, Action) and budget_in_costs(_CUBIC, component)
    return attrs.evolve(_CUBIC, amount="parameters") if alone else _CUBIC


def builtin_parameterizations() -> list[Parameterization]:
    """List lrkit's own, at a rank that fits the tiny model."""
    return [
        parameterizations.SVD(rank=4),
        parameterizations.VectorScaled(rank=4),
        parameterizations.LoRA(rank=4),
        parameterizations.Full(),
    ]


def builtin_metrics() -> list[Metric]:
    """List lrkit's own."""
    return [
        metrics.Magnitude(),
        metrics.Sensitivity(),
        metrics.SensitivityUncertainty(),
        metrics.GradientUncertainty(),
        metrics.RatioUncertainty(),
        metrics.Random(),
    ]


def builtin_actions() -> list[Action]:
    """List lrkit's own."""
    return [actions.Prune(), actions.Freeze(), actions.Zero(), actions.Switch()]


def or_refused(build: Callable[[], Method], *sides: object) -> Method | None:
    """Return what it builds, or None if it is refused.

    Raises:
        lrkit.testing.findings.Broken: a refusal that has several lines, or does not name both sides.
    """
    try:
        return build()
    except LrkitError as error:
        names = [type(side).__name__ for side in sides]
        expect(
            "\n" not in str(error) and sum(name in str(error) for name in names) >= 2,
            f"a refusal must be one line that names both sides ({' and '.join(names)}), not: {error}",
        )
        return None


def taken(component: Any, **sides: Sequence[Any]) -> Iterator[tuple[str, Method]]:
    """Yield what a run is called and its method, for choices of other parts that are not refused.

    Every choice is composed, and refused in words or taken. Of those that are taken, as many are yielded as have each other
    part in one of them: the component stands beside each, and not beside each pair of them.

    For example ``taken(metric, parameterization=builtin_parameterizations(), action=builtin_actions())``.

    Args:
        component: the component under test.
        sides: candidates for other places, by the place's name.
    """
    seen: set[tuple[int, int]] = set()
    for places in itertools.product(*(range(len(side)) for side in sides.values())):
        chosen = [side[place] for side, place in zip(sides.values(), places, strict=True)]
        build = functools.partial(method_with, component, **dict(zip(sides, chosen, strict=True)))
        method = or_refused(build, component, *chosen)
        if method is not None and not seen.issuperset(enumerate(places)):
            seen.update(enumerate(places))
            yield f"a run with {' and '.join(map(repr, chosen))}", method


@contextmanager
def only(plugin: object, *, distribution: str = "plug-in under test") -> Iterator[Registry]:
    """Let this process know lrkit's own components and those of one plug-in, and none that is installed.

    For example, in a fixture of a plug-in's tests: ``with lrkit.testing.only(my_module) as registry: yield registry``.

    Args:
        plugin: a module, or an object, with hook implementations.
        distribution: who it comes from, as errors and tables name it.

    Yields:
        The registry that `lrkit.current` returns until the block ends.

    Raises:
        lrkit.testing.findings.Broken: the plug-in, or a part of it, is refused.
    """
    made = Registry([(distribution, getattr(plugin, "__name__", "plugin"), plugin)], discover=False)
    expect(not made.problems, "; ".join(map(str, made.problems)))
    # The package's name first: it keeps the function that it has once found, and finds the true one again at the end.
    with mock.patch("lrkit.current", return_value=made), mock.patch.object(registry, "current", return_value=made):
        yield made
