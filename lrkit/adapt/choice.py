"""Which modules an attach replaces, and which parameters train: found before anything in the model is changed."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import attrs
from torch import nn

from lrkit.adapt.coverage import TOLD_FROM, Coverage, coverage, percent
from lrkit.adapt.exclusion import leave_out
from lrkit.adapt.foresight import check_room
from lrkit.adapt.heads import check_trainable, find_head, head_parameters, tell_tied
from lrkit.adapt.targets import find_targets, together
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.parameterizations import Parameterization, Target
from lrkit.ranks import ranks_of


@attrs.frozen(eq=False)
class Choice:
    """The changes that an attach is going to make to a model.

    Args:
        adapters: layer name to the module that takes its place, or to the layer itself.
        around: a module that the model's calls will go through; None for none.
        head: names of the modules that train in full.
        own: the model's own parameters that train, the head's included, by name.
        flags: every parameter of the model, and whether it required a gradient.
        buffers: ``id`` of every buffer of the model.
        coverage: how much of the blocks' weights is adapted; None for a model without blocks.
        offered: the same if all layers were adapted that the parameterization chose from; None if it had no choice.
    """

    adapters: dict[str, nn.Module]
    around: nn.Module | None
    head: list[str]
    own: Mapping[str, nn.Parameter]
    flags: Sequence[tuple[nn.Parameter, bool]]
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
    exclude: str | Sequence[str] = (),
) -> Choice:
    """Find what `attach` is asked for in a model, and build the adapters. The model stays as it is.

    Args:
        model: the plain model.
        parameterization: builds the adapters.
        targets: as `attach` takes them.
        train_also: as `attach` takes them.
        exact: `targets` and `train_also` are lists of whole names, and nothing is said of what they leave out.
        exclude: as `attach` takes it.

    Raises:
        LrkitError: nothing matches, or this model cannot be adapted so.
    """
    found, offered = find(model, parameterization, targets, exact=exact, exclude=exclude)
    check_room(found, parameterization)
    head = find_head(model, train_also, exact=exact)
    names = set(parameterization.own_parameters(model))
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
    whole = coverage(model, [target.name for target in offered], own.values()) if offered else None
    if not exact:
        if targets == "all-linear" and whole is not None and 1 - whole.share > TOLD_FROM:
            warnings.warn(
                f'targets="all-linear" adapts {percent(whole.share)} of the weights in the blocks of '
                f"{type(model).__name__}{whole.words}",
                LrkitWarning,
                stacklevel=4,
            )
        tell_tied(model, head)
    return Choice(adapters, around, head, own, flags, buffers, coverage(model, adapters, own.values()), whole)


def find(
    model: nn.Module,
    parameterization: Parameterization,
    targets: str | Sequence[str],
    *,
    exact: bool,
    exclude: str | Sequence[str] = (),
) -> tuple[list[Target], list[Target]]:
    """Return the layers that `targets` means for this parameterization, and those that it has chosen them from.

    `exclude` is taken from the former alone.
    """
    if not parameterization.takes_targets:
        if len(exclude):
            raise LrkitError(f"{parameterization!r} has places of its own: leave exclude out")
        if targets != "all-linear" and not exact:
            raise LrkitError(f"{parameterization!r} has places of its own: leave targets out")
        return [], []
    offered = found = find_targets(model, targets, exact=exact)
    if targets == "all-linear" and not (found := together(parameterization.choose(found))):
        seen = coverage(model, [target.name for target in offered])
        raise LrkitError(
            f"{parameterization!r} has no place in {type(model).__name__}: it chooses none of the linear layers "
            f"inside the transformer's blocks; name layers with targets{'' if seen is None else seen.words}"
        )
    return leave_out(found, exclude), offered


def _check_apart(layers: Iterable[str], head: Sequence[str]) -> None:
    prefixes = tuple(f"{name}." for name in head) or ("\0",)
    inside = [name for name in layers if f"{name}.".startswith(prefixes)]
    if inside:
        raise LrkitError(
            f'"{inside[0]}" is both a target and part of the head, which trains in full: leave it out of '
            "targets, or name the head with train_also"
        )
