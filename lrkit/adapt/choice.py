"""Which modules an attach replaces, and which parameters train: found before anything in the model is changed."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import attrs
from torch import nn

from lrkit.adapt.coverage import TOLD_FROM, Coverage, coverage, partly, percent
from lrkit.adapt.exclusion import leave_out
from lrkit.adapt.foresight import check_room
from lrkit.adapt.heads import check_trainable, find_head, head_parameters, tell_left, tell_running, tell_tied
from lrkit.adapt.targets import find_targets, together
from lrkit.adapt.tied import leaders, mirrors, tell_apart
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.parameterizations import Parameterization, Target
from lrkit.ranks import ranks_of


@attrs.frozen(eq=False)
class Choice:
    """The changes that an attach is going to make to a model.

    Args:
        adapters: layer name to the adapter, or to the layer itself.
        layers: layer name to the layer as it is.
        places: name of a module to the module that takes its place: an adapter, or one that holds adapters of its parts.
        around: a module that the model's calls will go through; None for none.
        head: names of the modules that train in full.
        own: the model's own parameters that train, the head's included, by name.
        flags: every parameter of the model, and whether it required a gradient.
        buffers: ``id`` of every buffer of the model.
        coverage: how much of the blocks' weights is adapted; None for a model without blocks.
        offered: the same if all layers were adapted that the parameterization chose from; None if it had no choice.
    """

    adapters: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    places: dict[str, nn.Module]
    around: nn.Module | None
    head: list[str]
    own: Mapping[str, nn.Parameter]
    flags: list[tuple[nn.Parameter, bool]]
    buffers: frozenset[int]
    coverage: Coverage | None
    offered: Coverage | None

    @property
    def added(self) -> set[int]:
        """Return the ``id`` of every parameter that the model is going to gain."""
        modules = [*self.adapters.values(), *([] if self.around is None else [self.around])]
        return {id(p) for module in modules for p in module.parameters()} - {id(p) for p, _ in self.flags}


def choose(
    model: nn.Module,
    parameterization: Parameterization,
    targets: str | Sequence[str],
    train_also: str | Sequence[str],
    *,
    exact: bool,
    slices: bool = False,
    exclude: str | Sequence[str] = (),
) -> Choice:
    """Find what `attach` is asked for in a model, and build the adapters. The model stays as it is.

    Args:
        model: the plain model.
        parameterization: builds the adapters.
        targets: as `attach` takes them.
        train_also: as `attach` takes them.
        exact: `targets` and `train_also` are lists of whole names, and nothing is said of what they leave out.
        slices: take the parts of fused projections in their places.
        exclude: as `attach` takes it.

    Raises:
        LrkitError: nothing matches, or this model cannot be adapted so.
    """
    found, offered = find(model, parameterization, targets, exact=exact, exclude=exclude, slices=slices)
    check_room(found, parameterization)
    head = find_head(model, train_also, exact=exact)
    names = set(parameterization.own_parameters(model))
    if names and len(exclude):
        _check_left(parameterization, names, offered, exclude)
    _check_apart([target.name for target in found], head)
    head_ids = {id(p) for p in head_parameters(model, head)}
    own = {name: p for name, p in model.named_parameters() if name in names or id(p) in head_ids}
    check_trainable(own)
    # Before adapters are built: some set flags of the layer that they are given.
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = frozenset(id(buffer) for buffer in model.buffers())
    adapters = dict(parameterization.adapt(model, found))
    if parameterization.components is not None:
        ranks_of(parameterization.components, list(adapters))  # an adapter may stand in other places than the targets
    around = parameterization.wrap(model)
    _check_apart(adapters, head)
    whole = coverage(model, [t.name for t in offered], own.values(), partly=partly(offered)) if offered else None
    if not exact:
        if targets == "all-linear" and whole is not None and 1 - whole.share > TOLD_FROM:
            warnings.warn(
                f'targets="all-linear" adapts {percent(whole.share)} of the weights in the blocks of '
                f"{type(model).__name__}{whole.words}",
                LrkitWarning,
                stacklevel=4,
            )
        tell_tied(model, head)
        tell_left(model, train_also, [*head, *adapters])
        tell_running(model)
    for target in found:
        if target.maps > 1 and getattr(adapters.get(target.name, target), "maps", 1) != target.maps:
            raise LrkitError(
                f"{target.name} stacks experts, which {parameterization!r} cannot adapt: leave it out by exclude"
            )
    layers, places = _placed(model, found, adapters)
    places |= mirrors(model, layers, adapters)
    if not exact:
        tell_apart(model, layers, places)
    covered = coverage(model, adapters, own.values(), partly=partly(found))
    return Choice(adapters, layers, places, around, head, own, flags, buffers, covered, whole)


def _placed(
    model: nn.Module, targets: Iterable[Target], adapters: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the layer of each adapter, and the modules that take places; parts of one module share its place."""
    parts = {target.name: target for target in targets if target.place not in ("", target.name)}
    layers: dict[str, nn.Module] = {}
    places: dict[str, nn.Module] = {}
    shared: dict[str, list[Target]] = {}
    for name, adapter in adapters.items():
        if name in parts:
            layers[name] = parts[name].layer
            if adapter is layers[name]:
                raise LrkitError(f"{name} has no tensors of its own that could train: name {parts[name].place}")
            shared.setdefault(parts[name].place, []).append(parts[name])
        else:
            layers[name] = model.get_submodule(name)
            if layers[name] is not adapter:
                places[name] = adapter
    for place, members in shared.items():
        if place in places:
            raise LrkitError(f"{place} and its part {members[0].name} are both to be adapted: name one of them")
        mine = {member.name.removeprefix(f"{place}."): adapters[member.name] for member in members}
        places[place] = members[0].kind.join(model.get_submodule(place), mine)
    return layers, places


