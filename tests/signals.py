"""Two layer metrics for tests, and the runs that read them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.metrics import Layer, LayerMetric, Seen


@attrs.frozen(kw_only=True)
class InputNorm(LayerMetric):
    """The mean squared norm of a layer's inputs. Source: none."""

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return a sum and a count."""
        return {
            "sum": torch.zeros((), dtype=torch.float64, device=layer.device),
            "rows": torch.zeros((), dtype=torch.int64, device=layer.device),
        }

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add the rows."""
        state["sum"].add_(seen.x.double().square().sum())
        state["rows"].add_(len(seen.x))

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return the mean."""
        return (state["sum"] / state["rows"].clamp(min=1)).float().expand(layer.units)


@attrs.frozen(kw_only=True)
class GradientNorm(LayerMetric):
    """The squared Frobenius norm of the gradient of a layer's frozen weight, summed over all steps. Source: none."""

    reads: ClassVar[Literal["inputs", "gradient"]] = "gradient"

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return the gradient."""
        return {"gradient": torch.zeros(layer.d_out, layer.d_in, device=layer.device)}

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add gᵀ x."""
        state["gradient"].addmm_(seen.g.t(), seen.x)

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return its squared norm."""
        return state["gradient"].square().sum().expand(layer.units)


@attrs.frozen(kw_only=True)
class ByUnit(InputNorm):
    """Remembers a number for each unit, in a stream and in its memory: how many decisions have kept it. Source: none."""

    memory: ClassVar[tuple[str, ...]] = ("kept",)

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return a number per unit beside the sums."""
        return {**super().begin(layer), "own": torch.arange(layer.units, dtype=torch.float32, device=layer.device)}

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add, and move each unit's own number."""
        super().observe(seen, state)
        state["own"].mul_(1.5)

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Keep the first's own numbers."""
        return {**super().merge(states), "own": states[0]["own"]}

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return both."""
        return super().score(layer, state) + state["own"] + layer.memory["kept"]

    def decided(self, kept: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Count."""
        memory["kept"].add_(kept)


def method(metric: lrkit.metrics.Importance, action: lrkit.Action | None = None, rank: int = 4) -> lrkit.Method:
    """Return a method with decisions after steps 4, 6 and 8 of 10."""
    base = lrkit.methods.adalora(rank=rank, target_rank=2, warmup=2, final=2, interval=2)
    return attrs.evolve(base, metric=metric, action=base.action if action is None else action)


def freezing(metric: lrkit.metrics.Importance, *, together: bool = True) -> lrkit.Method:
    """Return LoRA of which layers, or matrices, freeze: a half of them at the end."""
    scheduler = lrkit.schedulers.Linear(target=0.5, warmup=2, final=2)
    action = lrkit.actions.Freeze(together=together)
    return attrs.evolve(lrkit.methods.lora(rank=4), metric=metric, scheduler=scheduler, action=action)
