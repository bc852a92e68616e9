"""The contract of every kind of component, as tests that a third party subclasses.

    class TestMovement(lrkit.testing.MetricContract):
        component = Movement()

Each test method is one clause: its docstring says what must hold, its failure what was expected and what came instead.
`check` runs the same methods without pytest, which is how ``lrkit plugins doctor`` looks at what is installed. All that
is needed is made here: a model of a few thousand weights, and runs of ten optimizer steps.
"""

import inspect
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.hookspecs import Kind
from lrkit.method import Method
from lrkit.parameterizations import Parameterization
from lrkit.testing.action import ActionContract
from lrkit.testing.base import BASES, Broken, Contract, Finding, TinyModel, raised, title
from lrkit.testing.method import MethodContract, TaskContract
from lrkit.testing.metric import MetricContract
from lrkit.testing.parameterization import ParameterizationContract
from lrkit.testing.scheduler import SchedulerContract

CONTRACTS: dict[Kind | str, type[Contract]] = {
    "parameterization": ParameterizationContract,
    "metric": MetricContract,
    "scheduler": SchedulerContract,
    "action": ActionContract,
    "method": MethodContract,
    "task": TaskContract,
}
"""The contract of each kind that has one."""


def check(component: object, *, kind: Kind | None = None) -> list[Finding]:
    """Every clause that a component does not keep, by the same tests as the contract's classes.

    Args:
        component: a metric, scheduler, action or parameterization, or the class of one; a method's function; or a task's
            loader. A class is built with its defaults, but a rank, which is made to fit the tiny model.
        kind: what it is meant to be; needed for a task's loader alone.

    Returns:
        One finding for each broken clause, in the contract's order; an empty list where it is kept.

    Raises:
        LrkitError: something that has no contract.
    """
    contract = CONTRACTS.get(kind) if kind is not None else _contract_of(component)
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
            findings.append(Finding(_spoken(name), str(broken)))
    return findings


def clauses(contract: type["Contract"]) -> dict[str, str]:
    """The test methods of a contract's class in order, with what each of them says."""
    names = [name for cls in reversed(contract.__mro__) for name in vars(cls) if name.startswith("test_")]
    return {name: inspect.getdoc(getattr(contract, name)) or "" for name in dict.fromkeys(names)}


def _spoken(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def _small(component: Any) -> Any:
    """With a rank that the tiny model has room for."""
    has_rank = isinstance(component, Parameterization) and any(f.name == "rank" for f in attrs.fields(type(component)))
    return attrs.evolve(component, rank=4) if has_rank else component


def _contract_of(component: object) -> "type[Contract] | None":
    cls = component if isinstance(component, type) else type(component)
    for kind, base in BASES.items():
        if issubclass(cls, base):
            return CONTRACTS[kind]
    return MethodContract if callable(component) or isinstance(component, Method) else None


__all__ = [
    "CONTRACTS",
    "ActionContract",
    "Broken",
    "Contract",
    "Finding",
    "MethodContract",
    "MetricContract",
    "ParameterizationContract",
    "SchedulerContract",
    "TaskContract",
    "TinyModel",
    "check",
    "clauses",
]
