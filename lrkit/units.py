"""Units: what an action acts on, and how a unit's score follows from entry-wise scores.

A *unit* is a rank component (a triplet P_:i, λ_i, Q_i: of SVD; r of them a layer), a whole projection matrix, all
matrices of a layer, or a whole block of the transformer. A parameterization declares its tensors once, as `Part`s; every
kind of unit follows from that declaration. The score of a unit is the sum over its parts of the mean of the entry-wise
score over the part's slice. That one rule is both papers' formula:

- AdaLoRA (arXiv 2303.10512, Eq. 7): S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), a unit of kind ``"component"``;
- AFLoRA (arXiv 2403.13269, Eq. 4): s = mean(Ī ∘ Ū) of a projection matrix, a unit of kind ``"matrix"``.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

UnitKind = Literal["component", "matrix", "layer", "block"]
"""The kinds of units.

- ``"component"``: one rank component.
- ``"matrix"``: one projection matrix.
- ``"layer"``: all matrices of a layer together.
- ``"block"``: all that trains inside one block of the transformer, of adapters or of the model's own weights, biases and
  norms included. A budget that is an int is then a number of blocks of the whole model.
"""


@attrs.frozen
class Part:
    """One tensor of an adapter, as units see it.

    Args:
        name: attribute path of the parameter on the adapter, such as ``"A"`` or ``"down.weight"``.
        axis: the dimension that runs over rank components; None if there is none.
        core: one scalar per component (λ, d): zero takes the component out, and its gradient can bring it back.
        matrix: a projection matrix, on which freezing acts as a whole.
        trains: False if it is fixed at its random start in every layer (ELoRA's A and B).
        shared: whether all layers read one tensor (VeRA's A and B), so that no layer's components can grow alone.
        started: whether the increment is counted from this tensor's value at the start (PiSSA), so that a component of
            zeros takes away what it began with, and does not add nothing.
    """

    name: str
    axis: int | None = None
    core: bool = False
    matrix: bool = False
    trains: bool = True
    shared: bool = False
    started: bool = False

    def of(self, module: nn.Module) -> nn.Parameter:
        """Return the tensor of this part on one adapter."""
        return module.get_parameter(self.name)


@attrs.frozen(eq=False)
class Block:
    """Units that stand together: the components of one adapter, one matrix, all its matrices, or a transformer's block.

    Args:
        name: the layer's name; for one matrix the layer's name and the part's, joined by a dot; the transformer block's.
        module: what stands in the layer's place; for a transformer's block the whole model.
        parts: the tensors that make up the units.
        count: how many units: the rank for components, 1 for any other kind.
        kind: the kind of its units.
        numbers: the numbers that name its components, if some have been cut or added since the start; None if none has.
    """

    name: str
    module: nn.Module
    parts: tuple[Part, ...]
    count: int
    kind: UnitKind
    numbers: tuple[int, ...] | None = None

    @property
    def maps(self) -> int:
        """Return over how many maps of a layer the components are spread, which is 1 but for stacks of experts."""
        return maps_of(self.module) if self.kind == "component" else 1

    def tensor(self, part: Part) -> nn.Parameter:
        """Return the parameter behind one of the parts."""
        return part.of(self.module)

    @functools.cached_property
    def tensors(self) -> list[nn.Parameter]:
        """Return the parameters behind the parts, in order."""
        return [part.of(self.module) for part in self.parts]

    @functools.cached_property
    def core(self) -> nn.Parameter:
        """Return the core values [count]. Raises LookupError if the block has none."""
        for part, tensor in zip(self.parts, self.tensors, strict=True):
            if part.core:
                return tensor
        raise LookupError(f"{self.name} has no core")

    def unit_names(self) -> list[str]:
        """Return one name per unit: the block's own, with the component's index if units are components."""
        if self.kind != "component":
            return [self.name]
        return [f"{self.name}[{i}]" for i in (range(self.count) if self.numbers is None else self.numbers)]


def blocks_of(
    modules: Mapping[str, nn.Module],
    parts: Sequence[Part],
    kind: UnitKind,
    trained: set[int],
    body: Sequence[Block] = (),
) -> list[Block]:
    """Return the blocks of one kind over all adapted layers, in the model's order.

    Args:
        modules: layer name to the module in its place.
        parts: the parameterization's declaration.
        kind: which units are wanted.
        trained: ``id`` of every parameter that trains in this run. A part that never trains has no gradient, so its
            score would stand at its start, zero, for ever: it is left out. So is a matrix of a layer of rank 0.
        body: the transformer's blocks as units, which no layer knows.
    """
    if kind == "block":
        return list(body)
    blocks = []
    for name, module in modules.items():
        live = [part for part in parts if id(part.of(module)) in trained]
        if kind == "component":
            if chosen := tuple(ranked(live)):
                blocks.append(Block(name, module, chosen, rank_of(module, chosen), kind))
            continue
        matrices = tuple(part for part in live if part.matrix and part.of(module).numel())
        if kind == "matrix":
            blocks += [Block(f"{name}.{part.name}", module, (part,), 1, kind) for part in matrices]
        elif matrices:
            blocks.append(Block(name, module, matrices, 1, kind))
    return blocks


def ranked(parts: Iterable[Part]) -> list[Part]:
    """Return the parts that run over rank components."""
    return [part for part in parts if part.axis is not None]


def rank_of(module: nn.Module, parts: Sequence[Part]) -> int:
    """Return the components that an adapter stores; 0 for one without any."""
    return next((part.of(module).shape[part.axis] for part in parts if part.axis is not None), 0)


def maps_of(module: nn.Module) -> int:
    """Return how many maps the layer of an adapter stacks, each with as many components: 1 but for experts."""
    maps = getattr(module, "maps", 1)
    return maps if isinstance(maps, int) else 1


def evened(stays: Tensor, maps: int) -> Tensor:
    """Return which components of a stack stay if all of its maps are to keep as many, since they lie in one tensor.

    Maps that would keep fewer than another keep their first others besides. For example of two maps of three components,
    of which [1, 0, 0] and [0, 1, 1] are to stay, [1, 1, 0] and [0, 1, 1] do.

    Args:
        stays: bool [maps · r], the components that must stay.
        maps: how many maps there are.
    """
    by_map = stays.view(maps, -1)
    most = int(by_map.sum(1).max()) if by_map.numel() else 0
    first = by_map.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.zeros_like(by_map).scatter_(1, first, True).flatten()


def stop(p: nn.Parameter, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let a parameter stop training, and stay as it is; drop an optimizer's state for it if the optimizer is given."""
    p.requires_grad_(False)
    # Optimizers skip a parameter whose gradient is None; a stale or zero gradient would move it on.
    p.grad = None
    if optimizer is not None:
        optimizer.state.pop(p, None)


def resize(p: nn.Parameter, data: Tensor) -> None:
    """Give a parameter values of another shape; it stays the same object, without a gradient."""
    p.grad = None
    # A graph that is still alive (a loss in the caller's hands, DDP's reducer) holds the node that accumulates into p, and
    # that node remembers the old shape. Torch makes a new one if the dtype changes: change it on the way.
    p.data = torch.empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32, device=data.device)
    p.data = data


def present(module: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Return which components of an adapter may add to its output, bool [rank].

    They are those whose core value is not zero; if there are no core values, those with any entry that is not zero.

    Args:
        module: the adapter.
        parts: the parameterization's parts that have an axis, one at least.
    """
    shown = [part for part in parts if part.core] or [part for part in parts if part.trains]
    entries = [(part.of(module) != 0).movedim(part.axis or 0, 0).unsqueeze(-1).flatten(1) for part in shown]
    return torch.stack([each.any(dim=1) for each in entries]).any(dim=0)


def split(kept: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """Cut a tensor over all units [Σ count] into one piece [count] per block."""
    counts = [block.count for block in blocks]
    if len(set(counts)) == 1:
        return list(kept.view(len(counts), -1).unbind())  # half the time of a split
    return list(torch.split(kept, counts))
