"""Which parameters of an adapted model train, and which of its tensors a state holds: names, precision, and other ranks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.adapt.choice import Choice
from lrkit.adapt.heads import head_parameters
from lrkit.adapt.masters import Masters
from lrkit.adapt.sharding import Moves, reshard, several
from lrkit.errors import LrkitError, shown
from lrkit.loop.state import misfit
from lrkit.shards import held, is_sharded, mine
from lrkit.units import Part, resize

_REPLACED = (
    "the model's parameters are no longer those that were attached: something (FSDP, quantization, a cast that makes new "
    "ones, resize_token_embeddings) has replaced them: do that before attach"
)

LastOptimizer = Callable[[], torch.optim.Optimizer | None]
"""Returns the optimizer that is or was bound last, if it still lives."""


class Weights:
    """The tensors of an adapted model that a method trains or saves.

    Args:
        model: the model, with the adapters in it.
        choice: what was put into it.
        masters: keeps the model's own trained parameters in float32.
    """

    def __init__(self, model: nn.Module, choice: Choice, masters: Masters) -> None:
        self._model, self._masters = model, masters
        self._flags = choice.flags
        self._places = {id(p): (m, key) for m in model.modules() for key, p in m._parameters.items() if p is not None}
        self.on_move: Callable[[Moves], None] = self.follow
        """Called if sharded parameters have taken the places of those that were attached: with `follow`, unless replaced."""
        self._head = {id(p) for p in head_parameters(model, choice.head)}
        self.added = choice.added
        self.trained = {id(p) for p in model.parameters() if p.requires_grad}
        # An adapter of rank 0 trains nothing until it gets components: for each of its tensors, one without entries.
        self._empty: dict[int, nn.Parameter] = {}
        for adapter in choice.adapters.values():
            own = [p for p in adapter.parameters() if id(p) in self.trained & self.added]
            self._empty |= {id(p): empty for empty in own if not empty.numel() for p in own}
        self._set_flags()
        self._saved = self.added | {id(p) for p in choice.own.values()}
        self._buffers = [n for n, b in model.named_buffers() if id(b) not in choice.buffers and _lasts(model, n)]
        self._dtypes = {id(p): p.dtype for p in self.parameters()}

    def put_back(self) -> None:
        """Let parameters stand in their places as they do between the model's calls.

        Float32 ones are put back if a call was broken off (Ctrl-C), sharded ones if FSDP2 has left whole ones there for
        the next call. If `fully_shard` has made new ones since attach, they are followed.
        """
        self._masters.put_back()
        if several():
            reshard(self._model)
            if moves := self._moves():
                self.on_move(moves)

    def _moves(self) -> dict[int, nn.Parameter]:
        """Return the sharded parameters that stand where others stood, by the ``id`` of those."""
        now = ((key, module._parameters[name]) for key, (module, name) in self._places.items())
        return {key: p for key, p in now if p is not None and id(p) != key and is_sharded(p)}

    def follow(self, moves: Moves) -> None:
        """Take sharded parameters for those whose places they have taken."""

        def now(old: int) -> int:
            return id(moves[old]) if old in moves else old

        for known in (self._head, self.added, self.trained, self._saved):
            ids = set(map(now, known))
            known.clear()
            known |= ids
        self._empty = {now(old): moves.get(id(p), p) for old, p in self._empty.items()}
        self._dtypes = {now(old): dtype for old, dtype in self._dtypes.items()}
        self._places = {now(old): place for old, place in self._places.items()}
        self._flags[:] = [(moves.get(id(p), p), flag) for p, flag in self._flags]
        self._masters.follow(moves)

    # ---- what trains ----

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and tensors of all that trains or has been frozen on the way, in the model's order."""
        self.put_back()
        for name, p in self._model.named_parameters():
            if id(p) in self.trained:
                yield name, p

    def parameters(self) -> list[nn.Parameter]:
        """Return all that trains or has been frozen on the way."""
        return [p for _, p in self.named()]

    def adapter(self) -> list[nn.Parameter]:
        """Return the same without the head."""
        return [p for p in self.parameters() if id(p) not in self._head]

    def head(self) -> list[nn.Parameter]:
        """Return the head's."""
        return [p for p in self.parameters() if id(p) in self._head]

    def refusal(self, held: set[int], later: Collection[int] = ()) -> str | None:
        """Say why an optimizer cannot train them; None if it can.

        Args:
            held: ``id`` of every tensor that the optimizer holds.
            later: ``id`` of every tensor that does not train now, and may later.
        """
        named = list(self.named())
        if len(named) != len(self.trained):
            return _REPLACED
        missing = [name for name, p in named if (p.requires_grad or id(p) in later) and id(p) not in held]
        if missing:
            when = " after fully_shard" if any(is_sharded(p) for _, p in named) else ""
            return (
                f"the optimizer does not hold {len(missing)} of the parameters that the method trains, such as "
                f'"{missing[0]}": make it from adapted.parameters(){when}'
            )
        return None

    def cast(self) -> str | None:
        """Say that parameters are no longer in the precision that attach gave them; None if they are."""
        now = [p.dtype for p in self.parameters() if p.dtype != self._dtypes[id(p)]]
        if not now:
            return None
        loss = ": small updates round away" if now[0].itemsize < 4 else ""
        return f"what trains was cast to {now[0]} after attach, and trains in it{loss}"

    # ---- what a state holds ----

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors that a state holds, by name: all that trains, and what the adapters keep beside it."""
        self.put_back()
        parameters = {name: p for name, p in self._model.named_parameters() if id(p) in self._saved}
        if len(parameters) < len(self._saved):
            raise LrkitError(_REPLACED)
        return {**parameters, **{name: self._model.get_buffer(name) for name in self._buffers}}

    def check(self, given: Mapping[str, Tensor], shapes: Mapping[int, tuple[int, ...]]) -> None:
        """Raise LrkitError if tensors of a state cannot be taken over.

        Args:
            given: tensors by name.
            shapes: those that `saved` has at the state's ranks, by ``id``, if they may differ from the present ones.
        """
        saved = self.saved()
        if set(saved) != set(given):
            raise misfit(f"{_listed(set(saved) ^ set(given))} missing or not expected")
        for name, tensor in given.items():
            here = saved[name]
            if tensor.shape != shapes.get(id(here), here.shape):
                raise misfit(f"{name} is {list(tensor.shape)}, here {list(here.shape)}")
            if tensor.dtype != here.dtype and not (tensor.is_floating_point() and here.is_floating_point()):
                raise misfit(f"{name} is {tensor.dtype}, here {here.dtype}")
            if tensor.shape != here.shape and is_sharded(here):
                raise misfit(f"{name} has other ranks, and is sharded: load it into the model before fully_shard")

    def off(self, frozen: Collection[int]) -> set[int]:
        """Return the ``id`` of each tensor that has entries, and that somebody froze by hand: a LoRA-FA's A, say.

        Args:
            frozen: those that the method froze.
        """
        live = [p for p in self.parameters() if p.numel() and self._empty.get(id(p), p).numel()]
        return {id(p) for p in live if not p.requires_grad and id(p) not in frozen}

    @torch.no_grad()
    def take(
        self, given: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, off: Collection[int] = ()
    ) -> str | None:
        """Take over tensors that `check` has passed; return a warning about the precision, or None.

        A state in another precision is followed, unless these parameters were cast since attach.

        Args:
            given: tensors by name.
            optimizer: its state for a tensor of another rank goes.
            off: what `off` returns: it stays frozen, whatever the state's step.
        """
        saved = self.saved()
        odd = [name for name, tensor in given.items() if tensor.dtype != saved[name].dtype]
        follow = [name for name in odd if self._dtypes.get(id(saved[name]), saved[name].dtype) == saved[name].dtype]
        told = None
        if odd:
            how = ": it goes on as it was" if follow else ", to which the model was cast"
            was, now = given[odd[0]].dtype, saved[odd[0]].dtype
            told = f"the state was saved in {was} ({odd[0]}), and is loaded in {now}{how}"
        for name in follow:
            saved[name].grad = None
            saved[name].data = saved[name].data.to(given[name].dtype)
        self._dtypes |= {id(saved[name]): given[name].dtype for name in follow if id(saved[name]) in self._dtypes}
        for name, tensor in given.items():
            p = saved[name]
            if tensor.shape != p.shape:
                assert isinstance(p, nn.Parameter)  # `check` was given other shapes for components alone
                _make_room(p, tensor.shape, optimizer)
            held(p).copy_(mine(tensor, p))
        self._set_flags(off)  # the state may be of an earlier step, when less was frozen
        return told

    def _set_flags(self, off: Collection[int] = ()) -> None:
        """Let all train that has entries and is not `off`, but for the adapters that began with rank 0 and still have it."""
        for p in self.parameters():
            p.requires_grad_(p.numel() > 0 and self._empty.get(id(p), p).numel() > 0 and id(p) not in off)


def _lasts(model: nn.Module, buffer: str) -> bool:
    """Return whether a buffer is part of the model's state dict."""
    path, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(path)._non_persistent_buffers_set


