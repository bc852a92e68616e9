"""Fused projections: which rows of one linear map are q, k and v, or gate and up. One table, by the layer's name.

The sizes of heads are read from the module around the layer (or its config), and must add up to the layer's rows. A layer
that the table does not know, or whose sizes do not add up, has no slices.
"""

import re
from collections.abc import Callable, Mapping

import attrs
from torch import nn

from lrkit.layers.linear import Linear


@attrs.frozen
class Layout:
    """How the rows of a fused map are divided: `groups` groups, each of which holds some rows of every slice.

    Args:
        groups: how many groups; 1 if the slices simply follow each other.
        sizes: slice to its rows in one group, in order.
    """

    groups: int
    sizes: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Return how many rows there are."""
        return self.groups * sum(self.sizes.values())

    def place(self, part: str) -> tuple[int, int]:
        """Return the first row of a slice within a group, and how many it has there."""
        names = list(self.sizes)
        return sum(self.sizes[name] for name in names[: names.index(part)]), self.sizes[part]


_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "groups")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "kv_n_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size")


def _setting(parent: nn.Module, *names: str) -> int | None:
    """Return the first number that a module, or else its config, has under one of several names."""
    for settings in (parent, getattr(parent, "config", None)):
        for name in names:
            value = getattr(settings, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _heads(parent: nn.Module, rows: int) -> tuple[int, int, int] | None:
    """Return how many heads q has, how many k and v have, and the rows of one; None if that is not known."""
    heads = _setting(parent, *_HEADS)
    if not heads:
        return None
    kv = _setting(parent, *_KV_HEADS) or heads
    return heads, kv, _setting(parent, *_HEAD_DIM) or rows // (heads + 2 * kv)


def _in_order(parent: nn.Module, rows: int) -> Layout | None:
    """Divide into all of q, all of k, all of v; k and v may have fewer heads."""
    if (known := _heads(parent, rows)) is None:
        return None
    heads, kv, size = known
    return Layout(1, {"q": heads * size, "k": kv * size, "v": kv * size})


def _per_head(parent: nn.Module, rows: int) -> Layout | None:
    """Divide into groups of one head of k and v with the heads of q that share it."""
    if (known := _heads(parent, rows)) is None or known[0] % known[1]:
        return None
    heads, kv, size = known
    return Layout(kv, {"q": heads // kv * size, "k": size, "v": size})


def _codegen(parent: nn.Module, rows: int) -> Layout | None:
    """Divide into four groups, one for each TPU core that CodeGen was trained on, of q, v, k."""
    return None if rows % 12 else Layout(4, dict.fromkeys(("q", "v", "k"), rows // 12))


def _cross(parent: nn.Module, rows: int) -> Layout | None:
    """Divide GPT-2's projection of cross-attention into k and v; its q is a layer of its own."""
    return Layout(1, {"k": rows // 2, "v": rows // 2}) if getattr(parent, "is_cross_attention", False) else None


def _delta_net(parent: nn.Module, rows: int) -> Layout | None:
    """Divide a gated delta net's projection into q, k and v, whose sizes its module has."""
    key, value = _setting(parent, "key_dim"), _setting(parent, "value_dim")
    return None if not key or not value else Layout(1, {"q": key, "k": key, "v": value})


def _halves(first: str, second: str, down: str) -> Callable[[nn.Module, int], Layout | None]:
    """Divide into halves, if the layer `down` that follows takes as much as one."""

    def halves(parent: nn.Module, rows: int) -> Layout | None:
        sizes = Linear().sizes(getattr(parent, down, None) or nn.Identity())
        return None if sizes is None else Layout(1, {first: sizes.d_in, second: sizes.d_in})

    return halves


# (the layer's name, the class of the module around it, how it is divided); the first that matches both counts. Read from
# each model's forward in transformers 5.23: not all whose layer has one name divide it alike.
_TABLE: tuple[tuple[str, str, Callable[[nn.Module, int], Layout | None]], ...] = (
    ("qkv_proj", "CodeGen.*", _codegen),
    ("qkv_proj", "MiniMax.*LightningAttention", _per_head),
    ("c_attn", "GPTBigCode.*", _per_head),
    ("query_key_value", "(GPTNeoX|Bloom|Falcon|Persimmon).*", _per_head),
    ("wqkv", "InternLM2.*", _per_head),
    (
        "c_attn",
        "GPT2.*|DecisionTransformer.*|ImageGPT.*",
        lambda parent, rows: _cross(parent, rows) or _in_order(parent, rows),
    ),
    ("qkv|qkv_proj|qkv_linear|Wqkv|c_attn|W_pack", ".*", _in_order),
    ("in_proj_qkv", ".*GatedDeltaNet", _delta_net),
    ("gate_up_proj", "Phi4MultimodalAudio.*", _halves("up", "gate", "down_proj")),
    ("gate_up_proj", ".*", _halves("gate", "up", "down_proj")),
    ("Wi", "ModernBert.*", _halves("input", "gate", "Wo")),
)


def layout_of(name: str, model: nn.Module, rows: int) -> Layout | None:
    """Return how a fused map's rows are divided; None if that is not known, or the sizes do not add up.

    Args:
        name: the layer's name in the model.
        model: the model.
        rows: how many rows its weight has.
    """
    path, _, last = name.rpartition(".")
    for names, classes, divide in _TABLE:
        if re.fullmatch(names, last):
            parent = model.get_submodule(path)
            if re.fullmatch(classes, type(parent).__name__):
                layout = divide(parent, rows)
                return layout if layout is not None and layout.rows == rows else None
    return None
