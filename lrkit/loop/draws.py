"""Chance: numbers that follow from the run's seed, the step and the policy, and from nothing else.

No generator is advanced from decision to decision. So every process draws the same, a resumed run draws what the
undisturbed one would have drawn, and a draw changes no other random number of the program.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lrkit.units import Block

_BYTES = 3  # a float32 holds 24 bits


def seed_of(run: int, step: int, policy: int) -> int:
    """Return the seed of one decision, from 0 to 2^63 - 1.

    Args:
        run: the run's seed.
        step: the optimizer step just taken.
        policy: the policy's place in ``method.policies``.
    """
    return int.from_bytes(hashlib.sha256(f"{run} {step} {policy}".encode()).digest()[:8], "big") >> 1


def uniform(seed: int, blocks: Sequence[Block]) -> Tensor:
    """Draw one number in [0, 1) for each unit, float32 [units] on the CPU.

    A unit's number follows from the seed, its block's name and its own number alone: it stays the same if other units
    are cut, frozen or added, and whatever the layout.

    Args:
        seed: the decision's.
        blocks: the policy's units.
    """
    weights = torch.tensor([2.0**-8, 2.0**-16, 2.0**-24])
    drawn = []
    for block in blocks:
        numbers = torch.tensor(range(block.count) if block.numbers is None else block.numbers, dtype=torch.long)
        if len(numbers):
            # An output of any length: the first n numbers are the same whatever n is.
            stream = hashlib.shake_256(f"{seed} {block.name}".encode()).digest(_BYTES * (int(numbers.max()) + 1))
            each = torch.frombuffer(bytearray(stream), dtype=torch.uint8).view(-1, _BYTES)
            drawn.append((each[numbers] * weights).sum(dim=1))
    return torch.cat(drawn) if drawn else torch.zeros(0)
