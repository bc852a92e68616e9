"""Embeddings: ``nn.Embedding``, whose input is one-hot."""

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.base import LayerKind, Sizes


@attrs.frozen
class Embedding(LayerKind):
    """``nn.Embedding``: the row of a token, so that A [r, tokens] has a column per token, and B is [width, r].

    A subclass may multiply the row by its attribute ``embed_scale``, as transformers' do (Gemma 3, BART): the increment is
    multiplied too, so that ΔW is one of the weight. The row of ``padding_idx`` has no increment: its column of A begins at
    zero, and no gradient reaches it, as with the layer's own weight, unless an output head is tied to it.
    """

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return (tokens, width) of an embedding; None for any other module."""
        return Sizes(layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else None

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse an embedding that changes its own weight at every call, or that is none by what it does."""
        assert isinstance(layer, nn.Embedding)
        return "max_norm changes its weight at every call" if layer.max_norm is not None else _strangeness(layer)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the weight as [width, tokens]: a transposed view."""
        assert isinstance(layer, nn.Embedding)
        return layer.weight.t()

    def no_rows(self, layer: nn.Module) -> str | None:
        """Refuse: its input is one-hot, as wide as the vocabulary."""
        return "an embedding's inputs are token ids"

    def start(self, layer: nn.Module, a: Tensor) -> Tensor:
        """Return a new A, with the column of ``padding_idx`` set to zero."""
        assert isinstance(layer, nn.Embedding)
        if layer.padding_idx is not None:
            a[:, layer.padding_idx] = 0
        return a

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        """Return the columns of A [..., r] for token ids x [...], times the layer's scale."""
        assert isinstance(layer, nn.Embedding)
        h = F.embedding(x, a.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        scale = _scale_of(layer)
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)


def _has_own_forward(layer: nn.Embedding) -> bool:
    return type(layer).forward is not nn.Embedding.forward


def _scale_of(layer: nn.Embedding) -> Any:
    """Return what an embedding multiplies its rows by, a number or a tensor of one; None if by nothing."""
    return getattr(layer, "embed_scale", None) if _has_own_forward(layer) else None


def _strangeness(layer: nn.Embedding) -> str | None:
    """Say why an embedding by its class is none by what it does; None if it is one.

    One that runs ``nn.Embedding.forward`` is not tested. Any other is given two token ids, and must return the rows of its
    weight, each times ``embed_scale`` if it has one. On the meta device the shape alone is looked at.
    """
    if not _has_own_forward(layer):
        return None
    if len(list(layer.parameters())) > 1:
        return "it holds more than one table of rows"
    ids = torch.tensor([0, layer.num_embeddings - 1], device=layer.weight.device)
    try:
        with torch.no_grad():
            y: object = layer.forward(ids[None])
    except Exception as error:  # whatever it makes of its input
        return f"called with token ids alone it raises {type(error).__name__}"
    if not isinstance(y, Tensor) or y.shape != (1, 2, layer.embedding_dim):
        return f"it returns {list(y.shape) if isinstance(y, Tensor) else type(y).__name__} for two token ids"
    if y.is_meta:
        return None
    scale = _scale_of(layer)
    wanted = layer.weight[ids].float() * (1.0 if scale is None else float(scale))
    distance = (y[0].float() - wanted).norm()
    return "what it returns are not the rows of its weight" if distance > 0.02 * wanted.norm() else None
