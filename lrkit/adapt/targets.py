"""Targets: the layers of a model that are adapted, by name, pattern or kind."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs
from torch import nn

from lrkit.adapt.behaviour import strangeness
from lrkit.adapt.coverage import block_prefixes
from lrkit.adapt.roles import places
from lrkit.errors import LrkitError, LrkitWarning, cut, listing, nearest, pattern, shown
from lrkit.parameterizations.base import Target
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.patterns import compiled


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the linear maps of a model by name, and those that are so by class but not by behaviour, with the reason."""
    # torch's own encoder layer has a fast path that reads its linear layers' weights without calling them.
    fast = tuple(f"{n}." if n else "" for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer))
    layers, strange = {}, {}
    for name, module in model.named_modules():
        shape = layer_shape(module)
        if name and shape is not None and not (fast and name.startswith(fast)):
            reason = strangeness(module, *shape) if isinstance(module, nn.Linear) else None
            if reason is None:
                layers[name] = module
            else:
                strange[name] = f"{type(module).__name__}: {reason}"
    return layers, strange


def _in_blocks(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that lie inside the transformer's blocks, which are the elements of its module lists."""
    prefixes = tuple(block_prefixes(model)) or ("\0",)
    return {name for name in names if name.startswith(prefixes) and "pooler" not in name.split(".")}


def find_targets(model: nn.Module, targets: str | Sequence[str], *, exact: bool = False) -> list[Target]:
    """Find the layers to adapt, in the model's order.

    Args:
        model: the model.
        targets: ``"all-linear"``: every linear map inside the transformer's blocks. Another string: a regular
            expression that must match a layer's whole name. A list: names, or name suffixes at a dot.
        exact: a list holds whole names only.

    Raises:
        LrkitError: nothing matches, a list's entry matches nothing (with the nearest name), or one names a module that
            is not a linear map.
    """
    layers, strange = _linear_layers(model)
    if not isinstance(targets, str) and not (
        isinstance(targets, Sequence) and all(isinstance(target, str) for target in targets)
    ):
        raise LrkitError(f'targets must be "all-linear", a regular expression or a list of names, not {shown(targets)}')
    if targets == "all-linear":
        chosen, odd = _in_blocks(model, layers), _in_blocks(model, strange)
        if not chosen:
            raise LrkitError(
                'targets="all-linear" found no linear layer inside transformer blocks (no nn.ModuleList holds one) in '
                f"{type(model).__name__}: name the layers; it has {_some(layers)}"
            )
    elif isinstance(targets, str):
        regex = compiled(targets, "targets")
        chosen, odd = ({name for name in each if regex.fullmatch(name)} for each in (layers, strange))
        if not chosen and odd:
            raise LrkitError(f'targets="{cut(targets, 160)}" names nothing but {_odd(odd, strange)}')
        if not chosen:
            for name, _ in model.named_parameters():
                if regex.fullmatch(name) or regex.fullmatch(name.rpartition(".")[0]):
                    raise LrkitError(_no_layer(model, name, f'targets="{targets}" matches no linear layer: '))
            raise LrkitError(
                f'targets="{cut(targets, 160)}" matches no linear layer of {type(model).__name__} (a regular expression '
                f"must match the whole name); it has {_some(layers)}"
            )
    else:
        chosen, odd = set(), set()
        for suffix in targets:
            found, strangers = (
                {name for name in each if name == suffix or (not exact and name.endswith(f".{suffix}"))}
                for each in (layers, strange)
            )
            if not found and not strangers:
                raise LrkitError(_no_suffix(model, suffix, layers))
            chosen, odd = chosen | found, odd | strangers
        if not chosen and odd:
            raise LrkitError(f"targets names nothing but {_odd(odd, strange)}")
        if not chosen:
            raise LrkitError("targets is an empty list: name at least one layer, or use targets='all-linear'")
    if odd:
        warnings.warn(f"left out: {_odd(odd, strange)}", LrkitWarning, stacklevel=6)
    place = places(model, layers)
    found_targets = []
    for name, layer in layers.items():
        if name in chosen:
            shape = layer_shape(layer)
            assert shape is not None
            found_targets.append(Target(name, layer, *shape, *place[name]))
    return together(found_targets)


def together(targets: Iterable[Target]) -> list[Target]:
    """Return targets that know of each other: all layers that are to be adapted."""
    every = list(targets)
    names = tuple(target.name for target in every)
    return [attrs.evolve(target, layers=names) for target in every]


def _odd(names: Collection[str], strange: Mapping[str, str]) -> str:
    """Describe layers that are linear by class alone, with the reason."""
    reasons: dict[str, list[str]] = {}
    for name in strange:
        if name in names:
            reasons.setdefault(strange[name], []).append(name)
    listed = "; ".join(f"{listing(each)} ({reason})" for reason, each in reasons.items())
    return f"what is linear by its class, and no linear map by what it does: {listed}"


def _no_suffix(model: nn.Module, suffix: str, layers: dict[str, nn.Module]) -> str:
    others = [m for n, m in model.named_modules() if n and (n == suffix or n.endswith(f".{suffix}"))]
    if others:
        if layer_shape(others[0]) is not None:
            return (
                f'target "{suffix}" lies in an nn.TransformerEncoderLayer, whose fast path reads weights without '
                "calling the layer: an adapter there would be passed by"
            )
        inside = [f"{name} ({p.ndim}-D)" for name, p in others[0]._parameters.items() if p is not None and p.ndim > 2]
        holds = f", whose weights are parameters ({', '.join(inside)}) and no layers" if inside else ""
        return f'target "{suffix}" is a {type(others[0]).__name__}{holds}: adapters take nn.Linear and Conv1D layers'
    for name, _ in model.named_parameters():
        if name == suffix or name.endswith(f".{suffix}"):
            return _no_layer(model, name, f'target "{suffix}": ')
    endings = {name.rsplit(".", 1)[-1] for name in layers}
    return f'target "{suffix}" matches no layer of {type(model).__name__}{nearest(suffix, endings)}; it has {_some(layers)}'


def _no_layer(model: nn.Module, parameter: str, before: str) -> str:
    """Say why a parameter is not a target."""
    owner, _, name = parameter.rpartition(".")
    p, kind = model.get_parameter(parameter), type(model.get_submodule(owner)).__name__
    return (
        f"{before}{name} is a {p.ndim}-D parameter of {pattern(owner) or 'the model'} ({kind}), and no layer: adapters take "
        "nn.Linear and Conv1D layers"
    )


def _some(layers: dict[str, nn.Module]) -> str:
    names = sorted({re.sub(r"\.\d+\.", ".<i>.", name) for name in layers})
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"
