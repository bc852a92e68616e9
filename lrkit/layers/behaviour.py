"""A test of a layer that is linear by its class: a few rows show if it computes the product with its weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.probe import answer, gradientless, rows
from lrkit.precision import is_plain, without_autocast


def strangeness(layer: nn.Module, d_in: int, d_out: int) -> str | None:
    """Say why an adapter cannot stand beside a layer that is linear by its class; None if one can.

    A layer that runs ``nn.Linear.forward`` is not tested. Any other is given two rows, and must return one tensor of `d_out`
    columns. If the weight is a plain tensor, that must be W x + b up to half of its norm: a quantized product is far closer,
    and a softmax, a sigmoid or a normalised weight is farther away. Otherwise a gradient must come through. If a layer
    cannot run on such rows here, its class is believed.

    Args:
        layer: an ``nn.Linear`` by class.
        d_in: size of its input.
        d_out: size of its output.
    """
    if not _has_own_forward(layer):
        return None
    got = answer(layer, rows(d_in))
    if got is None:
        return None
    x, y = got
    if not isinstance(y, Tensor):
        return f"it returns a {type(y).__name__}"
    if y.shape != (len(x), d_out):
        return f"it returns {list(y.shape)} for {list(x.shape)}"
    error = _error(layer, x, y)
    if error is None:
        return gradientless(layer, d_in)
    return None if error <= 0.5 else "what it returns is not the product with its weight"


def is_exact(layer: nn.Module, d_in: int) -> bool:
    """Return whether a layer's output is W x + b up to rounding, so that an addition to the weight is one to the output."""
    if not _has_own_forward(layer):
        return True
    got = answer(layer, rows(d_in))
    if got is None:
        return False
    x, y = got
    error = _error(layer, x, y) if isinstance(y, Tensor) else None
    return error is not None and error <= (1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2)


def _has_own_forward(layer: nn.Module) -> bool:
    return "forward" in vars(layer) or type(layer).forward is not nn.Linear.forward


def _error(layer: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """Return ‖y - (W x + b)‖ / ‖W x + b‖; None if the weight is not a plain tensor with values."""
    weight, bias = layer.weight, layer.bias
    if not is_plain(weight) or x.device.type == "meta" or weight.shape != (y.shape[-1], x.shape[-1]):
        return None
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    with torch.no_grad(), without_autocast(x.device.type):
        wanted = F.linear(x, weight, bias).float()
        return float((y.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
