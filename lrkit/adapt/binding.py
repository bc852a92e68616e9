"""What ties a method to optimizers: hooks on their steps, one step of the method for one step of all of them."""

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrkit.adapt import parallel
from lrkit.errors import LrkitError
from lrkit.loop.gradients import on_accumulated


def held_by(optimizer: Optimizer) -> set[int]:
    """``id`` of every tensor that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def unwrapped(given: object) -> list[Optimizer]:
    """Return the torch optimizers whose steps count: accelerate wraps them, and `bind` takes one or several.

    Raises:
        LrkitError: something that is not a torch optimizer, none at all, or a tensor that two of them hold.
    """
    found = [_inner(each) for each in (given if isinstance(given, list | tuple) else [given])]
    if not found:
        raise LrkitError("bind takes an optimizer, or a list of several: the list is empty")
    held: set[int] = set()
    for optimizer in found:
        mine = held_by(optimizer)
        if mine & held:
            raise LrkitError(
                f"two of the optimizers hold the same tensor ({_names(found)}): it would move twice per step"
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


def _names(optimizers: Sequence[Optimizer]) -> str:
    return ", ".join(type(each).__name__ for each in optimizers)


class _States(MutableMapping[Tensor, Any]):
    """The state of several optimizers as one mapping: each tensor's lies with the optimizer that holds it."""

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
    """Several optimizers as one, for those that look at state and learning rates. It never steps."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Optimizer.__init__ would make groups of its own; only the two attributes that actions read are there.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state: Any = _States(optimizers)

    def step(self, closure: Any = None) -> Any:
        """Refuse."""
        raise LrkitError("this is a view of several optimizers: step each of them")


def as_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return an optimizer as it is, or several as one whose state and groups are theirs."""
    return optimizers[0] if len(optimizers) == 1 else _Together(optimizers)


class Binding:
    """Hooks on one or several optimizers. All of them step once in one step of the method.

    `before` is called when the first of them is about to step, when all gradients are still there; `after` is called when
    the last of them has stepped. A step that a gradient scaler skips is not a step. If one steps again while another has
    not, the step before ends there.

    Args:
        optimizers: what `unwrapped` gave.
        trained: tensors that they train.
        before: takes the factor that gradients still carry, or None.
        after: takes the optimizers as one.
        warn: says something once.
        adaptive: whether gradients must be there before the step; a closure is then called before it.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        trained: Sequence[nn.Parameter],
        before: Callable[[Tensor | None], None],
        after: Callable[[Optimizer], None],
        warn: Callable[[str, str], None],
        *,
        adaptive: bool,
    ) -> None:
        self.optimizers = list(optimizers)
        self._adaptive = adaptive
        self.optimizer = as_one(self.optimizers)
        self._before, self._after, self._warn = before, after, warn
        self._handles: list[Any] = []
        self._stepped: set[int] = set()
        self._inside = 0
        self._begun = self._backward = False
        for each in self.optimizers:
            self._handles += [
                each.register_step_pre_hook(self._hook_before(each)),
                each.register_step_post_hook(self._hook_after(each)),
            ]
        if len(self.optimizers) > 1:
            self._handles += [on_accumulated(p, self._see) for p in trained]

    @property
    def stepping(self) -> bool:
        """Whether one of them is in its step: another that steps then is one that it wraps."""
        return self._inside > 0

    def hold(self, handle: Any) -> None:
        """Remove a hook's handle together with the binding."""
        self._handles.append(handle)

    def last(self) -> Callable[[], Optimizer | None]:
        """Return a function that gives the optimizers as one as long as they live, and holds none of them."""
        references = [weakref.ref(each) for each in self.optimizers]

        def alive() -> Optimizer | None:
            there = [each for reference in references if (each := reference()) is not None]
            return as_one(there) if len(there) == len(references) else None

        return alive

    def release(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], 0

    # Hooks hold the binding, and it holds the handle: the method runs on if only model and optimizer are kept.

    def _hook_before(self, optimizer: Optimizer) -> Callable[..., Any]:
        def hook(_: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            self._inside += 1
            replaced = _closed(optimizer, args, kwargs) if self._adaptive else None
            again = id(optimizer) in self._stepped
            if self._begun and (again or self._backward):
                names = _names([each for each in self.optimizers if id(each) not in self._stepped])
                self._warn("uneven", f"{names} did not step, and the others did: a step of the method is one of each")
                self._finish()
            scale, skips = parallel.scaled_by(optimizer)
            if not skips and not self._begun:
                self._begun, self._backward = True, False
                self._before(scale)
            return replaced

        return hook

    def _hook_after(self, optimizer: Optimizer) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._inside = max(0, self._inside - 1)
            self._stepped.add(id(optimizer))
            if len(self._stepped) == len(self.optimizers):
                self._finish()

        return hook

    def _finish(self) -> None:
        begun, self._begun = self._begun, False
        self._stepped = set()
        if begun:
            self._after(self.optimizer)

    def _see(self, _: Tensor) -> None:
        self._backward = True


def _closed(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call a closure before the step, so that its gradients can be seen, and hand its loss on in its place."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first argument is the optimizer itself
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
