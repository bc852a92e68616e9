"""Everything that lrkit registers keeps the contract of `lrkit.testing`, with the settings that matter."""

from __future__ import annotations

import subprocess
import sys
import types

import attrs
import pytest
from faulty import Cosine, Gates, Peak, Shrink, mine, sums

import lrkit
import lrkit.registry
from lrkit import testing
from lrkit.registry import PluginWarning
from lrkit.testing import check

# Plug-ins' components are for `lrkit plugins doctor`, and for the plug-ins' own tests.
OURS = f"lrkit {lrkit.__version__}"
OFFERS = [
    o
    for o in lrkit.current().offers()
    if o.kind not in ("layer", "task", "executor", "study") and o.distribution == OURS
]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: f"{offer.kind}-{offer.name}")
def test_registered_components(offer):
    """Every component that lrkit offers by name keeps its contract."""
    assert check(offer.value, kind=offer.kind) == []


def test_movies():
    """The task that lrkit brings along keeps its contract."""
    assert check(lrkit.current().get("task", "movies"), kind="task") == []


class TestMetricsWithOtherSettings(testing.MetricContract):
    component = (
        lrkit.metrics.Magnitude(measure="before-step"),
        lrkit.metrics.Sensitivity(smoothed=True, measure="after-step"),
        lrkit.metrics.GradientUncertainty(window=3),
    )


class TestSchedulersWithOtherSettings(testing.SchedulerContract):
    component = (
        lrkit.schedulers.Cubic(target=3, start=6, warmup=40, final=20, interval=7),
        lrkit.schedulers.Linear(target=0.25, warmup=0.2, final=0.3, interval=0.1, first_step=0, ending="released"),
        lrkit.schedulers.Constant(target=0.0, final=0.5, ending="peft"),
        lrkit.schedulers.Cubic(target=1.0, ending="open"),
    )


class TestFreezeTogether(testing.ActionContract):
    component = lrkit.actions.Freeze(together=True)


class TestActionsThatKeepAnotherNumber(testing.ActionContract):
    component = (lrkit.actions.Freeze(rule="quantile"), lrkit.actions.Prune(ties="threshold"))
    exact = False


class TestParameterizationsWithOtherSettings(testing.ParameterizationContract):
    component = (
        lrkit.parameterizations.LoRA(rank=2, dropout=0.2),
        lrkit.parameterizations.DoRA(rank=3, form="svd", dropout=0.2),
        lrkit.parameterizations.SVD(rank=40, alpha=16.0, orthogonality_norm="mean"),
        lrkit.parameterizations.VectorScaled(rank=8, train="none", shared=True),
        lrkit.parameterizations.VectorScaled(rank=4, train="ffn"),
    )


class TestAMethodInPlace(testing.MethodContract):
    @property
    def component(self) -> lrkit.Method:
        both = lrkit.Policy(metric=METRIC, scheduler=lrkit.schedulers.Linear(), action=lrkit.actions.Prune())
        return attrs.evolve(lrkit.methods.aflora(rank=4), also=(both,))


METRIC = lrkit.metrics.SensitivityUncertainty()


@pytest.mark.parametrize(
    "good",
    [Peak(), Cosine(), Shrink(), Gates(), mine, mine()],
    ids=lambda good: getattr(good, "__name__", type(good).__name__),
)
def test_sound_specimens(good):
    """A component keeps its contract before something is broken in it."""
    assert check(good) == []


def test_sound_task():
    """A task keeps its contract before something is broken in it."""
    assert check(sums, kind="task") == []


def test_class_with_defaults():
    """A class is built with its defaults, and checked."""
    assert check(Gates) == []


def test_no_contract():
    """Something that has no contract is refused."""
    with pytest.raises(lrkit.LrkitError, match="there is no contract for this: 3"):
        check(3)
    with pytest.raises(lrkit.LrkitError, match="there is no contract for executor"):
        check(mine, kind="executor")


def test_no_component():
    """A contract without a component says so."""
    with pytest.raises(testing.Broken, match="component is not set"):
        testing.MetricContract().test_equal_by_value()


def test_nothing_stays_registered():
    """After a check the registry offers what it offered before."""
    before = [(o.kind, o.name) for o in lrkit.current().offers()]
    check(Peak())
    assert [(o.kind, o.name) for o in lrkit.current().offers()] == before


def test_clauses_have_sentences():
    """Every clause says what must hold."""
    for contract in testing.CONTRACTS.values():
        for name, says in testing.clauses(contract).items():
            assert says.endswith("."), (contract, name)


def plugin(**metrics: type[lrkit.Metric]) -> types.ModuleType:
    """Return a module that offers metrics."""
    module = types.ModuleType("acme")
    module.lrkit_metrics = lrkit.hookimpl(lambda: metrics)
    return module


def test_only_one_plugin():
    """Within `only` lrkit's components and one plug-in's are known, and afterwards what was known before."""
    before = lrkit.current()
    with testing.only(plugin(peak=Peak), distribution="acme 1.0") as registry:
        assert lrkit.current() is lrkit.registry.current() is registry
        assert registry.get("metric", "peak") is Peak
        assert {offer.distribution for offer in registry.offers()} == {OURS, "acme 1.0"}
    assert lrkit.current() is lrkit.registry.current() is before


def test_only_in_a_new_process():
    """`only` leaves the true registry behind, even if `lrkit.current` was never asked for before."""
    code = """
import types, lrkit
from lrkit import testing
module = types.ModuleType("acme")
module.lrkit_metrics = lrkit.hookimpl(lambda: {})
with testing.only(module) as registry:
    print(lrkit.current() is registry)
print(lrkit.current() is registry, lrkit.current() is lrkit.registry.current())
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False", "True"]


def test_only_sound_plugins():
    """`only` fails if the plug-in, or a part of it, is refused."""
    with (
        pytest.warns(PluginWarning, match="already offered"),
        pytest.raises(testing.Broken, match="already offered"),
        testing.only(plugin(magnitude=Peak)),
    ):
        pass
