"""Share a budget out among layers: evenly, by chance, or as another allocation does, but elsewhere. No torch here.

A layer is its size (d_in, d_out), and one rank component of it costs d_in + d_out parameters, as AdaLoRA's paper counts.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

Sizes = Mapping[str, tuple[int, int]]
"""Layer name to (d_in, d_out)."""

_GOLDEN = 0.6180339887498949


def parameters(ranks: Mapping[str, int], sizes: Sizes) -> int:
    """Return the sum of rank · (d_in + d_out) over all layers."""
    return sum(rank * sum(sizes[layer]) for layer, rank in ranks.items())


def uniform(sizes: Sizes, *, total: int | None = None, cost: int | None = None) -> dict[str, int]:
    """Give every layer the same rank, and what is left over as one more to layers that are spread evenly over the model.

    Args:
        sizes: the layers.
        total: the sum of ranks, to be met exactly; or
        cost: the most parameters. What is left of them is less than one component of any layer that did not get one more.
    """
    layers = list(sizes)
    # Multiples of the golden ratio, modulo 1: however many come first, they lie evenly.
    order = sorted(
        layers, key=dict(zip(layers, (i * _GOLDEN % 1.0 for i in range(len(layers))), strict=True)).__getitem__
    )
    if total is not None:
        base, left = divmod(total, len(layers))
        more = set(order[:left])
        return {layer: base + (layer in more) for layer in layers}
    assert cost is not None
    base, left = divmod(cost, sum(map(sum, sizes.values())))
    ranks = dict.fromkeys(layers, base)
    for layer in order:
        if sum(sizes[layer]) <= left:
            ranks[layer] += 1
            left -= sum(sizes[layer])
    return ranks


def at_random(sizes: Sizes, seed: int, *, total: int | None = None, cost: int | None = None) -> dict[str, int]:
    """Give each component to a layer that is drawn, every layer with the same chance.

    Args:
        sizes: the layers.
        seed: of the draws.
        total: the sum of ranks, to be met exactly; or
        cost: the most parameters. What is left of them is less than the smallest component; a layer whose component does
            not fit any more is drawn no more.
    """
    draw = random.Random(seed)
    ranks = dict.fromkeys(sizes, 0)
    for layer in _drawn(list(sizes), draw, total) if total is not None else _fitting(sizes, draw, cost or 0):
        ranks[layer] += 1
    return ranks


def _drawn(layers: Sequence[str], draw: random.Random, count: int) -> Iterator[str]:
    return (draw.choice(layers) for _ in repeat(None, count))


def _fitting(sizes: Sizes, draw: random.Random, left: int) -> Iterator[str]:
    layers = [layer for layer in sizes if sum(sizes[layer]) <= left]
    while layers:
        layer = draw.choice(layers)
        yield layer
        left -= sum(sizes[layer])
        if any(sum(sizes[other]) > left for other in layers):
            layers = [other for other in layers if sum(sizes[other]) <= left]


def shuffled(ranks: Mapping[str, int], sizes: Sizes, seed: int) -> dict[str, int]:
    """Permute ranks among layers of equal d_in + d_out, so that the parameters stay."""
    draw = random.Random(seed)
    groups: dict[int, list[str]] = {}
    for layer in ranks:
        groups.setdefault(sum(sizes[layer]), []).append(layer)
    found = dict(ranks)
    for members in groups.values():
        values = [ranks[layer] for layer in members]
        draw.shuffle(values)
        found |= dict(zip(members, values, strict=True))
    return found
