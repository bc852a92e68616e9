"""Stacks of experts in PEFT's format: the parameters that its setting ``target_parameters`` names.

PEFT puts a wrapper around a module for each of its parameters that it adapts, one around the other: the first parameter's is
the innermost. A key of its file says how deep a wrapper lies, and not whose it is.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers.experts import Stack, is_transposed
from lrkit.peft.files import peft

_INNER = ".base_layer"


def as_parameters(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that PEFT is to adapt as parameters, with the parameters' names.

    They are stacks of experts, and linear layers that PEFT would take for experts of the same name, by which it reads what
    was trained with transformers 4: the ``gate_proj`` of a shared expert, for example.
    """
    # It goes by the last part of a name.
    last = {name: name.rpartition(".")[2] for name in layers}
    taken = {end for end in set(last.values()) if _is_taken(model, end)}
    stacks = {name: name for name, layer in layers.items() if isinstance(layer, Stack)}
    return stacks | {name: f"{name}.weight" for name, end in last.items() if end in taken and name not in stacks}


def _is_taken(model: nn.Module, target: str) -> bool:
    """Return whether PEFT takes a target for something else in this model."""
    config = peft().LoraConfig(target_modules=[target])
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it misses the expert's other parts
        return True
    return target not in (config.target_modules or ())


def interleaved(b: Tensor, maps: int) -> Tensor:
    """Return B [d_out, maps · r] with the columns in PEFT's order: the first component of every map, then the second.

    With r in the place of `maps` it is the way back.
    """
    return b.view(len(b), maps, -1).transpose(1, 2).flatten(1)


def turned(a: Tensor, b: Tensor, maps: int) -> tuple[Tensor, Tensor]:
    """Return the factors of every map's ΔWᵀ, B as A [maps · r, d_out] and A as B [d_in, maps · r].

    PEFT takes matrices of experts that are not marked as transposed for [d_out, d_in], such as Llama 4's, which are not.
    """
    new_a = b.view(len(b), maps, -1).permute(1, 2, 0).flatten(0, 1)
    return new_a, a.view(maps, -1, a.shape[1]).permute(2, 0, 1).flatten(1)


def lies_turned(model: nn.Module, name: str, version: str = "") -> bool:
    """Return whether PEFT has the inputs and outputs of a stack the other way around.

    Args:
        model: the plain model.
        name: the parameter's name.
        version: PEFT's, which wrote the file. Before 0.19 it took all matrices for [d_in, d_out].
    """
    module = model.get_submodule(name.rpartition(".")[0])
    before = f"{version}.".startswith(("0.17.", "0.18."))
    return is_transposed(module) not in (None, before or bool(getattr(module, "is_transposed", False)))


def wrapper(model: nn.Module, name: str, adapted: Collection[str]) -> str:
    """Return the name of PEFT's wrapper for a parameter.

    Args:
        model: the plain model.
        name: the parameter's name.
        adapted: the names of all parameters that get a wrapper.
    """
    place, _, own = name.rpartition(".")
    return place + _INNER * _there(model, place, adapted)[::-1].index(own)


def parameter(model: nn.Module, key: str, targets: Collection[str]) -> str:
    """Return the name of the parameter that one of PEFT's wrappers is for; that of the module if it is for no parameter.

    Args:
        model: the plain model.
        key: the wrapper's name.
        targets: PEFT's setting ``target_parameters``: names or ends of names.

    Raises:
        LrkitError: a wrapper for which there is no parameter.
    """
    place = key
    while place.endswith(_INNER):
        place = place.removesuffix(_INNER)
    there = _there(model, place, targets)
    depth = (len(key) - len(place)) // len(_INNER)
    if depth >= max(1, len(there)):
        raise LrkitError(f"{place} has no {depth + 1} parameters that target_parameters names")
    return f"{place}.{there[-1 - depth]}" if there else place


def _there(model: nn.Module, place: str, targets: Collection[str]) -> list[str]:
    """Return the parameters of one module that are named, in the module's order."""
    try:
        own = [name for name, _ in model.get_submodule(place).named_parameters(recurse=False)]
    except AttributeError:
        return []
    return [name for name in own if any(f".{place}.{name}".endswith(f".{target}") for target in targets)]
