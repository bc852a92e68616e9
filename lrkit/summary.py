"""What became of each layer: rank or frozen state, and the trainable parameters it cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from lrkit.controller import Controller
    from lrkit.coverage import Coverage


@attrs.frozen
class LayerSummary:
    """One adapted layer.

    Args:
        name: the layer's name.
        rank: components kept now; None for an adapter without components.
        initial_rank: components at first.
        frozen: names of its matrices that have been frozen on the way.
        start: trainable parameters at first.
        now: trainable parameters now in effect (frozen tensors and masked components do not count).
        average: the same, averaged over the steps so far.
    """

    name: str
    rank: int | None
    initial_rank: int | None
    frozen: tuple[str, ...]
    start: int
    now: int
    average: float

    @property
    def state(self) -> str:
        """Rank and frozen matrices in a few characters."""
        words = []
        if self.rank is not None:
            words.append(
                f"rank {self.rank}/{self.initial_rank}" if self.rank != self.initial_rank else f"rank {self.rank}"
            )
        if self.frozen:
            words.append(f"{'+'.join(self.frozen)} frozen")
        return ", ".join(words) or "-"


@attrs.frozen
class Summary:
    """All adapted layers, and the head apart.

    Args:
        layers: one record a layer.
        head: parameters of the head.
        step: optimizer steps taken.
        beside: parameters of the method that are in none of the layers (all others in full fine-tuning).
        coverage: how much of the blocks' weights is adapted, and what is not; None for a model without blocks.
    """

    layers: tuple[LayerSummary, ...]
    head: int
    step: int
    beside: int = 0
    coverage: "Coverage | None" = attrs.field(default=None, eq=False)

    @property
    def start(self) -> int:
        """Trainable parameters at first, without the head."""
        return self.beside + sum(layer.start for layer in self.layers)

    @property
    def now(self) -> int:
        """Trainable parameters now, without the head."""
        return self.beside + sum(layer.now for layer in self.layers)

    @property
    def average(self) -> float:
        """Trainable parameters averaged over the steps so far, without the head."""
        return self.beside + sum(layer.average for layer in self.layers)

    def to_plain(self) -> dict[str, Any]:
        """The same as plain data."""
        totals = {"start": self.start, "now": self.now, "average": self.average}
        rest: dict[str, Any] = {"beside": self.beside, "head": self.head, "step": self.step}
        rest["coverage"] = None if self.coverage is None else self.coverage.to_plain()
        return {"layers": [attrs.asdict(layer) for layer in self.layers], **totals, **rest}

    def __str__(self) -> str:
        """A table."""
        rows: list[Sequence[str]] = [("layer", "state", "at start", "now", "on average")]
        rows += [
            (layer.name, layer.state, f"{layer.start:,}", f"{layer.now:,}", f"{layer.average:,.0f}")
            for layer in self.layers
        ]
        if self.beside:
            rows.append(("in no layer", "", *[f"{self.beside:,}"] * 3))
        rows.append(("adapters", "", f"{self.start:,}", f"{self.now:,}", f"{self.average:,.0f}"))
        rows.append(("head", "", f"{self.head:,}", f"{self.head:,}", f"{self.head:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = "\n".join(
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        )
        return table if self.coverage is None else f"{table}\n{self.coverage}"


def summarize(controller: "Controller", head: int, beside: int = 0, coverage: "Coverage | None" = None) -> Summary:
    """The summary of a run so far; `head`, `beside` and `coverage` as in `Summary`."""
    kept = controller.components_kept()
    average = controller.parameters_on_average()
    axes = [part for part in controller.method.parameterization.parts if part.axis is not None]
    layers = []
    for name, module in controller.modules.items():
        rank = initial = None
        if axes:
            axis = axes[0].axis
            assert axis is not None
            initial = controller.initial_ranks[name]
            rank = int(kept[name].sum()) if name in kept else axes[0].of(module).shape[axis]
        frozen = tuple(
            part.name
            for part in controller.method.parameterization.parts
            if part.matrix and controller.froze(part.of(module))
        )
        layers.append(
            LayerSummary(name, rank, initial, frozen, controller.starts[name], controller.counts[name], average[name])
        )
    return Summary(tuple(layers), head, controller.step, beside, coverage)
