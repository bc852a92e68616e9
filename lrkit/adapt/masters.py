"""Trained parameters are kept in float32, beside a model in half precision too, and put back as they were.

An update of a bfloat16 weight is lost if it is below the weight's last bit, and a GradScaler refuses float16 gradients. So
the model's own parameters that train (a head, biases, layer norms) are kept in float32, and their modules compute with them
in the model's precision, as the adapters do: a hook puts the rounded tensor in the parameter's place for the length of a
call, and the gradient comes back through the rounding.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.precision import is_plain
from lrkit.shards import is_sharded, like

_HALF = (torch.float16, torch.bfloat16)
_HELD = "_lrkit_masters"


@attrs.frozen(eq=False)
class _Kept:
    """A parameter or buffer, and a copy of it as it was before attach."""

    tensor: Tensor
    copy: Tensor


class Masters:
    """The copies that `detach` needs, and float32 in place of half precision.

    Args:
        model: the model.
        trained: its own parameters that are to train, by name.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        ids = {id(p) for p in trained.values()}
        # A parameter that does not train shows the model's precision, now and after casts.
        rest = (p for p in model.parameters() if id(p) not in ids and is_plain(p) and p.dtype in _HALF)
        self.witness: nn.Parameter | None = next(rest, None)
        self._was = None if self.witness is None else self.witness.dtype
        self._handles: list[Any] = []
        self._owners: list[nn.Module] = []
        owners = [m for m in model.modules() if any(id(p) in ids for p in m._parameters.values())]
        buffers = [b for m in owners for b in m._buffers.values() if b is not None and b.dtype in _HALF]
        raised = [p for p in trained.values() if is_plain(p) and p.dtype in _HALF]
        # If all of the model trains, all of it is in float32 afterwards, and nothing has to be rounded.
        whole = buffers if self.witness is None else []
        self.kept = [_Kept(p, p.detach().clone()) for p in trained.values()]
        self.kept += [_Kept(b, b.detach().clone()) for b in whole]
        for tensor in (*raised, *whole):
            tensor.data = tensor.data.float()
        if self.witness is not None:
            wide = {id(p) for p in raised}
            parents = {id(child): module for module in model.modules() for child in module._modules.values()}
            for owner in owners:
                names = tuple(n for n, p in owner._parameters.items() if id(p) in wide)
                if not names:
                    continue
                self._owners.append(owner)
                # A parent may read its child's weight without a call, as nn.MultiheadAttention and Mamba's mixer do.
                for module in {id(m): m for m in (owner, parents.get(id(owner), owner))}.values():
                    self._handles += [
                        module.register_forward_pre_hook(_Round(owner, names, self.witness)),
                        module.register_forward_hook(_Back(owner), always_call=True),
                    ]

    def follow(self, moves: Mapping[int, nn.Parameter]) -> None:
        """Keep copies for the sharded parameters that have taken the places of those that were attached, by ``id``."""
        moved = [moves.get(id(kept.tensor), kept.tensor) for kept in self.kept]
        self.kept = [_Kept(p, like(kept.copy, p)) for kept, p in zip(self.kept, moved, strict=True)]
        if self.witness is not None:
            self.witness = moves.get(id(self.witness), self.witness)

    def original(self, kept: _Kept) -> Tensor:
        """Return the copy from before attach, on the parameter's device, and in the precision that the model was cast to."""
        if kept.copy.device != kept.tensor.device:
            object.__setattr__(kept, "copy", kept.copy.to(kept.tensor.device))
        if self.witness is not None and kept.copy.dtype == self._was != self.witness.dtype:
            return kept.copy.to(self.witness.dtype)
        return kept.copy

    def restore(self) -> None:
        """Put everything back as it was before, bit for bit, dtype and all."""
        for kept in self.kept:
            _set(kept.tensor, self.original(kept))
        self._let_go()

    def as_computed(self, p: Tensor) -> Tensor:
        """Return a parameter as the model computes with it: rounded to the model's precision if it is kept in float32."""
        if self.witness is None or self.witness.dtype not in _HALF or p.dtype != torch.float32:
            return p
        return (
            p.to(self.witness.dtype) if any(kept.tensor is p and kept.copy.dtype in _HALF for kept in self.kept) else p
        )

    def put_back(self) -> None:
        """Put the float32 parameters back into modules if their call was broken off (Ctrl-C), so that no hook did."""
        for owner in self._owners:
            _put_back(owner)

    def settle(self) -> None:
        """Leave trained parameters in the model's own precision, in which it has computed all along."""
        if self.witness is not None:
            for kept in self.kept:
                if kept.copy.dtype in _HALF:
                    _set(kept.tensor, kept.tensor.detach().to(self.original(kept).dtype))
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def restore_copies(self, copies: Mapping[int, Any]) -> None:
        """Restore a deep copy of the model. `copies` is deepcopy's memo."""
        for kept in self.kept:
            _set(copies[id(kept.tensor)], self.original(kept))


def _set(tensor: Tensor, value: Tensor) -> None:
    if tensor.dtype == value.dtype:
        with torch.no_grad():
            tensor.copy_(value)
    else:
        tensor.grad = None
        tensor.data = value.detach().clone()


class _Round:
    """A forward pre-hook: the module computes with its trained parameters in the model's precision.

    Args:
        owner: the module that has the parameters: the one that is called, or a child of it.
        names: of the parameters.
        witness: a parameter of the model that says which precision that is. (A copy of the model copies it along.)
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...], witness: nn.Parameter) -> None:
        self.owner, self.names, self.witness = (owner,), names, witness

    def __call__(self, *_: Any) -> None:
        (owner,) = self.owner
        held, depth = owner.__dict__.get(_HELD, ({}, 0))
        for name in self.names:
            p, since = held.get(name, (owner._parameters[name], depth))
            # A sharded one has its turn when FSDP2 has made it whole, which may be in a call within this one.
            if p is not None and p.dtype == torch.float32 and self.witness.dtype in _HALF and not is_sharded(p):
                held[name] = p, since
                # Anew each time: a call within this one, or after one that was broken off, has a graph of its own.
                owner._parameters[name] = p.to(self.witness.dtype)
        owner.__dict__[_HELD] = held, depth + 1


class _Back:
    """A forward hook: the float32 parameters stand in their places again once the call has ended that rounded them first."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = (owner,)

    def __call__(self, *_: Any) -> None:
        (owner,) = self.owner
        _put_back(owner, owner.__dict__.get(_HELD, ({}, 1))[1] - 1)


def _put_back(owner: nn.Module, depth: int = 0) -> None:
    """End calls down to a depth: 0 ends them all."""
    held: dict[str, tuple[nn.Parameter, int]] = owner.__dict__.pop(_HELD, ({}, 0))[0]
    owner._parameters.update({name: p for name, (p, since) in held.items() if since >= depth})
    if depth > 0:
        owner.__dict__[_HELD] = {name: each for name, each in held.items() if each[1] < depth}, depth
