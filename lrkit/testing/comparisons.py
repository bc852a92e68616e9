"""Compare tensors: bit for bit, or as closely as float32 allows."""

from typing import Any

import torch
from torch import Tensor


def equal(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors agree bit for bit; two entries that are not a number agree too."""
    return one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())


def same(one: Any, two: Any) -> bool:
    """Return whether two values agree bit for bit: tensors, or tuples and dicts of them."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict | tuple) and isinstance(two, dict | tuple):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return (
            len(one) == len(two)
            and all(k in two if isinstance(two, dict) else True for k in keys)
            and all(same(one[k], two[k]) for k in keys)
        )
    return type(one) is type(two) and bool(one == two)


def close(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors agree but for the last places of float32."""
    # Vectorised and single functions of libm differ in the last place: a chunk's edge may show it.
    scale = two.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if two.numel() else 0.0
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)


def near(one: Tensor, two: Tensor) -> bool:
    """Return whether two outputs agree if each was computed in its own order, in float32."""
    return torch.allclose(one, two, rtol=1e-4, atol=1e-5 * max(1.0, two.detach().abs().max().item()))


def gap(one: Tensor, two: Tensor) -> float:
    """Return the largest difference."""
    return (one - two).detach().abs().max().item()


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Return the names of the first state dict whose tensors are missing in the second, or others there."""
    return [name for name in one if name not in two or not torch.equal(one[name], two[name])]
