"""Bottleneck adapters: A(z) = W_up f(W_down z + b_down) + b_up, added to what a transformer block computes.

Houlsby et al., arXiv 1902.00751, section 2.1 and Figure 2: h ← h + A(h), after attention's and after FFN's output h and
before the residual sum. Pfeiffer et al., arXiv 2005.00247: after FFN alone, and there after its layer norm: with h + x
what the norm takes, LN(h + x) becomes LN(A(LN(h + x)) + h + x).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrkit
from lrkit.adapt.targets import find_targets
from lrkit.layers import Convolution
from lrkit.parameterizations import Adapter, Target
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.settings import flag, one_of, whole

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(Adapter):
    """A module with a bottleneck after it: y = h + A(h) with h = base(x).

    Args:
        base: the module whose place it takes: a linear map, or the dropout or layer norm after one.
        size: d, the length of its output.
        width: m.
        activation: f by its name in `ACTIVATIONS`.
        like: a tensor on the device and in the precision of the new parameters; None for the base's weight.
    """

    def __init__(self, base: nn.Module, size: int, width: int, activation: str, like: Tensor | None = None) -> None:
        super().__init__(base)
        like = base.get_parameter("weight") if like is None else like
        # At least float32: beside a half-precision base, small updates would be lost in the base's type.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        self.down = nn.Linear(size, width, device=like.device, dtype=dtype)
        self.up = nn.Linear(width, size, device=like.device, dtype=dtype)
        nn.init.normal_(self.down.weight, std=1e-2)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)
        self.activation = activation

    def added(self, z: Tensor) -> Tensor:
        """Return A(z) [..., d] for z [..., d]."""
        down, up = self.down, self.up
        inner = ACTIVATIONS[self.activation](F.linear(z, down.weight.to(z.dtype), down.bias.to(z.dtype)))
        return F.linear(inner, up.weight.to(z.dtype), up.bias.to(z.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., d] for x [..., d_in]."""
        h: Tensor = self.base(x)
        return h + self.added(h)


class BottleneckAfterNorm(Bottleneck):
    """A layer norm with a bottleneck after it, and the norm once more: y = LN(s + A(LN(s))), s the residual sum."""

    def forward(self, s: Tensor) -> Tensor:
        """Return y [..., d] for s [..., d]."""
        y: Tensor = self.base(s + self.added(self.base(s)))
        return y


def _sibling(model: nn.Module, target: Target, fits: Callable[[nn.Module], bool]) -> str | None:
    """Return the name of the one module beside a linear map that fits; None if there is none, or it may be another map's.

    In BERT a module of its own has the map, the dropout and the norm, so that both are this map's. If there are further
    linear maps beside it, a dropout may be attention's, and a norm may come first.
    """
    path = target.name.rpartition(".")[0]
    children = dict(model.get_submodule(path).named_children())
    found = [name for name, child in children.items() if fits(child)]
    alone = sum(layer_shape(child) is not None for child in children.values()) == 1
    return f"{path}.{found[0]}" if alone and len(found) == 1 else None


