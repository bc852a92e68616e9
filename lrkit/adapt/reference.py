"""The model as it was before attach, beside the adapted one, sharing every weight: for a while, or as a module."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.process import swapped

Place = tuple[nn.Module, str, nn.Module]
"""A parent, the attribute, and the module that stands there without the adapter."""


def without(places: list[Place], values: list[tuple[Tensor, Tensor]], model: nn.Module) -> AbstractContextManager[None]:
    """Put the layers and the values from before attach in their places, and take them out again, whatever happens.

    Values are put in as other tensors, not written over: a graph that was made on either side of the change stays right, and
    an optimizer's parameters are not touched.

    Args:
        places: the places of the adapted layers.
        values: parameters and buffers that have been trained, each with its value from before.
        model: the model that holds them.
    """
    return swapped(chain(_layers(places), _values(values, model)))


def _layers(places: list[Place]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for parent, name, original in places:
        adapter = parent._modules[name]
        assert adapter is not None
        original.train(adapter.training)
        yield parent._modules, name, original


def _values(values: list[tuple[Tensor, Tensor]], model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    before = {id(now): was for now, was in values}
    for module in list(model.modules()) if before else ():
        for table in (module._parameters, module._buffers):
            for name, now in list(table.items()):
                if now is not None and id(now) in before:
                    was = before[id(now)]
                    yield table, name, nn.Parameter(was, requires_grad=False) if isinstance(now, nn.Parameter) else was


class Reference(nn.Module):
    """The model as it was before attach, as a module of its own, for ``ref_model=`` of DPO, GRPO and the like.

    It shares every weight with the adapted model and has none of its own: nothing trains, nothing is saved, and moving it
    moves nothing. A call runs the adapted model with its adapters off, without gradients, and in this module's own mode
    (``eval()`` at first) whatever the model's is. Two threads may not run the model and its reference at once.

    Args:
        model: the adapted model.
        disabled: takes the adapters out for a while.
    """

    def __init__(self, model: nn.Module, disabled: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self._of = (model, disabled)  # in a tuple: not a submodule, its parameters are not this module's
        self.eval()

    @contextmanager
    def _as_it_was(self) -> Iterator[nn.Module]:
        model, disabled = self._of
        with disabled(), torch.no_grad():
            modes = [(module, module.training) for module in model.modules()]
            try:
                model.train(self.training)
                yield model
            finally:
                for module, mode in modes:
                    module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model as it was."""
        with self._as_it_was() as model:
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model did."""
        with self._as_it_was() as model:
            return model.generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def base_model(self) -> "Reference":
        """Return the same for the model's base, whose calls run without adapters too (TRL computes log-probabilities so)."""
        model, disabled = self._of
        return Reference(model.base_model, disabled).train(self.training)  # type: ignore[arg-type]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the model's output embeddings with the weights from before `attach`."""
        model, disabled = self._of
        with disabled():
            module = model.get_output_embeddings()  # type: ignore[operator]
            if module is None:
                return None
            twin: nn.Module = copy.copy(module)
            twin._parameters = dict(module._parameters)
            return twin

    @property
    def config(self) -> Any:
        """Return the model's."""
        return self._of[0].config

    @property
    def generation_config(self) -> Any:
        """Return the model's."""
        return self._of[0].generation_config

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return next(self._of[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the model's precision."""
        own = getattr(self._of[0], "dtype", None)
        return own if isinstance(own, torch.dtype) else next(self._of[0].parameters()).dtype
