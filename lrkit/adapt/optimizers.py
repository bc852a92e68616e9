"""torch optimizers as `bind` takes them: one or several, wrapped or not, and the closure that a step may be given."""

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrkit.errors import LrkitError


def held_by(optimizer: Optimizer) -> set[int]:
    """Return the ``id`` of every tensor that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def unwrapped(given: object) -> list[Optimizer]:
    """Return the torch optimizers whose steps count, without wrappers such as accelerate's.

    Raises:
        LrkitError: it is not a torch optimizer or a list of them, or two of them hold the same tensor.
    """
    found = [_inner(each) for each in (given if isinstance(given, list | tuple) else [given])]
    if not found:
        raise LrkitError("bind takes an optimizer, or a list of several: the list is empty")
    held: set[int] = set()
    for optimizer in found:
        mine = held_by(optimizer)
        if mine & held:
            raise LrkitError(
                f"two of the optimizers hold the same tensor ({listed(found)}): it would move twice per step"
            )
        held |= mine
    return found


def _inner(optimizer: Any) -> Optimizer:
    while not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise LrkitError(f"bind takes a torch optimizer, or a list of them, not {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


def listed(optimizers: Sequence[Optimizer]) -> str:
    """Name optimizers in a message."""
    return ", ".join(type(each).__name__ for each in optimizers)


class _States(MutableMapping[Tensor, Any]):
    """The state of several optimizers as one mapping. A tensor's state lies with the optimizer that holds the tensor."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._of = {each: optimizer.state for optimizer in optimizers for each in held_by(optimizer)}
        self._all = [optimizer.state for optimizer in optimizers]

    def __getitem__(self, p: Tensor) -> Any:
        states: MutableMapping[Tensor, Any] = self._of[id(p)]
        if p not in states:
            raise KeyError(p)
        return states[p]

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._of[id(p)][p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._of[id(p)][p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for state in self._all for p in state)

    def __len__(self) -> int:
        return sum(map(len, self._all))


class _Together(Optimizer):
    """Several optimizers as one, to read states and learning rates from. It never steps."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Optimizer.__init__ would make groups of its own. Actions read these two attributes and no others.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state: Any = _States(optimizers)

    def step(self, closure: Any = None) -> Any:
        """Refuse."""
        raise LrkitError("this is a view of several optimizers: step each of them")


def as_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return an optimizer as it is, or several as one that has their state and groups."""
    return optimizers[0] if len(optimizers) == 1 else _Together(optimizers)


def as_long_as_alive(optimizers: Sequence[Optimizer]) -> Callable[[], Optimizer | None]:
    """Return a function that returns them as one, or None once one of them is gone. It keeps none of them alive."""
    references = [weakref.ref(each) for each in optimizers]

    def alive() -> Optimizer | None:
        there = [each for reference in references if (each := reference()) is not None]
        return as_one(there) if len(there) == len(references) else None

    return alive


def called_before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call the closure of a step before the step, so that its gradients can be observed.

    Returns:
        The step's arguments with a closure that returns the same loss; None if there was no closure.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
    if closure is None:
        return None
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise LrkitError(
            f"{name}.step(closure) computes several gradients within one step, where no metric can see them: an adaptive "
            "method needs an optimizer that takes one gradient per step, such as AdamW"
        )
    with torch.enable_grad():
        loss = closure()
    calls = 0

    def handed_on() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise LrkitError(
                f"{name}.step calls its closure more than once; its gradients were computed once, before the step, where "
                "the method sees them: use an optimizer that takes one gradient per step"
            )
        return loss

    if len(args) > 1:
        return (args[0], handed_on, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": handed_on}
