"""Rows that a layer is given to see what it computes: a copy of it runs if a call may change it."""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lrkit.precision import is_plain, without_autocast

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_GRADIENT = (
    "its forward passes no gradient to its input: choose a kernel of its package that can be trained through (or load the "
    "model again, if it has been evaluated and its package has packed the weights for that)"
)


def held(layer: nn.Module) -> Tensor | None:
    """Return the tensor that stands for a layer's weight: the weight, or else the first one that it holds; None if none."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(iter(own(layer)), None)


def own(layer: nn.Module) -> list[Tensor]:
    """Return the tensors that a layer holds itself: parameters, buffers, and attributes; not what a property shows."""
    every = (*layer._parameters.values(), *layer._buffers.values(), *vars(layer).values())
    return [tensor for tensor in every if isinstance(tensor, Tensor)]


def rows(d_in: int) -> Tensor:
    """Return two rows [2, d_in] without a pattern. They are not drawn: the global generator is the caller's."""
    return torch.linspace(-3.0, 7.0, 2 * d_in).mul(2.4).sin().mul(2.0).view(2, d_in)


def can_be_called(layer: nn.Module) -> nn.Module | None:
    """Return what can be called without a change to the layer: the layer, or a copy of it; None if it cannot be copied.

    A quantized layer may change its weight at its first call. For example bitsandbytes in 8 bits does, and then loads no
    checkpoint.
    """
    if is_plain(getattr(layer, "weight", None)):
        return layer
    try:
        return copy.deepcopy(layer)
    except Exception:
        return None


def answer(layer: nn.Module, x: Tensor) -> tuple[Tensor, object] | None:
    """Return rows as they were given to a layer, and its answer; None if it cannot run on them here.

    Args:
        layer: the layer. It is called without its hooks, and no gradient is kept.
        x: the rows [n, d_in], which are cast to the weight's dtype, or to the first of float32, bfloat16 and float16 the
            layer runs on if the weight is packed.
    """
    tensor = held(layer)
    if tensor is None or (called := can_be_called(layer)) is None:
        return None
    known = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor is getattr(layer, "weight", None)
    for dtype in (tensor.dtype,) if known else _DTYPES:
        given = x.to(tensor.device, dtype)
        with contextlib.suppress(Exception), torch.no_grad(), unmoved(tensor.device):
            y: object = called.forward(given)
            return given, y
    return None


def gradientless(layer: nn.Module, d_in: int) -> str | None:
    """Say why a layer cannot be trained through: the gradient of its output does not reach its input. None if it does.

    For rows u and v, and the gradient g of y · (f(u) - f(v)) by y = f(u), g · (u - v) must be ‖f(u) - f(v)‖², up to half of
    it. A layer that cannot run here is believed.
    """
    tensor = held(layer)
    if tensor is None or (called := can_be_called(layer)) is None:
        return None
    for dtype in _DTYPES:
        with contextlib.suppress(Exception), torch.inference_mode(False), torch.enable_grad(), unmoved(tensor.device):
            x = rows(d_in).to(tensor.device, dtype).requires_grad_()
            y = called.forward(x)
            if not isinstance(y, Tensor) or y.device.type == "meta":
                return None
            apart = (y[0] - y[1]).detach()
            (g,) = torch.autograd.grad((y[0] * apart).sum(), x, allow_unused=True) if y.requires_grad else (None,)
            size = float(apart.float().square().sum())
            found = 0.0 if g is None else float((g[0].float() * (x[0] - x[1]).detach().float()).sum())
            return None if abs(found - size) <= 0.5 * size else _NO_GRADIENT
    return None


@contextlib.contextmanager
def unmoved(device: torch.device) -> Iterator[None]:
    """Leave random generators as they are, and switch autocast and warnings off."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
