"""Rows that aim at one target and end with different numbers of parameters: their scores are not of one size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TENTH = 1.1


def unequal_sizes(
    methods: Sequence[Mapping[str, Any]], labels: Sequence[str], sizes: Sequence[float | None]
) -> Iterator[str]:
    """Tell of each target whose rows differ in size by more than a tenth.

    Args:
        methods: of the rows, as plain data.
        labels: of the rows.
        sizes: trainable parameters of the rows at the end; None for a row that is not done.
    """
    rows: dict[float, list[tuple[float, str]]] = {}
    for method, label, size in zip(methods, labels, sizes, strict=True):
        target = target_of(method)
        if target is not None and size:
            rows.setdefault(target, []).append((size, label))
    for target, found in rows.items():
        (least, smallest), (most, largest) = min(found), max(found)
        if most > _TENTH * least:
            yield (
                f"Rows of one target ({target:g}) end with {least:,.0f} ({smallest}) to {most:,.0f} ({largest}) "
                "trainable parameters: their scores are not of one size."
            )


def target_of(method: Mapping[str, Any]) -> float | None:
    """Return a method's target: that of its scheduler, or its rank if it allocates nothing; None if it has neither."""
    scheduler, parameterization = method.get("scheduler"), method.get("parameterization")
    part, key = (scheduler, "target") if scheduler else (parameterization, "rank")
    value = part.get(key) if isinstance(part, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
