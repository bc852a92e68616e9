"""What a cell takes from other cells: a `Need` names them and a rule, which fills it in once they are done.

For example, a control row's cell needs the cell of the row that it controls: the rule "allocation" reads the ranks that
one ended with, and writes them into this one's method. Which cells a cell needs is known before anything runs, and they
are part of its key; what they came to is known when they are done, and it depends on their results alone, so that a
study that was killed settles the same cell as one that was not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lrkit.study.files import CellResult


def _texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True)
class Need:
    """What a cell takes from other cells.

    Args:
        rule: the name of the rule that makes something of their results, in `lrkit.study.settling`.
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


def needs_from(plain: Sequence[Any]) -> tuple[Need, ...]:
    """Make needs from plain data, or take them as they are."""
    return tuple(each if isinstance(each, Need) else Need(**each) for each in plain)
