"""Read what is typed after ``--ranks``: a file, a run, ``uniform`` or ``random:SEED``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, quoted

if TYPE_CHECKING:
    from torch import nn

    from lrkit.adapt.allocation import Allocation
    from lrkit.method import Method


@attrs.frozen
class Reader:
    """Gives a method's ranks, layer by layer.

    Args:
        of: gives them.
        shares: they share out the total that the method's own rank makes.
    """

    of: Callable[["Method"], "Allocation"]
    shares: bool


def reader(text: str, model: "Callable[[], nn.Module]", where: Mapping[str, Any]) -> Reader:
    """Return what gives a method the ranks that ``--ranks`` asks for.

    ``uniform`` and ``random:SEED`` keep the total that the method has by itself: the sum of its rank over its layers.

    Args:
        text: a file that ends in .toml or .json, a run's folder, ``uniform``, or ``random:SEED``.
        model: gives the plain model; without weights will do. It is asked for layers by the last two alone.
        where: which layers: ``targets``, ``exclude`` and ``slices`` as `lrkit.attach` takes them.

    Raises:
        LrkitError: it is none of these.
    """
    word, colon, seed = text.partition(":")
    if word not in ("uniform", "random"):
        return Reader(lambda _: _read(text), shares=False)
    if (word == "random") != bool(colon) or (colon and not seed.isdecimal()):
        raise LrkitError(f'--ranks takes FILE, RUN, uniform or random:SEED (such as random:0), not "{text}"')
    return Reader(lambda method: _shared(method, model(), where, int(seed) if colon else None), shares=True)


def _read(text: str) -> "Allocation":
    from lrkit.adapt.allocation import Allocation

    path = Path(text)
    if path.suffix in (".toml", ".json"):
        return Allocation.load(path)
    if not path.exists():
        raise LrkitError(
            f"--ranks: there is no {quoted(text)}; it takes FILE.toml, FILE.json, a run, uniform or random:SEED"
        )
    return Allocation.from_run(path)


def _shared(method: "Method", model: "nn.Module", where: Mapping[str, Any], seed: int | None) -> "Allocation":
    from lrkit.adapt import budget, sharing
    from lrkit.adapt.allocation import Allocation
    from lrkit.adapt.choice import find
    from lrkit.ranks import ranks_of

    sizes = budget.sizes(find(model, method.parameterization, exact=False, **where)[0])
    total = sum(ranks_of(method.parameterization.components or 0, list(sizes)).values())
    ranks = sharing.uniform(sizes, total=total) if seed is None else sharing.at_random(sizes, seed, total=total)
    return Allocation(ranks, sizes)
