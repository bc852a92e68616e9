"""What a cell takes from other cells: a `Need` names them and a rule, and `settle` fills it in once they are done.

For example, a control row's cell needs the cell of the row that it controls: the rule "allocation" reads the ranks that
one ended with, and writes them into this one's method. Which cells a cell needs is known before anything runs, and they
are part of its key; what they came to is known when they are done, and it depends on their results alone, so that a
study that was killed settles the same cell as one that was not.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.files import CellResult, read_result
from lrkit.study.store import read_object

if TYPE_CHECKING:
    from lrkit.study.cell import Cell


def _texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True)
class Need:
    """What a cell takes from other cells.

    Args:
        rule: the name of the rule that makes something of their results, in `rules`.
        cells: their keys, in the order that the rule takes them in.
        settings: what else the rule goes by, as plain data.
    """

    rule: str
    cells: tuple[str, ...] = attrs.field(converter=_texts)
    settings: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Source:
    """A cell that is done, as a rule sees it.

    Args:
        key: the name of its folder.
        config: its ``config.json``, in which ``method`` and ``run`` are those that were trained.
        result: its result.
    """

    key: str
    config: Mapping[str, Any]
    result: CellResult


Rule = Callable[["Cell", Sequence[Source], Mapping[str, Any]], "Cell"]
"""Takes a cell, the cells that it needs and the need's settings; returns the cell with what follows from them filled in."""


def rules() -> Mapping[str, Rule]:
    """Return the rules by name."""
    from lrkit.study.choosing import chosen, of_chosen
    from lrkit.study.controls import allocated
    from lrkit.study.proposing import proposed

    return {"allocation": allocated, "chosen": chosen, "of-chosen": of_chosen, "proposed": proposed}


def needs_from(plain: Sequence[Any]) -> tuple[Need, ...]:
    """Make needs from plain data, or take them as they are."""
    return tuple(each if isinstance(each, Need) else Need(**each) for each in plain)


def settle(cell: "Cell", cells: Path) -> "Cell":
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
