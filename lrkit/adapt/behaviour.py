"""Whether a layer is what its class says: a linear map of its weight, by one pass of a few rows through it."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.precision import is_plain, without_autocast

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def strangeness(layer: nn.Module, d_in: int, d_out: int) -> str | None:
    """Why an adapter cannot stand beside a layer that is linear by its class; None where one can.

    A layer that runs ``nn.Linear.forward`` needs no look. Any other is given two rows: a tensor must go in, and one tensor
    of `d_out` columns come out, which is not far from W x + b where the weight is a plain tensor. (Half of the output's
    norm, which a quantized product stays far below, and a softmax, a sigmoid or a normalised weight does not.) A layer that
    cannot run here, on such rows, is taken for what its class says.

    Args:
        layer: an ``nn.Linear`` by class.
        d_in: size of its input.
        d_out: size of its output.
    """
    if not _has_own_forward(layer):
        return None
    got = _run(layer, d_in)
    if got is None:
        return None
    x, y = got
    if not isinstance(y, Tensor):
        return f"it returns a {type(y).__name__}"
    if y.shape != (len(x), d_out):
        return f"it returns {list(y.shape)} for {list(x.shape)}"
    error = _error(layer, x, y)
    return None if error is None or error <= 0.5 else "what it returns is not the product with its weight"


def is_exact(layer: nn.Module, d_in: int) -> bool:
    """Whether a layer's output is that of its weight to rounding, so that what is added to the weight is added to it."""
    if not _has_own_forward(layer):
        return True
    got = _run(layer, d_in)
    if got is None:
        return False
    x, y = got
    error = _error(layer, x, y) if isinstance(y, Tensor) else None
    return error is not None and error <= (1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2)


def _has_own_forward(layer: nn.Module) -> bool:
    return "forward" in vars(layer) or type(layer).forward is not nn.Linear.forward


def _run(layer: nn.Module, d_in: int) -> tuple[Tensor, object] | None:
    """Two rows and what the layer makes of them; None where it cannot run.

    A quantized layer may settle its weight at its first call (bitsandbytes in 8 bits does, and then takes no checkpoint): a
    copy of it runs, or nothing if it has none.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not is_plain(weight):
        try:
            layer = copy.deepcopy(layer)
        except Exception:
            return None
    known = weight.is_floating_point() and weight.dtype.itemsize > 1
    for dtype in (weight.dtype,) if known else _DTYPES:
        # Its own numbers: the global generator is the caller's.
        x = torch.linspace(-3.0, 7.0, 2 * d_in).mul(2.4).sin().mul(2.0).view(2, d_in).to(weight.device, dtype)
        with contextlib.suppress(Exception), torch.no_grad(), _unmoved(weight.device):
            y: object = layer.forward(x)
            return x, y
    return None


@contextlib.contextmanager
def _unmoved(device: torch.device) -> Iterator[None]:
    """Leave random generators as they are, and autocast out."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), without_autocast(device.type):
        yield


def _error(layer: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """‖y - (W x + b)‖ / ‖W x + b‖; None where the weight is no plain tensor, or there are no numbers."""
    weight, bias = layer.weight, layer.bias
    if not is_plain(weight) or x.device.type == "meta" or weight.shape != (y.shape[-1], x.shape[-1]):
        return None
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    with torch.no_grad(), without_autocast(x.device.type):
        wanted = F.linear(x, weight, bias).float()
        return float((y.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
