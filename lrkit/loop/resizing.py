"""Other numbers of components: how tensors, optimizer state, names and statistics follow a cut or a growth.

Cutting is to keep an index list; growing is that, and n more behind it.
"""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from lrkit.units import Part, resize


@attrs.frozen(eq=False)
class Resize:
    """Which components of a layer stay, in order [n], and how many fresh ones follow them."""

    index: Tensor
    fresh: int = 0

    def of(self, values: Tensor, axis: int, new: Tensor | float = 0.0) -> Tensor:
        """Return a tensor with one slice per component along `axis`, resized; fresh slices are `new`."""
        stays = values.index_select(axis, self.index.to(values.device))
        if not self.fresh:
            return stays
        if not isinstance(new, Tensor):
            shape = list(stays.shape)
            shape[axis] = self.fresh
            new = stays.new_full(shape, new)
        return torch.cat((stays, new), dim=axis)


@attrs.frozen(eq=False)
class Resized:
    """A resize that was done to one tensor, along one axis."""

    how: Resize
    axis: int

    def of(self, values: Tensor) -> Tensor:
        """Do the same to values of the tensor's shape; those of fresh components are zero."""
        return self.how.of(values, self.axis)


class Ranks:
    """The components that each layer stores, by number, masked ones included. No number is given twice.

    For example a layer that began with rank 3, lost its second component and got a new one has the numbers 0, 2 and 3.

    Args:
        initial: layer name to the rank at first; 0 for a layer without components.
        components: layer name to the numbers that are left, for layers that were cut or have grown.
        numbered: layer name to how many numbers have been given; as many as at first by default.
    """

    def __init__(
        self,
        initial: Mapping[str, int],
        components: Mapping[str, Sequence[int]] | None = None,
        numbered: Mapping[str, int] | None = None,
    ) -> None:
        self.initial = dict(initial)
        self.components = {name: tuple(numbers) for name, numbers in (components or {}).items()}
        self.numbered = dict(self.initial if numbered is None else numbered)

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of a layer's components."""
        return self.components.get(name, tuple(range(self.initial[name])))

    def now(self) -> dict[str, int]:
        """Return layer name to how many components it stores."""
        return {name: len(self.components[name]) if name in self.components else n for name, n in self.initial.items()}

    def take(self, name: str, how: Resize) -> tuple[int, ...]:
        """Follow one layer's resize. Returns the numbers of its fresh components."""
        before, given = self.numbers(name), self.numbered[name]
        fresh = tuple(range(given, given + how.fresh))
        self.components[name] = (*(before[i] for i in how.index.tolist()), *fresh)
        self.numbered[name] = given + how.fresh
        return fresh


def outgrown(
    optimizers: Sequence[torch.optim.Optimizer], modules: Mapping[str, nn.Module], parts: Sequence[Part], ranks: Ranks
) -> str | None:
    """Say that an optimizer's state is of the ranks at first, and that these are others now; None if it is not.

    For example Adagrad makes its sums when it is made, and a calibration gives other ranks afterwards.
    """
    for name, first in ranks.initial.items() if ranks.components else ():
        for part in parts:
            p, axis = part.of(modules[name]), part.axis
            if axis is None or p.shape[axis] == first:
                continue
            shape = (*p.shape[:axis], first, *p.shape[axis + 1 :])
            for optimizer in optimizers:
                sizes = [t.shape for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor) and t.ndim]
                # Adafactor's state of a row may look like that of rank 1; then its column's does not.
                if shape in sizes and all(size == shape or set(size) <= {*shape, 1} for size in sizes):
                    return (
                        f"{type(optimizer).__name__} keeps state of rank {first} for {name}, which has rank {p.shape[axis]} "
                        "now: make it from adapted.parameters() after calibrate, or after load"
                    )
    return None


def resize_layer(
    module: nn.Module,
    parts: Sequence[Part],
    how: Resize,
    fresh: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    trained: set[int],
) -> dict[int, Resized]:
    """Resize one adapter's tensors. The parameters stay the same objects, and the optimizer's state follows.

    Args:
        module: the adapter.
        parts: those of its parts that have an axis.
        how: which components stay, and how many are fresh.
        fresh: the fresh slices by the part's name; zero if it is not named.
        optimizer: whose state follows; None for none. Step counts go on.
        trained: ``id`` of every parameter that trains when the run begins.

    Returns:
        The resize of each tensor, by its ``id``.
    """
    done = {}
    if how.fresh and not len(how.index):
        for p in module.parameters():  # the rest of an adapter that began with rank 0 trains from here on
            p.requires_grad_(p.requires_grad or id(p) in trained)
    for part in parts:
        tensor, axis = part.of(module), part.axis
        assert axis is not None
        if optimizer is not None:
            _resize_state(optimizer, tensor, how, axis)
        trains = tensor.requires_grad or (not tensor.numel() and id(tensor) in trained)
        resize(tensor, how.of(tensor.detach(), axis, fresh.get(part.name, 0)))
        # Optimizers are not made for tensors without entries: leave none to them.
        tensor.requires_grad_(tensor.numel() > 0 and trains)
        done[id(tensor)] = Resized(how, axis)
    return done


def _resize_state(optimizer: torch.optim.Optimizer, tensor: nn.Parameter, how: Resize, axis: int) -> None:
    """Let an optimizer's state for one tensor follow, before the tensor itself."""
    for value in list(optimizer.state.get(tensor, {}).values()):
        if not isinstance(value, Tensor):
            continue
        if value.shape == tensor.shape:
            value.data = how.of(value.data, axis)
        elif value.ndim > 0:
            # State of another shape (Adafactor's factors) cannot follow: it begins anew.
            optimizer.state.pop(tensor, None)
    if not len(how.index) + how.fresh:
        optimizer.state.pop(tensor, None)
