"""Embeddings: ``nn.Embedding``, whose input is one-hot."""

from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit.layers.base import LayerKind, Sizes


@attrs.frozen
class Embedding(LayerKind):
    """``nn.Embedding``: the row of a token, so that A [r, tokens] has a column per token, and B is [width, r].

    The row of ``padding_idx`` has an increment too, and no gradient reaches it, as with the layer's own weight.
    """

    def sizes(self, layer: nn.Module) -> Sizes | None:
        """Return (tokens, width) of an embedding; None for any other module."""
        return Sizes(layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else None

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse an embedding that changes its own weight at every call."""
        assert isinstance(layer, nn.Embedding)
        return None if layer.max_norm is None else "max_norm changes its weight at every call"

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the weight as [width, tokens]: a transposed view."""
        assert isinstance(layer, nn.Embedding)
        return layer.weight.t()

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        """Return the columns of A [..., r] for token ids x [...]."""
        assert isinstance(layer, nn.Embedding)
        return F.embedding(x, a.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
