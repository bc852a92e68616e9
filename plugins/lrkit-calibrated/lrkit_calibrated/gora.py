"""GoRA: ranks by how much weight and gradient agree in size, and B from the gradient by A's pseudo-inverse."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.metrics import Layer, LayerMetric, Seen
from lrkit.ranks import Rank, Scale, most_of
from lrkit.settings import one_of, real
from lrkit_calibrated.allocation import ShareOut
from lrkit_calibrated.lora import AllocatedLoRA


@attrs.frozen(kw_only=True)
class WeightGradient(LayerMetric):
    """mean(abs(W ∘ G)) of a layer's frozen weight W and its gradient G, averaged over batches; the same for all its units.

    A batch that does not reach the layer does not count: for example, one without a token for this expert.

    Source: GoRA, arXiv 2502.12171, Eq. 5. G is kept until the last decision, float32 [d_out, d_in] per layer: as much as the
    weights themselves. The paper keeps it in the CPU's memory; here it lies where the layer does.
    """

    reads: ClassVar[Literal["inputs", "gradient"]] = "gradient"

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return the sum of gradients, the number of batches that reached the layer, and the last one's number: zero."""
        return {
            "gradient": torch.zeros(layer.d_out, layer.d_in, device=layer.device),
            "batches": torch.zeros((), device=layer.device),
            "last": torch.zeros((), device=layer.device),
        }

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add gᵀ x."""
        state["gradient"].addmm_(seen.g.t(), seen.x)
        state["batches"].add_(state["last"] != seen.step)  # a batch may go through a layer more than once
        state["last"].fill_(seen.step)

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return mean(abs(W ∘ G)) for each unit."""
        product = (layer.weight * state["gradient"]).abs().mean(dtype=torch.float64)
        return (product / state["batches"].clamp_min(1)).float().expand(layer.units)

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Add the gradients. Those of one step are one batch, whatever processes have a part of it."""
        first, *others = states
        return {
            "gradient": torch.stack([state["gradient"] for state in states]).sum(dim=0),
            "batches": first["batches"] + torch.stack([state["batches"] for state in others]).amax(dim=0),
            "last": torch.stack([state["last"] for state in states]).amax(dim=0),
        }


@attrs.frozen(kw_only=True)
class GoraLoRA(AllocatedLoRA):
    """LoRA that begins with a step against the gradient: A at random, and B = -ξ G A⁺.

    Source: GoRA, arXiv 2502.12171, Eq. 9 to 12. A⁺ is A's pseudo-inverse, so that B A is the gradient's projection on A's
    rows, of a norm near √(r / d_in) that of G. ξ = γ √d_in / α makes the increment's norm near γ that of G, at any rank:
    here ξ = γ √(d_in / r) / s with the scale s, which is that for α/√r, and right for α/r as well.

    Args:
        gamma: γ.
        scale: the divisor of the scale, ``"sqrt-rank"`` as the paper has it.
    """

    gamma: float = attrs.field(default=0.05, validator=real(0.0))
    scale: Scale = attrs.field(default="sqrt-rank", validator=one_of(("rank", "sqrt-rank")))

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw A, and compute B from the gradient that the metric has kept. Without one, as LoRA draws them."""
        drawn = super().fresh(module, count, generator, memory)
        if "gradient" not in memory:
            return drawn
        adapter: Any = module
        gradient = memory["gradient"].double() / memory["batches"].double().clamp_min(1)
        a, b = (part.name for part in self.parts)
        inverse = torch.linalg.pinv(drawn[a].to(gradient))
        # Equal to γ √d_in / α with α/√r.
        size = self.gamma * math.sqrt(adapter.d_in / count) / adapter.scaling
        drawn[b] = (-size * (gradient @ inverse)).float()
        return drawn


def gora(
    *,
    rank: Rank = 8,
    least: int | None = None,
    most: int | None = None,
    alpha: float = 16.0,
    gamma: float = 0.05,
    dropout: float = 0.0,
    calibration: int = 32,
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """GoRA (He et al., arXiv 2502.12171): LoRA whose ranks and start come from the gradient of the frozen weights.

    The gradient G of each frozen weight W is averaged over a few batches. A layer's share of the budget is that of
    mean(abs(W ∘ G)) (Eq. 5 to 8), and B begins as -ξ G A⁺ (Eq. 9 to 12). The scale is α/√r of the layer's own rank.

    Known: importance, ranks and B are the formulas', against gradients of the plain model in float64; the first increment
    is a step downhill of about γ times the gradient's norm; a resumed run is the run. The released code is
    ``hhnqqq/MyTransformers`` @4037d4d. What differs:

    - That commit begins with +ξ G A⁺, a step uphill. The paper and earlier commits have the minus, as here.
    - Batches go through the model without dropout; there in the mode for training.
    - The gradient is kept where the layer lies; there in the CPU's memory.
    - A step size γ or a number of batches that is found on the way (``adaptive``) is left out.
    - The scripts train B 16 times as fast as A (LoRA+): give the optimizer such groups.

    Not known: the paper's scores, which have not been run here.

    Args:
        rank: r_ref, by which the budget is counted.
        least: r_min; r_ref / 2 by default.
        most: r_max; 4 r_ref by default.
        alpha: α.
        gamma: γ: the first increment's norm, as a share of the gradient's; 0 begins as LoRA does.
        dropout: of the adapter's input.
        calibration: batches before the first step; 32 as in the released scripts.
        variant: ``"paper"``: the budget is counted with √(m + n) of an m x n matrix, and shares are rounded. ``"released"``:
            with m + n, and shares are rounded down.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'gora variant must be "paper" or "released", not {variant!r}')
    middle = most_of(rank)
    return lrkit.Method(
        parameterization=GoraLoRA(rank=rank, alpha=alpha, gamma=gamma, dropout=dropout),
        metric=WeightGradient(),
        scheduler=lrkit.schedulers.Once(target=1.0, calibration=calibration),
        action=ShareOut(
            least=max(1, middle // 2) if least is None else least,
            most=4 * middle if most is None else most,
            rule="rounded" if variant == "paper" else "floored",
        ).around(rank),
    )


METHODS: Mapping[str, Callable[..., lrkit.Method]] = {"gora": gora}
