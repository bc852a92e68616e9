"""Tensors by pieces: runs of neighbours that fit into a CPU's cache together; and one as units and layouts see it."""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import attrs
from torch import nn

Look = Callable[[nn.Parameter], tuple[tuple[int, ...], bool]]
"""Gives a tensor's shape, and whether it trains."""


def as_is(p: nn.Parameter) -> tuple[tuple[int, ...], bool]:
    """Look at a tensor as it is now."""
    return tuple(p.shape), p.requires_grad


@attrs.frozen(eq=False)
class Piece:
    """Neighbouring tensors, and where their entries lie."""

    tensors: list[nn.Parameter]
    where: slice


def pieces_of(tensors: Sequence[nn.Parameter], sizes: Sequence[int], limit: int) -> Iterator[Piece]:
    """Cut a list of tensors into runs of up to `limit` entries; a larger tensor is a run of its own."""
    run: list[nn.Parameter] = []
    start = size = 0
    for p, entries in zip(tensors, sizes, strict=True):
        if run and size + entries > limit:
            yield Piece(run, slice(start, start + size))
            run, start, size = [], start + size, 0
        run.append(p)
        size += entries
    if run:
        yield Piece(run, slice(start, start + size))


def as_units(shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
    """Return a tensor's shape as [outer, units, inner]."""
    if axis is None:
        return 1, 1, prod(shape)
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
