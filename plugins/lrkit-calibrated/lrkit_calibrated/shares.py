"""Whole numbers that share out a budget: by importance, and between a least and a most."""

import math
from collections.abc import Sequence


def shares_of(importance: Sequence[float], total: float) -> list[float]:
    """Return `total` in proportion to importance; in equal shares if nothing matters.

    Args:
        importance: one number each; those that are negative or not finite count as zero.
        total: the sum of the shares.
    """
    weights = [value if math.isfinite(value) and value > 0 else 0.0 for value in importance]
    whole = sum(weights)
    return [total * value / whole if whole else total / len(weights) for value in weights]


def filled(importance: Sequence[float], budget: int, least: int, most: int) -> list[int]:
    """Share out a budget exactly, in proportion to importance, by water-filling and largest remainders.

    What is above `most` or below `least` is put there, and the rest is shared out anew among the others, until all lie
    between. Then shares are rounded down, and the largest remainders get one more; of equal ones the earlier.

    Args:
        importance: as in `shares_of`.
        budget: the sum of the numbers, if it lies between the least and the most for all; otherwise they are all that.
        least: the smallest number.
        most: the largest.
    """
    count = len(importance)
    budget = min(max(budget, least * count), most * count)
    fixed: dict[int, int] = {}
    free = list(range(count))
    shares: list[float] = []
    while free:
        left = budget - sum(fixed.values())
        shares = shares_of([importance[i] for i in free], left)
        above = sum(max(0.0, share - most) for share in shares)
        below = sum(max(0.0, least - share) for share in shares)
        if not above and not below:
            break
        # As much as lies beyond one bound is what the others get or give: the farther bound is settled first.
        ends = {i: most for i, share in zip(free, shares, strict=True) if share > most}
        if below > above:
            ends = {i: least for i, share in zip(free, shares, strict=True) if share < least}
        fixed |= ends
        free = [i for i in free if i not in ends]
    numbers = [fixed.get(i, 0) for i in range(count)]
    down = [math.floor(share) for share in shares] if free else []
    rest = budget - sum(fixed.values()) - sum(down)
    order = sorted(range(len(free)), key=lambda i: down[i] - shares[i])
    for i, at in enumerate(free):
        numbers[at] = down[i]
    for i in order[:rest]:
        numbers[free[i]] += 1
    return numbers


def saturated(importance: Sequence[float], budget: int, least: int, most: int) -> list[int]:
    """Share out a budget as FIM-LoRA's released code does: those at `most` first, and `least` at the very end.

    If a share is raised to `least`, the others that are not full give what that takes, the least important first. The sum is
    the budget, but where the bounds or full ones leave too little for the rest. Arguments as in `filled`.
    """
    weights = [max(value, 1e-10) if math.isfinite(value) else 1e-10 for value in importance]
    numbers = [0] * len(weights)
    free, left = list(range(len(weights))), budget
    while full := [i for i, share in _shares(weights, free, left) if math.floor(share) >= most]:
        for i in full:
            numbers[i] = most
        left -= most * len(full)
        free = [i for i in free if i not in full]
    shares = dict(_shares(weights, free, left))
    down = {i: math.floor(share) for i, share in shares.items()}
    rest = left - sum(down.values())
    for place, i in enumerate(sorted(free, key=lambda i: down[i] - shares[i])):
        numbers[i] = down[i] + (place < rest)
    lack = sum(max(0, least - numbers[i]) for i in free)
    for i in sorted(free, key=weights.__getitem__):
        given = min(max(0, numbers[i] - least), lack)
        numbers[i] = max(least, numbers[i] - given)
        lack -= given
    return numbers


def _shares(weights: Sequence[float], among: Sequence[int], total: float) -> list[tuple[int, float]]:
    whole = sum(weights[i] for i in among)
    return [(i, total * weights[i] / whole) for i in among]
