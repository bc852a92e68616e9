"""The protocol of a layer kind: all that adapters must know of the layers that they stand beside."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from torch import Tensor, nn
from torch.nn import functional as F


@attrs.frozen
class Sizes:
    """The sizes of a layer as a linear map.

    Args:
        d_in: size of its input.
        d_out: size of its output.
        maps: how many maps of these sizes it stacks: the number of experts in a stack of experts; 1 otherwise.
    """

    d_in: int
    d_out: int
    maps: int = 1


@attrs.frozen
class LayerKind(abc.ABC):
    """One kind of layer that can be adapted. Subclass with ``@attrs.frozen``; it has no state.

    A layer of any kind is a map y = W x + bias for some W [d_out, d_in]. For a convolution x is a patch, and W a reshaped
    filter; for an embedding x is one-hot. An increment has two factors, A [r, d_in] and B [d_out, r], and the kind knows how
    the layer's input meets them. For example a convolution convolves with A, and then multiplies the r channels by B.

    A stack holds `Sizes.maps` maps, one per expert. Its factors are A [maps · r, d_in] and B [d_out, maps · r], expert after
    expert, and its layer is called with the rows of all experts and where each expert's rows end (`where`).
    """

    linear: ClassVar[bool] = False
    """Whether ``targets="all-linear"`` takes layers of this kind."""

    @abc.abstractmethod
    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return the sizes of a layer; None if it is not of this kind."""

    @abc.abstractmethod
    def weight(self, layer: nn.Module) -> Tensor:
        """Return W as [d_out, d_in], or [maps, d_out, d_in] of a stack: a view of the layer's weight if possible."""

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        """Return A x: r features in the place of the layer's. Of rows [..., d_in] unless overridden.

        Args:
            layer: the layer.
            x: its input.
            a: A [r, d_in], in the dtype of the layer's output.
            where: the layer's further arguments.
        """
        return F.linear(x.to(a.dtype), a)

    def up(self, layer: nn.Module, h: Tensor, b: Tensor, *where: Any) -> Tensor:
        """Return B h, in the shape of the layer's output: rows [..., d_out] unless overridden.

        `h` is what `down` returned, or that scaled.
        """
        return F.linear(h, b.to(h.dtype))

    def scale(self, layer: nn.Module, h: Tensor, by: Tensor, *where: Any) -> Tensor:
        """Return features multiplied by a vector: core values [r] after `down`, an output scale [d_out] after `up`."""
        return h * by

    def rows(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the layer's input as rows [n, d_in], so that the layer is W times each. Of [..., d_in] unless overridden.

        For example a convolution's rows are its patches.
        """
        return x.reshape(-1, x.shape[-1])

    def out_rows(self, layer: nn.Module, y: Tensor) -> Tensor:
        """Return something in the shape of the layer's output as rows [n, d_out], in the order of `rows`."""
        return y.reshape(-1, y.shape[-1])

    def no_rows(self, layer: nn.Module) -> str | None:
        """Say why this layer's input cannot be shown as rows, so that no metric can read it; None if it can."""
        return None

    def start(self, layer: nn.Module, a: Tensor) -> Tensor:
        """Return a new A [r, d_in], with those columns set to zero that no gradient is to reach: none unless overridden."""
        return a

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Write W, in the shape that `weight` returns, into the layer."""
        self.weight(layer).copy_(weight)

    def plain_weight(self, layer: nn.Module) -> Tensor | None:
        """Return W [d_out, d_in] if the layer computes x Wᵀ + bias and nothing else, so that a fused kernel may; or None."""
        return None

    def refusal(self, layer: nn.Module) -> str | None:
        """Say why this very layer cannot be adapted, although it is of this kind; None if it can."""
        return None

    def parts(self, layer: nn.Module, name: str, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the layers inside of a module that holds several, by name; empty if this kind knows none.

        They are small modules of this kind that show one part of the module's weights as a layer: the q, k and v of a fused
        map, or the stacks of a module of experts. The module may be a layer of another kind as well, as a fused map is.

        Args:
            layer: any module of a model.
            name: its name in the model.
            model: the model, for what the modules around know: a fused map's heads, for example.
        """
        return {}

    def join(self, layer: nn.Module, adapters: Mapping[str, nn.Module]) -> nn.Module:
        """Return the module that takes the place of one with `parts`, of which some are adapted.

        Args:
            layer: the module.
            adapters: the adapters by name of the part.
        """
        raise NotImplementedError
