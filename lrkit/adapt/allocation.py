"""An allocation: how much rank each layer has, as data. Torch is imported where a model is looked at, and nowhere else."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from lrkit.adapt import found, sharing
from lrkit.adapt.budget import as_seed, budget, sizes_of
from lrkit.adapt.sharing import Sizes
from lrkit.errors import LrkitError, listing, quoted, shown
from lrkit.ranks import REST, Ranks, ranks_of
from lrkit.settings import refuse_others

if TYPE_CHECKING:
    import torch

    from lrkit.adapt.summary import LayerSummary

Kind = Literal["uniform", "random", "shuffled"]
_KINDS: tuple[Kind, ...] = ("uniform", "random", "shuffled")


def _sizes(given: Any) -> dict[str, tuple[int, int]] | None:
    """Copy sizes, and refuse what are none."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise LrkitError(f"sizes must be a table of layer to [d_in, d_out], not {shown(given)}")
    for name, size in given.items():
        pair = isinstance(size, list | tuple) and len(size) == 2
        if not pair or not all(type(n) is int and 1 <= n < 2**40 for n in size):
            raise LrkitError(
                f"the size of {quoted(name)} must be [d_in, d_out], two ints of at least 1, not {shown(size)}"
            )
    return {name: (size[0], size[1]) for name, size in given.items()}


