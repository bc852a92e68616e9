"""Sound components, ways to break one thing in them, and the question whether a contract finds just that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import datasets
import torch
from torch import Tensor, nn

import lrkit
from lrkit import testing
from lrkit.schedulers import Timetable

frozen = attrs.frozen(kw_only=True)
NEVER_DUE: dict[str, Any] = {"due": lambda times, step: Timetable.due(times, step) and step != times.last}
# These train for seconds. They are left out if a fault is not meant for them.
LONG = {
    "trains or is refused everywhere",
    "resumes exactly",
    "trains and resumes exactly",
    "trains with all it takes",
}


class Specimens:
    """Broken components of one kind, each with the clauses that it breaks.

    An instance is a decorator. For example, ``@fault("equal by value")`` says that what the function below makes breaks
    this clause, and no other.
    """

    def __init__(self, kind: str) -> None:
        self.contract = testing.CONTRACTS[kind]
        self.made: dict[str, tuple[Callable[[], Any], set[str]]] = {}

    def __call__(self, *broken: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        def keep(make: Callable[[], Any]) -> Callable[[], Any]:
            assert make.__name__ not in self.made
            self.made[make.__name__] = (make, set(broken))
            return make

        return keep

    def check(self, name: str) -> None:
        """Assert that the contract finds a specimen by the clauses that are meant, each in one line."""
        make, wanted = self.made[name]
        findings = broken_clauses(self.contract, make(), lambda clause: clause in wanted or clause not in LONG)
        assert set(findings) == wanted, findings
        assert not [message for message in findings.values() if "\n" in message]

    def missing(self) -> set[str]:
        """Return the clauses that no specimen breaks."""
        found = {clause for _, wanted in self.made.values() for clause in wanted}
        return {testing.spoken(test) for test in testing.clauses(self.contract)} - found


COMMON = {testing.spoken(test) for test in testing.clauses(testing.PartContract)}
"""The clauses that every kind has: faulty metrics show that they are found."""


def broken_clauses(
    contract: type[testing.Contract], component: Any, asks: Callable[[str], bool] = lambda clause: True
) -> dict[str, str]:
    """Return what the test methods of a contract's subclass say, by clause, without `lrkit.testing.check`."""
    tests = type("Contract", (contract,), {"component": (component,)})
    findings = {}
    for test in testing.clauses(tests):
        clause = test.removeprefix("test_").replace("_", " ")
        if asks(clause):
            try:
                getattr(tests(), test)()
            except testing.Broken as broken:
                findings[clause] = str(broken)
    return findings


def variant(base: type, doc: str | None = "Broken on purpose: its settings are decay, measure, rank and factor, Source: this test.", **changes: Any):  # fmt: skip  # noqa: E501
    """Make an instance of a class with something written otherwise."""
    made = frozen(type("Broken", (base,), {"__doc__": doc, "__module__": __name__, **changes}))
    return made()


def timed(**methods: Any) -> Any:
    """Make a scheduler whose timetables have other methods, which take the timetable first."""
    times = attrs.frozen(type("Times", (Timetable,), methods))

    def over(self, total_steps, *, units, layers):
        return times(self, total_steps, units, layers)

    return variant(Cosine, over=over)


# ---- faults, each found by the clause that is meant ------------------------------------------------------------------


@frozen
class Peak(lrkit.Metric):
    """The largest abs(gradient), forgotten at the rate `decay`; `measure` as everywhere. Source: this test."""

    buffers: ClassVar[tuple[str, ...]] = ("peak",)
    decay: float = 0.9

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        state["peak"].copy_(torch.maximum(state["peak"] * self.decay, grad.abs()))

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return state["peak"]


@frozen
class Cosine(lrkit.Scheduler):
    """A half cosine. Source: this test."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@frozen
class Shrink(lrkit.Action):
    """λ of a loser times `factor`. Source: this test."""

    fate: ClassVar[Any] = "dimmed"
    factor: float = 0.1

    @property
    def unit(self) -> Any:
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        return None if any(part.core for part in parameterization.parts) else "there is no core value to shrink"

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(torch.where(keep, 1.0, self.factor))


class Gated(nn.Module):
    """y = W x + B (core ∘ A x), written plainly."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        d_out, d_in = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.A = nn.Parameter(torch.randn(rank, d_in, **like) * 0.1)
        self.B = nn.Parameter(torch.randn(d_out, rank, **like) * 0.1)
        self.core = nn.Parameter(torch.zeros(rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A.t()) * self.core) @ self.B.t()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        self.base.weight += (self.B * self.core) @ self.A
        return self.base


@frozen
class Gates(lrkit.Parameterization):
    """ΔW = B diag(core) A with r = `rank`. Source: this test."""

    learning_rate: ClassVar[float] = 1e-2
    module: ClassVar[type[nn.Module]] = Gated
    rank: int = 4

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        core = lrkit.Part("core", axis=0, core=True)
        return (core, lrkit.Part("A", axis=0, matrix=True), lrkit.Part("B", axis=1, matrix=True))

    @property
    def components(self) -> int:
        return self.rank

    def build(self, target: Any) -> nn.Module:
        if not isinstance(target.layer, nn.Linear):
            raise lrkit.LrkitError(f"{target.name}: Gates takes an nn.Linear, not {type(target.layer).__name__}")
        return self.module(target.layer, self.rank)


def mine(*, rank: int = 4) -> lrkit.Method:
    """AdaLoRA with another name, of rank `rank`. Source: arXiv 2303.10512."""
    return lrkit.methods.adalora(rank=rank, target_rank=2)


def sums(rest: str | None) -> lrkit.tasks.Task:
    """Say whether a sum is even. Source: this test."""
    if rest is not None:
        raise lrkit.LrkitError(f'sums has no part "{rest}"')
    return rows([{"text": f"{a} and {b}", "label": (a + b) % 2} for a in range(5) for b in range(5)])


def rows(table: list[dict[str, Any]]) -> lrkit.tasks.Task:
    """Return a task whose rows are these, for training and for validation."""
    data = datasets.Dataset.from_list(table)
    return lrkit.tasks.Classification(name="t", train=data, validation=data, fields=("text",), labels=("odd", "even"))