def _listed(names: set[str]) -> str:
    """Return the first names for a message."""
    return ", ".join(map(shown, sorted(names)[:3]))


def take_ranks(adapter: nn.Module, parts: Sequence[Part], optimizer: LastOptimizer) -> None:
    """Let ``load_state_dict`` of an adapter give it the rank of the tensors that it is given, if they are all of one.

    An adapter of which no tensor is given keeps its own, though the load be strict: the adaptive state is still to come.

    Args:
        adapter: a module with components.
        parts: its tensors.
        optimizer: its state for a tensor of another rank goes.
    """
    adapter.register_load_state_dict_pre_hook(_TakeRanks(parts, optimizer))  # type: ignore[no-untyped-call]


class _TakeRanks:
    """The hook of `take_ranks`. A copy of the model has one without an optimizer."""

    def __init__(self, parts: Sequence[Part], optimizer: LastOptimizer = lambda: None) -> None:
        self._parts, self._optimizer = parts, optimizer

    def __reduce__(self) -> tuple[Any, ...]:
        return _TakeRanks, (list(self._parts),)

    def __call__(self, module: nn.Module, given: dict[str, Tensor], prefix: str, *_: Any) -> None:
        own = {prefix + name: p for name, p in module._parameters.items() if p is not None}
        if not own.keys() & given.keys():
            given |= own
            return
        found = [
            (part.of(module), given[prefix + part.name], part.axis)
            for part in self._parts
            if part.axis is not None and prefix + part.name in given
        ]
        # Tensors of another layer are left to torch, which refuses them.
        alike = all(_across(p, axis) == _across(tensor, axis) for p, tensor, axis in found)
        if alike and len({tensor.shape[axis] for _, tensor, axis in found}) == 1:
            for p, tensor, _axis in found:
                if tensor.shape != p.shape:
                    _make_room(p, tensor.shape, self._optimizer())


