"""torch's counter of floating-point operations, with attention on a CPU, which it leaves out.

On a GPU torch counts attention by the shapes of its tensors, and so it is here: two products of queries × keys forward;
five backward, since the kernels compute the first again. A GPU's run and a CPU's then have one count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_NAME = "_scaled_dot_product_flash_attention_for_cpu"

Shape = Sequence[int]


def counter() -> FlopCounterMode:
    """Return a context manager that counts what is dispatched inside of it; a multiply-add is two."""
    kernels = {getattr(torch.ops.aten, _NAME): _forward, getattr(torch.ops.aten, f"{_NAME}_backward"): _backward}
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count scores, and their sums of values; shapes [rows, heads, tokens, features]."""
    rows, heads, queries, features = query
    return 2 * rows * heads * queries * key[2] * (features + value[3])


def _backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count the scores again, and the gradients of values, scores, queries and keys."""
    rows, heads, queries, features = query
    return 2 * rows * heads * queries * key[2] * (3 * features + 2 * value[3])
