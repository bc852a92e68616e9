"""Pictures of runs: final rank by layer and module, when each matrix froze or how long it trained, budget over time."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lrkit.study.charts import Canvas, Cell, Curve, Style, drawing, grid_of
from lrkit.study.charts.axes import limit
from lrkit.study.charts.curves import draw_curve
from lrkit.study.charts.maps import draw_cells
from lrkit.study.charts.palette import LIGHT
from lrkit.study.comebacks import switches, training

if TYPE_CHECKING:
    from lrkit.study.run import Result


@attrs.frozen
class _Map:
    """One heat map of a picture: its title, its cells by layer, and the value of the full colour."""

    title: str
    cells: Mapping[str, Cell]
    top: float


def draw(results: "Mapping[str, Result]", folder: Path) -> list[Path]:
    """Draw whatever the runs have to show.

    Args:
        results: runs by label.
        folder: for the files; it must exist.

    Returns:
        The PNG files; an SVG and a PDF stand beside each. ``ranks.png`` if a run ranked components, ``freezing.png`` if one
        froze matrices, ``training.png`` if frozen ones came back, and ``budget.png`` if one has a policy.
    """
    with drawing():
        drawn = {
            "ranks.png": _maps(_ranks(results), "heat"),
            "freezing.png": _maps(_freezing(results), "warm"),
            "training.png": _maps(_training(results), "warm"),
            "budget.png": _budget(results),
        }
        return [canvas.save(folder / name)[0] for name, canvas in drawn.items() if canvas is not None]


def _ranks(results: "Mapping[str, Result]") -> list[_Map]:
    maps = []
    for label, result in results.items():
        layers = result.summary.layers
        if all(layer.rank == layer.initial_rank for layer in layers):
            continue
        ranks = {layer.name: (layer.rank or 0, layer.initial_rank or 0) for layer in layers}
        begun = max(initial for _, initial in ranks.values())
        grown = any(rank > initial for rank, initial in ranks.values())
        told = f"rank in the end, begun at {begun}" if grown else f"rank kept of {begun}"
        mean = sum(rank for rank, _ in ranks.values()) / len(ranks)
        cells = {name: Cell(float(rank), str(rank)) for name, (rank, _) in ranks.items()}
        # A scale for each: one of rank 1000 would leave all others pale.
        maps.append(_Map(f"{label}: {told}, mean {mean:.1f}", cells, float(max(map(max, ranks.values())))))
    return maps


def _freezing(results: "Mapping[str, Result]") -> list[_Map]:
    maps = []
    for label, result in results.items():
        frozen = sorted(f"{layer.name}.{matrix}" for layer in result.summary.layers for matrix in layer.frozen)
        if not frozen or switches(result.history):
            continue
        when = {name: decision.step for decision in result.history for name in decision.lost}
        # Matrices that froze together stand in the history by their layer's name.
        steps = {name: when.get(name, when.get(name.rpartition(".")[0], 0)) for name in frozen}
        cells = {name: Cell(float(step), str(step)) for name, step in steps.items()}
        title = f"{label}: step at which each matrix froze (of {result.steps})"
        maps.append(_Map(title, cells, float(max(steps.values()))))
    last = max((each.top for each in maps), default=0.0)
    return [attrs.evolve(each, top=last) for each in maps]


def _training(results: "Mapping[str, Result]") -> list[_Map]:
    maps = []
    for label, result in results.items():
        shares = training(result.history, result.steps, [layer.name for layer in result.summary.layers])
        cells = {name: Cell(share, f"{share:.0%}") for name, share in shares.items()}
        if cells:
            maps.append(_Map(f"{label}: share of {result.steps} steps in which each layer trained", cells, 1.0))
    return maps


def _maps(maps: list[_Map], colour: str) -> Canvas | None:
    """Draw heat maps below each other, each with its title."""
    if not maps:
        return None
    places = [grid_of(list(each.cells)) for each in maps]
    modules = [list(dict.fromkeys(module for module, _ in place.values())) for place in places]
    blocks = [len({block for _, block in place.values()}) for place in places]
    margin = 14 + 7 * max(len(name) for names in modules for name in names)
    wide, tall, head, foot = 40, 22, 30, 22
    heights = [head + tall * len(names) + foot for names in modules]
    titles = max(len(each.title) for each in maps) * 8 + 20
    canvas = Canvas(max(margin + wide * max(blocks) + 10, titles), sum(heights) + 20)
    top = 0.0
    for each, columns, height in zip(maps, blocks, heights, strict=True):
        right = canvas.width - margin - wide * columns
        axes = canvas.axes(margin, canvas.height - top - height + foot, right, top + head)
        draw_cells(canvas, axes, each.cells, top=each.top, colour=colour, size=(wide, tall))
        canvas.label(10, top + 8, each.title, bold=True)
        top += height
    canvas.label(margin, -8, "transformer block")
    return canvas


def _budget(results: "Mapping[str, Result]") -> Canvas | None:
    curves = {}
    for label, result in results.items():
        policies = sorted({decision.policy for decision in result.history})
        for policy in policies:
            name = label if len(policies) == 1 else f"{label}, policy {policy}"
            curves[name] = [decision for decision in result.history if decision.policy == policy], result.steps
    if not curves:
        return None
    legend, tall, foot = 34, 150, 30
    canvas = Canvas(640, legend + tall * len(curves) + foot)
    for i, (label, (decisions, steps)) in enumerate(curves.items()):
        top, units = legend + tall * i, decisions[0].whole
        axes = canvas.axes(60, canvas.height - top - tall + 20, 20, top + 30)
        limit(axes, (0, steps), (0, units * 1.06))
        x = [0, *(decision.step for decision in decisions), steps]
        for name, style, width in (("budget", Style("planned"), 5.0), ("spent", Style("h0"), 1.75)):
            amounts = [float(getattr(decision, name)) for decision in decisions]
            y = [float(decisions[0].began), *amounts, amounts[-1]]
            curve = Curve(
                label="planned" if name == "budget" else "kept", style=style, x=x, y=y, step=True, width=width
            )
            draw_curve(canvas, axes, curve)
        back = [(decision.step, decision.spent) for decision in decisions if decision.returned]
        if back:
            axes.plot(*zip(*back, strict=True), "|", color=LIGHT["h1"], markersize=8, markeredgewidth=1.5)
        canvas.label(10, top + 8, f"{label}: {units} {decisions[0].amount}, those kept over the steps", bold=True)
    _legend(canvas, any(decision.returned for decisions, _ in curves.values() for decision in decisions))
    canvas.label(-20, -8, "optimizer step")
    return canvas


def _legend(canvas: Canvas, returned: bool) -> None:
    """Write the key at the picture's upper edge, which is kept free for it, so that it covers no title and no line."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=LIGHT["planned"], linewidth=5, label="planned"),
        Line2D([], [], color=LIGHT["h0"], linewidth=1.75, label="kept"),
    ]
    if returned:
        lines.append(Line2D([], [], color=LIGHT["h1"], linestyle="", marker="|", markersize=8, label="units came back"))
    place = (10 / canvas.width, 1 - 4 / canvas.height)
    canvas.figure.legend(handles=lines, loc="upper left", bbox_to_anchor=place, frameon=False, ncols=3, borderpad=0)
