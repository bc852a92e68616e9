"""DoRA: W' = m ∘ (W + ΔW) / ‖W + ΔW‖, a magnitude per output and a low-rank direction (arXiv 2402.09353, Eq. 5)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers.dequantized import is_quantized
from lrkit.parameterizations.adapter import new_factor
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.parameterizations.lora import LoRA
from lrkit.parameterizations.lowrank import LowRank
from lrkit.parameterizations.svd import SVD
from lrkit.precision import without_autocast
from lrkit.ranks import DIVISORS, SCALES, Rank, Scale, ScaleBy, as_rank, is_rank
from lrkit.settings import one_of, real
from lrkit.units import Part


class Magnitude(LowRank):
    """A linear map with a low-rank increment and a trained magnitude per output: y = m/n ∘ (W x + ΔW x) + bias.

    n is the row norm ‖W + ΔW‖, through which no gradient flows (arXiv 2402.09353, section 4.3). It is computed from
    ‖W‖² + 2⟨W, ΔW⟩ + ‖ΔW‖² in the low-rank form, so that no d_out x d_in matrix is made. While training with dropout, the
    correction (m/n - 1) ∘ W x takes the input with the same entries dropped as ΔW x does, as in PEFT.

    Args:
        base: the target whose place it takes.
        a: A [r, d_in].
        b: B [d_out, r].
        core: c [r] or None.
        scaling: s.
        dropout: probability with which an entry of the adapter's input is dropped while training.
    """

    additive: ClassVar[bool] = False
    magnitude: nn.Parameter

    def __init__(
        self,
        base: Target,
        a: nn.Parameter,
        b: nn.Parameter,
        *,
        core: nn.Parameter | None,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__(base, a, b, core=core, scaling=scaling, dropout=dropout)
        self.magnitude = new_factor(base.layer, self.maps * self.d_out)
        with torch.no_grad():
            self.magnitude.copy_(self._base_squares().sqrt().flatten())

    def _weight(self) -> Tensor:
        """Return W [d_out, d_in], or [maps, d_out, d_in]."""
        assert self.kind is not None
        return self.kind.weight(self.base)

    def _base_squares(self) -> Tensor:
        """Return ‖W‖² of each row, in the factors' dtype."""
        norms: Tensor = torch.linalg.vector_norm(self._weight(), dim=-1, dtype=self.A.dtype)
        return norms.square()

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ‖W + ΔW‖ of each row [d_out], map after map."""
        a, b = self.factors()
        b = (b if self.core is None else b * self.core) * self.scaling
        if self.maps > 1:
            a, b = a.view(self.maps, -1, self.d_in), b.view(self.d_out, self.maps, -1).transpose(0, 1)
        weight = self._weight()
        with without_autocast(weight.device.type):
            across = 2 * (weight @ a.mT.to(weight.dtype)).to(a.dtype) + b @ (a @ a.mT)
            squares = self._base_squares() + (across * b).sum(-1)
        return squares.clamp_min(torch.finfo(a.dtype).tiny).sqrt().flatten()

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """Return y [..., d_out] for x [..., d_in]; of other kinds of layers, in the layer's own shapes.

        Args:
            x: the layer's input.
            where: its further arguments.
        """
        base, kind = self.base, self.kind
        assert kind is not None
        y: Tensor = base(x, *where)
        z = self.dropped(x) if self.dropout and self.training else x
        plain: Tensor = y if z is x else base(z, *where)
        if self.bias is not None:
            plain = plain - kind.scale(base, torch.ones_like(y[..., :1]), self.bias.to(y.dtype), *where)
        ratio = self.magnitude / self.norms()
        # Exactly y at the start, where the ratio is 1 and ΔW is 0.
        further = kind.scale(base, plain, (ratio - 1).to(y.dtype), *where)
        if not self.rank:
            return y + further
        delta = self.increment(base, kind, z, y.dtype, *self.factors(), *where)
        return y + further + kind.scale(base, delta, ratio.to(y.dtype), *where)

    def merged_weight(self) -> Tensor:
        """Return W' in the factors' dtype, in the shape of `delta`."""
        ratio = (self.magnitude / self.norms()).view(-1 if self.maps == 1 else (self.maps, -1)).unsqueeze(-1)
        return super().merged_weight().mul_(ratio)

    @torch.no_grad()
    def export_factors(self) -> tuple[Any, ...]:
        """Return A, B, c, s and m. If no component is left, there is one that adds nothing: m needs a place beside it."""
        a, b, core, scaling = super().export_factors()
        if not len(core):
            a, b, core = a.new_zeros(1, self.d_in), b.new_zeros(self.d_out, 1), core.new_ones(1)
        return a, b, core, scaling, self.magnitude

    @torch.no_grad()
    def import_factors(
        self, a: Tensor, b: Tensor, core: Tensor | None, scaling: float, magnitude: Tensor | None = None
    ) -> None:
        """Take over A, B, c, s and m. Without m the layer is W + ΔW: m is its row norms.

        Raises:
            LrkitError: the sizes differ, or this adapter has fewer than r components.
        """
        super().import_factors(a, b, core, scaling)
        if magnitude is not None and magnitude.numel() != self.magnitude.numel():
            raise LrkitError(f"it has {self.magnitude.numel()} outputs, and {magnitude.numel()} magnitudes are given")
        self.magnitude.copy_(self.norms() if magnitude is None else magnitude.flatten())


@attrs.frozen(kw_only=True)
class DoRA(Parameterization):
    """W' = m ∘ (W + ΔW) / ‖W + ΔW‖ with ΔW low-rank and m [d_out] at the base's row norms at first.

    Source: arXiv 2402.09353, Eq. 5, with the norm held constant in the gradient (its section 4.3), as in PEFT's
    ``use_dora``. The base's weight is read at every call, so that it may not be quantized.

    Args:
        rank: r, or a table of layer or pattern to rank; 0 leaves a layer as it is: its magnitude trains as little.
        alpha: α; ΔW is scaled by α/r.
        form: ``"lora"``: ΔW = (α/r) B A as `LoRA` has it, which is as published; ``"svd"``: (α/r) P Λ Q as `SVD` has it,
            without its penalty: its core values λ let `lrkit.actions.Prune` take components out.
        dropout: probability of dropping an entry of the adapter's input while training.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r.
    """

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    form: Literal["lora", "svd"] = attrs.field(default="lora", validator=one_of(("lora", "svd")))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    scale: Scale = attrs.field(default="rank", validator=one_of(DIVISORS))

    @property
    def direction(self) -> LoRA | SVD:
        """Return the parameterization of ΔW."""
        if self.form == "lora":
            return LoRA(rank=self.rank, alpha=self.alpha, scale_by=self.scale_by, scale=self.scale)
        return SVD(rank=self.rank, alpha=self.alpha, scale_by=self.scale_by, scale=self.scale, orthogonality=0.0)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare the tensors of ΔW, and m."""
        return (*self.direction.parts, Part("magnitude"))

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """Return the layer with the factors and the magnitude beside it.

        Raises:
            LrkitError: its weight is quantized.
        """
        if is_quantized(target.layer):
            raise LrkitError(f"{target.name}: DoRA reads the base's weight, which is quantized here: use LoRA")
        low = self.direction.build(target)
        assert isinstance(low, LowRank)
        return Magnitude(target, low.A, low.B, core=low.core, scaling=low.scaling, dropout=self.dropout)

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further components of ΔW, as at the start."""
        return self.direction.fresh(module, count, generator, memory)