def find(
    model: nn.Module,
    parameterization: Parameterization,
    targets: str | Sequence[str],
    *,
    exact: bool,
    slices: bool = False,
    exclude: str | Sequence[str] = (),
) -> tuple[list[Target], list[Target]]:
    """Return the layers that `targets` means for this parameterization, and those that it has chosen them from.

    `exclude` is taken from the former alone.
    """
    if not isinstance(slices, bool):
        raise LrkitError(
            f"slices must be True or False, not {shown(slices)}: name single slices in targets, such as c_attn.q"
        )
    if not parameterization.takes_targets:
        if len(exclude):
            raise LrkitError(f"{parameterization!r} has places of its own: leave exclude out")
        if (targets != "all-linear" and not exact) or slices:
            raise LrkitError(
                f"{parameterization!r} has places of its own: leave {'slices' if slices else 'targets'} out"
            )
        return [], []
    offered = found = together(leaders(find_targets(model, targets, exact=exact, slices=slices)))
    if targets == "all-linear" and not (found := together(parameterization.choose(found))):
        seen = coverage(model, [target.name for target in offered], partly=partly(offered))
        raise LrkitError(
            f"{parameterization!r} has no place in {type(model).__name__}: it chooses none of the linear layers "
            f"inside the transformer's blocks; name layers with targets{'' if seen is None else seen.words}"
        )
    return leave_out(found, exclude), offered


def _check_left(
    parameterization: Parameterization, own: Iterable[str], offered: list[Target], exclude: str | Sequence[str]
) -> None:
    """Raise LrkitError if a parameterization trains a layer that is to be left out, whatever its targets are."""
    kept = {target.name for target in leave_out(offered, exclude)}
    left = tuple(f"{target.name}." for target in offered if target.name not in kept)
    if odd := [name for name in sorted(own) if name.startswith(left)]:
        raise LrkitError(f"{parameterization!r} trains {odd[0]} whatever the targets are: leave exclude out")


def _check_apart(layers: Iterable[str], head: Sequence[str]) -> None:
    prefixes = tuple(f"{name}." for name in head) or ("\0",)
    inside = [name for name in layers if f"{name}.".startswith(prefixes)]
    if inside:
        raise LrkitError(
            f'"{inside[0]}" is both a target and part of the head, which trains in full: leave it out of '
            "targets, or name the head with train_also"
        )
