"""What is shared out among which layers: a model's layers with their sizes, and the budget that was given. No torch here."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lrkit.adapt.sharing import Sizes
from lrkit.errors import LrkitError, shown
from lrkit.ranks import MOST

if TYPE_CHECKING:
    import torch

    from lrkit.parameterizations.base import Target


def sizes_of(
    model: "torch.nn.Module",
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    slices: bool = False,
) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of the layers of a plain model that `targets` means, as for `lrkit.attach`.

    Raises:
        LrkitError: nothing matches, or the model carries adapters, so that its layers have other names.
    """
    from lrkit.adapt.exclusion import leave_out
    from lrkit.adapt.graft import check_model
    from lrkit.adapt.targets import find_targets

    check_model(model)
    return sizes(leave_out(find_targets(model, targets, slices=slices), exclude))


def sizes(targets: "Iterable[Target]") -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of layers by name. A stack of experts has those of all its experts: rank 1 is one in each."""
    return {target.name: (target.maps * target.d_in, target.maps * target.d_out) for target in targets}


def budget(layers: Sizes, total: int | None, parameters: int | None) -> dict[str, int]:
    """Return the one budget that was given, by the argument of `sharing`'s functions."""
    if (total is None) == (parameters is None):
        raise LrkitError("give either total (a sum of ranks) or parameters")
    name, value = ("total", total) if parameters is None else ("parameters", parameters)
    least = 1 if parameters is None else min(map(sum, layers.values()))
    most = MOST * (len(layers) if parameters is None else sum(map(sum, layers.values())))
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise LrkitError(
            f"{name} must be an int from {least:,} to {most:,} for these {len(layers)} layers, not {shown(value)}"
        )
    return {"total" if parameters is None else "cost": value}


def as_seed(seed: int) -> int:
    """Return a seed. Raises LrkitError if it is not an int."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise LrkitError(f"seed must be an int, not {shown(seed)}")
    return seed
