"""The parts of AdaGradSelect that lrkit has not: a gradient's norm, and who is chosen by it (arXiv 2512.15764)."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Switch, Verdict, best
from lrkit.metrics import Parts
from lrkit.settings import one_of, real, whole


@attrs.frozen(kw_only=True)
class GradientNorm(lrkit.Metric):
    """The norm of the last gradient of all of a unit's entries, ‖g‖. Source: arXiv 2512.15764.

    A unit that does not train has the norm that it had at the end of its last step. It counts how often each unit was
    chosen, and how many decisions there were.
    """

    buffers: ClassVar[tuple[str, ...]] = ("square",)
    memory: ClassVar[tuple[str, ...]] = ("chosen", "decisions")

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Remember g² of this step."""
        torch.mul(grad, grad, out=state["square"])

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return g² [N]."""
        return state["square"].clone()

    def reduce(self, parts: Parts) -> Tensor:
        """Return the root of the sum over all entries of all parts [blocks, units]."""
        return torch.stack([part.sum(dim=-1) for part in parts]).sum(dim=0).sqrt()

    def decided(self, kept: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Count who was chosen."""
        memory["chosen"].add_(kept)
        memory["decisions"].add_(1)


@attrs.frozen(kw_only=True)
class EpsilonGreedy(Switch):
    """The best by their scores with probability ε at first; otherwise a Dirichlet draw by how often each was chosen.

    Source: arXiv 2512.15764. At decision t = 0, 1, ... the best are kept with probability ε exp(-decay · t), and with
    probability 0 from `exploration` on. Otherwise p is drawn from Dirichlet(counts + δ), and units are chosen by p.
    `by` says how the best by their scores are ranked, and nothing of the draw.

    Args:
        exploration: how many decisions there are before ε is 0.
        epsilon: ε at the first.
        decay: the rate at which ε falls per decision.
        delta: δ.
        draw: how units are chosen by p: by ``"chance"``, that is, drawn without replacement with probabilities p; or those
            with the ``"largest"`` p.
    """

    exploration: int = attrs.field(default=100, validator=whole(0))
    epsilon: float = attrs.field(default=1.0, validator=real(0.0, 1.0))
    decay: float = attrs.field(default=0.05, validator=real(0.0))
    delta: float = attrs.field(default=1.0, validator=real(0.0, above=True))
    draw: Literal["chance", "largest"] = attrs.field(default="chance", validator=one_of(("chance", "largest")))

    def decide(self, ballot: Ballot) -> Verdict:
        """Explore, or go by what was chosen before."""
        nothing = torch.zeros(len(ballot.scores))
        counts = ballot.memory.get("chosen", nothing).double().cpu()
        taken = int(ballot.memory.get("decisions", nothing).max()) if len(nothing) else 0
        chance = self.epsilon * math.exp(-self.decay * taken) if taken < self.exploration else 0.0
        if float(torch.rand((), generator=ballot.generator)) < chance:
            return Verdict(best(ballot, self.by))
        gamma = torch._standard_gamma(counts + self.delta, generator=ballot.generator)  # noqa: SLF001
        keys = gamma.clamp_min(1e-300).log()
        if self.draw == "chance":  # the largest of log p + Gumbel noise are a draw by p without replacement
            uniform = torch.rand(len(counts), generator=ballot.generator, dtype=torch.float64)
            keys = keys - (-uniform.clamp_min(1e-300).log()).log()
        return Verdict(best(attrs.evolve(ballot, scores=keys.to(ballot.scores.device))))
