"""Vector-scaled LoRA: ΔW = Λ_b B Λ_d A (VeRA/ELoRA, arXiv 2310.11454, Eq. 2; AFLoRA, arXiv 2403.13269, Eq. 1)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.parameterizations.adapter import further, new_factor, started
from lrkit.parameterizations.base import Parameterization, Role, Target
from lrkit.parameterizations.lowrank import LowRank
from lrkit.ranks import Rank, as_rank, is_rank
from lrkit.settings import flag, one_of, real
from lrkit.units import Part

_WHERE: dict[str, tuple[Role, ...]] = {
    "none": (),
    "ffn": ("ffn",),
    "attention": ("attention",),
    "both": ("attention", "ffn", "other"),
}


@attrs.frozen(kw_only=True)
class VectorScaled(Parameterization):
    """ΔW = Λ_b B Λ_d A: vectors d [r] and b [d_out] train throughout, the matrices A and B in the layers that `train` names.

    A [r, d_in] and B [d_out, r] are Kaiming-uniform (a = 0), d = `d_init`, b = 0, no scale. On the adapter Λ_d is
    ``core`` and Λ_b is ``out_scale``. Sources: arXiv 2310.11454, Eq. 2 and section 3.2; arXiv 2403.13269, Eq. 1.

    Args:
        rank: r, or a table of layer or pattern to rank; 0 leaves a layer without an adapter. Not with `shared`.
        train: the layers whose A and B train: ``"ffn"`` (AFLoRA's choice, its Table 3), ``"attention"``, ``"both"``, or
            ``"none"`` (ELoRA and VeRA: frozen at their random start). Layers are told apart by name.
        shared: one pair A, B for all layers, cut to each layer's size (VeRA). Only with ``train="none"``.
        d_init: first value of d.
    """

    rank: Rank = attrs.field(default=4, converter=as_rank, validator=is_rank())
    train: Literal["ffn", "attention", "both", "none"] = attrs.field(
        default="both", validator=one_of(("ffn", "attention", "both", "none"))
    )
    shared: bool = attrs.field(default=False, validator=flag())
    d_init: float = attrs.field(default=0.1, validator=real(0.0, above=True))

    def __attrs_post_init__(self) -> None:
        """Refuse shared matrices that train, or that are of several ranks."""
        if self.shared and not isinstance(self.rank, int):
            raise LrkitError(
                "VectorScaled(shared=True) has one A and B for all layers: rank must be an int, and no table"
            )
        if self.shared and self.train != "none":
            raise LrkitError(
                f'VectorScaled(shared=True) has one A and B for all layers: train must be "none", not "{self.train}"'
            )

    @property
    def learning_rate(self) -> float:  # type: ignore[override]  # of each setting, where others have one for their class
        """Return 3e-2 for vectors alone; 1e-2 if matrices train beside them."""
        return 3e-2 if self.train == "none" else 1e-2

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare d, which is the core, B, A and b."""
        trains = self.train != "none"
        return (
            Part("core", axis=0, core=True),
            Part("B", axis=1, matrix=True, trains=trains, shared=self.shared),
            Part("A", axis=0, matrix=True, trains=trains, shared=self.shared),
            Part("out_scale"),
        )

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further columns of B and rows of A from the same range as at the start."""
        _, b, a, _ = self.parts
        assert isinstance(module, LowRank)
        # Kaiming's bound, whose fan-in is the initial rank for B.
        bound = math.sqrt(6 / max(1, module.first_rank // module.maps))
        columns = nn.init.uniform_(further(module, b, count), -bound, bound, generator=generator)
        rows = nn.init.kaiming_uniform_(further(module, a, count), generator=generator)
        return {b.name: columns, a.name: started(module, a, rows)}

    def adapt(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """Return all adapters. If `shared`, they hold the same two tensors, as wide as the widest layer."""
        if self.train in ("ffn", "attention"):
            unknown = [target.name for target in targets if target.role == "other"]
            how = f'VectorScaled(train="{self.train}") tells attention from FFN by name, and cannot place'
            if len(unknown) == len(targets):
                raise LrkitError(f'{how} "{unknown[0]}" (as all {len(unknown)} layers): use train="both" or "none"')
            if unknown:
                warnings.warn(
                    f"{how} {', '.join(unknown[:10])}{f' and {len(unknown) - 10} more' if unknown[10:] else ''}: left out. "
                    'Use train="both" or "none" to adapt them too',
                    LrkitWarning,
                    stacklevel=5,
                )
            targets = [target for target in targets if target.role != "other"]
        if not self.shared:
            return {target.name: self.build(target) for target in targets}
        if stacks := [target.name for target in targets if target.maps > 1]:
            raise LrkitError(
                f"VectorScaled(shared=True) has one A and B for all layers, and {stacks[0]} stacks maps: leave it out"
            )
        d_in, d_out = max(target.d_in for target in targets), max(target.d_out for target in targets)
        adapters: dict[str, nn.Module] = {}
        owner: LowRank | None = None
        for target in targets:
            adapter = self._adapter(target, d_in, d_out, owner)
            owner = owner or adapter
            adapters[target.name] = adapter
        return adapters

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A, B, d and b beside it."""
        return self._adapter(target, target.d_in, target.d_out, None)

    def _adapter(self, target: Target, d_in: int, d_out: int, owner: LowRank | None) -> LowRank:
        rank = target.components_of(self.rank)
        core = new_factor(target.layer, rank)
        nn.init.constant_(core, self.d_init)
        out_scale = new_factor(target.layer, target.maps * target.d_out)
        nn.init.zeros_(out_scale)
        if owner is not None:
            return LowRank(target, None, None, core=core, out_scale=out_scale, owner=owner)
        a = new_factor(target.layer, rank, d_in)
        b = new_factor(target.layer, d_out, rank)
        for matrix in (a, b):
            if rank:
                nn.init.kaiming_uniform_(matrix)
                if matrix is b and target.maps > 1:  # Kaiming's fan-in is one map's rank
                    matrix.data.mul_(math.sqrt(target.maps))
            matrix.requires_grad_(target.role in _WHERE[self.train])
        return LowRank(target, a, b, core=core, out_scale=out_scale)
