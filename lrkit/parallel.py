"""Distributed training: follow DDP when a matrix freezes, and refuse what cannot work.

DDP averages gradients before the optimizer steps, so that every rank decides alike. But its reducer waits for the
gradient of every parameter that trained when the model was wrapped; after a freeze it must be made anew, or the next
step ends in "Expected to have finished reduction". (``find_unused_parameters=True`` would hide that, at a cost in every
step, and only if the user knew of it.)
"""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def refusal(model: nn.Module, optimizer: object, *, adaptive: bool) -> str | None:
    """Say why a method cannot run under this way of training in parallel; None if it can.

    Args:
        model: the adapted model, wrapped or sharded as it is now.
        optimizer: the one that trains the adapters.
        adaptive: whether the method decides anything.
    """
    if any(_is_sharded(p) for p in model.parameters()):
        return (
            "FSDP2 shards the adapters' parameters, of which scores need whole ones, and does not reduce the gradients of "
            "those that it is told to ignore, so that each process would train adapters of its own: use DDP (or one process)"
        )
    if not adaptive:
        return None
    if any(cls.__module__.split(".")[0] == "deepspeed" for cls in type(optimizer).__mro__):
        return "DeepSpeed's engine steps inside backward(), where no hook can see whole gradients: use DDP (or one process)"
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return "FSDP1 flattens the adapters' parameters, and scores need whole ones: use DDP"
    return None


def _is_sharded(p: nn.Parameter) -> bool:
    return type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor"


def wrapper() -> DistributedDataParallel | None:
    """The DDP module whose forward is running."""
    return DistributedDataParallel._active_ddp_module


def follow(ddp: Any) -> None:
    """Make DDP's reducer anew over the parameters that still train. The same on every rank.

    torch has no public call for this; these are the steps by which DDP itself makes a reducer when it is unpickled.

    Args:
        ddp: a ``DistributedDataParallel``; its private methods have no types.
    """
    distributed: Any = torch.distributed
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    for hook, state in ddp._comm_hooks:
        distributed._register_comm_hook(ddp.reducer, state, hook)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
        # The first backward pass of a static graph reduces at its end: DDP must ask its new reducer for that as well.
        ddp._static_graph_delay_allreduce_enqueued = False


def scaled_by(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor | None, bool]:
    """How a GradScaler has left the gradients of an optimizer that unscales them itself (fused Adam, say).

    Returns:
        The factor they still carry (None for none), and whether the optimizer is about to skip this step.
    """
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return scale, found is not None and bool(found.item())
