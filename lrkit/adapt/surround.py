"""A module around a whole model, through which its calls go: a prompt method's, say."""

import types
from collections.abc import Callable
from typing import Any

from torch import nn

AROUND = "lrkit_around"
"""The module's name in the model."""

ASIDE = "_lrkit_aside"
"""An attribute of the module while calls pass it by."""


class Surround:
    """A model's ``forward`` that lets its calls go through a module, which becomes a part of it. It copies with the model.

    Args:
        model: the model.
        around: the module; it is called with the model's own forward and the arguments of the call.
    """

    def __init__(self, model: nn.Module, around: nn.Module) -> None:
        self.model, self.around = model, around
        self.before = model.__dict__.get("forward")
        """What somebody else had put in the place of the class's ``forward``; None if nobody had."""
        self.passes = False
        model.add_module(AROUND, around)
        set_forward(model, self)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the model's own forward: the Trainer looks at the signature."""
        call: Callable[..., Any] = types.MethodType(type(self.model).forward, self.model)
        return call if self.before is None else self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through the module, unless it has left or is aside."""
        if self.passes or ASIDE in self.around.__dict__:
            return self.__wrapped__(*args, **kwargs)
        return self.around(self.__wrapped__, *args, **kwargs)

    def leave(self) -> None:
        """Let calls pass. Whoever has wrapped this forward since keeps calling it; otherwise it gives its place back."""
        self.passes = True
        self.model._modules.pop(AROUND, None)
        now = self.model.__dict__.get("forward")
        if getattr(now, "__func__", now) is self:  # accelerate binds what it finds
            set_forward(self.model, self.before)


def set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Put something in the place of a model's ``forward``; None for its class's."""
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward
