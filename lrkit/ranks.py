"""Ranks by layer: a table that says how many rank components each layer begins with. No torch here.

A parameterization's ``rank`` is an int, the same for every layer, or such a table. An entry names its layers as PEFT's
``rank_pattern`` does: by a name, by its last components (``"query"``, ``"attention.output.dense"``), or by a regular
expression that matches the name's end; ``"*"`` is for all layers that no other entry names. If several entries match a
layer, the nearest one counts, in whatever order they are written: its own name, then the longest run of last components,
then a regular expression, then ``"*"``. For example ``{"query": 8, "0.attention.self.query": 2, "*": 0}`` gives the first
block's query 2, every other query 8, and the rest nothing.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from lrkit.errors import LrkitError, listing, nearest, pattern, quoted, shown
from lrkit.patterns import compiled
from lrkit.settings import whole

REST = "*"
"""The entry for all layers that no other one names."""
MOST = 65_536
"""The highest rank."""

Rank = int | Mapping[str, int]
"""One rank for every layer, or a table of layer or pattern to rank."""
ScaleBy = Literal["own-rank", "mean-rank"]
"""The r in α/r if ranks differ: each layer's own, or the mean over all adapted layers."""
SCALES: tuple[ScaleBy, ...] = ("own-rank", "mean-rank")
Scale = Literal["rank", "sqrt-rank"]
"""The scale's divisor: r, as in LoRA, or √r, as in rsLoRA (arXiv 2312.03732)."""
DIVISORS: tuple[Scale, ...] = ("rank", "sqrt-rank")

_PLAIN = re.compile(r"[\w.-]+")
_ENTRIES = 100_000


def _copied(given: Mapping[str, int]) -> dict[str, int]:
    return dict(_entries(given))


@attrs.frozen(eq=False, repr=False, slots=False)
class Ranks(Mapping[str, int]):
    """A table of ranks that cannot be changed. Two are equal if their entries are, as for any mapping.

    Args:
        mapping: layer or pattern to rank, from 0 to 65,536.

    Raises:
        LrkitError: no entries, a key that is no name or pattern, or a value that is no rank.
    """

    _mapping: Mapping[str, int] = attrs.field(converter=_copied)

    def __getitem__(self, entry: str) -> int:
        return self._mapping[entry]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __eq__(self, other: object) -> bool:
        return dict(self._mapping) == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._mapping.items()))

    def __repr__(self) -> str:
        """Return it in a few words, since a table may have hundreds of entries."""
        if len(self) <= 3:
            return f"{type(self).__name__}({self._mapping!r})"
        low, high = min(self._mapping.values()), max(self._mapping.values())
        return f"{type(self).__name__}({len(self)} entries, ranks {low} to {high})"

    def entry_of(self, layer: str) -> str | None:
        """Return the entry that counts for a layer; None if none matches.

        Raises:
            LrkitError: two regular expressions match it and say different ranks.
        """
        parts = layer.split(".")
        for begin in range(len(parts)):
            if (name := ".".join(parts[begin:])) in self._mapping and name != REST:
                return name
        found = [entry for entry in self._patterns if _matches(entry, layer)]
        if len({self._mapping[entry] for entry in found}) > 1:
            raise LrkitError(f"rank: {quoted(found[0])} and {quoted(found[1])} both match {layer}, and say other ranks")
        return found[0] if found else REST if REST in self._mapping else None

    @functools.cached_property
    def _patterns(self) -> list[str]:
        return [entry for entry in self._mapping if entry != REST and not _PLAIN.fullmatch(entry)]


def _entries(given: Any) -> Iterator[tuple[str, int]]:
    """Yield the entries of a table, and refuse what is none."""
    if not isinstance(given, Mapping):
        raise LrkitError(f"ranks must be a table of layer or pattern to rank, not {shown(given)}")
    if not given:
        raise LrkitError('ranks must have an entry, such as "*" = 8 for every layer')
    if len(given) > _ENTRIES:
        raise LrkitError(f"ranks have {len(given):,} entries; at most {_ENTRIES:,}")
    for entry, rank in given.items():
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            raise LrkitError(f"an entry of ranks must be a layer's name or a pattern, not {shown(entry)}")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= MOST:
            raise LrkitError(f"the rank of {quoted(entry)} must be an int from 0 to {MOST:,}, not {shown(rank)}")
        if entry != REST and not _PLAIN.fullmatch(entry):
            _compiled(entry)
        yield entry, rank