@attrs.frozen(eq=False, repr=False, slots=False)
class Allocation(Ranks):
    """Layer or pattern to rank, and the layers' sizes if they are known. A mapping that cannot be changed.

    ``rank=`` of every low-rank parameterization and named method takes one. For example
    ``lrkit.methods.lora(rank=lrkit.Allocation({"query": 8, "*": 2}))``. An allocation from a model or a run names whole
    layers and has their sizes. Two are equal if their entries are; sizes do not count.

    Args:
        mapping: layer or pattern to rank, from 0 to 65,536. A pattern is the last components of layers' names, a regular
            expression that matches their end, or ``"*"`` for all layers that no other entry names.
        sizes: name of every adapted layer to (d_in, d_out); None if they are not known.

    Raises:
        LrkitError: a key that is no name or pattern, a value that is no rank, or entries that do not fit the layers.
    """

    _sizes: Sizes | None = attrs.field(default=None, converter=_sizes)

    def __attrs_post_init__(self) -> None:
        """Refuse entries that do not fit the layers."""
        if self._sizes is not None:
            ranks_of(self, list(self._sizes))

    @property
    def sizes(self) -> dict[str, tuple[int, int]] | None:
        """Return layer name to (d_in, d_out); None if they are not known."""
        return None if self._sizes is None else dict(self._sizes)

    def layers(self) -> dict[str, int]:
        """Return layer name to rank.

        Raises:
            LrkitError: it has no sizes, so that its layers are not known, and an entry is a pattern.
        """
        if self._sizes is not None:
            return ranks_of(self, list(self._sizes))
        if self._patterns or self.get(REST):
            pattern = REST if self.get(REST) else self._patterns[0]
            raise LrkitError(
                f"how many layers {quoted(pattern)} stands for is not known: give the allocation sizes, or on(model)"
            )
        return {entry: rank for entry, rank in self.items() if entry != REST}

    @property
    def total(self) -> int:
        """Return the sum of all layers' ranks. Without sizes every entry counts as one layer. Raises as `layers`."""
        return sum(self.layers().values())

    @property
    def parameters(self) -> int:
        """Return the sum of rank · (d_in + d_out) over all layers, as AdaLoRA's paper counts, without core values.

        Raises:
            LrkitError: it has no sizes.
        """
        return sharing.parameters(self.layers(), self._known("parameters"))

    def _known(self, what: str) -> Sizes:
        if self._sizes is None:
            raise LrkitError(f"{what}: the layers' sizes are not known: use on(model), or give the allocation sizes")
        return self._sizes

    # ---- made of others ----

    def on(
        self,
        model: "torch.nn.Module",
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        slices: bool = False,
    ) -> "Allocation":
        """Return the same for the layers of a model, by whole names and with their sizes.

        Args:
            model: a plain model.
            targets: which layers, as `lrkit.attach` takes it.
            exclude: which of them to leave out, as `lrkit.attach` takes it.
            slices: take the parts of fused projections in their places, as `lrkit.attach` does.

        Raises:
            LrkitError: an entry matches no layer, or a layer has no entry.
        """
        sizes = sizes_of(model, targets, exclude, slices)
        return Allocation(ranks_of(self, list(sizes)), sizes)

    def shuffled(
        self,
        *,
        seed: int,
        model: "torch.nn.Module | None" = None,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        slices: bool = False,
    ) -> "Allocation":
        """Permute the ranks among layers of equal d_in + d_out, so that ranks and parameters stay in sum.

        Args:
            seed: of the permutation.
            model: a plain model with the layers, for an allocation without sizes.
            targets: which of its layers.
            exclude: which of them to leave out.
            slices: take the parts of fused projections in their places.
        """
        if model is not None:
            return self.on(model, targets, exclude, slices).shuffled(seed=seed)
        sizes = self._known("shuffled")
        return Allocation(sharing.shuffled(self.layers(), sizes, as_seed(seed)), sizes)

    def like(self, kind: Kind, *, seed: int = 0) -> "Allocation":
        """Return a control of this allocation: on the same layers, with as many parameters within one component.

        Args:
            kind: ``"uniform"``: the same rank in every layer, or one more; ``"random"``: each component in a layer that is
                drawn; ``"shuffled"``: the same ranks, permuted among layers of equal d_in + d_out.
            seed: of the draws.

        Raises:
            LrkitError: another kind, or an allocation without sizes.
        """
        if kind not in _KINDS:
            raise LrkitError(f"like takes {', '.join(_KINDS)}, not {shown(kind)}")
        if kind == "shuffled":
            return self.shuffled(seed=seed)
        sizes, cost = self._known(kind), self.parameters
        if kind == "uniform":
            return Allocation(sharing.uniform(sizes, cost=cost), sizes)
        return Allocation(sharing.at_random(sizes, as_seed(seed), cost=cost), sizes)

    @classmethod
    def uniform(
        cls,
        model: "torch.nn.Module",
        *,
        total: int | None = None,
        parameters: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        slices: bool = False,
    ) -> "Allocation":
        """Give every layer of a model the same rank; what is left over is one more in layers spread evenly over it.

        Args:
            model: a plain model; on the meta device will do.
            total: the sum of ranks, which is met exactly; or
            parameters: the most parameters, of which less than one component of a layer is left.
            targets: which layers, as `lrkit.attach` takes it.
            exclude: which of them to leave out, as `lrkit.attach` takes it.
            slices: take the parts of fused projections in their places, as `lrkit.attach` does.
        """
        sizes = sizes_of(model, targets, exclude, slices)
        return cls(sharing.uniform(sizes, **budget(sizes, total, parameters)), sizes)

    @classmethod
    def random(
        cls,
        model: "torch.nn.Module",
        *,
        seed: int,
        total: int | None = None,
        parameters: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        slices: bool = False,
    ) -> "Allocation":
        """Give each component to a layer of a model that is drawn, every layer with the same chance.

        Args:
            model: a plain model; on the meta device will do.
            seed: of the draws.
            total: the sum of ranks, which is met exactly; or
            parameters: the most parameters, of which less than the smallest component is left.
            targets: which layers, as `lrkit.attach` takes it.
            exclude: which of them to leave out, as `lrkit.attach` takes it.
            slices: take the parts of fused projections in their places, as `lrkit.attach` does.
        """
        sizes = sizes_of(model, targets, exclude, slices)
        return cls(sharing.at_random(sizes, as_seed(seed), **budget(sizes, total, parameters)), sizes)

    @classmethod
    def from_layers(cls, layers: "Iterable[LayerSummary]") -> "Allocation":
        """Take the ranks in effect out of a summary's layers, with the sizes if every layer has them.

        Raises:
            LrkitError: a layer has no rank components.
        """
        every = list(layers)
        if without := [layer.name for layer in every if layer.rank is None]:
            raise LrkitError(
                f"an allocation is of layers with rank components, and these have none: {listing(without)}"
            )
        return cls.from_plain(found.in_effect(every))

    # ---- files ----

    def to_plain(self) -> dict[str, Any]:
        """Return ``{"ranks": {layer: rank}, "sizes": {layer: [d_in, d_out]}}``, without sizes if they are not known."""
        ranks: dict[str, Any] = {"ranks": dict(self)}
        return ranks if self._sizes is None else {**ranks, "sizes": {n: list(size) for n, size in self._sizes.items()}}

    @classmethod
    def from_plain(cls, plain: Any) -> "Allocation":
        """Read what `to_plain` wrote. Raises LrkitError if it is something else."""
        if not isinstance(plain, Mapping) or "ranks" not in plain:
            raise LrkitError(
                "an allocation is a table with a table ranks (layer or pattern to rank), and may have sizes"
            )
        refuse_others(plain, ("ranks", "sizes"), "an allocation")
        return cls(plain["ranks"], plain.get("sizes"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file, by its ending ``.toml`` or ``.json``, in one move. Returns the path."""
        return found.write(Path(path), self.to_plain())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        """Read a file that `save` wrote, or a TOML file with a table ``[ranks]`` that was written by hand.

        Raises:
            LrkitError: no such file, another ending, or content that is no allocation; with the path.
        """
        plain = found.read(Path(path))
        try:
            return cls.from_plain(plain)
        except LrkitError as error:
            raise LrkitError(f"{path} is no allocation: {error}") from None

    @classmethod
    def from_run(cls, folder: str | os.PathLike[str]) -> "Allocation":
        """Read what a run ended with.

        Args:
            folder: of ``lrkit run --out``, of a study's cell, or one that `Adapted.save` wrote.

        Raises:
            LrkitError: it is none of these, or its method has no ranks.
        """
        try:
            return cls.from_plain(found.found_in(Path(folder)))
        except LrkitError as error:
            raise error if str(folder) in str(error) else LrkitError(f"{folder}: {error}") from None

    def __repr__(self) -> str:
        """Return it in a few words."""
        if self._sizes is None:
            return super().__repr__()
        layers, total, cost = len(self._sizes), self.total, self.parameters
        return f"Allocation({layers} layers, {total:,} components, {cost:,} parameters)"


__all__ = ["Allocation", "sizes_of"]
