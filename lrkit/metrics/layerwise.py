"""The protocol of a metric that reads layers: their inputs, or the gradients of their frozen weights."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers import beneath
from lrkit.metrics.base import Importance
from lrkit.shards import whole


@attrs.frozen(eq=False)
class Layer:
    """One adapted layer, as a `LayerMetric` sees it.

    Args:
        name: the layer's name in the model.
        module: what stands in its place: mostly an adapter, which holds the layer as ``module.base``.
        d_in: size of its input.
        d_out: size of its output.
        units: how many units the policy has in it: components, matrices, or the layer itself.
        device: where its tensors lie.
        memory: what the metric remembers of these units, by the names in `Importance.memory`: float32 [units] each.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    units: int
    device: torch.device
    memory: Mapping[str, Tensor] = attrs.field(factory=dict)

    @property
    def weight(self) -> Tensor:
        """Return the layer's frozen weight W, float32 [d_out, d_in], without a graph. A quantized one is dequantized."""
        layer, kind = beneath(self.module)
        assert kind is not None
        return whole(kind.weight(layer).detach()).to(self.device, torch.float32)


@attrs.frozen(eq=False)
class Seen:
    """Rows that went through a layer in one forward and backward pass of the model.

    Args:
        layer: the layer.
        x: its inputs, float32 [n, d_in].
        g: the loss's gradient by its outputs, float32 [n, d_out]; None for a metric that reads inputs alone, whose look at
            it raises LrkitError.
        labelled: for rows that are tokens with labels, whether the label is not -100, bool [n]; None if no labels fit.
        step: how many steps have been observed, this one included: 1, 2, ...; each batch of a calibration counts as one.
    """

    layer: Layer
    x: Tensor
    _g: Tensor | None
    labelled: Tensor | None
    step: int

    @property
    def g(self) -> Tensor:
        """Return the gradients [n, d_out]. Raises LrkitError if the metric does not say that it reads them."""
        if self._g is None:
            raise LrkitError(
                'seen.g is not there for a metric of reads = "inputs": let its class say reads = "gradient"'
            )
        return self._g


@attrs.frozen(kw_only=True)
class LayerMetric(Importance, abc.ABC):
    """How much a layer's units matter, by what goes through the layer. Subclass with ``@attrs.frozen(kw_only=True)``.

    lrkit puts hooks on the layers whose units are ranked, in the steps that are observed, and takes them away after the
    last decision. A row counts once, also under gradient checkpointing, if a gradient comes back to it: evaluation does not
    count. With gradient accumulation every micro-batch is handed over. Its gradient is a part of the optimizer's: the sum
    of gᵀ x over a step's micro-batches, and over all processes, is the gradient of the layer's weight in that step as a
    mean over processes, before clipping, and without a ``GradScaler``'s factor if `Adapted.bind` is told of the scaler.
    A micro-batch with a number that is not finite is left out.

    The memory is a dict of tensors per layer, of any shape, made by `begin`: a running sum, or a sketch. Nothing of the size
    [d_out, d_in] is made unless the metric makes it. Several processes each take in their own rows of a step, and `merge`
    makes one memory of theirs before the next step, the same on each.
    """

    reads: ClassVar[Literal["inputs", "gradient"]] = "inputs"
    """``"inputs"``: rows x, without those that the batch's ``attention_mask`` calls padding. ``"gradient"``: all rows x, and
    their gradients g, so that dL/dW = gᵀ x."""

    @abc.abstractmethod
    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return what is remembered of a layer at first: tensors by name, of shapes that never change, on ``layer.device``.

        It must follow from the layer's name and sizes and from the settings, the same on every process. If a tensor has one
        slice per unit, along a dimension of size ``layer.units``, it follows if units are cut or added. For example
        ``{"sum": torch.zeros((), device=layer.device)}``.
        """

    @abc.abstractmethod
    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Take in rows, writing only to the tensors of `state`, in place.

        For example ``state["sum"].add_(seen.x.square().sum())``. Where a row falls among micro-batches should not matter.

        Args:
            seen: the rows. Not to be written to.
            state: the tensors that `begin` named.
        """

    @abc.abstractmethod
    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return the score of each of a layer's units, float32 [layer.units], higher for what matters more.

        Must change nothing. For example ``state["sum"].expand(layer.units)`` says the same of all of them.
        """

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the one memory of several that have taken in different rows: sums, unless overridden.

        The first holds all earlier steps; then follows, for each process, one that began anew and has taken in its own
        rows of this step. Override it if not all tensors are sums over rows: a tensor that `begin` fixes, such as the
        random matrix of a sketch, is ``states[0]``'s.
        """
        return {
            name: torch.stack([state[name] for state in states]).sum(dim=0).to(first)
            for name, first in states[0].items()
        }