def _compiled(entry: str) -> re.Pattern[str]:
    return compiled(entry, "rank", r"(.*\.)?({})$")


def _matches(entry: str, layer: str) -> bool:
    """Return whether an entry but ``"*"`` matches a layer, be it the nearest or not."""
    if _PLAIN.fullmatch(entry):
        return layer == entry or layer.endswith(f".{entry}")
    return layer == entry or _compiled(entry).match(layer) is not None


# ---- of all layers ---------------------------------------------------------------------------------------------------


def ranks_of(rank: Rank, layers: Sequence[str]) -> dict[str, int]:
    """Return the rank of each of all adapted layers, in their order.

    Args:
        rank: one for all, or a table.
        layers: names of the layers.

    Raises:
        LrkitError: a layer that no entry names, or an entry that matches no layer.
    """
    return dict.fromkeys(layers, rank) if isinstance(rank, int) else dict(_of_all(as_ranks(rank), tuple(layers)))


@functools.lru_cache(maxsize=32)
def _of_all(ranks: Ranks, layers: tuple[str, ...]) -> Mapping[str, int]:
    chosen = {layer: ranks.entry_of(layer) for layer in layers}
    if missing := [layer for layer, entry in chosen.items() if entry is None]:
        raise LrkitError(
            f"rank names {len(layers) - len(missing)} of {len(layers)} adapted layers, and none of {listing(missing)}: give "
            'them ranks, or "*" = 0 to leave them without'
        )
    used = {REST, *chosen.values()}
    for entry in ranks:
        if entry not in used and not any(_matches(entry, layer) for layer in layers):
            ends = {layer.rpartition(".")[2] for layer in layers} | set(layers)
            kinds = list(dict.fromkeys(map(pattern, layers)))
            raise LrkitError(
                f"rank: {quoted(entry)} matches no adapted layer{nearest(entry, ends)}; they are {listing(kinds)}"
            )
    return {layer: ranks[entry] for layer, entry in chosen.items() if entry is not None}


def rank_at(rank: Rank, layer: str) -> int:
    """Return the rank of one layer. Raises LrkitError if a table has no entry for it."""
    if isinstance(rank, int):
        return rank
    entry = as_ranks(rank).entry_of(layer)
    if entry is None:
        raise LrkitError(f'rank has no entry for {layer}: give it one, or "*" = 0')
    return rank[entry]


def scale_rank(rank: Rank, layer: str, layers: Sequence[str], by: ScaleBy) -> float:
    """Return the r of a scale such as α/r: at least 1 by a layer's own rank, since a layer of rank 0 adds nothing anyway.

    Args:
        rank: one for all, or a table.
        layer: the layer.
        layers: names of all adapted layers, over which the mean is; those of rank 0 count.
        by: ``"own-rank"`` or ``"mean-rank"``. If the rank is one for all, both are that.
    """
    if isinstance(rank, int):
        return rank
    if by == "own-rank":
        return max(1, rank_at(rank, layer))
    every = ranks_of(rank, layers)
    return sum(every.values()) / len(every)


def divisor(rank: float, scale: Scale) -> float:
    """Return r or √r: α is divided by it. Sources: arXiv 2106.09685, section 4.1; arXiv 2312.03732, Theorem 3.2."""
    return math.sqrt(rank) if scale == "sqrt-rank" else rank


def most_of(rank: Rank) -> int:
    """Return the highest rank that a layer may begin with. Raise LrkitError if it is neither an int nor a table of ranks."""
    return rank if isinstance(rank, int) else max(as_ranks(rank).values())


# ---- as a setting ----------------------------------------------------------------------------------------------------


def as_ranks(given: Mapping[str, int]) -> Ranks:
    """Return a mapping as a table that cannot be changed; as it is if it is one."""
    return given if isinstance(given, Ranks) else Ranks(given)


def as_rank(given: Rank) -> Rank:
    """Convert a setting ``rank``: a mapping becomes a table that cannot be changed, and anything else is left as it is."""
    return as_ranks(given) if isinstance(given, Mapping) else given


def is_rank(minimum: int = 1) -> Any:
    """Accept an int from `minimum` to 65,536, or a table: the validator of a setting ``rank``."""
    check_int = whole(minimum, MOST)

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, Ranks):
            check_int(instance, attribute, value)

    return check
