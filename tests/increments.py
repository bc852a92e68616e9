"""Adapters whose ΔW is not zero, and that ΔW from their tensors."""

from typing import Any

import torch
from torch import Tensor

import lrkit


def perturb(adapted: lrkit.Adapted) -> None:
    """Give every trainable tensor random values, so that ΔW is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 0.3)


def nudged(adapted: lrkit.Adapted) -> lrkit.Adapted:
    """Move every trained tensor a little, so that ΔW is not zero, magnitudes are no norms, and no start is where it was."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return adapted


def delta_of(adapter: Any) -> Tensor:
    """Return s · b ∘ B diag(c) A from the adapter's tensors."""
    b = adapter.B if adapter.core is None else adapter.B * adapter.core
    delta: Tensor = adapter.scaling * b @ adapter.A
    return delta if adapter.out_scale is None else delta * adapter.out_scale[:, None]
