"""The share of a model's blocks that is adapted, and the kinds of weights that are not: found from the parameters."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import attrs
from torch import Tensor, nn

from lrkit.errors import pattern
from lrkit.layers.dequantized import features
from lrkit.parameterizations.base import Target
from lrkit.parameterizations.lowrank import layer_shape

TOLD_FROM = 0.1
"""If more than this share of the blocks' weights is left out, a warning says so."""


@attrs.frozen
class LeftOut:
    """Weights of one kind in the blocks that nothing adapts.

    Args:
        what: their kind and place, in words.
        share: their share of the blocks' weights.
    """

    what: str
    share: float


@attrs.frozen
class Coverage:
    """How much of the blocks' weights is adapted. Weights are parameters of two dimensions or more, biases left out.

    Args:
        share: of the blocks' weights, those that are adapted or train in full.
        left_out: the others, by kind, the largest first.
    """

    share: float
    left_out: tuple[LeftOut, ...]

    def to_plain(self) -> dict[str, object]:
        """Return the same as plain data."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{percent(self.share)} of the blocks' weights adapted{self.words}"

    @property
    def words(self) -> str:
        """Say what is left out, as the end of a sentence; empty if nothing is."""
        if not self.left_out:
            return ""
        told = [f"{percent(each.share)} {each.what}" for each in self.left_out[:5]]
        rest = sum(each.share for each in self.left_out[5:])
        return "; left out: " + ", ".join(told + ([f"{percent(rest)} other things"] if rest else []))


def percent(share: float) -> str:
    """Format a share: without digits that say nothing, and 100 % or 0 % only if it is exactly that."""
    if 0 < share < 0.01 or 0.99 < share < 1:
        return f"{100 * min(max(share, 0.0001), 0.9999):.2g} %" if share < 0.5 else f"{100 * min(share, 0.9999):.4g} %"
    return f"{round(100 * share)} %"


def block_prefixes(model: nn.Module) -> list[str]:
    """Return name prefixes of the transformer's blocks: the elements of the base model's module lists."""
    base = getattr(model, "base_model", None)
    inside = base if isinstance(base, nn.Module) else model
    within = {id(module) for module in inside.modules()}
    return [f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in within]


def partly(targets: Iterable[Target]) -> dict[str, int]:
    """Return how many entries of a module's weights its adapted parts have, by the module's name."""
    entries: dict[str, int] = {}
    for target in targets:
        if target.place not in ("", target.name):
            entries[target.place] = entries.get(target.place, 0) + target.maps * target.d_in * target.d_out
    return entries


def coverage(
    model: nn.Module,
    adapted: Collection[str],
    trained: Iterable[Tensor] = (),
    *,
    partly: Mapping[str, int] | None = None,
) -> Coverage | None:
    """Measure how much of a plain model's blocks is adapted.

    Args:
        model: the model before anything is put into it.
        adapted: names of the modules that are adapted.
        trained: parameters that train in full.
        partly: how many entries of a layer's weight are adapted, if its parts are, by the layer's name.

    Returns:
        None for a model without blocks.
    """
    prefixes = tuple(block_prefixes(model))
    ids = {id(p) for p in trained}
    done = tuple(f"{name}." for name in adapted)
    seen: set[int] = set()
    total = covered = 0
    kinds: dict[tuple[str, str], tuple[int, dict[str, None]]] = {}
    for name, module in model.named_modules():
        if not prefixes or not name.startswith(prefixes) or "pooler" in name.split("."):
            continue
        for part, size, parameter in _weights(module):
            if parameter is not None and id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += size
            if f"{name}.{part}.".startswith(done or ("\0",)) or id(parameter) in ids:
                covered += size
                continue
            if layer_shape(module) is not None and partly is not None:
                covered, size = covered + partly.get(name, 0), size - partly.get(name, 0)
            if size:
                kind = (pattern(name), type(module).__name__)
                before, parts = kinds.get(kind, (0, {}))
                shown = part if part == "weight" or parameter is None else f"{part} ({parameter.ndim}-D)"
                kinds[kind] = before + size, parts | {shown: None}
    if not total:
        return None
    groups = _by_kind(kinds)
    order = sorted(groups, key=lambda what: -groups[what])
    return Coverage(covered / total, tuple(LeftOut(what, groups[what] / total) for what in order))


def _weights(module: nn.Module) -> Iterator[tuple[str, int, Tensor | None]]:
    """Yield a module's own weights: name, entries, tensor. A quantized layer counts by sizes, not by packed bytes."""
    shape = layer_shape(module) or features(module)
    if shape is not None:
        weight = module._parameters.get("weight")
        yield "weight", shape[0] * shape[1], weight
        return
    for name, p in module._parameters.items():
        if p is not None and p.ndim >= 2 and not name.endswith("bias"):
            yield name, p.numel(), p


def _by_kind(kinds: Mapping[tuple[str, str], tuple[int, Mapping[str, None]]]) -> dict[str, int]:
    """Group weights by kind, in words. Places of one kind are given as the first and their number."""
    merged: dict[tuple[str, tuple[str, ...]], list[tuple[str, int]]] = {}
    for (place, kind), (size, parts) in kinds.items():
        merged.setdefault((kind, tuple(parts)), []).append((place, size))
    words = {}
    for (kind, names), places in merged.items():
        most = max(places, key=lambda each: each[1])[0]
        where = most + (f" and {len(places) - 1} like it" if len(places) > 1 else "")
        if names == ("weight",):
            what = f"{kind} ({where})"
        else:
            what = f"{kind} (parameters {', '.join(names)} of {where}, which are no layers)"
        words[what] = sum(size for _, size in places)
    return words
