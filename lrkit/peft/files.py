"""PEFT itself, its files and the parts of one layer, for both directions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lrkit.errors import LrkitError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Factors(NamedTuple):
    """ΔW = s · B diag(c) A of one layer, in the order of ``export_factors`` and ``import_factors``.

    Args:
        a: A, [rank, inputs]; [maps · rank, inputs] of a stack of experts, expert after expert.
        b: B, [outputs, rank]; [outputs, maps · rank].
        core: c, [rank]; [maps · rank]; None for ones.
        scaling: s.
        magnitude: m of DoRA, [outputs]; None if there is none.
        maps: how many maps the layer stacks.
    """

    a: Tensor
    b: Tensor
    core: Tensor | None
    scaling: float
    magnitude: Tensor | None = None
    maps: int = 1

    @property
    def rank(self) -> int:
        """The number of components of each map."""
        return len(self.a) // self.maps


def commonest(values: Mapping[str, Any]) -> Any:
    """Return the value that most layers have, so that the pattern of exceptions is short."""
    every = list(values.values())
    return max(dict.fromkeys(every), key=every.count)


def peft() -> Any:
    """Return PEFT itself.

    Raises:
        LrkitError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise LrkitError('writing PEFT\'s formats needs PEFT to read them back: pip install "lrkit[peft]"') from None
    return peft
