"""Hooks on adapted layers that hand what goes through them to the metrics that read it."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers import beneath
from lrkit.loop.policy import PolicyState
from lrkit.loop.remembered import Peers


@attrs.frozen(eq=False)
class Marks:
    """The masks that one call of a model came with.

    Args:
        tokens: which tokens are no padding; None if all are, or the call does not say.
        labels: the labels; None for none.
        decoder: the same as `tokens` for the decoder of an encoder-decoder, whose `tokens` are the encoder's.
        split: whether the model is an encoder-decoder.
    """

    tokens: "Tokens | None" = None
    labels: Tensor | None = None
    decoder: "Tokens | None" = None
    split: bool = False

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Marks":
        """Read a call's arguments, by name or, as the model's forward names them, by position."""
        # A signature sees through the decorators that transformers puts around `forward`.
        names = list(inspect.signature(model.forward).parameters) if args else []
        given = {**dict(zip(names, args, strict=False)), **kwargs}

        def mask(name: str) -> Tokens | None:
            value = given.get(name)
            return Tokens.of(value) if isinstance(value, Tensor) and value.ndim == 2 else None

        labels = given.get("labels")
        split = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
        return cls(mask("attention_mask"), labels, mask("decoder_attention_mask"), split)

    @property
    def tell(self) -> bool:
        """Whether they leave anything out."""
        return self.tokens is not None or self.decoder is not None or self.labels is not None

    def rows(self, name: str, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return which rows of a layer's input are no padding, and whether each has a label, bool [n]; None if not known.

        Args:
            name: the layer's name.
            shape: of its input without the last dimension.
        """
        own = not self.split or (re.search(_DECODER, name) is not None and re.search(_ACROSS, name) is None)
        tokens = self.decoder if self.split and own else self.tokens
        labels = self.labels if own else None
        return (
            None if tokens is None or not _fits(tokens.shape, shape) else tokens.index,
            None if labels is None or not _fits(labels.shape, shape) else (labels != -100).reshape(-1),
        )


@attrs.frozen(eq=False)
class Tokens:
    """The tokens of a batch [batch, length] that are no padding.

    Args:
        shape: of the batch.
        index: their places among all.
    """

    shape: tuple[int, ...]
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Tokens | None":
        """Read an attention mask, once per call of the model; None if nothing is padding."""
        index = mask.reshape(-1).nonzero().flatten()
        return None if len(index) == mask.numel() else cls(tuple(mask.shape), index)


_DECODER = r"(^|\.)decoder(\.|$)"
_ACROSS = r"\.(EncDecAttention|encoder_attn|cross_?attn|crossattention)\.(.*\.)?(k|v|key|value)(_proj)?$"
"""Layers of a decoder that read what the encoder gives: keys and values of cross-attention."""


def _fits(tokens: Sequence[int], rows: Sequence[int]) -> bool:
    """Return whether rows are the tokens of a batch [batch, length], in that shape or one after the other."""
    return tuple(rows) in (tuple(tokens), (math.prod(tokens),))


