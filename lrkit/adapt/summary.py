"""The summary of a run so far: each layer's rank or frozen state, and its trainable parameters."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import nn

    from lrkit.adapt.coverage import Coverage
    from lrkit.loop.controller import Controller
    from lrkit.method import Method


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
        d_in: size of the layer's input; None if it is no linear map, or not known.
        d_out: size of its output, likewise.
        maps: how many maps of these sizes the layer stacks, one per expert; the ranks are the sums over all of them.
        scale: the factor of its increment now, such as α/r; None if it has none, or it is not known.
    """

    name: str
    rank: int | None
    initial_rank: int | None
    frozen: tuple[str, ...]
    start: int
    now: int
    average: float
    d_in: int | None = None
    d_out: int | None = None
    maps: int = 1
    scale: float | None = None

    @property
    def state(self) -> str:
        """Return rank and frozen matrices in a few characters."""
        words = []
        if self.rank is not None:
            words.append(
                f"rank {self.rank}/{self.initial_rank}" if self.rank != self.initial_rank else f"rank {self.rank}"
            )
        if self.frozen:
            words.append(f"{'+'.join(self.frozen)} frozen")
        return ", ".join(words) or "-"

    def to_plain(self) -> dict[str, Any]:
        """Return the same as plain data, without sizes and scales that are not known, and without `maps` if that is 1."""
        silent = {"d_in": None, "d_out": None, "maps": 1, "scale": None}
        return {key: value for key, value in attrs.asdict(self).items() if key not in silent or value != silent[key]}


@attrs.frozen
class Summary:
    """All adapted layers, and the head apart.

    Args:
        layers: one record per layer.
        head: parameters of the head.
        step: optimizer steps taken.
        beside: parameters of the method that are in none of the layers, such as all others in full fine-tuning, at first.
        coverage: the share of the blocks' weights that is adapted, and the kinds that are not; None for a model without
            blocks.
        beside_now: what of `beside` trains now.
        beside_average: the same, averaged over the steps so far.
    """

    layers: tuple[LayerSummary, ...]
    head: int
    step: int
    beside: int = 0
    coverage: "Coverage | None" = attrs.field(default=None, eq=False)
    beside_now: int = attrs.field(default=attrs.Factory(lambda self: self.beside, takes_self=True))
    beside_average: float = attrs.field(default=attrs.Factory(lambda self: self.beside, takes_self=True))

    @property
    def start(self) -> int:
        """Return trainable parameters at first, without the head."""
        return self.beside + sum(layer.start for layer in self.layers)

    @property
    def now(self) -> int:
        """Return trainable parameters now, without the head."""
        return self.beside_now + sum(layer.now for layer in self.layers)

    @property
    def average(self) -> float:
        """Return trainable parameters averaged over the steps so far, without the head."""
        return self.beside_average + sum(layer.average for layer in self.layers)

    def to_plain(self) -> dict[str, Any]:
        """Return the same as plain data."""
        totals = {"start": self.start, "now": self.now, "average": self.average}
        rest: dict[str, Any] = {"beside": self.beside, "head": self.head, "step": self.step}
        rest["coverage"] = None if self.coverage is None else self.coverage.to_plain()
        return {"layers": [layer.to_plain() for layer in self.layers], **totals, **rest}

    def __str__(self) -> str:
        """Return a table. Of layers that stand in one module, that module's name is in the head alone."""
        within = _within([layer.name for layer in self.layers])
        rows: list[Sequence[str]] = [
            (f"layer of {within}" if within else "layer", "state", "at start", "now", "on average")
        ]
        for layer in self.layers:
            name, counts = layer.name.removeprefix(f"{within}."), (f"{layer.start:,}", f"{layer.now:,}")
            rows.append((name, layer.state, *counts, f"{layer.average:,.0f}"))
        if self.beside:
            rows.append(("in no layer", "", f"{self.beside:,}", f"{self.beside_now:,}", f"{self.beside_average:,.0f}"))
        rows.append(("adapters", "", f"{self.start:,}", f"{self.now:,}", f"{self.average:,.0f}"))
        rows.append(("head", "", f"{self.head:,}", f"{self.head:,}", f"{self.head:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = "\n".join(
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        )
        return table if self.coverage is None else f"{table}\n{self.coverage}"


def _within(names: Sequence[str]) -> str:
    """Return the path of the module in which all of these layers stand: ``"bert.encoder.layer"``, or nothing."""
    paths = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def summarize(controller: "Controller", head: int, coverage: "Coverage | None" = None) -> Summary:
    """Summarize a run so far. `head` and `coverage` are as in `Summary`."""
    from lrkit.loop.run import BESIDE
    from lrkit.parameterizations.adapter import layer_shape
    from lrkit.units import maps_of, rank_of

    kept = controller.components.kept()
    run, tally = controller.run, controller.tally
    average, counts = tally.on_average(controller.step), tally.counts
    matrices = [part for part in run.method.parameterization.parts if part.matrix]
    layers = []
    for name, module in run.modules.items():
        rank = initial = None
        if run.parts:
            initial = run.ranks[name]
            rank = int(kept[name].sum()) if name in kept else rank_of(module, run.parts)
        frozen = tuple(part.name for part in matrices if run.froze(part.of(module)))
        trains = run.starts[name], counts[name], average[name]
        d_in, d_out = layer_shape(getattr(module, "base", module)) or (None, None)
        scaling = getattr(module, "scaling", None)  # of a module of PEFT it is a table by adapter
        scale = float(scaling) if isinstance(scaling, float | int) else None
        layers.append(LayerSummary(name, rank, initial, frozen, *trains, d_in, d_out, maps_of(module), scale))
    beside = run.starts[BESIDE], counts[BESIDE], average[BESIDE]
    return Summary(tuple(layers), head, controller.step, beside[0], coverage, *beside[1:])


def trainable(model: "nn.Module", everything: int, summary: Summary) -> str:
    """Tell in PEFT's words how many parameters train, and below that how they divide into adapters and head.

    For example::

        trainable params: 1,234 || all params: 5,678 || trainable%: 21.7330
        adapters: 1,200 now, 1,200 at start, 1,200 on average || head: 34

    The first line counts whole tensors, as PEFT does; `everything` are all parameters. The second does not count masked
    components, and averages over the steps so far.
    """
    trains = sum(p.numel() for p in dict.fromkeys(model.parameters()) if p.requires_grad)
    return (
        f"trainable params: {trains:,} || all params: {everything:,} || trainable%: {100 * trains / everything:.4f}\n"
        f"adapters: {summary.now:,} now, {summary.start:,} at start, {summary.average:,.0f} on average || "
        f"head: {summary.head:,}"
    )


def brief(model: "nn.Module", method: "Method", layers: int, step: int, total_steps: int | None) -> str:
    """Name what is attached to what, and how far the run is, in one line."""
    parts = [method.parameterization, *(policy.action for policy in method.policies)]
    words = " + ".join(type(part).__name__ for part in parts)
    of = "" if total_steps is None else f" of {total_steps:,}"
    return f"<Adapted {type(model).__name__}: {words} in {layers} layers, step {step:,}{of}>"
