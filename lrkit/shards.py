"""Tensors of which each process holds a piece (DTensor, as FSDP2's `fully_shard` makes them), beside plain ones.

For a plain tensor each function returns what it is given, so that nobody has to ask which kind a tensor is. `whole` and
`told` wait for all processes: each must call them, in the same order.
"""

from typing import Any

import torch
from torch import Tensor


def is_sharded(p: Tensor) -> bool:
    """Return whether several processes hold pieces of a tensor."""
    return type(p).__name__ == "DTensor"


def held(p: Tensor) -> Tensor:
    """Return the piece of a tensor that this process holds, without a graph, sharing memory; a plain tensor whole."""
    piece: Tensor = p.detach()
    if is_sharded(p):
        sharded: Any = piece
        piece = sharded.to_local()
    return piece


def whole(p: Tensor) -> Tensor:
    """Return all of a tensor, on every process; a gradient goes back to the piece that each holds."""
    sharded: Any = p
    if is_sharded(p) and not p.numel():  # torch fails to gather [n, 0]
        return torch.empty(p.shape, dtype=p.dtype, device=p.device)
    return sharded.full_tensor() if is_sharded(p) else p


def like(values: Tensor, p: Tensor) -> Tensor:
    """Cut up values, which every process has whole, as a tensor of the same shape is cut up. Nothing is sent."""
    if not is_sharded(p):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = p
    values = values.to(p.device).contiguous()
    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)


def mine(values: Tensor, p: Tensor) -> Tensor:
    """Return the piece of whole values [*p.shape] that this process holds of a tensor."""
    return held(like(values, p)) if is_sharded(p) else values


def joined(piece: Tensor, p: Tensor) -> Tensor:
    """Return whole values [*p.shape] from the piece that each process has of them, shaped like `held` of a tensor."""
    if not is_sharded(p):
        return piece
    from torch.distributed.tensor import DTensor

    sharded: Any = p
    made = DTensor.from_local(
        piece, sharded.device_mesh, sharded.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole(made)


def told(value: Tensor, p: Tensor) -> Tensor:
    """Return values that each process that holds pieces of a tensor has, of one shape for all of them.

    Args:
        value: this process's [*shape].
        p: the tensor.

    Returns:
        [processes, *shape]; this one's alone [1, *shape] for a plain tensor.
    """
    if not is_sharded(p):
        return value[None]
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = p
    mesh = sharded.device_mesh
    return whole(DTensor.from_local(value[None].to(p.device), mesh, [Shard(0)] * mesh.ndim, run_check=False))
