"""Chance: the random metric, a ballot's generator, and what they follow from."""

import hashlib
from typing import ClassVar

import attrs
import models
import pytest
import torch

import lrkit
from lrkit.actions import Ballot, Prune, Verdict, best
from lrkit.loop.draws import seed_of, uniform
from lrkit.metrics import Parts, Random
from lrkit.testing import ActionContract, MetricContract

STEPS = 10


@attrs.frozen(kw_only=True)
class Raffle(Prune):
    """Any components may stay. Source: this test."""

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep as many as the budget says, at random."""
        chance = torch.rand(len(ballot.scores), generator=ballot.generator)
        return Verdict(best(attrs.evolve(ballot, scores=chance)))


class TestRandom(MetricContract):
    """Lrkit's own contract, in full."""

    component: ClassVar = Random()


class TestRaffle(ActionContract):
    """An action that draws keeps the contract of actions."""

    component: ClassVar = Raffle()


def method(**changes):
    base = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=2, interval=1)
    return attrs.evolve(base, **{"metric": Random(), **changes})


def start(chosen, seed):
    model = models.make("bert", seed=1)
    torch.manual_seed(seed)
    adapted = lrkit.attach(model, chosen)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    return model, adapted, optimizer


def go(started, until=STEPS):
    model, adapted, optimizer = started
    for step in range(adapted.step, until):
        (model(**models.batch(seed=step, rows=4)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def kept(adapted, policy=0):
    return adapted.controller.policies[policy].kept.clone()


def by_hash(seed, name, number):
    """The definition, in whole numbers: three bytes of one long hash."""
    stream = hashlib.shake_256(f"{seed} {name}".encode()).digest(3 * (number + 1))
    return int.from_bytes(stream[-3:], "big") / 2**24


def test_draws_follow_from_names():
    """Each unit's number is that of its definition, whatever other units there are."""
    adapted = lrkit.attach(models.make("bert", seed=1), method())
    blocks = adapted.controller.policies[0].blocks
    seed = seed_of(3, 5, 0)
    drawn = dict(zip([n for b in blocks for n in b.unit_names()], uniform(seed, blocks).tolist(), strict=True))
    assert drawn == {f"{b.name}[{i}]": by_hash(seed, b.name, i) for b in blocks for i in range(b.count)}
    fewer = [attrs.evolve(blocks[2], count=2, numbers=(1, 3)), attrs.evolve(blocks[0], count=1, numbers=(9,))]
    want = [drawn[f"{blocks[2].name}[1]"], drawn[f"{blocks[2].name}[3]"], by_hash(seed, blocks[0].name, 9)]
    assert uniform(seed, fewer).tolist() == want
    assert len(uniform(seed, [])) == 0


def test_draws_are_uniform():
    """Mean, variance and the least and largest of many draws are those of a uniform number in [0, 1)."""
    block = attrs.evolve(lrkit.attach(models.make("bert"), method()).controller.policies[0].blocks[0], count=200_000)
    drawn = uniform(1, [block]).double()
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.003
    assert abs(drawn.var() - 1 / 12) < 0.001


def test_scores_are_the_draws():
    """A decision's threshold is the lowest draw that is kept, in whatever groups units are laid out."""
    adapted = go(start(method(), seed=7))
    (state,) = adapted.controller.policies
    for decision in adapted.history:
        drawn = uniform(seed_of(7, decision.step, 0), state.blocks)
        assert decision.threshold == drawn.sort(descending=True).values[decision.kept - 1].item()
        last = drawn
    assert torch.equal(state.kept, last >= decision.threshold)


def test_seed_step_and_policy_matter():
    """Another seed, step or policy is another draw; the same are the same draw."""
    seeds = [seed_of(*each) for each in ((1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 1), (12, 0, 0), (1, 20, 0))]
    assert len(set(seeds)) == len(seeds)
    twice = [kept(go(start(method(), seed=s))) for s in (5, 5, 6)]
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(twice[0], twice[2])
    also = method()
    both = go(start(attrs.evolve(also, also=(also.policies[0],)), seed=5))
    assert not torch.equal(kept(both, 0), kept(both, 1))
    assert any(d.returned for d in both.history)


@pytest.mark.parametrize("action", [Prune(), Prune(cut="always"), lrkit.actions.Freeze()])
def test_resumed_chance_is_the_same(action):
    """A run that is resumed in a process with another seed draws what the undisturbed one draws."""
    chosen = method(action=action, scheduler=lrkit.schedulers.Cubic(target=0.5, warmup=2, final=2, interval=1))
    whole, half = go(start(chosen, seed=5)), go(start(chosen, seed=5), until=5)
    again = start(chosen, seed=99)
    again[1].load_state_dict(half.state_dict())
    resumed = go(again)
    names = [[(d.step, d.kept, d.lost, d.returned) for d in a.history] for a in (whole, resumed)]
    assert names[0] == names[1]


def test_nothing_is_drawn_from_torch():
    """To attach and decide by chance leaves torch's own generator where it was without it."""
    after = []
    for chosen in (method(), method(metric=lrkit.metrics.Magnitude())):
        go(start(chosen, seed=5))
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_no_gradient_is_asked():
    """Random scores are there without gradients, buffers or observations."""
    assert Random().buffers == ()
    with pytest.raises(lrkit.LrkitError, match="no draws"):
        Random().reduce(Parts([torch.zeros(1, 2, 3)]))
