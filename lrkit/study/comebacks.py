"""Units that came back: how many, and in what share of the steps each layer trained. No torch here."""

from collections.abc import Sequence

from lrkit.loop.history import Decision


def switches(history: Sequence[Decision]) -> set[int]:
    """Return the policies of which units of whole matrices came back: they stopped training, and trained again."""
    return {d.policy for d in history if any("[" not in name for name in d.returned)}


def comebacks(history: Sequence[Decision]) -> tuple[int, int, int]:
    """Count the units that were lost, those of them that came back, and those of these that were kept at the end.

    A unit counts once, however often it was lost. For example, a is lost, comes back and is lost again, and b is lost and
    comes back: (2, 2, 1).

    Args:
        history: a run's decisions, in order.
    """
    lost: set[tuple[int, str]] = set()
    back: set[tuple[int, str]] = set()
    away: set[tuple[int, str]] = set()
    for d in history:
        going, coming = {(d.policy, name) for name in d.lost}, {(d.policy, name) for name in d.returned}
        lost, back, away = lost | going, back | coming, (away | going) - coming
    return len(lost), len(back), len(back - away)


def training(history: Sequence[Decision], steps: int, layers: Sequence[str]) -> dict[str, float]:
    """Return the share of a run's steps in which each layer trained, if units of whole matrices came back in it.

    A layer of which several matrices stopped has their mean; a unit may also be a block with several layers. Nothing is
    returned for a run in which no such unit came back: its units stopped at one step each.

    Args:
        history: the run's decisions, in order.
        steps: its length.
        layers: names of its layers.
    """
    switching = switches(history)
    away: dict[str, int] = {}
    since: dict[str, int] = {}
    for d in history:
        if d.policy in switching:
            since |= dict.fromkeys(d.lost, d.step)
            for name in d.returned:
                away[name] = away.get(name, 0) + d.step - since.pop(name)
    for name, step in since.items():
        away[name] = away.get(name, 0) + steps - step
    found = {}
    for layer in layers if switching else ():
        mine = [n for name, n in away.items() if f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}.")]
        found[layer] = 1 - sum(mine) / max(1, len(mine)) / max(1, steps)
    return found
