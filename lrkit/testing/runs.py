"""Train the tiny model by a method, resume it, and look at the decisions that were taken."""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrkit.adapt.adapted import attach
from lrkit.loop import beginning
from lrkit.method import Method
from lrkit.testing.comparisons import differing
from lrkit.testing.findings import expect
from lrkit.testing.tiny import batch, seed_torch, tiny

POINTS = (1, 5, 9)
"""Steps to resume at, of 10 with decisions after 4, 6 and 8."""


def is_rate(rate: object) -> bool:
    """Return whether an optimizer takes this as a learning rate."""
    return isinstance(rate, int | float) and 0 < rate < math.inf


class Run:
    """A method on the tiny model, one optimizer step at a time; the same in each process and at each resume."""

    def __init__(self, method: Method, total_steps: int, *, seed: int = 0, **options: Any) -> None:
        self.model = tiny()
        seed_torch(seed)
        self.adapted = attach(self.model, method, **options)
        rate = method.parameterization.learning_rate
        rate = rate if is_rate(rate) else 1e-3  # a clause of its own says so
        self.seed, self.optimizer = seed, torch.optim.AdamW(self.adapted.parameters(), lr=rate, foreach=True)
        if beginning.batches(self.adapted.controller):
            self.adapted.calibrate([batch()], self._loss)
        self.adapted.bind(self.optimizer, total_steps=total_steps)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.model(x), labels)

    def step(self) -> float:
        """Take one optimizer step. Returns the loss before it, without the penalty."""
        seed_torch(100 + self.adapted.step)  # for dropout, the same at each resume
        loss = self._loss(batch())
        (loss + self.adapted.penalty()).backward()  # type: ignore[no-untyped-call]
        # Another seed per run, so that a draw in the optimizer's step or in a decision shows when a run is resumed.
        seed_torch(200 + 50 * self.seed + self.adapted.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def to(self, step: int) -> list[float]:
        """Take steps until so many have been taken. Returns their losses."""
        return [self.step() for _ in range(self.adapted.step, step)]

    def state(self) -> tuple[Any, Any]:
        """Return the method's state and the optimizer's."""
        return self.adapted.state_dict(), copy.deepcopy(self.optimizer.state_dict())

    def load(self, state: tuple[Any, Any]) -> None:
        """Take over what `state` gave."""
        self.adapted.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def resumes(method: Method, total_steps: int, points: Sequence[int]) -> Run:
    """Train through, and begin anew at each point from what was saved there: every tensor must be bitwise the same.

    Args:
        method: what trains.
        total_steps: length of the run.
        points: steps at which the run is saved and resumed.

    Returns:
        The run that was not interrupted.

    Raises:
        lrkit.testing.findings.Broken: a resumed run ends with another tensor, or takes another decision.
    """
    run, states = Run(method, total_steps), {}
    for step in range(total_steps):
        if step in points:
            states[step] = run.state()
        run.step()
    for point, state in states.items():
        # With another random start, so that what is not in the state cannot agree by chance.
        again = Run(method, total_steps, seed=1)
        again.load(state)
        again.to(total_steps)
        odd = differing(run.model.state_dict(), again.model.state_dict())
        expect(
            not odd,
            f"a run resumed at step {point} of {total_steps} is another one: {len(odd)} tensors differ at the end, such as "
            f'"{odd[0] if odd else ""}". What is needed to go on must lie in parameters or in a metric\'s buffers',
        )
        expect(
            run.adapted.history == again.adapted.history,
            f"a run resumed at step {point} of {total_steps} takes other decisions",
        )
    return run


def decides(run: Run, exact: bool = True) -> None:
    """Check that each decision took the scheduler's budget, and that the last one has been taken.

    Args:
        run: a run that has come to its end.
        exact: whether the action keeps just as many units as the budget; of a budget in costs as many as it has room for.

    Raises:
        lrkit.testing.findings.Broken: a decision is missing, or has another budget, or keeps another number.
    """
    method, costs = run.adapted.method, run.adapted.controller.policies[0].costs
    scheduler = method.policies[0].scheduler
    total = run.adapted.total_steps or 0
    taken = [d for d in run.adapted.history if d.policy == 0]
    times = scheduler.over(total, units=1, layers=1)
    due = [step for step in range(total + 1) if times.due(step) and step <= times.last]
    expect([d.step for d in taken] == due, f"decisions at {[d.step for d in taken]}, due {due}")
    for earlier, later in itertools.pairwise(taken):
        expect(
            later.before == earlier.kept,
            f"step {earlier.step} leaves {earlier.kept} units, and step {later.step} finds {later.before}",
        )
    for d in taken:
        budget = scheduler.over(total, units=d.whole, layers=costs.layer).budget(d.step)
        # An action that asks for no number goes by all, and one that draws a number by that.
        expect(
            d.budget == budget or (not exact and d.budget in (d.whole, d.kept)),
            f"the decision at step {d.step} has budget {d.budget}, the scheduler {budget}",
        )
        short = 0 if costs.each is None else max(costs.each) - 1
        expect(
            not exact or d.budget - short <= d.spent <= d.budget,
            f"the decision at step {d.step} keeps {d.spent} of a budget {d.budget} ({d.amount})",
        )
        if method.policies[0].action.final:
            expect(not d.returned, f"losing is final, and at step {d.step} {d.returned[0:1]} came back")
