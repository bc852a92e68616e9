"""Where every entry of a policy's units lies in flat tensors.

A metric sees the entries of all units as flat tensors, so that a step costs a handful of tensor operations however many
layers there are. Blocks of one shape lie together, part by part, so that unit scores are one reduction a shape.

Statistics lie in one flat tensor; weights and gradients are gathered a *piece* at a time. On a CPU a piece is small enough
to stay in the cache while a metric works on it, and is never written to memory as a whole; on other devices, where each
operation costs a launch, everything is one piece.

Of a tensor that is sharded over processes (FSDP2) this one holds a part. Flat tensors of what is *held* have the entries of
that part alone, and a metric works on them; `Layout.whole` puts the parts of all processes together, and units are scored
from whole flat tensors, alike on every process. Where nothing is sharded the two are the same.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from operator import attrgetter
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.loop.native import Compiled
from lrkit.loop.pieces import Look, Piece, as_is, as_units, pieces_of
from lrkit.metrics import Parts
from lrkit.shards import held, is_sharded, joined, mine, told
from lrkit.units import Block, Part

GradientOf = Callable[[nn.Parameter], Tensor | None]
"""Where a tensor's gradient is looked up."""

own_gradient: GradientOf = attrgetter("grad")
"""The gradient that lies on the tensor itself."""

_PIECE = 1 << 16
"""Entries of a piece on a CPU: weights, gradients and temporaries of 64 Ki float32 fit into the second-level cache."""


@attrs.frozen(eq=False)
class _Slab:
    """One part of all blocks of a group: [blocks, *shape] at an offset of the flat tensor of live or still entries."""

    still: bool
    offset: int
    shape: tuple[int, ...]
    axis: int | None


@attrs.frozen(eq=False)
class _Group:
    """Blocks of one shape, and where their parts lie."""

    blocks: int
    units: int
    slabs: tuple[_Slab, ...]


@attrs.frozen(eq=False)
class Span:
    """Where the held entries of one tensor lie: among the live or the still ones, from an offset on, in their shape."""

    still: bool
    offset: int
    shape: tuple[int, ...]

    def of(self, live: Tensor, still: Tensor) -> Tensor:
        """Cut this tensor's entries out of the flat ones, in its shape."""
        return (still if self.still else live)[self.offset : self.offset + prod(self.shape)].view(self.shape)


