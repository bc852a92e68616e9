"""FIM-LoRA: ranks in proportion to the mean squared gradient of each layer's factors."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import attrs
from torch import Tensor

import lrkit
from lrkit.ranks import Rank, most_of
from lrkit_calibrated.allocation import ShareOut
from lrkit_calibrated.lora import AllocatedLoRA


@attrs.frozen(kw_only=True)
class MeanSquaredGradient(lrkit.Metric):
    """The mean over steps of an entry's squared gradient: the diagonal of the empirical Fisher information.

    Source: FIM-LoRA, arXiv 2605.16800, section 3: F_ii ≈ (1/T) Σ_t (∂ℓ_t/∂θ_i)². At LoRA's start B is zero, and so is A's
    gradient: what is seen is B's.
    """

    buffers: ClassVar[tuple[str, ...]] = ("mean",)

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Take in a step: mean += (g² - mean) / t."""
        state["mean"].lerp_(grad.square(), 1.0 / step)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return the mean."""
        return state["mean"].clone()


def fim_lora(
    *,
    rank: Rank = 8,
    least: int = 1,
    most: int | None = None,
    alpha: float = 16.0,
    dropout: float = 0.0,
    calibration: int = 8,
    scale_of: Literal["new-rank", "first-rank"] = "new-rank",
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """FIM-LoRA (Sathyavageeswaran, arXiv 2605.16800): LoRA with ranks by the Fisher information of a few batches.

    A layer's importance is the mean squared gradient of its B over the batches. The budget of `rank` per layer is shared
    out in proportion, once, before the first step: arXiv 2605.16800, section 3.

    Known: the importance is B's mean squared gradient over the batches, against plain backward passes in float64; the ranks
    are the shares between both bounds, and their sum is the budget; the released variant's ranks are those of the released
    rule on random importances; a resumed run is the run. What differs from the author's code
    (``Kernel-ML/fim-lora-experiments`` @9811817):

    - Batches go through the model without dropout; there in the mode for training.
    - All components are drawn anew, of one distribution; there the first of each layer stay as they were drawn.
    - His pull requests to PEFT, #3204, and axolotl, #3639, neither of which was merged, raise low ranks beyond the budget.
      The one to PEFT reads A's gradient, which is zero at LoRA's start; the others read B's, as here.

    Not known: the paper's own text on scale and rounding beyond its abstract and that code, so that the released variant
    may be the paper's rule as well; and its scores, which have not been run here.

    Args:
        rank: r, a layer's rank on average.
        least: r_min.
        most: r_max; 2 r by default.
        alpha: α of the scale α/r.
        dropout: of the adapter's input.
        calibration: batches before the first step.
        scale_of: the r of the scale: ``"new-rank"``, as the author's code computes; or ``"first-rank"``, as its comments
            say.
        variant: ``"paper"``: shares between both bounds, rounded so that their sum is the budget. ``"released"``: the
            author's code, in which shares are bounded by `most` alone and rounded, and what low ranks then lack to `least`
            is taken from the layers that matter least.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'fim_lora variant must be "paper" or "released", not {variant!r}')
    return lrkit.Method(
        parameterization=AllocatedLoRA(rank=rank, alpha=alpha, dropout=dropout, scale_of=scale_of),
        metric=MeanSquaredGradient(),
        scheduler=lrkit.schedulers.Once(target=1.0, calibration=calibration),
        action=ShareOut(
            least=least,
            most=2 * most_of(rank) if most is None else most,
            rule="filled" if variant == "paper" else "saturated",
        ).around(rank),
    )


METHODS: Mapping[str, Callable[..., lrkit.Method]] = {"fim-lora": fim_lora}
