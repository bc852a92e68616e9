"""Fill in a cell that takes something from other cells, once these are done: `settle`, by the rules that its needs name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.cell import Cell
from lrkit.study.choosing import chosen, promoted, proposed, winner_of
from lrkit.study.controls import allocated
from lrkit.study.files import read_result
from lrkit.study.needs import Source
from lrkit.study.store import read_object

Rule = Callable[[Cell, Sequence[Source], Mapping[str, Any]], Cell]
"""Takes a cell, the cells that it needs and the need's settings; returns the cell with what follows from them filled in."""


def rules() -> Mapping[str, Rule]:
    """Return the rules by name."""
    return {
        "allocation": allocated,
        "chosen": chosen,
        "of-chosen": of_chosen,
        "promoted": promoted,
        "proposed": proposed,
    }


def of_chosen(cell: Cell, sources: Sequence[Source], settings: Mapping[str, Any]) -> Cell:
    """Hand the trial that was chosen, with one of its seeds, to another rule: the rule "of-chosen".

    Args:
        cell: the cell.
        sources: the trials of another row, as in `chosen`.
        settings: as in `chosen`; further ``which``, the index of the seed; ``rule``, the other rule, and ``of_rule``, its
            settings.
    """
    winner, _ = winner_of(sources, settings)
    source = sources[winner * settings["seeds"] + settings["which"]]
    return rules()[settings["rule"]](cell, [source], settings["of_rule"])


def settle(cell: Cell, cells: Path) -> Cell:
    """Fill in everything that a cell takes from others.

    Args:
        cell: the cell.
        cells: the folder that holds the cells' folders.

    Returns:
        The same cell without needs: what is trained.

    Raises:
        LrkitError: a cell that it needs is not done, or they do not come to anything that it can train.
    """
    for need in cell.needs:
        sources = [source_in(cells / key) for key in need.cells]
        cell = rules()[need.rule](cell, sources, need.settings)
    return attrs.evolve(cell, needs=())


def source_in(folder: Path) -> Source:
    """Read a cell that is done. Raise LrkitError if it is not."""
    result = read_result(folder / "result.json")
    config = read_object(folder / "config.json", "a cell's configuration")
    if result is None or config is None:
        raise LrkitError(f"it needs the cell {folder.name}, which is not done")
    return Source(key=folder.name, config=config, result=result)
