"""A controller as the record that a checkpoint holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrkit.loop.run import BESIDE
from lrkit.loop.state import Saved, SavedPolicy

if TYPE_CHECKING:
    from lrkit.loop.controller import Controller


def saved(loop: "Controller", method: dict[str, Any], head: Sequence[str], base: Any) -> Saved:
    """Return everything that the loop remembers beside its tensors. Arguments as in `Saved`."""
    loop.tally.settle(loop.step)
    sums = loop.tally.totals
    policies = [(state.statistics.observations, state.ended) for state in loop.policies]
    return Saved(
        method=method,
        targets=tuple(loop.run.modules),
        head=tuple(head),
        ranks=loop.ranks.now(),
        step=loop.step,
        total_steps=loop.total_steps,
        seed=loop.seed,
        policies=tuple(SavedPolicy(observations=seen, ended=ended) for seen, ended in policies),
        history=tuple(loop.history),
        components=dict(loop.ranks.components),
        numbered=dict(loop.ranks.numbered),
        sums={name: sums[name] for name in loop.run.modules},
        dead=None if loop.liveness.dead is None else tuple(loop.liveness.dead),
        beside=sums[BESIDE],
        base=base,
    )
