"""Ask how a parameterization learns: what gets a gradient, whether the loss goes down, and what is random."""

import random
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lrkit.method import Method
from lrkit.testing.base import clause
from lrkit.testing.findings import calling, expect
from lrkit.testing.parameterization.clauses import ParameterizationClauses
from lrkit.testing.parameterization.subjects import attached, stirred
from lrkit.testing.runs import Run, is_rate
from lrkit.testing.tiny import batch


class Learning(ParameterizationClauses):
    """The clauses about the first steps of a training."""

    @clause
    def test_every_trained_parameter_learns(self, component: Any) -> None:
        """Within three steps each tensor that trains gets a gradient that is not zero, and what is fixed does not move."""
        run = Run(Method(parameterization=component), 10)
        # In a layer of rank 0 nothing trains.
        parameters = {n: p for n, p in run.adapted.named_parameters() if p.requires_grad}
        expect(run.adapted.adapter_parameters(), "nothing trains")
        fixed = {n: p.detach().clone() for n, p in run.model.named_parameters() if n not in parameters}
        learns: set[str] = set()
        for _ in range(3):
            x, labels = batch()
            with calling("forward or backward"):
                (F.cross_entropy(run.model(x), labels) + run.adapted.penalty()).backward()  # type: ignore[no-untyped-call]
            learns |= {n for n, p in parameters.items() if p.grad is not None and bool((p.grad != 0).any())}
            bad = [n for n, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            expect(not bad, f"the gradient of {', '.join(bad[:2])} is not finite")
            run.optimizer.step()
            run.optimizer.zero_grad()
        idle = [name for name in parameters if name not in learns]
        expect(
            not idle,
            f"{len(idle)} tensors that train have had no gradient but zero in 3 steps, such as {', '.join(idle[:2])}",
        )
        for name, p in run.model.named_parameters():
            expect(name not in fixed or torch.equal(p, fixed[name]), f"{name} is fixed, and it has moved")

    @clause
    def test_loss_goes_down(self, component: Any) -> None:
        """At its `learning_rate`, without the head's help, the loss on one batch goes down."""
        rate = component.learning_rate
        expect(is_rate(rate), f"learning_rate must be above 0, not {rate!r}")
        losses = Run(Method(parameterization=component), 25, train_also=()).to(25)
        expect(
            min(losses[-5:]) < losses[0],
            f"after 25 steps of AdamW at {rate:g} the loss is {min(losses[-5:]):.4f}, at first it was {losses[0]:.4f}",
        )

    @clause
    def test_same_seed_same_start(self, component: Any) -> None:
        """The random start is drawn from torch's global generator alone, and evaluation is not random at all."""
        model, _ = attached(component)
        random.random()
        np.random.random()
        twin, _ = attached(component)
        ours, theirs = model.state_dict(), twin.state_dict()
        odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        expect(not odd, f"with the same seed {', '.join(odd[:2])} starts differently: draw from torch's generator")
        model, _ = stirred(component)
        x, _ = batch()
        first = model(x)
        expect(torch.equal(first, model(x)), "in evaluation the same input gives other outputs the second time")
