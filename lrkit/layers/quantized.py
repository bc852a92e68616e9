"""Quantized linear maps that are no ``nn.Linear``: the layers of GPTQ, AWQ and HQQ."""

from typing import ClassVar

import attrs
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers.base import LayerKind, Sizes
from lrkit.layers.dequantized import features, is_quantized, whole_weight
from lrkit.layers.probe import answer, gradientless, rows


@attrs.frozen
class Quantized(LayerKind):
    """A layer that names its features, holds no layers and no float weight, and is no ``nn.Linear``.

    It is known by its attributes, and by what it computes: one tensor in and out, affine on a probe, and its gradient
    reaches its input. (bitsandbytes, torchao and quanto make subclasses of ``nn.Linear``, or leave the layer as it is.)
    """

    linear: ClassVar[bool] = True

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return the features that the layer names; None if it is an ``nn.Linear`` or is not quantized."""
        sizes = None if isinstance(layer, nn.Linear) else features(layer)
        return None if sizes is None or not is_quantized(layer) else Sizes(*sizes)

    def refusal(self, layer: nn.Module) -> str | None:
        """Say why a layer is no linear map, or cannot be trained through."""
        sizes = self.sizes(layer)
        assert sizes is not None
        return not_affine(layer, sizes.d_in, sizes.d_out) or gradientless(layer, sizes.d_in)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the dequantized weight: a new tensor at every call."""
        return whole_weight(layer)

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Refuse: nothing can be written into a quantized weight exactly."""
        raise LrkitError(f"a {type(layer).__name__} is quantized: nothing can be written into its weight exactly")


def not_affine(layer: nn.Module, d_in: int, d_out: int) -> str | None:
    """Say why a layer is no map y = W x + bias from d_in to d_out; None if it is, or if it cannot run here.

    For rows u and v, f((u + v) / 2) must be (f(u) + f(v)) / 2, up to a tenth of the norm of f(u) - f(v).
    """
    both = rows(d_in) * 16  # far from 0, where a sigmoid is nearly linear
    got, ends = answer(layer, both.mean(0, keepdim=True)), answer(layer, both)
    if got is None or ends is None:
        return None
    y, pair = got[1], ends[1]
    if not isinstance(y, Tensor) or not isinstance(pair, Tensor):
        return f"it returns a {type(y).__name__}"
    if y.shape != (1, d_out) or pair.shape != (2, d_out):
        return f"it returns {list(y.shape)} for {[1, d_in]}"
    if y.device.type == "meta":
        return None
    size = float((pair[0] - pair[1]).float().norm())
    error = float((pair.float().mean(0) - y[0].float()).norm())
    return None if error <= 0.1 * size else "what it returns is no linear map of its input"
