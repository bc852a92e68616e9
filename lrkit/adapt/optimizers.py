"""torch optimizers as `bind` takes them, one or several, and their steps: one step of each is one step of a method."""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrkit.adapt import parallel
from lrkit.errors import LrkitError
from lrkit.loop.gradients import on_accumulated
from lrkit.loop.liveness import held_by

_DEPTH = 16  # frames from `GradScaler.step` to a hook of the optimizer, wrappers around its step included


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
                f"two of the optimizers hold the same tensor ({_listed(found)}): it would move twice per step"
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


def _listed(optimizers: Sequence[Optimizer]) -> str:
    """Name optimizers in a message."""
    return ", ".join(type(each).__name__ for each in optimizers)


class _States(MutableMapping[Tensor, Any]):
    """The state of several optimizers as one mapping. A tensor's state lies with the optimizer that holds the tensor.

    An optimizer's ``state`` is looked up at each use: ``load_state_dict`` puts another dict in its place.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._of = {each: optimizer for optimizer in optimizers for each in held_by(optimizer)}
        self._all = list(optimizers)

    def __getitem__(self, p: Tensor) -> Any:
        states: MutableMapping[Tensor, Any] = self._of[id(p)].state
        if p not in states:
            raise KeyError(p)
        return states[p]

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._of[id(p)].state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._of[id(p)].state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for optimizer in self._all for p in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._all)


class _Together(Optimizer):
    """Several optimizers as one, to read states and learning rates from. It never steps."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Optimizer.__init__ would make groups of its own. Actions read state and groups, and nothing else.
        self._all = list(optimizers)
        self.state: Any = _States(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the groups of all of them as they are now: ``load_state_dict`` makes new ones."""
        return [group for optimizer in self._all for group in optimizer.param_groups]

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


class Steps:
    """Hooks on one or several optimizers. Each of them steps once per step of the method.

    `before` is called when the first of them is about to step, with all gradients still there, and `after` when the last of
    them has stepped. A step that a gradient scaler skips does not count. If one steps again while another has not, the
    previous step of the method ends there. One that an exception has broken off is forgotten.

    Args:
        optimizers: as `unwrapped` returns them.
        trained: tensors that they train.
        before: takes the factor that gradients still carry, or None.
        after: takes the optimizers as one.
        warn: says a message once per key.
        adaptive: whether gradients must be there before the step. A closure is then called before it.
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
        self._together = as_one(self.optimizers)
        self._adaptive = adaptive
        self._before, self._after, self._warn = before, after, warn
        self._handles: list[Any] = []
        self._stepped: set[int] = set()
        self._inside = 0
        self._outermost: FrameType | None = None
        self._begun = self._backward = False
        for each in self.optimizers:
            self._handles += [each.register_step_pre_hook(self._enter), each.register_step_post_hook(self._leave)]
        if len(self.optimizers) > 1:
            self._handles += [on_accumulated(p, self._see) for p in trained]

    @property
    def stepping(self) -> bool:
        """Return whether one of them is inside its step. Another optimizer that steps now is one that it wraps."""
        return self._inside > 0 and _runs(self._outermost)

    def hold(self, handle: Any) -> None:
        """Keep the handle of another hook, and remove it together with these."""
        self._handles.append(handle)

    def release(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Forget a step that has begun and was broken off, or that a state that was loaded since knows nothing of."""
        self._inside, self._outermost = 0, None
        self._begun = self._backward = False
        self._stepped = set()

    # The optimizers' hooks hold this object, and it holds whoever it calls: a method goes on running if a script keeps no
    # more than the model and the optimizer.

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._inside and not _runs(self._outermost):
            self.forget()
        if not self._inside:
            self._outermost = _caller()
        self._inside += 1
        replaced = _called_before(optimizer, args, kwargs) if self._adaptive else None
        again = id(optimizer) in self._stepped
        if self._begun and (again or self._backward):
            names = _listed([each for each in self.optimizers if id(each) not in self._stepped])
            self._warn("uneven", f"{names} did not step, and the others did: a step of the method is one of each")
            self._finish()
        scale, skips = parallel.scaled_by(optimizer)
        if not skips and not self._begun:
            if scale is None and len(self.optimizers) > 1:
                _unscale([each for each in self.optimizers if each is not optimizer])
            self._before(scale)
            self._begun, self._backward = True, False
        return replaced

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        self._inside = max(0, self._inside - 1)
        self._outermost = self._outermost if self._inside else None
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._finish()

    def _finish(self) -> None:
        begun, self._begun = self._begun, False
        self._stepped = set()
        if begun:
            self._after(self._together)

    def _see(self, _: Tensor) -> None:
        self._backward = True


def _stack() -> Iterator[FrameType]:
    """Yield the frames of all calls that run now, the innermost first."""
    now: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while now is not None:
        yield now
        now = now.f_back


def _caller() -> FrameType | None:
    """Return the frame that a hook was called from; None while torch.compile traces, which has none."""
    return None if torch.compiler.is_compiling() else sys._getframe(2)  # noqa: SLF001


def _runs(frame: FrameType | None) -> bool:
    """Return whether a call has not come to its end: its frame is still on the stack."""
    return frame is None or any(each is frame for each in _stack())


def _unscale(others: Sequence[Optimizer]) -> None:
    """Unscale the gradients of the other optimizers as well, if a GradScaler steps the first: it does so one by one."""
    owners = (frame.f_locals.get("self") for frame in islice(_stack(), _DEPTH))
    scaler = next((each for each in owners if isinstance(each, torch.amp.GradScaler)), None)
    if scaler is not None:
        for each in others:
            with suppress(RuntimeError):  # it has been done
                scaler.unscale_(each)


def _called_before(
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
