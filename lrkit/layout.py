"""Where every entry of a policy's units lies in flat tensors.

A metric sees all entries of all units as one flat tensor, so that a step costs a handful of tensor operations however
many layers there are. Blocks of one shape lie together, part by part, so that unit scores are one reduction a shape.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.units import Block, Part


@attrs.frozen(eq=False)
class _Slab:
    """One part of all blocks of a group: [blocks, *shape] at an offset of the flat tensor of live or still entries."""

    still: bool
    offset: int
    shape: tuple[int, ...]
    axis: int | None


@attrs.frozen(eq=False)
class _Group:
    """Blocks of one shape: where their parts lie, and the positions of their units."""

    blocks: int
    slabs: tuple[_Slab, ...]
    index: Tensor


class Layout:
    """The order in which a policy's entries lie in flat tensors.

    Args:
        blocks: all blocks of the policy, n units in all.
        present: for each block whether it is still ranked; the others have no entries here.
        reads: ``"core"`` takes the core parts alone.

    A tensor that has stopped training has no gradient, so its statistics cannot move on: it is *still*, and only its
    last entry-wise scores are kept. `live` lists the others, in flat order.
    """

    def __init__(self, blocks: Sequence[Block], present: Sequence[bool], reads: Literal["all", "core"]) -> None:
        self.units = sum(block.count for block in blocks)
        self.live: list[nn.Parameter] = []
        self.still: list[nn.Parameter] = []
        self.groups: list[_Group] = []
        gathered: dict[object, list[tuple[int, Block, list[Part]]]] = {}
        start = 0
        for block, there in zip(blocks, present, strict=True):
            if there:
                parts = [part for part in block.parts if reads == "all" or part.core]
                tensors = [block.tensor(part) for part in parts]
                key = (block.count, *((t.shape, p.axis, t.requires_grad) for t, p in zip(tensors, parts, strict=True)))
                gathered.setdefault(key, []).append((start, block, parts))
            start += block.count
        device = blocks[0].tensors[0].device if blocks else torch.device("cpu")
        sizes = {True: 0, False: 0}
        for members in gathered.values():
            _, first, parts = members[0]
            slabs = []
            for position, part in enumerate(parts):
                tensor = first.tensor(part)
                still = not tensor.requires_grad
                axis = part.axis if first.kind == "component" else None
                slabs.append(_Slab(still, sizes[still], tuple(tensor.shape), axis))
                sizes[still] += tensor.numel() * len(members)
                (self.still if still else self.live).extend(b.tensor(p[position]) for _, b, p in members)
            index = torch.tensor([s + i for s, b, _ in members for i in range(b.count)], device=device)
            self.groups.append(_Group(len(members), tuple(slabs), index))
        self.size, self.still_size = sizes[False], sizes[True]
        self.device = device

    def weights(self) -> Tensor:
        """The live entries [size] in float32."""
        return self._gather([p.detach() for p in self.live])

    def grads(self) -> tuple[Tensor, int]:
        """The live entries' gradients [size] in float32, and how many tensors had none (they count as zero)."""
        missing = 0
        grads: list[Tensor] = []
        for p in self.live:
            if p.grad is None:
                missing += 1
                grads.append(torch.zeros_like(p))
            else:
                grads.append(p.grad.detach())
        return self._gather(grads), missing

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(0, device=self.device)
        return torch.cat([t.reshape(-1).to(self.device, torch.float32) for t in tensors])

    def reduce(self, live: Tensor, still: Tensor, rule: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """Unit scores from entry-wise scores.

        Args:
            live: scores of the live entries [size].
            still: scores of the still entries [still_size].
            rule: `Metric.reduce`.

        Returns:
            [units], -inf for units of blocks that are not present.
        """
        scores = torch.full((self.units,), -torch.inf, device=self.device)
        for group in self.groups:
            parts = []
            for slab in group.slabs:
                source = still if slab.still else live
                entries = source[slab.offset : slab.offset + group.blocks * prod(slab.shape)]
                if slab.axis is None:
                    parts.append(entries.view(group.blocks, 1, -1))
                else:
                    by_unit = entries.view(group.blocks, *slab.shape).movedim(slab.axis + 1, 1)
                    parts.append(by_unit.unsqueeze(-1).flatten(2))
            scores[group.index] = rule(parts).reshape(-1)
        return scores

    def move(self, flat: Tensor, old: "Layout") -> Tensor:
        """A flat tensor over `old`'s live entries, put into this layout's order. Entries new here are zero."""
        where = old.slices()
        pieces = [flat[where[id(p)]] if id(p) in where else flat.new_zeros(p.numel()) for p in self.live]
        return torch.cat(pieces) if pieces else flat.new_zeros(0)

    def slices(self) -> dict[int, slice]:
        """Where each live tensor's entries lie, by the tensor's ``id``."""
        return _slices(self.live)

    def still_slices(self) -> dict[int, slice]:
        """Where each still tensor's scores lie, by the tensor's ``id``."""
        return _slices(self.still)


def _slices(tensors: Sequence[nn.Parameter]) -> dict[int, slice]:
    where, offset = {}, 0
    for p in tensors:
        where[id(p)] = slice(offset, offset + p.numel())
        offset += p.numel()
    return where
