"""The loss of a task whose loss is not the model's own: an `Objective`, made once for each run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lrkit.adapt.summary import LayerSummary


class Objective(ABC):
    """The loss of one run, and what else its task knows of it.

    `lrkit.tasks.Task.objective` makes one for a run, before the adapters are attached. It must be a function of the
    model's weights, the batch and the seed that it is given there, so that every process of a run and every resume has
    the same one.

    Attributes:
        truth: names of the layers that the best allocation is known to lie in; empty if that is not known.
    """

    truth: tuple[str, ...] = ()

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the model's forward takes. For example: all but the column ``labels``."""
        return {name: value for name, value in batch.items() if name != "labels"}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, as a mean over its rows, and the predictions that the task scores.

        For example: the mean squared distance to another model's outputs, and the distances row by row.

        Args:
            model: the adapted model, or what a Trainer has wrapped it in.
            batch: as the task's collator makes it.

        Returns:
            The loss, a scalar; and tensors by name, each [rows, ...]. A Trainer gathers them as predictions.
        """

    def judge(self, layers: Sequence[LayerSummary]) -> dict[str, float]:
        """Score what a run has made of its adapters, beside its predictions. For example: the ranks against `truth`."""
        return {}
