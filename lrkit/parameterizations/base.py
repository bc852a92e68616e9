"""The protocol of a parameterization: how an increment ΔW is written in trainable tensors."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.layers import LayerKind, Linear
from lrkit.ranks import Rank, ScaleBy, rank_at, scale_rank
from lrkit.units import Part

Role = Literal["attention", "ffn", "other"]
"""The place of a linear map in a transformer block."""


@attrs.frozen(eq=False)
class Target:
    """One layer that a parameterization is to adapt.

    Args:
        name: the layer's name in the model.
        layer: the layer itself.
        d_in: size of its input.
        d_out: size of its output.
        role: ``"attention"``, ``"ffn"`` or ``"other"``, found by the classes around the layer and by its name.
        output: whether it is the last map of attention or FFN, whose output is added to the residual; found by name.
        kind: what is known of its kind.
        maps: how many maps of these sizes it stacks, one per expert; its factors hold so many times r components.
        place: name of the module whose place is taken: the layer's own, or that of the module that it is a part of.
        layers: names of all layers that are adapted, this one included; empty for this one alone.
    """

    name: str
    layer: nn.Module
    d_in: int
    d_out: int
    role: Role
    output: bool = False
    kind: LayerKind = attrs.field(factory=Linear)
    maps: int = 1
    place: str = ""
    layers: tuple[str, ...] = attrs.field(default=(), repr=False)

    def rank_of(self, rank: Rank) -> int:
        """Return this layer's rank by a setting ``rank``, which may be one for all layers or a table; 0 for none."""
        return rank_at(rank, self.name)

    def components_of(self, rank: Rank) -> int:
        """Return how many components the layer has by a setting ``rank``: so many for each of its maps."""
        return self.maps * self.rank_of(rank)

    def scale_rank(self, rank: Rank, by: ScaleBy) -> float:
        """Return the r of this layer's scale α/r by the settings ``rank`` and ``scale_by``. It is never 0."""
        return scale_rank(rank, self.name, self.layers or (self.name,), by)


@attrs.frozen(kw_only=True)
class Parameterization(abc.ABC):
    """How ΔW is written in trainable tensors. Subclass with ``@attrs.frozen(kw_only=True)``.

    A subclass declares the `parts` of one adapter, and builds the module that takes a layer's place. For example
    ``lrkit.parameterizations.LoRA`` has the parts A and B, and builds a ``LowRank``.
    """

    learning_rate: ClassVar[float] = 1e-3
    """A peak rate at which AdamW is known to train it. ``lrkit run`` uses it if none is given."""

    penalty_weight: ClassVar[str | None] = None
    """The setting that weighs the penalty, and turns it off at zero; None if there is no penalty."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Declare the tensors of one adapter, from which all units follow.

        For example ``Part("A", axis=0)`` has one row per component.
        """

    @abc.abstractmethod
    def build(self, target: Target) -> nn.Module:
        """Return the module that takes the layer's place, with fresh parameters and ΔW = 0; or the layer itself.

        Parameters that train have ``requires_grad`` set. The layer's own parameters are left as they are.
        """

    @property
    def takes_targets(self) -> bool:
        """Return whether it adapts the linear maps that `targets` names. False if it finds its own places (prompts)."""
        return True

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose the layers that ``targets="all-linear"`` means: all of them, unless overridden.

        Override it if the method adapts certain places only, for example the last map of each FFN. It is not asked about
        layers that the user names.
        """
        return targets

    def adapt(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """Return the adapters of a whole model, by the name of the module whose place each takes.

        Override it if layers share tensors, or if other modules than linear maps are replaced (layer norms, for example).

        Args:
            model: the plain model, which must be left as it is.
            targets: the layers to adapt; none if `takes_targets` is False.
        """
        return {target.name: self.build(target) for target in targets}

    def wrap(self, model: nn.Module) -> nn.Module | None:
        """Return a module that the model's own calls go through, or None. For example prompts, before the model's input.

        Its forward is ``forward(call, *args, **kwargs)``; ``call`` is the model's forward as it was. Its parameters train,
        and are saved. It has no `parts`, and so no units. The model must be left as it is.
        """
        return None

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """Name the model's own parameters that train as well. In full fine-tuning they are all of them."""
        return ()

    def penalty(self, modules: Sequence[nn.Module]) -> Tensor | None:
        """Return a scalar that is added to the loss while training, or None."""
        return None

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw the start of further components of one adapter, as `build` does. An action gives the core values itself.

        A parameterization that does not override it cannot grow: an action that adds components is refused.

        Args:
            module: the adapter.
            count: how many components.
            generator: on the CPU. Draw from it alone, so that a resumed run draws the same.
            memory: what a `LayerMetric` of the policy that adds them has kept of the layer, by name. Otherwise empty.

        Returns:
            By the name of each part that has an `axis` and is not the core, the tensor's further slices: of its shape, with
            `count` along `axis`.
        """
        raise NotImplementedError

    @property
    def components(self) -> Rank | None:
        """Return the initial rank, which is how many rank components an adapter has before anything is pruned.

        It is an int, or a table of layer or pattern to rank if layers differ (`lrkit.ranks`). None if it follows from the
        layer, for example if a component is a row of its weight.
        """
        return 0
