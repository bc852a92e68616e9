"""LoRA: ΔW = (α/r) B A (Hu et al., arXiv 2106.09685, section 4.1)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.parameterizations.adapter import further, started
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.parameterizations.starts import FROM_BASE, INITS, Init, begin
from lrkit.ranks import DIVISORS, SCALES, Rank, Scale, ScaleBy, as_rank, divisor, is_rank
from lrkit.settings import one_of, real
from lrkit.units import Part


@attrs.frozen(kw_only=True)
class LoRA(Parameterization):
    """ΔW = (α/r) B A, with A [r, d_in] Kaiming-uniform (a = √5) and B [d_out, r] zero at first (or by `init`).

    Source: arXiv 2106.09685, section 4.1. It has rank components (doublets B[:, i], A[i, :]) but no core value, so that
    `lrkit.actions.Prune` refuses it.

    Args:
        rank: r, or a table of layer or pattern to rank; 0 leaves a layer without an adapter.
        alpha: α; the increment is scaled by α/r.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        dropout: probability of dropping an entry of the adapter's input while training.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r, which is rsLoRA's (arXiv 2312.03732) and PEFT's ``use_rslora``.
        init: how A and B begin, PEFT's ``init_lora_weights``. ``"kaiming"``: as above. ``"orthogonal"``: both random, with
            B A = 0; r must be even. From the base's weight W: ``"pissa"``, its r largest singular values with their
            vectors (arXiv 2404.02948); ``"pissa-fast"``, the same by a randomized SVD, which large weights need;
            ``"olora"``, the first r columns and rows of W = Q R (arXiv 2406.01775). These three begin with B A ≠ 0: the
            increment is counted from there, (α/r) (B A - B₀ A₀), and the base's weight stays as it is. Components that are
            added later begin as in ``"kaiming"``.
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    scale: Scale = attrs.field(default="rank", validator=one_of(DIVISORS))
    init: Init = attrs.field(default="kaiming", validator=one_of(INITS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare A and B."""
        started = self.init in FROM_BASE
        return (Part("A", axis=0, matrix=True, started=started), Part("B", axis=1, matrix=True, started=started))

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further rows of A, Kaiming-uniform, and make columns of B, zero, as at the start.

        The scale stays as it was with the initial r.
        """
        a, b = self.parts
        rows = nn.init.kaiming_uniform_(further(module, a, count), math.sqrt(5), generator=generator)
        return {a.name: started(module, a, rows), b.name: nn.init.zeros_(further(module, b, count))}

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A and B beside it."""
        scaling = self.alpha / divisor(target.scale_rank(self.rank, self.scale_by), self.scale)
        return begin(self.init, target, target.rank_of(self.rank), scaling, self.dropout)
