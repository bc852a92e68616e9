"""LoRA-drop (Zhou et al., arXiv 2402.07721): layers whose LoRA adds little to their output lose it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Verdict
from lrkit.actions.base import Fate
from lrkit.metrics import Layer, LayerMetric, Seen
from lrkit.ranks import Rank
from lrkit.settings import real
from lrkit.shards import held
from lrkit.units import Block, UnitKind, stop


@attrs.frozen(kw_only=True)
class AdapterOutput(LayerMetric):
    """g = Σ ‖ΔW x‖² over the inputs x of a layer: how much its adapter adds. Source: arXiv 2402.07721, section 3."""

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return a sum, in float64: it runs over all tokens."""
        return {"sum": torch.zeros((), dtype=torch.float64, device=layer.device)}

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add ‖ΔW x‖² of each row, with ΔW as it is now."""
        state["sum"].add_(_added(seen).double().square().sum())

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return g for each of the layer's units."""
        return state["sum"].float().expand(layer.units)


def _added(seen: Seen) -> Tensor:
    """Return ΔW x of each row [n, d_out]; of a layer that trains itself, beside which nothing stands, zeros."""
    adapter: Any = seen.layer.module
    if getattr(adapter, "additive", False):
        a, b, core, scaling = adapter.export_factors()
        outputs: Tensor = (seen.x @ a.float().t() * core.float()) @ b.float().t() * scaling
        return outputs
    if hasattr(adapter, "merged_weight"):  # DoRA scales W as well: W' x - W x
        change: Tensor = adapter.merged_weight().float() - seen.layer.weight
        return seen.x @ change.t()
    return seen.x.new_zeros(len(seen.x), 1)


_NOTHING = (
    "drop: no layer has added anything yet, so that every one stays: measure more than one step (B is zero in the first), "
    "by a larger `sample` of lora_drop or a longer run"
)


@attrs.frozen(kw_only=True)
class Drop(lrkit.Action):
    """The best layers stay, as few as have a share T of all scores; the others lose their ΔW.

    Source: arXiv 2402.07721, section 3.

    A layer that is dropped has A = B = 0, and stops training for good. It goes by no budget: the scheduler says when. If all
    scores are zero, as after a sample of one step, in which B is still zero, every layer stays, and a warning says so.

    Args:
        threshold: T, the share of all scores that the layers which stay have together: 0.9 in the paper.
    """

    fate: ClassVar[Fate] = "frozen"
    final: ClassVar[bool] = True

    threshold: float = attrs.field(default=0.9, validator=real(0.0, 1.0))

    @property
    def unit(self) -> UnitKind:
        """All matrices of a layer."""
        return "layer"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """Ask for matrices that train, since nothing else is set to zero."""
        parts = [part for part in parameterization.parts if part.trains]
        if not any(part.matrix for part in parts):
            return "it drops projection matrices that train, and this parameterization has none"
        if any(part.started for part in parts):
            return "matrices of zeros would take the piece of the base's weight with them that they began with"
        if left := [part.name for part in parts if part.axis is None and not part.matrix]:
            return f"a layer whose matrices are dropped would train its {left[0]} on"
        return None

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep the fewest candidates whose scores sum to T of all candidates' scores."""
        scores = torch.where(ballot.candidates, ballot.scores.double().clamp(min=0), 0.0)
        if not bool(scores.any()):
            return Verdict(ballot.candidates, budget=len(scores), told=_NOTHING)
        order = torch.argsort(scores, descending=True, stable=True)
        before = torch.cumsum(scores[order], 0) - scores[order]
        kept = torch.zeros_like(ballot.candidates)
        kept[order] = before < self.threshold * scores.sum()
        return Verdict(kept & ballot.candidates, budget=len(scores))

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int] | None:
        """Return None: how many are dropped follows from the scores."""
        return None

    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Set the matrices of layers that are not kept to zero, and let them stop training."""
        for block, keep in zip(blocks, kept.tolist(), strict=True):
            for tensor in () if keep else block.tensors:
                held(tensor).zero_()
                stop(tensor, optimizer)


def lora_drop(*, rank: Rank = 8, alpha: float = 16.0, threshold: float = 0.9, sample: float = 0.1) -> lrkit.Method:
    """LoRA-drop (Zhou et al., arXiv 2402.07721): layers whose LoRA adds little to the output lose it.

    All layers train for the first `sample` of the run. Then g_i = Σ ‖ΔW_i x‖² over the inputs of these steps is divided by
    the sum over all layers, and the layers with the largest stay, as few as have `threshold` of the whole (section 3).

    What differs from the paper, and what is known, is in README.md: above all, that the layers which are dropped share no
    common LoRA.

    Args:
        rank: r of every layer.
        alpha: α.
        threshold: T = 0.9 in the paper.
        sample: the share of the run by which outputs are measured; the paper samples 10 % of the data.
    """
    if not isinstance(sample, float) or not 0.0 < sample < 1.0:
        raise lrkit.LrkitError(f"lora-drop sample must be above 0 and below 1, not {sample!r}")
    return lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=rank, alpha=alpha),
        metric=AdapterOutput(),
        # One decision, after the first share of the run: the action goes by its threshold, and not by the target.
        scheduler=lrkit.schedulers.Constant(target=1.0, final=1.0 - sample, interval=1.0),
        action=Drop(threshold=threshold),
    )


METHODS = {"lora-drop": lora_drop}
