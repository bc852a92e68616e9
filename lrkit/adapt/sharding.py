"""FSDP2 (`fully_shard`): follow parameters to the sharded ones that take their places, and refuse what cannot work."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrkit.loop.controller import Controller
from lrkit.loop.gradients import on_gradient
from lrkit.loop.remembered import Peers
from lrkit.process import swapped
from lrkit.shards import is_sharded, told, whole

Moves = Mapping[int, nn.Parameter]
"""The parameter that stands in another one's place now, by the ``id`` of the one that stood there."""


_TENSOR_PARALLEL = (
    "the model's weights are sharded, and not by FSDP2: tensor parallel layers (tp_plan, parallelize_module) cannot be "
    "adapted. Load the model without tp_plan, attach, and use DDP or fully_shard"
)


def refusal_to_attach(model: nn.Module) -> str | None:
    """Say why adapters cannot go into a model whose weights are sharded; None if they are not."""
    if not any(map(is_sharded, model.parameters())):
        return None
    if not any(map(is_managed, model.modules())):
        return _TENSOR_PARALLEL
    return "the model's weights are sharded already: attach first, then fully_shard each block and the model"


def refusal(model: nn.Module, loop: Controller) -> str | None:
    """Say why a method cannot run on sharded parameters; None if it can, or if nothing is sharded.

    Args:
        model: the adapted model, as it is now.
        loop: the method on its adapters.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return None
    if not any(map(is_managed, model.modules())):
        return _TENSOR_PARALLEL
    run = loop.run
    base = {id(p) for module in run.modules.values() for p in getattr(module, "base", nn.Module()).parameters()}
    own = [p for module in run.modules.values() for p in module.parameters() if id(p) not in base]
    if not any(map(is_sharded, own)):  # left whole, what does not train as well
        return None
    to_come = [state.policy for state in loop.policies if not state.ended]
    if any(policy.action.grows or policy.action.fate == "removed" for policy in to_come):
        early = " (or calibrate before fully_shard)" if all(policy.scheduler.calibration for policy in to_come) else ""
        return (
            "the method cuts or adds components, which sharded parameters (FSDP2) cannot follow: use DDP or one process"
            f"{early}"
        )
    if any(part.shared for part in run.method.parameterization.parts):
        return "the layers share matrices, which FSDP2 gathers for one block at a time: use DDP or one process"
    return None


def several() -> bool:
    """Return whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_managed(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on a module."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Let sharded parameters stand in their places again if FSDP2 has left whole ones there for the next call."""
    for module in model.modules():
        if is_managed(module):
            managed: Any = module
            managed.reshard()


def left_whole(model: nn.Module, trained: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return what trains whole beside sharded parameters (``ignored_params``): FSDP2 averages no gradient of it."""
    if not any(map(is_sharded, model.parameters())):
        return []
    return [p for p in trained if not is_sharded(p)]


def averaged(model: nn.Module, p: nn.Parameter) -> RemovableHandle:
    """Begin a tensor that is left whole as the first process has it, and average its gradients over all of them."""
    sharded: Any = next(p for p in model.parameters() if is_sharded(p))
    mesh = sharded.device_mesh
    distributed: Any = torch.distributed
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    for group in groups:
        distributed.broadcast(p.data, distributed.get_global_rank(group, 0), group=group)

    def average(grad: Tensor) -> Tensor:
        mean: Tensor = grad / mesh.size()
        for group in groups:
            distributed.all_reduce(mean, group=group)
        return mean

    return on_gradient(p, average)


def peers(model: nn.Module) -> Peers | None:
    """Return the processes that hold parts of a model; None if nothing is sharded."""
    first: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if first is None or first.device_mesh.size() == 1:
        return None
    return Peers(first.device_mesh.size(), lambda values: told(values, first))


def one_seed(seed: int, model: nn.Module) -> int:
    """Return the seed of the first process that holds a part of a model; this one's if nothing is sharded."""
    first = next((p for p in model.parameters() if is_sharded(p)), None)
    return seed if first is None else int(told(torch.tensor(seed, dtype=torch.int64), first)[0])


def gathered(adapters: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Put whole tensors in the places of sharded parameters for a while; gradients go back to each process's part.

    Call it on every process alike. The base layers of the adapters stay as they are.
    """
    return swapped(_whole(adapters))


def _whole(adapters: Sequence[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for adapter in adapters:
        base = {id(p) for p in getattr(adapter, "base", nn.Module()).parameters()}
        for module in adapter.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and id(p) not in base and is_sharded(p):
                    full: Any = whole(p)
                    full._is_param = True  # noqa: SLF001 - so that `get_parameter` takes it
                    yield module._parameters, name, full
