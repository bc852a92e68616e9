"""ElaLoRA as its released code has it: ranks move within a pool of weak components, and begin beside what is there."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Fate, Verdict, Zero
from lrkit.parameterizations import SVD
from lrkit.settings import flag, real, whole
from lrkit.units import UnitKind
from lrkit_grow.actions import Exchange


@attrs.frozen(kw_only=True)
class ProjectedSVD(SVD):
    """AdaLoRA's form, whose further vectors are made orthogonal to those that are there, and of length 1.

    Source: ElaLoRA's released code, ``HuandongChang/ElaLoRA`` @3865a37: for V [n, d] the vectors of a factor, a Gaussian x
    becomes x - Vᵀ V x, divided by its norm: orthogonal to V if its rows are orthonormal, nearly so otherwise.
    """

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further columns of P and rows of Q, one after the other."""
        new = {}
        for part in (part for part in self.parts if not part.core):
            assert part.axis is not None
            there = part.of(module).detach().movedim(part.axis, 0)
            for _ in range(count):
                x = torch.randn(there.shape[1], generator=generator).to(there)
                x = x - there.t() @ (there @ x)
                there = torch.cat([there, (x / (x.norm() + 1e-6))[None]])
            new[part.name] = there[-count:].movedim(0, part.axis)
        return new


@attrs.frozen(kw_only=True)
class PoolExchange(lrkit.Action):
    """The worst of a pool are cut, and the matrices of its best get one fresh component each.

    Each matrix puts its min(k, n - 1) lowest components into the pool, n being how many it has. Of the pool the b lowest are
    cut, and each of the b highest gives its matrix a fresh component, so that a matrix may get up to k, and one that loses a
    component may get another. Source: ElaLoRA's released code, ``HuandongChang/ElaLoRA`` @3865a37 (``mask_to_target_rank``).

    Args:
        count: b; in a pool of less it is the pool's size.
        pool: k.
        taper: whether b falls with the scheduler's share, to ``round(count · share)``. With `LateCubic` from 1.0 to 0.0 that
            is round(b₀ (1 - u³)).
        core: λ of a fresh component.
        restart: whether the optimizer's state of all adapters is dropped by an exchange.
    """

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    exact = False  # for its contract: as many as before are kept, whatever the budget

    count: int = attrs.field(default=4, validator=whole(1))
    pool: int = attrs.field(default=2, validator=whole(1))
    taper: bool = attrs.field(default=False, validator=flag())
    core: float = attrs.field(default=1e-13, validator=real(0.0))
    restart: bool = attrs.field(default=True, validator=flag())

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """With one component a layer there is nothing that could be exchanged."""
        return Exchange().refusal(parameterization)

    def decide(self, ballot: Ballot) -> Verdict:
        """Cut the lowest of the pool, and let the matrices of the highest grow; of equals the earlier one is the lower."""
        scores, where = ballot.scores.tolist(), ballot.blocks.tolist()
        layers: list[list[int]] = [[] for _ in range(ballot.layers)]
        for unit in torch.sort(ballot.scores, stable=True).indices.tolist():
            layers[where[unit]].append(unit)
        pool = [unit for units in layers for unit in units[: min(self.pool, len(units) - 1)]]
        pool.sort(key=scores.__getitem__)
        count = min(round(self.count * ballot.share) if self.taper else self.count, len(pool))
        kept, fresh = ballot.candidates.clone(), [0] * ballot.layers
        kept[pool[:count]] = False
        for unit in pool[len(pool) - count :]:
            fresh[where[unit]] += 1
        return Verdict(kept, cut=True, fresh=tuple(fresh), core=self.core, budget=len(scores))

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero what will be cut, so that fresh vectors are made orthogonal to what stays; and drop the optimizer's state."""
        Zero().apply(blocks, kept, optimizer)
        if self.restart and optimizer is not None and not bool(kept.all()):
            for tensor in (tensor for block in blocks for tensor in block.tensors):
                optimizer.state.pop(tensor, None)

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: as many come as go, whatever the budget."""
        return
