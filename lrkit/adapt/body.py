"""The transformer's blocks of a model, as units: all that trains inside of each."""

from collections.abc import Mapping, Sequence

import attrs
from torch import nn

from lrkit.adapt.coverage import block_prefixes
from lrkit.adapt.weights import Weights
from lrkit.loop.run import Run
from lrkit.method import Method
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.units import Block, Part


def run_on(model: nn.Module, method: Method, adapters: Mapping[str, nn.Module], weights: Weights) -> Run:
    """Look at an adapted model before its first step. Raises LrkitError as `Run.of`."""
    asked = any(policy.action.unit == "block" for policy in method.policies)
    body = blocks(model, adapters, method.parameterization.parts) if asked else []
    return Run.of(method, model, adapters, weights.trained, weights.head(), body)


def blocks(model: nn.Module, adapters: Mapping[str, nn.Module], parts: Sequence[Part]) -> list[Block]:
    """Return the transformer's blocks in which anything trains, in the model's order.

    A tensor that stands in several blocks, or in one and outside of it as well, is in none of them: it would stop with one
    while the other trains.

    Args:
        model: the adapted model.
        adapters: layer name to adapter.
        parts: the parameterization's declaration, for the tensors of adapters.
    """
    places = block_names(model)
    declared = {id(part.of(adapter)): part for adapter in adapters.values() for part in parts}
    owners: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), set()).add(next((place for place in places if name.startswith(f"{place}.")), ""))
        if p.requires_grad:
            names.setdefault(id(p), name)
    inside: dict[str, list[Part]] = {place: [] for place in places}
    for key, name in names.items():
        (first, *others) = owners[key]
        if first and not others:
            inside[first].append(attrs.evolve(declared.get(key, Part(name)), name=name))
    return [Block(place, model, tuple(mine), 1, "block") for place, mine in inside.items() if mine]


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the transformer's blocks: elements of a model's outermost module lists that hold a linear map.

    For example ``bert.encoder.layer.0``; of an encoder-decoder those of both, and of a model in stages (Swin) the stages.
    """
    lists = block_prefixes(model)
    outer = [each for each in lists if not any(each != other and each.startswith(other) for other in lists)]
    return [
        f"{prefix}{key}"
        for prefix in outer
        for key, module in model.get_submodule(prefix.removesuffix(".")).named_children()
        if any(layer_shape(inner) is not None for inner in module.modules())
    ]
