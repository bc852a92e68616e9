"""Modules and their places: adapters are put into a model, taken out for a while or for good, and merged into it."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

from lrkit.adapt import pretrained
from lrkit.adapt.choice import Choice
from lrkit.adapt.masters import Masters
from lrkit.adapt.merging import check_weight, forget, merged
from lrkit.adapt.names import keep_names
from lrkit.adapt.quantized import Layout
from lrkit.adapt.reference import without
from lrkit.adapt.sharding import refusal_to_attach
from lrkit.adapt.surround import AROUND, ASIDE, Surround, set_forward
from lrkit.errors import LrkitError, LrkitWarning, listing
from lrkit.layers import kind_of
from lrkit.layers.dequantized import is_packed
from lrkit.precision import is_plain
from lrkit.shards import is_sharded

_MARK = "_lrkit_adapted"
_OURS = f"{__package__}."


def check_model(model: nn.Module) -> None:
    """Raise LrkitError if it is not a model, has its weights elsewhere, or carries adapters already."""
    if not isinstance(model, nn.Module):
        raise LrkitError(f"a model is an nn.Module, not {model!r}")
    if hasattr(model, "_orig_mod"):
        raise LrkitError(
            "the model is what torch.compile returned, under other names: attach to the model, then compile it"
        )
    for name, module in model.named_modules():
        # accelerate keeps such weights on the CPU or disk, and has them on the device for the length of a call.
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise LrkitError(f"{name or 'the model'} is offloaded by accelerate: load the model without offloading")
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise LrkitError(
                f"{name or 'the model'} is PEFT's own ({type(module).__name__}): take PEFT's adapters out first "
                "(merge_and_unload() or unload()), or let lrkit.from_peft read the folder that PEFT saved"
            )
    if reason := refusal_to_attach(model):
        raise LrkitError(reason)
    if any(getattr(module, _MARK, False) for module in model.modules()):
        raise LrkitError(
            "this model already carries adapters, and holds one method at a time: detach() or merge() them first (and copy "
            "a model before attach, not after), or lrkit.export each and switch between them in PEFT with load_adapter"
        )


@attrs.define(eq=False)
class _Place:
    """A place in the model: the module that stands there without adapters, and the one that has taken it."""

    name: str
    parent: nn.Module
    attribute: str
    before: nn.Module
    after: nn.Module


class Graft:
    """A model with other modules in some of its places. Making one changes the model.

    Args:
        model: the plain model.
        choice: the modules that take places, and the parameters that train.
    """

    def __init__(self, model: nn.Module, choice: Choice) -> None:
        self.model, self.adapters, self.around = model, choice.adapters, choice.around
        self.masters = Masters(model, choice.own)
        self.originals = choice.layers
        self._places = _places(model, choice.places)
        self._flags = choice.flags
        for p, _ in self._flags:
            p.requires_grad_(False)
        for p in choice.own.values():
            p.requires_grad_(True)
        for place in self._places:
            place.after.train(place.before.training)
            setattr(place.after, _MARK, True)
            setattr(place.parent, place.attribute, place.after)
        replaced = {place.name: place for place in self._places}
        self._handles: list[Any] = [Layout(model)]
        self._handles += [handle for each in replaced.values() for handle in keep_names(each.after, each.before)]
        self._surround = None if self.around is None else Surround(model, self.around)
        self.saves = pretrained.SaveNotice(model, replaced)
        self._depth = 0
        self.alive = True
        setattr(model, _MARK, True)

    def check(self, *, within: bool = False) -> None:
        """Raise LrkitError if the adapters are not in the model.

        Args:
            within: whether they may be out for a while, by `disabled`.
        """
        if not self.alive:
            raise LrkitError("these adapters were merged or detached: attach again")
        self._follow()
        if self._depth and not within:
            raise LrkitError("the adapters are out of the model within adapted.disabled(): do this outside of it")

    def _follow(self) -> None:
        """Take the layers that others have put into the adapters since, as ``model.dequantize()`` of transformers does."""
        for place in self._places:
            base = place.after._modules.get("base")
            if base is not None and base is not place.before and place.after is self.adapters.get(place.name):
                place.before = self.originals[place.name] = base
                vars(place.after)["kind"] = kind_of(base)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Put the layers and values from before attach in their places for a while. It can be nested."""
        self.check(within=True)
        if any(is_sharded(kept.tensor) for kept in self.masters.kept):
            raise LrkitError(
                "the head is sharded, and FSDP2 puts its trained values in place at each call: the model as it was is the "
                "plain one (or attach with train_also=[])"
            )
        self._depth += 1
        try:
            if self._depth > 1:
                yield
                return
            if self.around is not None:
                self.around.__dict__[ASIDE] = True
            places = [(place.parent, place.attribute, place.before) for place in self._places]
            values = [(kept.tensor, self.masters.original(kept)) for kept in self.masters.kept]
            with without(places, values, self.model):
                yield
        finally:
            self._depth -= 1
            if self.around is not None and not self._depth:
                self.around.__dict__.pop(ASIDE, None)

    def original(self, trained: set[int]) -> nn.Module:
        """Return a copy of the model as it was before attach.

        Args:
            trained: ``id`` of every parameter that trains. Quantized and sharded ones that do not are shared with the copy.
        """
        if any(map(is_sharded, self.model.parameters())):
            raise LrkitError("a sharded model cannot be copied: make another from the plain one")
        # Not every quantized tensor can be copied; none of them changes.
        frozen = (p for p in self.model.parameters() if id(p) not in trained and not is_plain(p))
        memo: dict[int, Any] = {id(p): p for p in frozen}
        for place in self._places:
            memo[id(place.after)] = copy.deepcopy(place.before, memo)
        if self.around is not None:
            memo[id(self.around)] = None
        model = copy.deepcopy(self.model, memo)
        if self._surround is not None:
            model._modules.pop(AROUND, None)
            # Whoever has wrapped the model's forward since, such as accelerate, wrapped that of the model, not of the copy.
            set_forward(model, copy.deepcopy(self._surround.before, memo))
        delattr(model, _MARK)
        self.masters.restore_copies(memo)
        pretrained.strip(model)
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [
                    key for key, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_OURS)
                ]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        for p, flag in self._flags:
            memo[id(p)].requires_grad_(flag)
        return model

    def merge(self, *, dequantize: bool = False) -> None:
        """Add every adapter to its layer's weight, and leave the model.

        Args:
            dequantize: whether a quantized layer gives its place to a plain ``nn.Linear``.

        Raises:
            LrkitError: an adapter that cannot be merged, or a weight that cannot be added to. Nothing is changed then.
        """
        if self.around is not None:
            raise LrkitError(
                f"{type(self.around).__name__} stands around the whole model, and cannot be merged into it"
            )
        merges: dict[str, Any] = {}
        put_in = [name for name, adapter in self.adapters.items() if adapter is not self.originals[name]]
        for name in put_in:
            merges[name] = getattr(self.adapters[name], "merge", None)
            if merges[name] is None:
                kind = type(self.adapters[name]).__name__
                raise LrkitError(f"{name}: {kind} cannot be merged into the layer's weight")
        owners: dict[int, int] = {}
        # A layer that is tied to an adapted one and sees its increment changes with it.
        follow = {id(place.before) for place in self._places if place.name not in self.adapters}
        for module in self.model.modules():
            if id(module) in follow:
                continue
            for p in module._parameters.values():
                owners[id(p)] = owners.get(id(p), 0) + 1
        whole = {place.name for place in self._places}
        packed = [n for n in put_in if dequantize and n in whole and is_packed(self.originals[n])]
        for name in put_in:
            if name not in packed:
                check_weight(name, self.originals[name], owners)
        plain = {name: merged(self.model, name, self.originals[name], self.adapters[name]) for name in packed}
        for name, merge in merges.items():
            if name not in plain:
                try:
                    merge()
                except (ValueError, TypeError, AttributeError, NotImplementedError) as error:  # of a plug-in's layer
                    kind = type(self.adapters[name]).__name__
                    raise LrkitError(f"{name}: {kind} cannot be merged: {' '.join(str(error).split())}") from error
        self.masters.settle()
        for place in self._places:
            place.before = plain.get(place.name, place.before)
        self._leave()
        if plain and (left := forget(self.model)):
            warnings.warn(
                f"{len(left)} layers without adapters are still quantized ({listing(left)}), and the model's configuration "
                "says so of all: save_pretrained would write a model that is quantized again when it is loaded",
                LrkitWarning,
                stacklevel=3,
            )

    def detach(self) -> None:
        """Put all values back as they were before attach, and leave the model."""
        self.masters.restore()
        self._leave()

    def _leave(self) -> None:
        self.alive = False
        self.masters.put_back()
        self.saves.remove()
        for handle in self._handles:
            handle.remove()
        for place in self._places:
            setattr(place.parent, place.attribute, place.before.train(place.after.training))
            place.after.__dict__.pop(_MARK, None)
        if self._surround is not None:
            self._surround.leave()
        for p, flag in self._flags:
            p.requires_grad_(flag)
            p.grad = None
        delattr(self.model, _MARK)


def _places(model: nn.Module, after: Mapping[str, nn.Module]) -> list[_Place]:
    """Return every place of the modules that others take the places of, by name; a module that is used twice has two."""
    names = {id(model.get_submodule(name)): name for name in after}
    return [
        _Place(names[id(child)], parent, attribute, child, after[names[id(child)]])
        for parent in list(model.modules())
        for attribute, child in parent._modules.items()
        if child is not None and id(child) in names
    ]
