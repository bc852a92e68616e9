"""``save_pretrained`` of an adapted model: warn once, and say how adapters are saved."""

import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lrkit.errors import LrkitWarning

_NAME = "save_pretrained"


class SaveNotice:
    """A warning on every module of a model that has a ``save_pretrained``, and adapters inside.

    The folder that it writes holds the adapters beside the base's weights. ``from_pretrained`` loads the base without them,
    with no more than a table in its log.

    Args:
        model: the adapted model.
        layers: names of the layers that were replaced.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self._said = False
        self._expected: OrderedDict[int, bool] = OrderedDict()
        names = list(layers)
        self._on = [
            module
            for prefix, module in model.named_modules()
            if callable(getattr(type(module), _NAME, None))
            and _NAME not in vars(module)
            and any(not prefix or name.startswith(f"{prefix}.") for name in names)
        ]
        for module in self._on:
            setattr(module, _NAME, _Saver(module, self))

    def expect(self) -> RemovableHandle:
        """Do not warn until the returned handle is removed, since the adapters are saved beside the model."""
        handle = RemovableHandle(self._expected)
        self._expected[handle.id] = True
        return handle

    def remove(self) -> None:
        """Remove it from the model."""
        for module in self._on:
            module.__dict__.pop(_NAME, None)
        self._on = []

    def say(self) -> None:
        """Warn, unless that was done before or the save is expected."""
        if not self._said and not self._expected:
            self._said = True
            warnings.warn(
                "save_pretrained of an adapted model writes adapters that from_pretrained leaves out, so that it loads the "
                "model without them: save with adapted.save(folder) and load with lrkit.load(model, folder) into the model "
                "as it was before attach; or merge() first, and save a plain model",
                LrkitWarning,
                stacklevel=4,
            )


class _Saver:
    """A module's ``save_pretrained``, with the notice before it. A copy of the module copies it along."""

    def __init__(self, module: nn.Module, notice: SaveNotice) -> None:
        self.module, self.notice = module, notice

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.notice.say()
        save = getattr(type(self.module), _NAME)
        return save(self.module, *args, **kwargs)


def strip(model: nn.Module) -> None:
    """Remove it from a copy of the model."""
    for module in model.modules():
        if isinstance(vars(module).get(_NAME), _Saver):
            del module.__dict__[_NAME]
