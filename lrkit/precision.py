"""Questions about precision: autocast, and plain tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def is_autocast_on(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    # torch.compile of torch 2.7 cannot ask whether there is one; a device that it compiles for has it.
    there = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return there and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off for one type of device, where it is on; an autograd function is cast as a whole or not at all.

    Autocast around ``backward()`` alone reaches into an autograd function's backward, and would cast some of its products.
    """
    return torch.autocast(device, enabled=False) if is_autocast_on(device) else nullcontext()


def is_plain(weight: object) -> bool:
    """Whether a weight is a floating tensor of torch's own, that can be added to and taken apart.

    Not so: tensor subclasses (quantized ones that have a floating dtype all the same, shards), integers, 8-bit floats.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and isinstance(weight, Tensor)
        and weight.layout == torch.strided
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
    )
