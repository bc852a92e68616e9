"""Targets: the layers of a model that are adapted, by name, pattern or kind."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs
from torch import nn

from lrkit import registry
from lrkit.adapt.coverage import block_prefixes
from lrkit.adapt.grammar import entries
from lrkit.adapt.roles import is_output, places, role_of
from lrkit.errors import LrkitError, LrkitWarning, cut, listing, nearest, pattern
from lrkit.layers import LayerKind, kind_of
from lrkit.parameterizations.base import Role, Target
from lrkit.parameterizations.lowrank import layer_shape


@attrs.frozen(eq=False)
class Found:
    """A layer of a known kind.

    Args:
        layer: the layer, or what shows a part of a module as one.
        kind: its kind.
        place: name of the module whose place an adapter takes.
    """

    layer: nn.Module
    kind: LayerKind
    place: str

    def target(self, name: str, role: Role, output: bool) -> Target:
        """Return what a parameterization is told of it."""
        sizes = self.kind.sizes(self.layer)
        assert sizes is not None
        return Target(
            name,
            self.layer,
            sizes.d_in,
            sizes.d_out,
            role,
            output,
            kind=self.kind,
            maps=sizes.maps,
            place=self.place,
        )


def kinds() -> list[LayerKind]:
    """Return all kinds of layers, lrkit's own first."""
    now = registry.current()
    return [now.made("layer", name) for name in now.names("layer")]


def _layers(model: nn.Module) -> tuple[dict[str, Found], dict[str, str]]:
    """Return the layers of all kinds by name, and those that are so by class but not by behaviour, with the reason."""
    known = kinds()
    # torch's own encoder layer has a fast path that reads its linear layers' weights without calling them.
    fast = tuple(f"{n}." if n else "" for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer))
    layers: dict[str, Found] = {}
    strange: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name or (fast and name.startswith(fast)):
            continue
        if (kind := kind_of(module, known)) is not None:
            reason = kind.refusal(module)
            if reason is None:
                layers[name] = Found(module, kind, name)
            else:
                strange[name] = f"{type(module).__name__}: {reason}"
        for each in known if name not in strange else ():
            for part, layer in each.parts(module, name, model).items():
                reason = each.refusal(layer)
                if reason is None:
                    layers[f"{name}.{part}"] = Found(layer, each, name)
                else:
                    strange[f"{name}.{part}"] = f"{type(module).__name__}: {reason}"
    return layers, strange


def _is_linear(model: nn.Module, name: str) -> bool:
    """Return whether a layer that is not to be adapted is of a kind that all linear layers are; parts of modules are."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)._modules.get(last)
    return module is None or layer_shape(module) is not None


def _in_blocks(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that lie inside the transformer's blocks, which are the elements of its module lists."""
    prefixes = tuple(block_prefixes(model)) or ("\0",)
    return {name for name in names if name.startswith(prefixes) and "pooler" not in name.split(".")}


def find_targets(
    model: nn.Module, targets: str | Sequence[str], *, exact: bool = False, slices: bool = False
) -> list[Target]:
    """Find the layers to adapt, in the model's order.

    The parts of a fused projection, such as ``c_attn.q``, are layers beside the projection itself. A regular expression that
    matches both means the projection, and so does an entry of a list.

    Args:
        model: the model.
        targets: ``"all-linear"``: every linear map inside the transformer's blocks. Another string: a regular
            expression that must match a layer's whole name. A list: names, or name suffixes at a dot.
        exact: a list holds whole names only.
        slices: take the parts of fused projections in their places.

    Raises:
        LrkitError: nothing matches, a list's entry matches nothing (with the nearest name), or one names a module that
            is not a linear map; or `slices`, and no projection among them has parts that are known.
    """
    layers, strange = _layers(model)
    # A part of a module that is a layer itself: one can be adapted, or the other.
    parts = {name: found.place for name, found in layers.items() if found.place != name and found.place in layers}
    if targets == "all-linear":
        chosen = _in_blocks(model, (name for name, found in layers.items() if found.kind.linear))
        odd = _in_blocks(model, (name for name in strange if _is_linear(model, name)))
        if not chosen and odd:
            raise LrkitError(f'targets="all-linear" found nothing but {_odd(odd, strange)}')
        if not chosen:
            raise LrkitError(
                'targets="all-linear" found no linear layer inside transformer blocks (no nn.ModuleList holds one) in '
                f"{type(model).__name__}: name the layers; it has {_some(layers)}"
            )
    else:
        chosen, odd = set(), set()
        choices = '"all-linear", a regular expression or a list of names'
        for entry, fits in entries(targets, "targets", choices, exact=exact):
            named, strangers = (set(filter(fits, each)) for each in (layers, strange))
            if isinstance(targets, str):
                # An expression that matches a layer and its parts means the layer.
                named = {name for name in named if parts.get(name) not in named}
            else:
                # Names of layers meant before there were parts: "gate" is a router where there is one.
                named = named - set(parts) or named
            if not named and not strangers:
                tell = _no_match if isinstance(targets, str) else _no_suffix
                raise LrkitError(tell(model, entry, layers))
            if isinstance(targets, str):
                unknown = {
                    name: reason for name, reason in _unknown(model).items() if fits(name) and name not in layers
                }
                strange, strangers = {**unknown, **strange}, strangers | unknown.keys()
            chosen, odd = chosen | named, odd | strangers
        if not chosen and odd:
            before = f'targets="{cut(targets, 160)}"' if isinstance(targets, str) else "targets"
            raise LrkitError(f"{before} names nothing but {_odd(odd, strange)}")
        if not chosen:
            raise LrkitError("targets is an empty list: name at least one layer, or use targets='all-linear'")
    if odd:
        warnings.warn(f"left out: {_odd(odd, strange)}", LrkitWarning, stacklevel=6)
    if slices:
        chosen = _in_slices(model, chosen, parts, layers)
    roles = places(model, (name for name, found in layers.items() if found.kind.linear))
    chosen_roles = {
        name: roles.get(name) or (roles.get(layers[name].place, (role_of(name),))[0], is_output(name))
        for name in chosen
    }
    return together(found.target(name, *chosen_roles[name]) for name, found in layers.items() if name in chosen)