def _is_norm(size: int) -> Callable[[nn.Module], bool]:
    """Return a test for a module that has one weight per each of `size` features, and none that mixes them."""

    def fits(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.shape == (size,) and not list(module.children())

    return fits


@attrs.frozen(kw_only=True)
class _Bottlenecks(lrkit.Parameterization):
    learning_rate: ClassVar[float] = 1e-3

    width: int = attrs.field(default=64, validator=whole(1, 65_536))
    activation: str = attrs.field(default="gelu", validator=one_of(tuple(ACTIVATIONS)))
    layer_norms: bool = attrs.field(default=False, validator=flag())
    after: str = attrs.field(default="linear")

    @property
    def takes_targets(self) -> bool:
        """Return True if bottlenecks stand directly after a linear map. Elsewhere they take another module's place."""
        return self.after == "linear"

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare W_down and W_up, matrices that can be frozen. Neuron i is row i of the one and column i of the other."""
        return (
            lrkit.Part("down.weight", axis=0, matrix=True),
            lrkit.Part("down.bias", axis=0),
            lrkit.Part("up.weight", axis=1, matrix=True),
            lrkit.Part("up.bias"),
        )

    @property
    def components(self) -> int:
        """Return m, the neurons of one bottleneck."""
        return self.width

    def build(self, target: Target) -> nn.Module:
        """Return the layer with a bottleneck after it. W_up is zero, so that at first nothing changes.

        Raises:
            LrkitError: a convolution, whose outputs do not lie along the last axis.
        """
        if isinstance(target.kind, Convolution):
            kind = type(target.layer).__name__
            raise lrkit.LrkitError(f"{target.name}: a bottleneck comes after a linear map, not a {kind}")
        return Bottleneck(target.layer, target.d_out, self.width, self.activation)

    def adapt(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """Return the bottlenecks by the modules that they replace. Raise LrkitError if one cannot be told."""
        if self.takes_targets:
            return super().adapt(model, targets)
        return dict(self._beside(model, target) for target in self._places(model))

    def _beside(self, model: nn.Module, target: Target) -> tuple[str, nn.Module]:
        """Return the name of the module after a linear map that a bottleneck replaces, and the bottleneck."""
        raise NotImplementedError

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """Name the layer norms' parameters, if these train."""
        if not self.layer_norms:
            return ()
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            raise lrkit.LrkitError(f"layer_norms=True, and {type(model).__name__} has no nn.LayerNorm")
        return [f"{norm}.{name}" for norm in norms for name, _ in model.get_submodule(norm).named_parameters()]

    def _places(self, model: nn.Module) -> list[Target]:
        """Return the linear maps that a bottleneck belongs to, for a method that finds its places itself."""
        targets = list(self.choose(find_targets(model, "all-linear")))
        if not targets:
            raise lrkit.LrkitError(
                f"{self!r} has no place in {type(model).__name__}: it finds no last map of FFN or attention inside the "
                "transformer's blocks"
            )
        return targets


@attrs.frozen(kw_only=True)
class Houlsby(_Bottlenecks):
    """A bottleneck after attention's and after FFN's output, before the residual sum. Source: arXiv 1902.00751, section 2.1.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"`` (the authors' code), ``"relu"``, ``"silu"`` (AdaLoRA's and AdapterHub's) or ``"tanh"``.
        layer_norms: train the model's layer norms too, as the paper does; comparisons in later papers leave them out.
        after: ``"linear"``: directly after the linear map, as the paper's text has it ("after the projection back to the
            input size"), so that the block's dropout comes last. ``"dropout"``: after the dropout that follows it, as
            AdaLoRA's repository and AdapterHub have it. The same in evaluation.
    """

    after: Literal["linear", "dropout"] = attrs.field(default="linear", validator=one_of(("linear", "dropout")))

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose the last maps of attention and of FFN."""
        return [t for t in targets if t.maps == 1 and t.output and t.role in ("attention", "ffn")]

    def _beside(self, model: nn.Module, target: Target) -> tuple[str, nn.Module]:
        name = _sibling(model, target, lambda module: isinstance(module, nn.Dropout))
        if name is None:
            raise lrkit.LrkitError(
                f'Houlsby(after="dropout"): {target.name} has no dropout of its own beside it: use after="linear"'
            )
        like = target.layer.get_parameter("weight")
        return name, Bottleneck(model.get_submodule(name), target.d_out, self.width, self.activation, like)


@attrs.frozen(kw_only=True)
class Pfeiffer(_Bottlenecks):
    """A bottleneck after FFN's output alone, and there after its layer norm. Source: arXiv 2005.00247, section 3.

    With x the residual and h FFN's output after its dropout, LN(h + x) becomes LN(A(LN(h + x)) + h + x): the form of
    AdapterHub's configuration (``original_ln_before``, ``residual_before_ln``) and of AdaLoRA's repository.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"relu"`` (AdapterHub's), ``"gelu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too.
        after: ``"norm"``: as above. A block that normalizes first (GPT-2, Llama) has no norm after the sum; there it is
            ``"linear"``. ``"linear"``: directly after FFN's last map, LN(A(h) + h + x).
    """

    activation: str = attrs.field(default="relu", validator=one_of(tuple(ACTIVATIONS)))
    after: Literal["norm", "linear"] = attrs.field(default="norm", validator=one_of(("norm", "linear")))

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose the last maps of FFN."""
        return [t for t in targets if t.maps == 1 and t.output and t.role == "ffn"]

    def _beside(self, model: nn.Module, target: Target) -> tuple[str, nn.Module]:
        name = _sibling(model, target, _is_norm(target.d_out))
        if name is None:
            return target.name, self.build(target)
        like = target.layer.get_parameter("weight")
        return name, BottleneckAfterNorm(model.get_submodule(name), target.d_out, self.width, self.activation, like)
