"""Gradients as backward leaves them, before anybody clips them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrkit.shards import held, is_sharded


def on_gradient(p: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call a hook with each gradient that arrives at a parameter, before it is accumulated; it may return another one.

    FSDP2 reduces gradients past such hooks. For a sharded parameter the hook is called after that instead, with this
    process's part of the sum so far.
    """
    if is_sharded(p):

        def reduced(p: Tensor) -> None:
            assert p.grad is not None  # it has just arrived
            part = held(p.grad)
            if (other := hook(part)) is not None:
                part.copy_(other)

        return on_accumulated(p, reduced)
    return _hooked(p, lambda: p.register_hook(hook))  # type: ignore[no-untyped-call]


def on_accumulated(p: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook with the parameter each time a gradient has been added to its ``grad``."""
    return _hooked(p, lambda: p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]


def _hooked(p: nn.Parameter, register: Callable[[], RemovableHandle]) -> RemovableHandle:
    """Register a hook. A parameter that is frozen now is hooked all the same: it may train again after a load."""
    trains = p.requires_grad
    p.requires_grad_(True)  # torch takes a hook only for tensors that need a gradient
    handle = register()
    p.requires_grad_(trains)
    return handle


class Unclipped:
    """Copies of gradients, made at the end of each backward pass: an optimizer's hook sees them only after clipping.

    With gradient accumulation the copies hold the sum so far, so that after the last micro-batch they hold the whole. Under
    DDP they hold the mean over processes.

    Args:
        tensors: whose gradients.
    """

    def __init__(self, tensors: Iterable[nn.Parameter]) -> None:
        self._tensors = list(tensors)
        self._copies: dict[int, Tensor] = {}
        self._passes: set[int] = set()  # backward passes at whose end copies will be made
        self._handles = []
        for p in self._tensors:
            self._handles.append(on_accumulated(p, self._arrive))

    def of(self, p: Tensor) -> Tensor | None:
        """Return the gradient of a tensor as the last backward pass left it; None if it has none.

        If there was no backward pass since the last step, somebody has put gradients there by hand, and those count.
        """
        return self._copies.get(id(p)) if self._copies else p.grad

    def clear(self) -> None:
        """Forget the copies, after an optimizer step."""
        self._copies, self._passes = {}, set()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def _arrive(self, _: Tensor) -> None:
        # Known by its number: one that failed never comes to its end, and must not stand for the next.
        if (now := torch._C._current_graph_task_id()) not in self._passes:  # noqa: SLF001 (there is no public name)
            self._passes.add(now)
            _at_end(self._wait)

    def _wait(self) -> None:
        # DDP averages in a callback of its own, which it queues after this one: go behind it.
        _at_end(self._copy)

    def _copy(self) -> None:
        self._copies = {id(p): p.grad.clone() for p in self._tensors if p.grad is not None}


def _at_end(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is running, after those queued so far."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
