"""How A and B of LoRA begin: at random beside a B of zeros, or from the base's weight.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) begin with a product that is not zero, and take it from the base's
weight: W - s B₀ A₀ + s B A. Here the base stays as it is, and the same sum is W + s (B A - B₀ A₀), which `Started` computes.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers.dequantized import is_quantized, whole_weight
from lrkit.parameterizations.adapter import new_factor
from lrkit.parameterizations.base import Target
from lrkit.parameterizations.lowrank import LowRank

Init = Literal["kaiming", "pissa", "pissa-fast", "olora", "orthogonal"]
INITS: tuple[Init, ...] = ("kaiming", "pissa", "pissa-fast", "olora", "orthogonal")
FROM_BASE = ("pissa", "pissa-fast", "olora")
_ITERATIONS = 16


class Started(LowRank):
    """A low-rank adapter that counts its increment from its start: ΔW = s (B A - B₀ A₀).

    A₀ and B₀ are parameters that never train, and are saved with A and B. The product has 2r components: while there are
    as many in A as in A₀ it is (B - B₀) A + B₀ (A - A₀), which is exactly zero at the start, in any precision.

    Args:
        base: the target whose place it takes.
        a: A₀ [r, d_in], where A begins.
        b: B₀ [d_out, r], where B begins.
        scaling: s.
        dropout: probability with which an entry of the adapter's input is dropped while training.
    """

    def __init__(self, base: Target, a: nn.Parameter, b: nn.Parameter, *, scaling: float, dropout: float) -> None:
        super().__init__(base, a, b, scaling=scaling, dropout=dropout)
        self.start_A = nn.Parameter(a.detach().clone(), requires_grad=False)
        self.start_B = nn.Parameter(b.detach().clone(), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return factors [2r, d_in] and [d_out, 2r] of B A - B₀ A₀; of a stack, those of every map together."""
        a, a0 = (f.view(self.maps, -1, self.d_in) for f in (self.A, self.start_A))
        b, b0 = (f.view(self.d_out, self.maps, -1) for f in (self.B, self.start_B))
        alike = a.shape == a0.shape
        down = torch.cat([a, a - a0] if alike else [a, a0], 1)
        up = torch.cat([b - b0, b0] if alike else [b, -b0], 2)
        return down.flatten(0, 1), up.flatten(1)

    @torch.no_grad()
    def import_factors(self, a: Tensor, b: Tensor, core: Tensor | None, scaling: float) -> None:
        """Take over ΔW = s · B diag(c) A exactly: it is no longer counted from where this adapter began."""
        super().import_factors(a, b, core, scaling)
        self.start_B.zero_()


def begin(init: Init, target: Target, rank: int, scaling: float, dropout: float) -> LowRank:
    """Return a layer with new factors A and B beside it, whose ΔW is zero.

    Args:
        init: how they begin.
        target: the layer.
        rank: components per map.
        scaling: s.
        dropout: as `LowRank` takes it.

    Raises:
        LrkitError: this layer cannot begin so: too high a rank for its weight, an odd one for orthogonal factors, or a
            quantized weight that cannot be read.
    """
    count = target.maps * rank
    a, b = new_factor(target.layer, count, target.d_in), new_factor(target.layer, target.d_out, count)
    if init == "kaiming" or not rank:
        if rank:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
        return LowRank(target, a, b, scaling=scaling, dropout=dropout)
    if init == "orthogonal":
        if rank % 2:
            raise LrkitError(f'{target.name}: init="orthogonal" halves the rank: it must be even, not {rank}')
        pairs = [_orthogonal(target, rank, a.device) for _ in range(target.maps)]
        down, up = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    else:
        if rank > (most := min(target.d_in, target.d_out)):
            raise LrkitError(f'{target.name}: init="{init}" takes {rank} components of a weight that has {most}')
        down, up = _from_base(init, _weight(target), rank, scaling)
    with torch.no_grad():
        a.copy_(down.reshape(a.shape))
        b.copy_(up.movedim(-2, 0).reshape(b.shape))
    kind: Any = Started if init in FROM_BASE else LowRank
    adapter: LowRank = kind(target, a, b, scaling=scaling, dropout=dropout)
    return adapter


@torch.no_grad()
def _weight(target: Target) -> Tensor:
    """Return a copy of W in float32 at least, [d_out, d_in] or [maps, d_out, d_in]; a quantized one dequantized."""
    layer = target.layer
    try:
        weight = whole_weight(layer) if is_quantized(layer) else target.kind.weight(layer)
    except LrkitError as error:
        raise LrkitError(f"{target.name}: this init reads the base's weight: {error}") from None
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _from_base(init: Init, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A [.., r, d_in] and B [.., d_out, r] from W [.., d_out, d_in]."""
    if init == "olora":  # arXiv 2406.01775: W = Q R
        q, triangle = torch.linalg.qr(weight)
        return triangle[..., :rank, :], q[..., :rank]
    if init == "pissa":  # arXiv 2404.02948, Eq. 2 and 3: W = U S Vᵀ
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=_ITERATIONS)
        vt = v.mT
    root = (s / scaling).sqrt()
    return root[..., :, None] * vt, u * root[..., None, :]


def _orthogonal(target: Target, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A [r, d_in] and B [d_out, r] with B A = 0: random mixtures of the odd and even rows of one rotation.

    Source: https://datta0.github.io/posts/rethink-lora-init/, as PEFT has it, with its factors of 1/10.
    """
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank, device=device))
    a = torch.randn(target.d_in, rank // 2, device=device) @ rotation[0::2]
    b = torch.randn(rank // 2, target.d_out, device=device).t() @ rotation[1::2]
    return a.t() / 10, b / 10