def _in_slices(
    model: nn.Module, chosen: Collection[str], parts: Mapping[str, str], layers: Mapping[str, object]
) -> set[str]:
    """Take the parts of layers in the places of those that have some."""
    found = {name for name, place in parts.items() if place in chosen or name in chosen}
    if not found:
        raise LrkitError(
            f"slices=True, and no fused projection whose parts are known is among the targets in {type(model).__name__}: "
            f"they are {_some({name: layers[name] for name in chosen})}"
        )
    return found | {name for name in chosen if name not in parts.values()}


def together(targets: Iterable[Target]) -> list[Target]:
    """Return targets that know of each other: all layers that are to be adapted."""
    every = list(targets)
    names = tuple(target.name for target in every)
    return [attrs.evolve(target, layers=names) for target in every]


def _odd(names: Collection[str], strange: Mapping[str, str]) -> str:
    """Describe layers that cannot be adapted, with the reason."""
    reasons: dict[str, list[str]] = {}
    for name in strange:
        if name in names:
            reasons.setdefault(strange[name], []).append(name)
    listed = "; ".join(f"{listing(each)} ({reason})" for reason, each in reasons.items())
    return f"what cannot be adapted: {listed}"


def _unknown(model: nn.Module) -> dict[str, str]:
    """Return all modules with a weight of two axes or more, with the reason for which one of no known kind is left out."""
    weights = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    return {
        name: f"{type(model.get_submodule(name)).__name__}: no layer of a known kind"
        for name, weight in weights.items()
        if weight is not None and weight.ndim > 1
    }


def _no_match(model: nn.Module, targets: str, layers: Mapping[str, object]) -> str:
    """Say why an expression names no layer."""
    for name, _ in model.named_parameters():
        if any(re.fullmatch(targets, each) for each in (name, name.rpartition(".")[0])):
            return _no_layer(model, name, f'targets="{targets}" matches no linear layer: ')
    return (
        f'targets="{cut(targets, 160)}" matches no linear layer of {type(model).__name__} (a regular expression must match '
        f"the whole name); it has {_some(layers)}"
    )


def _no_suffix(model: nn.Module, suffix: str, layers: Mapping[str, object]) -> str:
    others = [m for n, m in model.named_modules() if n and (n == suffix or n.endswith(f".{suffix}"))]
    whole, _, part = suffix.rpartition(".")
    fused = [n for n in layers if whole and (n == whole or n.endswith(f".{whole}"))]
    if not others and fused:
        known = [n.removeprefix(f"{fused[0]}.") for n in layers if n.startswith(f"{fused[0]}.")]
        return f'target "{suffix}": {fused[0]} has no part "{part}"{nearest(part, known)}; ' + (
            f"it has {', '.join(known)}" if known else "lrkit does not know how its rows are divided"
        )
    if others:
        parts = [n for n in layers if f".{n}".rpartition(".")[0].endswith(f".{suffix}")]
        if parts:
            kind = type(others[0]).__name__
            inside = _some(dict.fromkeys(parts))
            return f'target "{suffix}" is a {kind}, and adapters take the layers in it: name them, as {inside}'
        if layer_shape(others[0]) is not None:
            return (
                f'target "{suffix}" lies in an nn.TransformerEncoderLayer, whose fast path reads weights without '
                "calling the layer: an adapter there would be passed by"
            )
        tensors = [f"{name} ({p.ndim}-D)" for name, p in others[0]._parameters.items() if p is not None and p.ndim > 2]
        holds = f", whose weights are parameters ({', '.join(tensors)}) and no layers" if tensors else ""
        return f'target "{suffix}" is a {type(others[0]).__name__}{holds}: adapters take layers of known kinds'
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
        "layers of known kinds"
    )


def _some(layers: Mapping[str, object]) -> str:
    names = sorted({re.sub(r"\.\d+\.", ".<i>.", name) for name in layers})
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"
