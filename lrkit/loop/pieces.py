"""Runs of neighbouring tensors that are gathered together, so that what a metric works on stays in a CPU's cache."""

from collections.abc import Iterator, Sequence

import attrs
from torch import nn


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