class _Kept(torch.autograd.Function):
    """Keeps a layer's input as autograd keeps it: gradient checkpointing drops it, and computes it again."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


_resting: ContextVar[bool] = ContextVar("_resting", default=False)


@contextmanager
def resting() -> Iterator[None]:
    """Let no metric take in what goes through any model meanwhile: for a pass that is no part of a run."""
    token = _resting.set(True)
    try:
        yield
    finally:
        _resting.reset(token)


def _off() -> bool:
    """Return whether hooks have to do nothing. A compiled model has no rows to show, which the step says."""
    return torch.compiler.is_compiling() or _resting.get()


class Taps:
    """The hooks of one adapted model: none unless a metric reads layers in the next step.

    A row counts if a gradient comes back to it, and then once: hooks of the recomputed forward pass of checkpointing are on
    outputs that no gradient comes back to, or on the only ones to which one does. Those come after the model's call: if
    several calls with masks of their own wait for a gradient, nothing says whose the recomputed rows are, and the step
    fails.

    Args:
        model: the adapted model.
        peers: returns the processes that train together.
    """

    def __init__(self, model: nn.Module, peers: Callable[[], Peers | None] = lambda: None) -> None:
        self._model, self._peers = model, peers
        self.scale: Callable[[], float] = lambda: 1.0
        """Returns the factor that the loss carries."""
        self._handles: list[Any] = []
        self._hung: dict[str, nn.Module] = {}
        self._marks = Marks()
        self._inside = False
        self._waiting: list[bool] = []
        """Calls whose gradients are still to come: whether the marks of each tell anything."""
        self._readers: Sequence[PolicyState] = ()
        self._forward = False  # whether rows count as they go in, and no gradient is waited for

    def hang(self, readers: Sequence[PolicyState]) -> None:
        """Put hooks on the layers that these policies read, and take away all others.

        Args:
            readers: policies that read layers (`lrkit.loop.controller.Controller.readers`).
        """
        layers = {name: module for state in readers for name, module in state.statistics.reads.items()}
        self._readers, self._waiting = readers, []
        if layers.keys() == self._hung.keys() and all(self._hung[name] is m for name, m in layers.items()):
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._hung, self._marks, self._inside = [], layers, Marks(), False
        if layers:
            self._handles.append(self._model.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(self._model.register_forward_hook(self._leave, always_call=True))
        for name, module in layers.items():
            self._handles.append(module.register_forward_hook(_Tap(self, name), with_kwargs=True))

    @contextmanager
    def hung(self, readers: Sequence[PolicyState], *, forward: bool = False) -> Iterator[None]:
        """Put hooks for these policies, and take them away at the end.

        Args:
            readers: policies that read layers.
            forward: rows count as they go in, with gradients or without: for policies that read inputs alone.
        """
        self.hang(readers)
        self._forward = forward
        try:
            yield
        finally:
            self._forward = False
            self.hang(())

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A call without gradients, such as an evaluation, leaves the marks of those that wait for theirs.
        if not _off() and (torch.is_grad_enabled() or self._forward):
            self._marks, self._inside = Marks.of(model, args, kwargs), True
            self._waiting.append(self._marks.tell)

    def _leave(self, *_: Any) -> None:
        self._inside = False

    def through(self, name: str, module: Any, x: Tensor, y: Tensor) -> None:
        """Follow a layer's input and output, until the output's gradient arrives."""
        if self._forward:
            with torch.no_grad():
                self._arrive(name, module, x, y, self._marks.rows(name, x.shape[:-1]))
            return
        if not (torch.is_grad_enabled() and y.requires_grad):
            return
        kept: Any = _Kept.apply(torch.zeros(0, requires_grad=True), x.detach())  # type: ignore[no-untyped-call]
        marks, shape = self._marks, x.shape[:-1]
        doubtful = not self._inside and len(self._waiting) > 1 and any(self._waiting)

        def arrive(g: Tensor) -> None:
            calls, self._waiting = len(self._waiting), []
            if doubtful:
                raise LrkitError(
                    f"{name} is recomputed by gradient checkpointing after {calls} calls of the model, each with "
                    "a mask of its own, and a metric reads its rows: call backward after each, or checkpoint with "
                    "use_reentrant=False"
                )
            (x,) = kept.grad_fn.saved_tensors
            with torch.no_grad():
                self._arrive(name, module, x, g, marks.rows(name, shape))

        y.register_hook(arrive)  # type: ignore[no-untyped-call]

    def _arrive(self, name: str, module: Any, x: Tensor, g: Tensor, which: tuple[Tensor | None, Tensor | None]) -> None:
        (base, kind), peers = beneath(module), self._peers()
        assert kind is not None
        rows = kind.rows(base, x).float()
        # A convolution's rows are no tokens, whatever its sizes.
        tokens, labelled = which if math.prod(x.shape[:-1]) == len(rows) else (None, None)
        for state in self._readers:
            state.follow_device()  # the model may have moved since attach
            if state.policy.metric.reads == "gradient":
                grads = kind.out_rows(base, g).float() / (self.scale() * (1 if peers is None else peers.count))
                if len(grads) != len(rows):
                    raise LrkitError(f"{name} has {len(rows)} rows of inputs and {len(grads)} of outputs")
                state.statistics.take(name, rows, grads, labelled, peers)
            elif tokens is None:
                state.statistics.take(name, rows, None, labelled, peers)
            else:
                state.statistics.take(name, rows[tokens], None, None if labelled is None else labelled[tokens], peers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Taps, (nn.Module(),)


class _Tap:
    """The hook on one layer. A copy of the model has a copy of it, which does nothing."""

    def __init__(self, taps: Taps | None, name: str) -> None:
        self._taps, self._name = taps, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        if self._taps is not None and isinstance(y, Tensor) and not _off():
            self._taps.through(self._name, module, args[0] if args else next(iter(kwargs.values())), y)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tap, (None, self._name)
