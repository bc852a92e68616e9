"""``save_pretrained`` of an adapted model: say once how such a folder is loaded."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from lrkit.errors import LrkitWarning

_NAME = "save_pretrained"


class SaveNotice:
    """Hangs on every module of a model that has adapters inside, and a ``save_pretrained``.

    The folder that it writes holds the adapters beside the base's weights. ``from_pretrained`` loads the base without them,
    with no more than a table in its log.

    Args:
        model: the adapted model.
        layers: names of the layers that were replaced.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self.said = False
        self.expected = 0
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

    def expect(self) -> "Expected":
        """Say nothing until the handle that this gives is removed: somebody saves the adapters beside the model."""
        return Expected(self)

    def remove(self) -> None:
        """Take it off."""
        for module in self._on:
            module.__dict__.pop(_NAME, None)
        self._on = []

    def say(self) -> None:
        """Warn, unless it was done or is not needed."""
        if not self.said and not self.expected:
            self.said = True
            warnings.warn(
                "save_pretrained of an adapted model writes adapters that from_pretrained leaves out, so that it loads the "
                "model without them: save with adapted.save(folder) and load with lrkit.load(model, folder) into the model "
                "as it was before attach; or merge() first, and save a plain model",
                LrkitWarning,
                stacklevel=4,
            )


class Expected:
    """For as long as it is not removed, saving is expected."""

    def __init__(self, notice: SaveNotice) -> None:
        self._notice: SaveNotice | None = notice
        notice.expected += 1

    def remove(self) -> None:
        """Say it again from here on."""
        if self._notice is not None:
            self._notice.expected -= 1
        self._notice = None


class _Saver:
    """A module's ``save_pretrained``, with the notice before it. A copy of the module copies it along."""

    def __init__(self, module: nn.Module, notice: SaveNotice) -> None:
        self.module, self.notice = module, notice

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.notice.say()
        save = getattr(type(self.module), _NAME)
        return save(self.module, *args, **kwargs)


def strip(model: nn.Module) -> None:
    """Take it off a copy of the model."""
    for module in model.modules():
        if isinstance(vars(module).get(_NAME), _Saver):
            del module.__dict__[_NAME]
