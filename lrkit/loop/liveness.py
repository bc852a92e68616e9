"""Which of what trains is reached by the loss, seen at the optimizer's first step from the gradients that are there.

A layer whose weight is read without a call, or one that the loss does not depend on, has an adapter without a gradient. It
is *dead*: it is named, ranks below all others, and takes part again from the first step at which its gradients arrive.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrkit.units import Block


class Liveness:
    """The dead among a model's adapters.

    Args:
        adapters: layer name to adapter.
        trained: ``id`` of every parameter that trains.
        others: what trains beside them: a gradient there alone says that no adapter is reached.
        whole: an adapter is reached where *all* of its tensors have a gradient. False: where any has. (A penalty reaches
            the matrices of an adapter that the loss does not.)
    """

    def __init__(
        self, adapters: Mapping[str, nn.Module], trained: set[int], others: Sequence[nn.Parameter] = (), *, whole: bool
    ) -> None:
        self._adapters, self._trained, self._others, self._whole = adapters, trained, others, whole
        self._doubted: set[str] = set()
        self.dead: list[str] | None = None
        """Names of the dead layers, in the model's order; None as long as no gradient has been seen."""

    def look(self) -> bool:
        """See which adapters have gradients now. Returns whether that has changed who is dead."""
        before = self.dead
        open_ = self._adapters if before is None else {*before, *self._doubted}
        names = [name for name in self._adapters if name in open_] if open_ else []
        if not names:
            return False
        arrived = {name: self._arrived(self._adapters[name]) for name in names}
        enough = all if self._whole else any
        live = {name for name, each in arrived.items() if each and enough(each)}
        if not live and all(p.grad is None for p in self._others):
            return False  # where there is no gradient at all nothing is known
        # A layer of rank 0 has nothing that trains, and so neither lives nor is dead.
        self.dead, self._doubted = [name for name in names if arrived[name] and name not in live], set()
        return self.dead != (before or [])

    def doubt(self, blocks: Sequence[Block], returned: Collection[str]) -> None:
        """Look again, at the next step, at the adapters of what has begun to train again: blocks by their names."""
        again = {id(tensor) for block in blocks if block.name in returned for tensor in block.tensors}
        if again:
            self._doubted |= {n for n, m in self._adapters.items() if any(id(p) in again for p in m.parameters())}

    def _arrived(self, module: nn.Module) -> list[bool]:
        """Tell of each tensor of an adapter that trains whether it has a gradient."""
        return [p.grad is not None for p in module.parameters() if p.requires_grad and id(p) in self._trained]


def unreached(modules: Mapping[str, Sequence[nn.Parameter]]) -> list[str]:
    """Names of modules that train and have a parameter without a gradient; none where no module has any gradient."""
    found = {name: [p.grad is not None for p in ps if p.requires_grad] for name, ps in modules.items()}
    if not any(any(each) for each in found.values()):
        return [name for name, each in found.items() if each]
    return [name for name, each in found.items() if each and not any(each)]


def held_by(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    """Return the ``id`` of every tensor that an optimizer steps."""
    return frozenset(id(p) for group in optimizer.param_groups for p in group["params"])


Look = Callable[[Any, torch.optim.Optimizer, frozenset[int]], None]
"""A look at an optimizer before its step: who looks, the optimizer, and the ``id`` of each tensor that it steps."""

_watchers: "weakref.WeakKeyDictionary[object, Look]" = weakref.WeakKeyDictionary()


def watch(who: object, call: Look) -> None:
    """Call a function with `who` before each step of any optimizer, until `leave` or the end of `who`."""
    _look_out()
    _watchers[who] = call


def leave(who: object) -> None:
    """Stop the calls that `watch` began."""
    _watchers.pop(who, None)


@functools.cache
def _look_out() -> None:
    """One hook for all, for good: torch does not bear that one is removed, by a garbage collection, in a step."""

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = held_by(optimizer) if _watchers else frozenset()
        for who, call in list(_watchers.items()):
            call(who, optimizer, held)

    register_optimizer_step_pre_hook(look)
