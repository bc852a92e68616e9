"""The contract of every kind of component, as tests that a third party subclasses.

    class TestMovement(lrkit.testing.MetricContract):
        component = Movement()

Each test method is one clause: its docstring says what must hold, its failure what was expected and what came instead.
`check` runs the same methods without pytest, as ``lrkit plugins doctor`` does for all that is installed. A plug-in's own
tests may use the same tools: `resumes` for a method that must resume bit for bit, `only` if no other plug-in is to be
known. Everything they need is made here: a model of a few thousand weights, and runs of ten optimizer steps.
"""

import inspect
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.hookspecs import Kind
from lrkit.method import Method
from lrkit.metrics import LayerMetric
from lrkit.parameterizations import Parameterization
from lrkit.registry import BASES
from lrkit.testing.action import ActionContract
from lrkit.testing.base import Contract, PartContract
from lrkit.testing.findings import Broken, Finding, raised, title
from lrkit.testing.layer_metric import LayerMetricContract
from lrkit.testing.method import MethodContract
from lrkit.testing.metric import MetricContract
from lrkit.testing.neighbours import only
from lrkit.testing.parameterization import ParameterizationContract
from lrkit.testing.runs import Run, resumes
from lrkit.testing.scheduler import SchedulerContract
from lrkit.testing.task import TaskContract
from lrkit.testing.tiny import TinyModel

CONTRACTS: dict[Kind | str, type[Contract]] = {
    "parameterization": ParameterizationContract,
    "metric": MetricContract,
    "layer metric": LayerMetricContract,
    "scheduler": SchedulerContract,
    "action": ActionContract,
    "method": MethodContract,
    "task": TaskContract,
}
"""The contract of each kind that has one."""


def check(component: object, *, kind: Kind | None = None) -> list[Finding]:
    """Find every clause that a component does not keep, by the same tests as the contract's classes.

    Args:
        component: a metric, scheduler, action or parameterization, or the class of one; a method's function; or a task's
            loader. A class is built with its defaults, except for a rank, which is made to fit the tiny model.
        kind: the kind of component; needed for a task's loader alone.

    Returns:
        One finding per broken clause, in the contract's order; an empty list if the contract is kept.

    Raises:
        LrkitError: there is no contract for such a component.
    """
    contract = _contract_of(component, kind)
    if contract is None:
        raise LrkitError(f"there is no contract for {kind or 'this'}: {component!r}")
    if isinstance(component, type):
        try:
            component = _small(component())
        except Exception as error:
            return [Finding("settings have defaults", f"{title(component)}() {raised(error)}")]
    # In a tuple, so that a function does not become a bound method.
    tests = type(contract.__name__, (contract,), {"component": (component,)})()
    findings = []
    for name in clauses(contract):
        try:
            getattr(tests, name)()
        except Broken as broken:
            findings.append(Finding(spoken(name), str(broken)))
    return findings


def clauses(contract: type[Contract]) -> dict[str, str]:
    """Return the names of a contract's test methods in order, each with its docstring."""
    names = [name for cls in reversed(contract.__mro__) for name in vars(cls) if name.startswith("test_")]
    return {name: inspect.getdoc(getattr(contract, name)) or "" for name in dict.fromkeys(names)}


def spoken(name: str) -> str:
    """Return a clause in words: ``"equal by value"`` for the test method ``test_equal_by_value``."""
    return name.removeprefix("test_").replace("_", " ")


def _small(component: Any) -> Any:
    """Return the component with a rank that the tiny model has room for."""
    has_rank = isinstance(component, Parameterization) and any(f.name == "rank" for f in attrs.fields(type(component)))
    return attrs.evolve(component, rank=4) if has_rank else component


def _contract_of(component: object, kind: Kind | None) -> type[Contract] | None:
    cls = component if isinstance(component, type) else type(component)
    if issubclass(cls, LayerMetric):
        return LayerMetricContract
    if kind is not None:
        return CONTRACTS.get(kind)
    for each, base in BASES.items():
        if issubclass(cls, base):
            return CONTRACTS[each]
    return MethodContract if callable(component) or isinstance(component, Method) else None


__all__ = [
    "CONTRACTS",
    "ActionContract",
    "Broken",
    "Contract",
    "Finding",
    "LayerMetricContract",
    "MethodContract",
    "MetricContract",
    "ParameterizationContract",
    "PartContract",
    "Run",
    "SchedulerContract",
    "TaskContract",
    "TinyModel",
    "check",
    "clauses",
    "only",
    "resumes",
    "spoken",
]
