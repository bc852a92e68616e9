"""A saved state as a whole: the run that it is of, and a mixture of two states of one run."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrkit.adapt.found import in_effect
from lrkit.adapt.summary import summarize
from lrkit.adapt.weights import Weights, check_ranks
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError, shown
from lrkit.loop import state as states
from lrkit.loop.controller import Controller
from lrkit.method import Method
from lrkit.shards import whole

WEIGHT = "weight."
"""Prefix of the model's tensors in a state, before their names in the model."""


@attrs.frozen(eq=False)
class Loaded:
    """A state that was taken over: the loop as it was then, and a warning about the weights' precision or None."""

    controller: Controller
    cast: str | None


@attrs.frozen(eq=False)
class Archive:
    """Writes and reads the states of one run.

    Args:
        method: the method.
        layers: names of the adapted layers.
        head: names of the modules that train in full.
        base: the plain model, as `describe` has it.
        weights: the model's tensors that a state holds.
    """

    method: Method
    layers: tuple[str, ...]
    head: tuple[str, ...]
    base: dict[str, Any] | None
    weights: Weights

    def state(self, controller: Controller) -> dict[str, Any]:
        """Return copies of all that is adaptive: ``{"meta": JSON data, "tensors": name to tensor}``.

        Raises:
            LrkitError: weights of other ranks than the run's were loaded into the model.
        """
        if cast := self.weights.cast():
            controller.warn("cast", cast)
        saved = controller.saved(to_plain(self.method), self.head, copy.deepcopy(self.base))
        mine = self.weights.saved()
        check_ranks(mine, controller.run.shapes(saved.ranks))
        weights = {WEIGHT + name: whole(tensor.detach()).clone() for name, tensor in mine.items()}
        layers = summarize(controller, 0).layers
        ranked = bool(layers) and all(layer.rank is not None for layer in layers)
        saved = attrs.evolve(saved, allocation=in_effect(layers) if ranked else None)
        return {"meta": saved.to_plain(), "tensors": {**controller.tensors(), **weights}}

    @torch.inference_mode(False)  # what is made in the mode for inference could never train
    def load(
        self,
        saved: states.Saved,
        tensors: Mapping[str, Tensor],
        controller: Controller,
        optimizer: Optimizer | None,
    ) -> "Loaded":
        """Take over a state that `state` returned and `lrkit.loop.state.read` has structured.

        Raises:
            LrkitError: it is of another run. Nothing is changed then.
        """
        self._check(saved)
        saved.check()
        given = {name.removeprefix(WEIGHT): tensor for name, tensor in tensors.items() if name.startswith(WEIGHT)}
        self.weights.check(given, controller.run.shapes(saved.ranks))
        off = self.weights.off(controller.components.frozen()) | controller.components.off
        controller.check(saved, tensors, off)
        if controller.total_steps is None and saved.total_steps is not None:
            controller.foretell(saved.total_steps)
        # All was checked above, and nothing below can fail.
        cast = self.weights.take(given, optimizer, off)
        return Loaded(controller.loaded(saved, tensors, off), cast)

    @torch.inference_mode(False)
    def rewind(
        self,
        saved: states.Saved,
        tensors: Mapping[str, Tensor],
        controller: Controller,
        optimizer: Optimizer | None,
    ) -> "Loaded":
        """Go back to an earlier state in all but the weights. Returns and raises as `load`."""
        mixed = _rewound(saved, tensors, self.weights.saved(), controller)
        total, controller.total_steps = controller.total_steps, None
        try:
            return self.load(saved, mixed, controller, optimizer)
        except BaseException:
            controller.total_steps = total
            raise

    def _check(self, saved: states.Saved) -> None:
        # Settings that lrkit did not have when the state was written are at their defaults, as they were in effect then.
        mine, theirs = to_plain(self.method), to_plain(from_plain(saved.method))
        if mine != theirs:
            raise LrkitError(f"the state is of another method: {_difference(theirs, mine)}")
        for kind, here, there in (
            ("other layers", self.layers, saved.targets),
            ("another head", self.head, saved.head),
        ):
            if here != there:
                odd = ", ".join(map(shown, sorted(set(here) ^ set(there))[:3]))
                raise LrkitError(f"the state is of {kind}: {odd or 'in another order'}")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Describe a transformers model, for those who have only the saved file; None for any other model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    return {
        "class": type(model).__name__,
        "name": getattr(config, "name_or_path", ""),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config": json.loads(config.to_json_string()),
    }


def _rewound(
    earlier: states.Saved, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], controller: Controller
) -> dict[str, Tensor]:
    """Return the tensors of an earlier state with the weights of now, at the ranks of then.

    Args:
        earlier: the earlier state's data.
        tensors: its tensors.
        weights: the model's tensors now, by name. A component that was cut since then is as it was in `tensors`.
        controller: the loop now.
    """
    tensors, places = dict(tensors), controller.run.places()
    for name, p in weights.items():
        layer, axis = places.get(id(p), (None, 0))
        key = WEIGHT + name
        now, then = ((), ()) if layer is None else (controller.ranks.numbers(layer), earlier.numbers(layer))
        if now == then:
            tensors[key] = p.detach().clone()
            continue
        tensors[key] = tensors[key].clone().to(p)
        for number in set(then) & set(now):
            present = p.detach().select(axis, now.index(number))
            tensors[key].select(axis, then.index(number)).copy_(present)
    return tensors


def _difference(theirs: Any, mine: Any, path: str = "") -> str:
    """Say at which place two plain data first differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in {**theirs, **mine}:
            if theirs.get(key) != mine.get(key):
                return _difference(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
    return f"{path} is {shown(theirs)} there and {shown(mine)} here"
