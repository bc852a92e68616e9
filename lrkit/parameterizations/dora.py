"""DoRA: W' = m ∘ (W + ΔW) / ‖W + ΔW‖, a magnitude per output and a low-rank direction (arXiv 2402.09353, Eq. 5)."""

import math
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.errors import LrkitError
from lrkit.parameterizations.adapter import Adapter, further, new_factor, oriented_weight
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.precision import is_plain
from lrkit.ranks import DIVISORS, SCALES, Rank, Scale, ScaleBy, as_rank, divisor, is_rank
from lrkit.settings import one_of, real
from lrkit.units import Part

_STD = 0.02


class Magnitude(Adapter):
    """A linear map with a trained magnitude per output: y = m/n ∘ (W x + s · B (c ∘ (A x))) + bias.

    n is the row norm ‖W + s B diag(c) A‖, through which no gradient flows (arXiv 2402.09353, section 4.3). It is computed
    from ‖W‖² + 2⟨W, ΔW⟩ + ‖ΔW‖² in the low-rank form, so that no d_out x d_in matrix is made.

    Args:
        base: the layer.
        a: A [r, d_in].
        b: B [d_out, r].
        core: c [r]; None for ones.
        scaling: s.
    """

    A: nn.Parameter
    B: nn.Parameter
    core: nn.Parameter | None
    magnitude: nn.Parameter

    def __init__(
        self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, core: nn.Parameter | None, scaling: float
    ) -> None:
        super().__init__(base)
        self.A, self.B = a, b
        self.register_parameter("core", core)
        self.scaling = scaling
        self.magnitude = new_factor(base, len(b))
        with torch.no_grad():
            self.magnitude.copy_(self._base_squares().sqrt())

    @property
    def rank(self) -> int:
        """Return how many rank components are stored, masked ones included."""
        return self.A.shape[0]

    def _base_squares(self) -> Tensor:
        """Return ‖W‖² of each row [d_out], in the factors' dtype."""
        norms: Tensor = torch.linalg.vector_norm(oriented_weight(self.base), dim=1, dtype=self.A.dtype)
        return norms.square()

    def _scaled(self) -> Tensor:
        """Return s · B diag(c)."""
        b = self.B if self.core is None else self.B * self.core
        return b * self.scaling

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ‖W + ΔW‖ of each row, [d_out]."""
        weight, a, b = oriented_weight(self.base), self.A, self._scaled()
        across = 2 * (weight @ a.t().to(weight.dtype)).to(a.dtype) + b @ (a @ a.t())
        squares = self._base_squares() + (across * b).sum(1)
        return squares.clamp_min(torch.finfo(a.dtype).tiny).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., d_out] for x [..., d_in]."""
        y: Tensor = self.base(x)
        ratio = (self.magnitude / self.norms()).to(y.dtype)
        h = F.linear(F.linear(x.to(y.dtype), self.A.to(y.dtype)), self._scaled().to(y.dtype))
        plain = y if self.bias is None else y - self.bias.to(y.dtype)
        # Exactly y at the start, where the ratio is 1 and h is 0.
        return y + (ratio - 1) * plain + ratio * h

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Write W' into the base's weight, in place, and return the base."""
        ratio = (self.magnitude / self.norms())[:, None]
        delta = self._scaled() @ self.A
        return self.base_with(ratio * (oriented_weight(self.base).to(delta.dtype) + delta))

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


@attrs.frozen(kw_only=True)
class DoRA(Parameterization):
    """W' = m ∘ (W + ΔW) / ‖W + ΔW‖ with m [d_out] at the base's row norms at first.

    Source: arXiv 2402.09353, Eq. 5, with the norm held constant in the gradient (its section 4.3), as in PEFT's
    ``use_dora``. The base's weight is read, so that it may not be quantized.

    Args:
        rank: r, or a table of layer or pattern to rank.
        alpha: α; ΔW is scaled by α/r.
        form: ``"lora"``: ΔW = (α/r) B A, as published; ``"svd"``: ΔW = (α/r) P Λ Q, whose core values λ let
            `lrkit.actions.Prune` take components out.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r.
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    form: Literal["lora", "svd"] = attrs.field(default="lora", validator=one_of(("lora", "svd")))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    scale: Scale = attrs.field(default="rank", validator=one_of(DIVISORS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare A, B and m, and in SVD form the core values."""
        core = (Part("core", axis=0, core=True),) if self.form == "svd" else ()
        return (*core, Part("A", axis=0, matrix=True), Part("B", axis=1, matrix=True), Part("magnitude"))

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """Return the layer with the factors and the magnitude beside it. Raise LrkitError if its weight is quantized."""
        if not is_plain(oriented_weight(target.layer)):
            raise LrkitError(
                f"{target.name}: DoRA reads the base's weight, which is quantized or sharded here: use LoRA"
            )
        rank = target.rank_of(self.rank)
        a = new_factor(target.layer, rank, target.d_in)
        b = new_factor(target.layer, target.d_out, rank)
        core = None
        if self.form == "svd":
            nn.init.normal_(a, std=_STD)
            nn.init.normal_(b, std=_STD)
            core = new_factor(target.layer, rank)
            nn.init.zeros_(core)
        else:
            if rank:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)
        scaling = self.alpha / divisor(target.scale_rank(self.rank, self.scale_by), self.scale)
        return Magnitude(target.layer, a, b, core, scaling)

    def fresh(self, part: Part, module: nn.Module, count: int, generator: torch.Generator) -> Tensor:
        """Draw further rows of A or columns of B, as at the start."""
        new = further(module, part, count)
        if self.form == "svd":
            return nn.init.normal_(new, std=_STD, generator=generator)
        return (
            nn.init.zeros_(new)
            if part.name == "B"
            else nn.init.kaiming_uniform_(new, math.sqrt(5), generator=generator)
        )
