"""The SVD form of AdaLoRA: ΔW = P Λ Q with an orthogonality penalty (Zhang et al., arXiv 2303.10512, section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.parameterizations.adapter import further, new_factor, started
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.parameterizations.lowrank import LowRank
from lrkit.parameterizations.orthogonality import orthogonality
from lrkit.ranks import DIVISORS, SCALES, Rank, Scale, ScaleBy, as_rank, divisor, is_rank
from lrkit.settings import one_of, real
from lrkit.units import Part


@attrs.frozen(kw_only=True)
class SVD(Parameterization):
    """ΔW = P Λ Q: P [d_out, r] and Q [r, d_in] Gaussian, Λ diagonal [r] and zero at first.

    Source: arXiv 2303.10512, Eq. 3; the penalty is Eq. 4 or the released code's form of it. On the adapter P is ``B``, Λ
    is ``core`` and Q is ``A``, the names of the shared low-rank form.

    Args:
        rank: r, the initial rank of every layer, or a table of layer or pattern to rank; 0 leaves a layer without.
        alpha: None for no scale, as the paper has it; a number for α/(r + 1e-5), as the released code has it. The
            scale is not changed when ranks fall (the authors found that to hurt).
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        init_std: standard deviation of P and Q at the start. The paper says Gaussian; 0.02 is the released code's.
        orthogonality: γ, the penalty's weight; 0 turns it off.
        orthogonality_norm: ``"mean"`` is the released code's and PEFT's mean over all P and Q of the un-squared norm;
            ``"squared"`` is Eq. 4, Σ (‖PᵀP - I‖_F² + ‖QQᵀ - I‖_F²), which grows with the number of layers and outweighs the
            task in a short run.
        scale: the scale's divisor if there is an α: ``"rank"`` as above; ``"sqrt-rank"`` for √(r + 1e-5), as rsLoRA
            has it (arXiv 2312.03732).
    """

    learning_rate: ClassVar[float] = 1e-2
    penalty_weight: ClassVar[str | None] = "orthogonality"

    rank: Rank = attrs.field(default=12, converter=as_rank, validator=is_rank())
    alpha: float | None = attrs.field(default=None, validator=attrs.validators.optional(real(0.0, above=True)))
    init_std: float = attrs.field(default=0.02, validator=real(0.0, above=True))
    orthogonality: float = attrs.field(default=0.1, validator=real(0.0))
    orthogonality_norm: Literal["squared", "mean"] = attrs.field(default="mean", validator=one_of(("squared", "mean")))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    scale: Scale = attrs.field(default="rank", validator=one_of(DIVISORS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare core values λ, and the matrices P and Q."""
        return (
            Part("core", axis=0, core=True),
            Part("B", axis=1, matrix=True),
            Part("A", axis=0, matrix=True),
        )

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """Return the layer with P, Λ and Q beside it."""
        rank = target.components_of(self.rank)
        q = new_factor(target.layer, rank, target.d_in)
        nn.init.normal_(q, std=self.init_std)
        p = new_factor(target.layer, target.d_out, rank)
        nn.init.normal_(p, std=self.init_std)
        core = new_factor(target.layer, rank)
        nn.init.zeros_(core)
        scaling = 1.0
        if self.alpha is not None:
            scaling = self.alpha / divisor(target.scale_rank(self.rank, self.scale_by) + 1e-5, self.scale)
        return LowRank(target, q, p, core=core, scaling=scaling)

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further columns of P and rows of Q: Gaussian, as at the start."""

        def drawn(part: Part) -> Tensor:
            new = nn.init.normal_(further(module, part, count), std=self.init_std, generator=generator)
            return started(module, part, new)

        return {part.name: drawn(part) for part in self.parts if not part.core}

    def penalty(self, modules: Sequence[nn.Module]) -> Tensor | None:
        """Return γ R(P, Q), a scalar; None if γ is 0."""
        if self.orthogonality == 0:
            return None
        factors = [f for m in modules for f in _maps(m, m.get_parameter("B").t())]
        factors += [f for m in modules for f in _maps(m, m.get_parameter("A"))]
        return self.orthogonality * orthogonality(factors, self.orthogonality_norm)


def _maps(module: nn.Module, rows: Tensor) -> Sequence[Tensor]:
    """Cut the rows of a factor into those of each map that a layer stacks: one map's are orthogonal to each other."""
    maps = module.maps if isinstance(module, LowRank) else 1
    return (rows,) if maps == 1 else rows.view(maps, -1, rows.shape[1]).unbind()
