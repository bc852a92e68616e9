"""Distributed training: follow DDP when a matrix freezes, and refuse what cannot work.

DDP averages gradients before the optimizer steps, so that every rank decides alike. But its reducer waits for the
gradient of every parameter that trained when the model was wrapped; after a freeze it must be made anew, or the next
step ends in "Expected to have finished reduction". (``find_unused_parameters=True`` would hide that, at a cost in every
step, and only if the user knew of it.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrkit.loop.remembered import Peers


def refusal(model: nn.Module, optimizer: object, *, adaptive: bool) -> str | None:
    """Say why a method cannot run under this way of training in parallel; None if it can.

    Args:
        model: the adapted model, wrapped or sharded as it is now.
        optimizer: the one that trains the adapters.
        adaptive: whether the method decides anything.
    """
    if not adaptive:
        return None
    if any(cls.__module__.split(".")[0] == "deepspeed" for cls in type(optimizer).__mro__):
        return "DeepSpeed's engine steps inside backward(), where no hook can see whole gradients: use DDP (or one process)"
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return "FSDP1 flattens the adapters' parameters, and scores need whole ones: use DDP"
    return None


def joining(ddp: Any) -> str | None:
    """Say so if a DDP module runs in its ``join``; None if it does not. Torch has no public sign of it."""
    if not getattr(getattr(ddp, "_join_config", None), "enable", False):
        return None
    return (
        "DDP's join() lets a process without batches answer the others' reductions and take no step, so that its masks and "
        "statistics stay behind: give all processes as many batches (drop_last=True, or a DistributedSampler)"
    )


def wrapper() -> DistributedDataParallel | None:
    """Return the DDP module whose forward is running."""
    return DistributedDataParallel._active_ddp_module


class Outer:
    """The DDP module that an adapted model is in, found at its calls by a forward pre-hook.

    A copy of the model is in no DDP module, and neither is the copy of this hook.

    Args:
        met: called each time with the DDP module, before the model runs in it.
    """

    def __init__(self, met: Callable[[DistributedDataParallel], None] = lambda _: None) -> None:
        self.ddp: DistributedDataParallel | None = None
        self._stale = False
        self._met = met
        self._handle: Any = None

    def hang_on(self, model: nn.Module) -> None:
        """Hang on a model, once, if there are several processes."""
        if self._handle is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._handle = model.register_forward_pre_hook(self)

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __call__(self, *_: Any) -> None:
        """Look if the model runs in DDP."""
        # Nothing is met while torch.compile traces: the wrapper's own forward is not traced with the model.
        if not torch.compiler.is_compiling() and (ddp := wrapper()) is not None:
            self._met(ddp)
            self.ddp = ddp
            if self._stale:
                self.follow()
                if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
                    ddp.reducer.prepare_for_forward()  # as DDP has just told the old one

    def follow(self) -> None:
        """Make the reducer anew (see `follow` below), or as soon as a DDP module is met that was made before."""
        self._stale = self.ddp is None
        if self.ddp is not None:
            follow(self.ddp)

    def __deepcopy__(self, memo: object) -> "Outer":
        return Outer()


def first_says(number: int, ddp: Any) -> int:
    """Return the number that the first process of a DDP module has. Call it on every rank alike.

    Args:
        number: this process's, from 0 to 2^63 - 1.
        ddp: a ``DistributedDataParallel``.
    """
    told = torch.tensor(number, dtype=torch.int64, device=ddp.device)
    group, distributed = ddp.process_group, torch.distributed
    distributed.broadcast(told, distributed.get_global_rank(group, 0), group=group)
    return int(told)


def peers(ddp: Any) -> Peers | None:
    """Return the processes of a DDP module, or all that there are if it is None; None if this one is alone."""
    distributed: Any = torch.distributed
    if ddp is None and not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = None if ddp is None else ddp.process_group
    count = distributed.get_world_size(group)

    def tell(values: torch.Tensor) -> torch.Tensor:
        told = [torch.empty_like(values) for _ in range(count)]
        distributed.all_gather(told, values.contiguous(), group=group)
        return torch.stack(told)

    return Peers(count, tell) if count > 1 else None


def follow(ddp: Any) -> None:
    """Make DDP's reducer anew over the parameters that still train. Call it on every rank alike.

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
        # The first backward pass of a static graph reduces at its end: the new reducer must be asked for that as well.
        ddp._static_graph_delay_allreduce_enqueued = False


def scaled_by(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor | None, bool]:
    """Read how a GradScaler has left the gradients of an optimizer that unscales them itself (fused Adam, for example).

    Returns:
        The factor they still carry (None for none), and whether the optimizer is about to skip this step.
    """
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return scale, found is not None and bool(found.item())
