"""The protocol of a parameterization: how an increment ΔW is written in trainable tensors."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.units import Part

Role = Literal["attention", "ffn", "other"]
"""Where in a transformer block a linear map stands."""


@attrs.frozen(eq=False)
class Target:
    """One layer that a parameterization is to adapt.

    Args:
        name: the layer's name in the model.
        layer: the layer itself (``nn.Linear`` or transformers' ``Conv1D``).
        d_in: size of its input.
        d_out: size of its output.
        role: ``"attention"``, ``"ffn"`` or ``"other"``, found by name.
        output: whether it is the last map of attention or FFN, whose output goes to the residual sum; found by name.
    """

    name: str
    layer: nn.Module
    d_in: int
    d_out: int
    role: Role
    output: bool = False


@attrs.frozen(kw_only=True)
class Parameterization(abc.ABC):
    """How ΔW is written in trainable tensors. Subclass with ``@attrs.frozen(kw_only=True)``.

    A subclass says of which `parts` an adapter consists, and builds the module that takes a layer's place.
    """

    learning_rate: ClassVar[float] = 1e-3
    """A peak rate for AdamW at which it is known to train, used by ``lrkit run`` where none is given."""

    penalty_weight: ClassVar[str | None] = None
    """The setting that weighs the penalty, which zero turns off; None where there is no penalty."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The tensors of one adapter; from this declaration all units follow."""

    @abc.abstractmethod
    def build(self, target: Target) -> nn.Module:
        """The module that takes the layer's place, with fresh parameters and ΔW = 0; or the layer itself.

        What trains has ``requires_grad`` set. The layer's own parameters are left as they are.
        """

    @property
    def takes_targets(self) -> bool:
        """Whether it adapts the linear maps that `targets` names. False for a method with places of its own (prompts)."""
        return True

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Which layers ``targets="all-linear"`` means: all that there are.

        Override it where the method has places of its own, such as a bottleneck after FFN. Layers that are named are
        adapted as they are named.
        """
        return targets

    def adapt(self, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """All adapters of a model, by layer name. Override it where layers share tensors."""
        return {target.name: self.build(target) for target in targets}

    def adapt_model(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """What takes which module's place: `adapt` for a method of layers. Override it where that is not enough.

        The modules replaced need not be linear maps. Under the empty name, which is the model's own in
        ``named_modules()``, stands a module that the model's calls go through: ``forward(call, *args, **kwargs)``, where
        ``call`` is the model's forward as it was. Its parameters train and are saved; it has no `parts`, so no units.

        Args:
            model: the plain model, which must be left as it is.
            targets: the layers; none where `takes_targets` is False.
        """
        return self.adapt(targets)

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """Names of the model's own parameters that train as well (all of them in full fine-tuning)."""
        return ()

    def penalty(self, modules: Sequence[nn.Module]) -> Tensor | None:
        """A scalar that is added to the loss while training, or None."""
        return None

    def fresh(self, part: Part, module: nn.Module, count: int, generator: torch.Generator) -> Tensor:
        """Return new components of one tensor, as they begin in `build`. Core values are the action's, and not asked for.

        A parameterization that does not override it cannot grow: an action that adds components is refused.

        Args:
            part: one with an `axis`, and no core.
            module: the adapter.
            count: how many components.
            generator: where to draw from, on the CPU: a resumed run must draw the same.

        Returns:
            The tensor's further slices, of its shape, with `count` along `axis`.
        """
        raise NotImplementedError

    @property
    def components(self) -> int | None:
        """The initial rank, that is the rank components of one adapter before anything is pruned.

        None where it follows from the layer: a component may be a row of its weight.
        """
        return 0


ModuleMap = Mapping[str, nn.Module]
