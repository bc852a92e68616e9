"""The figures by layer: ranks at the end, when matrices froze, and how long each trained if they came back."""

import math
import re
import statistics
from collections.abc import Iterator

from markupsafe import Markup

from lrkit.study.charts import Cell, grid_of, heat_map
from lrkit.study.comebacks import comebacks, switches, training
from lrkit.study.report.figures import Figures, Panel, Panels
from lrkit.study.report.view import View


def ranks(view: View, task: str) -> Figures:
    """Draw the rank that each layer has at the end; rows that keep theirs are told in words."""
    tables: dict[int, dict[str, list[int]]] = {}
    initial: dict[int, int] = {}
    told: list[tuple[int, str]] = []
    for row in view.rows:
        layers = [layer for cell in view.cells(row, task) if cell.result for layer in cell.result.layers]
        ranked = [layer for layer in layers if layer.rank is not None]
        if not ranked:
            continue
        if all(layer.rank == layer.initial_rank for layer in ranked):
            kept = sorted({layer.rank for layer in ranked if layer.rank is not None})
            shown = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
            told.append((row, f"keeps rank {shown} in every layer."))
            continue
        initial[row] = max(max(layer.initial_rank or 0, layer.rank or 0) for layer in ranked)
        for layer in ranked:
            tables.setdefault(row, {}).setdefault(layer.name, []).append(layer.rank or 0)
    top = max(initial.values(), default=0)
    panels = []
    for row, table in tables.items():
        cells = {}
        for name, found in table.items():
            mean = statistics.fmean(found)
            text = f"{name}: {mean:.2f} on average ({', '.join(map(str, found))})"
            cells[name] = Cell(mean, _short(mean), text)
        mean = statistics.fmean(cell.value for cell in cells.values())
        svg = Markup(heat_map(cells, top=top))
        decided = [decision for cell in view.cells(row, task) for decision in cell.decisions]
        when = ", decided before step 1" if decided and not any(decision.step for decision in decided) else ""
        panels.append(Panel(svg=svg, row=row, aside=f"mean {mean:.2f} of {initial[row]}{when}"))
        told += [(row, text) for text in _returns(view, row, task)]
    if not panels and not told:
        return []
    caption = "Components kept at the end, mean over seeds, by transformer block and module." if panels else ""
    return [Panels(panels=panels, caption=caption, notes=told, width=_widest(panels))]


def _returns(view: View, row: int, task: str) -> Iterator[str]:
    """Say how many components came back after they were cut, if a decision could have brought some back."""
    runs = [cell.decisions for cell in view.cells(row, task) if cell.result is not None]
    counts = [comebacks(run) for run in runs if len({d.step for d in run if d.lost or d.returned}) > 1]
    if counts:
        lost, back, kept = (statistics.fmean(each) for each in zip(*counts, strict=True))
        yield f"lost {lost:.1f} components, of which {back:.1f} came back and {kept:.1f} stayed (means over seeds)."


def freezing(view: View, task: str) -> Figures:
    """Draw the step after which each matrix was frozen."""
    panels = []
    last = max((cell.steps for cell in view.record.cells), default=0)
    for row in view.rows:
        steps, done = _frozen(view, row, task)
        adapted = [layer.name for cell in view.cells(row, task) if cell.result for layer in cell.result.layers]
        for matrix in sorted(steps):
            cells = {}
            touched = {grid_of([name])[name][0] for name in steps[matrix]}
            for name in dict.fromkeys(adapted):
                if grid_of([name])[name][0] not in touched:
                    continue  # a module of which this matrix never freezes does not train it
                froze = steps[matrix].get(name, [])
                mean = statistics.fmean(froze) if froze else math.nan
                told = f"froze at step {mean:.1f} on average" if froze else "never froze"
                text = f"{mean:.0f}" if froze else "–"
                cells[name] = Cell(mean, text, f"{name}.{matrix}: {told} ({len(froze)} of {done} seeds)")
            svg = Markup(heat_map(cells, top=last, colour="warm"))
            panels.append(Panel(svg=svg, row=row, title=f", {matrix}"))
    caption = f"Step of {last:,} after which each matrix was frozen, mean over the seeds in which it was."
    return [Panels(panels=panels, caption=caption, width=_widest(panels))] if panels else []


def switching(view: View, task: str) -> Figures:
    """Draw the share of steps in which each layer trained, for rows whose units stop and train again."""
    panels = []
    for row in view.rows:
        found: dict[str, list[float]] = {}
        for cell in view.cells(row, task):
            layers = [layer.name for layer in cell.result.layers] if cell.result else []
            for name, share in training(cell.decisions, cell.steps, layers).items():
                found.setdefault(name, []).append(share)
        if found:
            means = {name: statistics.fmean(shares) for name, shares in found.items()}
            cells = {
                name: Cell(
                    mean, f"{mean:.0%}", f"{name}: trained in {mean:.1%} of the steps, mean of {len(found[name])} seeds"
                )
                for name, mean in means.items()
            }
            aside = f"mean {statistics.fmean(means.values()):.0%}"
            panels.append(Panel(svg=Markup(heat_map(cells, top=1.0, colour="warm")), row=row, aside=aside))
    caption = "Share of the steps in which each layer trained, mean over seeds: its units stopped, and came back."
    return [Panels(panels=panels, caption=caption, width=_widest(panels))] if panels else []


def _frozen(view: View, row: int, task: str) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return the steps by matrix and layer, one for each seed in which it froze, and how many seeds are done."""
    steps: dict[str, dict[str, list[int]]] = {}
    done = 0
    for cell in view.cells(row, task):
        if cell.result is None:
            continue
        if switches(cell.decisions):
            continue  # they come back: see `switching`
        done += 1
        when: dict[str, int] = {}
        for decision in cell.decisions:
            for name in decision.lost:
                when.setdefault(name, decision.step)
        for layer in cell.result.layers:
            for matrix in layer.frozen:
                # matrices that freeze together stand in the history by their layer's name
                step = when.get(f"{layer.name}.{matrix}", when.get(layer.name))
                if step is not None:
                    steps.setdefault(matrix, {}).setdefault(layer.name, []).append(step)
    return steps, done


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _widest(panels: list[Panel]) -> int:
    """Return the width that the widest of them needs."""
    widths = [
        int(float(found.group(1))) for panel in panels if (found := re.match(r'<svg width="([\d.]+)"', panel.svg))
    ]
    return max(widths, default=320)