def _across(tensor: Tensor, axis: int) -> torch.Size | None:
    """Return the sizes of one component."""
    return tensor.movedim(axis, 0).shape[1:] if -tensor.ndim <= axis < tensor.ndim else None


def _make_room(p: nn.Parameter, shape: torch.Size, optimizer: torch.optim.Optimizer | None) -> None:
    """Resize a tensor for a load. An optimizer's state for it goes, unless it has the new shape already."""
    state = optimizer.state.get(p, {}) if optimizer is not None else {}
    values = [value for value in state.values() if isinstance(value, Tensor)]
    # State of the tensor's present shape is one entry per entry, even if rank 1 makes it look like Adafactor's.
    odd = any(value.shape == p.shape != shape or not _belongs(value.shape, shape) for value in values)
    if optimizer is not None and odd:
        del optimizer.state[p]
    resize(p, p.new_empty(shape))


def _belongs(state: torch.Size, shape: torch.Size) -> bool:
    """Return whether an optimizer's state can be of a tensor of this shape: its sizes, or some of them (Adafactor)."""
    if len(state) == len(shape):
        return all(a in (b, 1) for a, b in zip(state, shape, strict=True))
    return set(state) <= {*shape, 1}


def check_ranks(saved: Mapping[str, Tensor], shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Raise LrkitError if a tensor has another shape than at the run's ranks: weights of another step were loaded.

    Args:
        saved: the model's tensors by name, as `Weights.saved` returns them.
        shapes: as in `Weights.check`, at the run's ranks.
    """
    for name, tensor in saved.items():
        if tensor.shape != shapes.get(id(tensor), tensor.shape):
            raise LrkitError(
                f"{name} is {list(tensor.shape)}, and {list(shapes[id(tensor)])} at the run's ranks: weights of another "
                "step were loaded into the model. Load that step's state as well, by load_state_dict of the handle"
            )