class Layout:
    """The order in which a policy's entries lie in flat tensors.

    A tensor that has stopped training has no gradient, so its statistics cannot move on: it is *still*, and only its
    last entry-wise scores are kept. `live` lists the others, in flat order.

    Args:
        blocks: all blocks of the policy, n units in all.
        present: for each block whether it is still ranked; the others have no entries here.
        reads: ``"core"`` takes the core parts alone, ``"nothing"`` takes none.
        look: how a tensor is looked at: as it is, or as a saved state has it.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        present: Sequence[bool],
        reads: Literal["all", "core", "component", "nothing"],
        look: Look = as_is,
    ) -> None:
        self.units = sum(block.count for block in blocks)
        self.live: list[nn.Parameter] = []
        self.still: list[nn.Parameter] = []
        self.groups: list[_Group] = []
        self.spans: dict[int, Span] = {}
        self.device = blocks[0].tensors[0].device if blocks else torch.device("cpu")
        sizes, here, shapes = {True: 0, False: 0}, {True: 0, False: 0}, []
        places: list[int | None] = [None] * self.units
        place = 0
        unit_of: list[int] = []
        for members in _alike(blocks, present, reads, look):
            _, first, parts = members[0]
            slabs = []
            for position, part in enumerate(parts):
                shape, trains = look(first.tensor(part))
                still, size = not trains, prod(shape)
                axis = part.axis if first.kind == "component" else None
                slabs.append(_Slab(still, sizes[still], shape, axis))
                for _, block, own in members:
                    p = block.tensor(own[position])
                    (self.still if still else self.live).append(p)
                    mine_of = tuple(held(p).shape) if is_sharded(p) else shape
                    self.spans[id(p)] = Span(still, here[still], mine_of)
                    here[still] += prod(mine_of)
                sizes[still] += size * len(members)
                if not still:
                    unit_of += range(place, place + first.count * len(members))
                    shapes += [as_units(shape, axis)] * len(members)
            self.groups.append(_Group(len(members), first.count, tuple(slabs)))
            for begin, block, _ in members:
                places[begin : begin + block.count] = range(place, place + block.count)
                place += block.count
        self.size, self.still_size = sizes[False], sizes[True]
        # The place of each unit among the units of all groups; those that are not present come after the last.
        self._order = self._whole(place if p is None else p for p in places)
        # The unit of each place of a live tensor.
        unit_at = {p: unit for unit, p in enumerate(places) if p is not None}
        self._unit_of = self._whole(unit_at[p] for p in unit_of)
        absent = torch.tensor([p is None for p in places], dtype=torch.bool, device=self.device)
        self._absent = absent if None in places else absent[:0].clone()
        # A unit's mean takes entries of all processes: the compiled path knows whole tensors alone.
        self.native = Compiled(self.live, shapes) if self._first is None else Compiled([], [])

    @functools.cached_property
    def _first(self) -> nn.Parameter | None:
        """The first tensor that is sharded; None if none is."""
        return next((p for p in (*self.live, *self.still) if is_sharded(p)), None)

    @functools.cached_property
    def held(self) -> int:
        """How many of the live entries this process holds."""
        return sum(prod(self.spans[id(p)].shape) for p in self.live)

    @functools.cached_property
    def still_held(self) -> int:
        """How many of the still entries this process holds."""
        return sum(prod(self.spans[id(p)].shape) for p in self.still)

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The live tensors by pieces: small ones on a CPU, one on other devices."""
        sizes = [prod(self.spans[id(p)].shape) for p in self.live]
        return list(pieces_of(self.live, sizes, _PIECE if self.device.type == "cpu" else self.size))

    def _whole(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32, device=self.device)

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The tensors that say where units stand: for counting bytes."""
        return self._order, self._unit_of, self._absent

    def grads(self, of: GradientOf = own_gradient) -> list[Tensor]:
        """The live tensors' gradients, without those that have none."""
        return [grad for p in self.live if (grad := of(p)) is not None]

    def each(
        self, flat: Mapping[str, Tensor], of: GradientOf = own_gradient
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Piece by piece: weights [n] and gradients [n] in float32 (zero where there is none), and views of `flat`."""
        for piece in self.pieces:
            grads = [grad if (grad := of(p)) is not None else torch.zeros_like(p) for p in piece.tensors]
            state = {name: values[piece.where] for name, values in flat.items()}
            yield self._gather(piece.tensors), self._gather(grads), state

    def finite(self, of: GradientOf = own_gradient) -> Tensor:
        """Whether all gradients are finite, on every process: a bool scalar on the device, so that nothing waits."""
        sums = [self._gather([g for p in piece.tensors if (g := of(p)) is not None]).sum() for piece in self.pieces]
        finite = torch.isfinite(torch.stack(sums)).all()
        return finite if self._first is None else told(finite.float(), self._first).all()

    def weights(self) -> Tensor:
        """The live entries that this process holds [held] in float32."""
        return self._gather(self.live)

    def whole(self, flat: Tensor, *, still: bool = False) -> Tensor:
        """All entries, of those that each process holds.

        Args:
            flat: of the live ones [held], or of the still ones [still_held].
            still: which of the two.

        Returns:
            [size] or [still_size]; `flat` itself where nothing is sharded.
        """
        return self._over(flat, joined, still=still)

    def mine(self, flat: Tensor, *, still: bool = False) -> Tensor:
        """The entries that this process holds, out of all: the inverse of `whole`."""
        return self._over(flat, mine, still=still)

    def _over(self, flat: Tensor, move: Callable[[Tensor, Tensor], Tensor], *, still: bool) -> Tensor:
        """Move a flat tensor, one parameter's entries at a time."""
        if self._first is None:
            return flat
        tensors = self.still if still else self.live
        shapes = [tuple(p.shape) if move is mine else self.spans[id(p)].shape for p in tensors]
        parts = zip(torch.split(flat, [prod(shape) for shape in shapes]), shapes, tensors, strict=True)
        return torch.cat([flat[:0], *(move(part.view(shape), p).reshape(-1) for part, shape, p in parts)])

    def _gather(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(0, dtype=torch.float32, device=self.device)
        return torch.cat([held(t).reshape(-1).to(self.device, torch.float32) for t in tensors])

    def reduce(
        self,
        live: Tensor,
        still: Tensor,
        rule: Callable[[Parts], Tensor],
        draw: Callable[[], Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Unit scores from entry-wise scores.

        Args:
            live: scores of the live entries [size].
            still: scores of the still entries [still_size].
            rule: `Metric.reduce`.
            draw: gives a random number for each unit [units], if the rule asks for them.
            memory: what the metric remembers of each unit, by name [units].

        Returns:
            [units], -inf for units of blocks that are not present.
        """
        scores = []
        place = 0
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
            mine = None if draw is None else functools.partial(self._drawn, draw, place, group)
            own = {name: self._of_group(values, place, group) for name, values in (memory or {}).items()}
            scores.append(rule(Parts(parts, mine, own)).flatten())
            place += group.blocks * group.units
        absent = torch.full((1,), -torch.inf, dtype=torch.float32, device=self.device)
        return torch.cat([*scores, absent]).index_select(0, self._order)

    def _drawn(self, draw: Callable[[], Tensor], place: int, group: _Group) -> Tensor:
        return self._of_group(draw().to(self.device), place, group)

    def _of_group(self, values: Tensor, place: int, group: _Group) -> Tensor:
        """The numbers of a group's units [blocks, units], out of all [units]; `place` is that of its first unit."""
        here = (self._order >= place) & (self._order < place + group.blocks * group.units)
        units = here.nonzero().flatten()
        by_place = units[torch.argsort(self._order[units])]
        return values[by_place].view(group.blocks, group.units)

    def reduce_means(self, means: Tensor) -> Tensor:
        """Unit scores by the default rule, from the mean score of each live tensor's units.

        Args:
            means: [Σ units], tensor after tensor, as `lrkit.loop.native.Compiled` gives them.

        Returns:
            [units], -inf for units of blocks that are not present. Only where nothing is still.
        """
        scores = means.new_zeros(self.units).index_add_(0, self._unit_of, means).float()
        return scores.masked_fill_(self._absent, -torch.inf) if self._absent.numel() else scores


_Member = tuple[int, Block, list[Part]]
"""The number of a block's first unit, the block, and its parts that are read."""


def _alike(
    blocks: Sequence[Block], present: Sequence[bool], reads: Literal["all", "core", "component", "nothing"], look: Look
) -> list[list[_Member]]:
    """Gather the blocks that are present by shape, and by which of their tensors train."""
    gathered: dict[object, list[_Member]] = {}
    start = 0
    for block, there in zip(blocks, present, strict=True):
        if there:
            parts = [p for p in block.parts if reads in ("all", "component") or (reads == "core" and p.core)]
            key = (block.count, *((*look(block.tensor(part)), part.axis) for part in parts))
            gathered.setdefault(key, []).append((start, block, parts))
        start += block.count
    return list(gathered.values())
