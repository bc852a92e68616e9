"""Which rows a study's settings reach, if the rows are different methods: ``swap = {"method": ["svd-lora", "adalora"]}``."""

import warnings
from collections.abc import Mapping
from typing import Any

from lrkit.compose import arguments_of
from lrkit.errors import LrkitError, LrkitWarning, nearest
from lrkit.settings import is_at
from lrkit.study.composing import composed

METHOD = "method"
"""The path that makes rows of other methods, if it is swapped."""


class Reached:
    """Gives each row the study's settings that it has.

    Args:
        settings: the study's.
        everywhere: a row that lacks some is left without; otherwise every row is given all of them, or refuses them.
    """

    def __init__(self, settings: Mapping[str, Any], *, everywhere: bool) -> None:
        self.everywhere = everywhere
        self._settings = dict(settings)
        self._lacking: dict[str, list[str]] = {}
        self._rows = 0

    def by(self, base: Any, label: str) -> dict[str, Any]:
        """Return the settings that a row has.

        Args:
            base: its method by name, or as plain data.
            label: the row's.
        """
        if not self.everywhere:
            return self._settings
        self._rows += 1
        plain, known = composed(base), arguments_of(base)
        for path in self._settings:
            if path not in known and not ("." in path and is_at(plain, path)):
                self._lacking.setdefault(path, []).append(label)
        return {path: value for path, value in self._settings.items() if label not in self._lacking.get(path, ())}

    def tell(self) -> None:
        """Warn of the settings that some rows lack.

        Raises:
            LrkitError: no row has one of them.
        """
        lacking = {path: self._lacking[path] for path in self._settings if path in self._lacking}
        for path, labels in lacking.items():
            if len(labels) == self._rows:
                raise LrkitError(f'set: no row has a setting "{path}"{nearest(path, self._settings)}')
        if lacking:
            told = "; ".join(f"{path}: not {', '.join(labels)}" for path, labels in lacking.items())
            warnings.warn(f"set reaches the rows that have the setting ({told})", LrkitWarning, stacklevel=4)
