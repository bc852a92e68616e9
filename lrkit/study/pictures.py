"""Pictures of runs: final rank by layer and module, when each matrix froze, budget planned and kept over time."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lrkit.study.run import Result

_INK = "#3d3d3a"


def grid_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Layer names to (module, block): the last number in a name is the block, the rest behind it the module."""
    places = {}
    for name in names:
        match = re.match(r"(?:.*\.)?(\d+)\.(.+)$", name)
        places[name] = (match.group(2), int(match.group(1))) if match else (name, 0)
    return places


def draw(results: Mapping[str, "Result"], folder: Path) -> list[Path]:
    """Draw what there is to draw.

    Args:
        results: runs by label.
        folder: where the PNG files go; it must exist.

    Returns:
        The files: ``ranks.png`` (runs that ranked components), ``freezing.png`` (runs that froze matrices) and
        ``budget.png`` (runs with a policy); a file nothing belongs in is left out.
    """
    import matplotlib

    with matplotlib.rc_context(
        {
            "figure.dpi": 140,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.edgecolor": "#b8b6ad",
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "text.color": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        drawn = [_ranks(results, folder), _freezing(results, folder), _budget(results, folder)]
    return [path for path in drawn if path is not None]


def _figure(rows: int, width: float, height: float) -> tuple[Any, list["Axes"]]:
    # Not pyplot: it keeps global state, and wants a display's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False)
    return figure, [axes[i][0] for i in range(rows)]


def _ranks(results: Mapping[str, "Result"], folder: Path) -> Path | None:
    pruned = {label: r for label, r in results.items() if any(x.rank != x.initial_rank for x in r.summary.layers)}
    if not pruned:
        return None
    cells = {
        label: {x.name: (x.rank or 0, x.initial_rank or 0) for x in result.summary.layers}
        for label, result in pruned.items()
    }
    titles = {label: f"{label}: {_ranked(table)}, mean {_mean(table):.1f}" for label, table in cells.items()}
    return _heat_maps(
        folder / "ranks.png",
        {
            titles[label]: {name: (float(rank), str(rank)) for name, (rank, _) in table.items()}
            for label, table in cells.items()
        },
        # Up to what a method began with, or has grown to: one of rank 1000 would leave all others pale.
        tops={titles[label]: float(max(max(pair) for pair in table.values())) for label, table in cells.items()},
        label="rank in the end",
        colours="YlGnBu",
    )


def _ranked(table: Mapping[str, tuple[int, int]]) -> str:
    begun = max(initial for _, initial in table.values())
    grown = any(rank > initial for rank, initial in table.values())
    return f"rank in the end, begun at {begun}" if grown else f"rank kept of {begun}"


def _mean(table: Mapping[str, tuple[int, int]]) -> float:
    return sum(rank for rank, _ in table.values()) / len(table)


def _freezing(results: Mapping[str, "Result"], folder: Path) -> Path | None:
    tables = {}
    for label, result in results.items():
        frozen = {name for layer in result.summary.layers for name in _matrices(layer.name, layer.frozen)}
        if not frozen:
            continue
        when = {name: d.step for d in result.history for name in d.lost}
        table: dict[str, tuple[float, str]] = {}
        for name in sorted(frozen):
            # Matrices that froze together stand in the history by their layer's name.
            step = when.get(name, when.get(name.rpartition(".")[0], 0))
            table[name] = (float(step), str(step))
        tables[f"{label}: step at which each matrix froze (of {result.steps})"] = table
    if not tables:
        return None
    last = max(value for table in tables.values() for value, _ in table.values())
    tops = dict.fromkeys(tables, last)
    return _heat_maps(folder / "freezing.png", tables, tops=tops, label="optimizer step", colours="YlOrBr")


def _matrices(layer: str, frozen: Sequence[str]) -> list[str]:
    return [f"{layer}.{matrix}" for matrix in frozen]


def _heat_maps(
    path: Path,
    tables: Mapping[str, Mapping[str, tuple[float, str]]],
    *,
    tops: Mapping[str, float],
    label: str,
    colours: str,
) -> Path:
    """One map for each table, coloured from 0 to its top."""
    import numpy as np

    places = {title: grid_of(list(table)) for title, table in tables.items()}
    rows = {title: _in_order(place) for title, place in places.items()}
    columns = max(block for place in places.values() for _, block in place.values()) + 1
    height = sum(0.30 * len(r) + 0.75 for r in rows.values()) + 0.3
    figure, axes = _figure(len(tables), max(7.2, 3.6 + 0.5 * columns), height)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        top = tops[title] or 1.0
        values = np.full((len(rows[title]), columns), np.nan)
        for name, (value, text) in table.items():
            module, block = places[title][name]
            row = rows[title].index(module)
            values[row, block] = value
            dark = value > 0.6 * top
            axis.text(block, row, text, ha="center", va="center", fontsize=8, color="white" if dark else _INK)
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=top)
        axis.set_title(title, loc="left")
        axis.set_yticks(range(len(rows[title])), rows[title])
        axis.set_xticks(range(columns))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(-0.5, columns), minor=True)
        axis.set_yticks(np.arange(-0.5, len(rows[title])), minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="minor", length=0)
        figure.colorbar(image, ax=axis, label=label, pad=0.02).outline.set_visible(False)
    axes[-1].set_xlabel("transformer block")
    figure.savefig(path)
    return path


def _in_order(places: Mapping[str, tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(module for module, _ in places.values()))


def _budget(results: Mapping[str, "Result"], folder: Path) -> Path | None:
    curves = {}
    for label, result in results.items():
        indices = sorted({d.policy for d in result.history})
        for index in indices:
            name = label if len(indices) == 1 else f"{label}, policy {index}"
            curves[name] = [d for d in result.history if d.policy == index], result
    if not curves:
        return None
    figure, axes = _figure(len(curves), 6.4, 1.75 * len(curves) + 0.5)
    for axis, (label, (decisions, result)) in zip(axes, curves.items(), strict=True):
        units = decisions[0].units
        steps = [0, *(d.step for d in decisions), result.steps]
        before = decisions[0].before
        planned = [before, *(d.budget for d in decisions), decisions[-1].budget]
        kept = [before, *(d.kept for d in decisions), decisions[-1].kept]
        axis.step(steps, planned, where="post", color="#b8b6ad", linewidth=4, label="planned")
        axis.step(steps, kept, where="post", color="#0b6e99", linewidth=1.5, label="kept")
        back = [(d.step, d.kept) for d in decisions if d.returned]
        if back:
            axis.plot(
                [s for s, _ in back], [k for _, k in back], "|", color="#d9730d", markersize=7, label="units came back"
            )
        axis.set_title(f"{label}: {units} units", loc="left")
        axis.set_ylim(0, units * 1.06)
        axis.set_xlim(0, result.steps)
        axis.set_ylabel("units kept")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0, ncols=3)
    axes[-1].set_xlabel("optimizer step")
    path = folder / "budget.png"
    figure.savefig(path)
    return path
