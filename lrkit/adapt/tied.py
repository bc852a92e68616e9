"""Weights that several layers share: if an embedding is adapted, the layers that are tied to it see its ΔW too."""

from collections.abc import Mapping, Sequence

from torch import nn

from lrkit.errors import LrkitError
from lrkit.layers import kind_of
from lrkit.parameterizations.base import Target
from lrkit.parameterizations.lowrank import LowRank
from lrkit.parameterizations.mirror import Mirror


def leaders(targets: Sequence[Target]) -> list[Target]:
    """Leave out the targets that share their weight with an embedding among the targets: they follow it."""
    led = {id(t.layer.weight): t.name for t in reversed(targets) if isinstance(t.layer, nn.Embedding)}
    return [t for t in targets if led.get(id(getattr(t.layer, "weight", None)), t.name) == t.name]


def mirrors(model: nn.Module, layers: Mapping[str, nn.Module], adapters: Mapping[str, nn.Module]) -> dict[str, Mirror]:
    """Return what takes the places of layers that are tied to an adapted embedding, by name.

    Args:
        model: the plain model.
        layers: layer name to the layer that is adapted.
        adapters: layer name to adapter.

    Raises:
        LrkitError: a tied embedding has an adapter that is not W + ΔW by factors, which cannot be mirrored.
    """
    embeddings = {id(layer.weight): name for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    taken = {id(layer) for layer in layers.values()}
    found: dict[str, Mirror] = {}
    for name, module in model.named_modules() if embeddings else ():
        leader = embeddings.get(id(module._parameters.get("weight")))
        if leader is None or id(module) in taken or adapters[leader] is layers[leader]:
            continue
        adapter = adapters[leader]
        if kind_of(module) is None or not (isinstance(adapter, LowRank) and adapter.additive):
            raise LrkitError(
                f"{name} is tied to {leader}, and {type(adapter).__name__} cannot serve both: leave {leader} out"
            )
        found[name] = Mirror(module, adapter)
    return found


def passed_by(model: nn.Module) -> list[str]:
    """Name the layers that are tied to an adapted embedding and have never been called."""
    return [name for name, module in model.named_modules() if isinstance(module, Mirror) and not module.called]


__all__ = ["leaders", "mirrors", "passed_by"]
