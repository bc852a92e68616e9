"""Weights that several layers share: if an embedding is adapted, the layers that are tied to it see its ΔW too."""

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lrkit.errors import LrkitError, LrkitWarning
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


def tell_apart(model: nn.Module, layers: Mapping[str, nn.Module], places: Collection[str]) -> None:
    """Warn if an adapted layer has its weight from a layer that will not see its increment.

    Args:
        model: the plain model.
        layers: layer name to the layer that is adapted.
        places: names of the modules that adapters or mirrors take the places of.
    """
    beside = {name: layer._parameters.get("weight") for name, layer in layers.items() if name in places}
    mine = {id(weight): name for name, weight in beside.items() if weight is not None}
    for other, module in model.named_modules():
        name = mine.get(id(module._parameters.get("weight")))
        if name is not None and other not in places and module is not layers[name]:
            embeds = isinstance(module, nn.Embedding)
            warnings.warn(
                f"{name} has its weight from {other}, which will not see its ΔW, so that it cannot be merged"
                + (f": name {other} instead, and both see one" if embeds else ""),
                LrkitWarning,
                stacklevel=5,
            )


def passed_by(model: nn.Module) -> list[str]:
    """Name the layers that are tied to an adapted embedding and have never been called."""
    return [name for name, module in model.named_modules() if isinstance(module, Mirror) and not module.called]


__all__ = ["leaders", "mirrors", "passed_by", "tell_apart"]
