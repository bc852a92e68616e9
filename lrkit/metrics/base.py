"""The protocols of importance metrics: what the loop knows of each, and an entry-wise score from weights and gradients."""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from lrkit.errors import LrkitError
from lrkit.settings import one_of


class Parts(tuple[Tensor, ...]):
    """The parts of blocks of one shape, each with its entries' scores [blocks, units, entries]; and numbers of each unit.

    Args:
        scores: the tensors.
        draw: makes `draws`; without it there are none.
        memory: what the metric remembers of each unit, by the names in `Importance.memory`, float32 [blocks, units] each.
    """

    def __new__(
        cls,
        scores: Iterable[Tensor],
        draw: Callable[[], Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> "Parts":
        """Make the tuple."""
        made = super().__new__(cls, scores)
        made._draw, made.memory = draw, memory or {}
        return made

    _draw: Callable[[], Tensor] | None
    memory: Mapping[str, Tensor]

    @property
    def draws(self) -> Tensor:
        """One uniform number in [0, 1) for each unit, float32 [blocks, units].

        A unit's number follows from the run's seed, the step, the policy and the unit's name alone. So it is the same on
        every process and in a resumed run, whatever became of other units; and another one at the next decision.

        Raises:
            LrkitError: these parts were made without draws.
        """
        if self._draw is None:
            raise LrkitError("these parts have no draws: make them by Parts(scores, draw)")
        return self._draw()


@attrs.frozen(kw_only=True)
class Importance:
    """How much each unit matters: everything that the loop knows of any metric.

    There are two kinds. `Metric` scores entries, by their weights and gradients. `LayerMetric` scores a layer's units by
    the layer's inputs, or by the gradient of its weight. Subclass one of them.
    """

    reads: ClassVar[str] = ""
    """The signal that it reads, by which the loop chooses what to remember for it (see the two kinds)."""
    memory: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that it remembers of each unit, one float32 tensor [units] each, zero at first. lrkit saves them
    until the last decision, and lets them follow if units are cut or added: those of a new unit are zero."""

    @property
    def measure(self) -> Literal["before-step", "after-step", "before-clipping"]:
        """Return when a step is taken in, which is as the optimizer finds it unless a subclass says otherwise."""
        return "before-step"

    def decided(self, kept: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Take in a decision, writing only to the tensors of `memory`, in place.

        For example a metric that counts how often a unit was kept writes ``memory["kept"].add_(kept)``.

        Args:
            kept: who is kept, bool [units]. Not to be written to.
            memory: one tensor [units] for each name in `memory`.
        """
        return


@attrs.frozen(kw_only=True)
class Metric(Importance, abc.ABC):
    """How much each entry matters. Subclass with ``@attrs.frozen(kw_only=True)``.

    lrkit hands a metric the entries of all units as flat float32 tensors [N], so a metric is a few elementwise lines, and
    its cost does not grow with the number of layers. Its memory lies in `buffers`: one tensor [N] each, zero at
    first, saved and restored by lrkit. A metric itself is frozen configuration.

    A step may be handed over in pieces, in any cut: entries must not depend on one another, and N is no size to go by.

    Args:
        measure: ``"before-step"`` takes weights and gradients as the optimizer finds them (Algorithm 1 of AdaLoRA);
            ``"after-step"`` takes the updated weights with the old gradients (its released code, and PEFT).
            ``"before-clipping"`` takes the weights before the update with the gradients as backward leaves them, before
            they are clipped (AFLoRA's released code). Under a ``GradScaler``, `Adapted.bind` must be told of it.
    """

    reads: ClassVar[Literal["all", "core", "component", "nothing"]] = "all"
    """``"core"``: only the core value of each component is read. ``"component"``: all parts, but only where units are rank
    components: a score that makes no sense for a single matrix. ``"nothing"``: no entry, so that `reduce`
    has no parts, and goes by draws and memory; no tensor is gathered, however large the units are."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors it remembers. A metric with none is never asked to observe."""

    measure: Literal["before-step", "after-step", "before-clipping"] = attrs.field(
        default="before-step", validator=one_of(("before-step", "after-step", "before-clipping"))
    )

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Take in one optimizer step, writing only to the tensors of `state`, in place.

        Args:
            weight: all entries [N]. Not to be written to.
            grad: their gradients [N]. Not to be written to.
            state: one tensor [N] for each name in `buffers`.
            step: how many steps have been observed, this one included: 1, 2, ... (Where a gradient is not finite, the step
                counts, and `state` stays as it was.)
        """
        return

    @abc.abstractmethod
    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The entry-wise score [N], higher for what matters more. Must change nothing.

        Args:
            weight: all entries [N] as they are at the decision, after the optimizer's step. Whatever must be read before the
                step is taken in by `observe`.
            state: the tensors [N] that `buffers` names.
        """

    def reduce(self, parts: Parts) -> Tensor:
        """Unit scores of blocks of one shape, from the entry-wise scores of their parts.

        Args:
            parts: for each part of the units its entries' scores [blocks, units, entries]. A metric that leaves something to
                chance finds its random numbers in ``parts.draws`` [blocks, units] (`Parts.draws`), and one that remembers
                numbers of each unit finds them in ``parts.memory``.

        Returns:
            Unit scores [blocks, units], by default the sum over parts of the mean over entries (AdaLoRA, Eq. 7; AFLoRA,
            Eq. 4).
        """
        return torch.stack([part.mean(dim=-1) for part in parts]).sum(dim=0)


def smooth(mean: Tensor, value: Tensor, beta: float) -> None:
    """mean = β mean + (1 - β) value, in place; no bias correction (AdaLoRA, Eq. 9 and 10)."""
    mean.lerp_(value, 1.0 - beta)
