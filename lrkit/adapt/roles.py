"""The place of a layer in a transformer's block, by the classes around it and by the components of its name."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lrkit.parameterizations.base import Role

# By the end of a class's name: BertAttention, NemotronHMLP, Qwen3NextGatedDeltaNet. A block is neither, whatever its name
# begins with (JambaAttentionDecoderLayer).
_CLASSES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("ffn", re.compile(r"(MLP|Mlp|FFN|FeedForward|MoE|Moe|Experts|ActDense|(MLP|Mlp)Layer)$")),
    ("other", re.compile(r"(Head|Merger|Merging|Embedder|Projector)$|Aligner")),
    (
        "attention",
        re.compile(r"(Attention|Attn|DeltaNet|Mixer|RecurrentBlock|ShortConv)$|Attention(?!.*(Layer|Block)$)"),
    ),
)

# Whole components of a layer's path inside its block, never substrings. Attention first: BERT's attention output is
# "attention.output.dense", its FFN output "output.dense".
_ATTENTION = frozenset(
    (
        *("self_attention", "crossattention", "SelfAttention", "EncDecAttention", "selfattention"),
        *("q_lin", "k_lin", "v_lin", "out_lin"),
        *("mixer", "mamba", "temporal_block", "mlstm_layer"),  # a state space mixes tokens, as attention does
    )
)
_FFN = frozenset(
    (
        *("mlp", "ffn", "intermediate", "output", "feed_forward", "feedforward", "DenseReluDense", "ffn_output"),
        *("fc1", "fc2", "linear1", "linear2", "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj"),
        *("wi", "wo", "block_sparse_moe", "experts", "ff", "ffn1", "ffn2", "pwconv1", "pwconv2", "fc_in", "fc_out"),
        *("intermediate_dense", "output_dense", "pointwise_conv1", "pointwise_conv2", "output_query", "layout_output"),
    )
)
# The same for a part of a component: "linear_attn", "cross_attn_image_to_token", "shared_mlp".
_ATTENTION_WORDS = frozenset(("attn", "attention", "attentions"))
_FFN_WORDS = frozenset(("mlp", "ffn", "ffw", "intermediate"))
# The last map of attention or FFN by its own name; BERT's are "output.dense", GPT-NeoX's "attention.dense".
_OUTPUTS = frozenset(
    (
        *("o", "o_proj", "out_proj", "out_lin", "c_proj", "wo", "w2", "down_proj", "fc2", "lin2", "linear2"),
        *("dense_4h_to_h", "ffn_output", "output", "down", "Wo", "output_dense", "layer_2", "pwconv2", "fc_out"),
        *("proj", "projection", "post_proj", "linear_out", "linear_2", "dense2", "output_query", "layout_output"),
        *("linear_down", "output_linear", "proj_out", "proj_down", "projection_out", "pointwise_conv2", "output_proj"),
        *("projection_layer", "to_out", "attention_out", "w_out", "linear_fc2", "ffw_layer_2", "out_text_proj"),
        *("out_vision_proj",),
    )
)
# A layer so called is no last map, even where it stands last: routers, and the maps of queries, keys and positions.
_INNER_WORDS = frozenset(
    (
        *("router", "gate", "gating", "classifier", "weights", "relative", "pos", "bias"),
        *("q", "k", "kv", "qkv", "query", "key"),
    )
)


def role_of(name: str) -> Role:
    """Return ``"attention"``, ``"ffn"`` or ``"other"``, by the components of a layer's name alone.

    Shapes do not count: square FFNs and grouped-query attention would be mistaken, as they are in AFLoRA's released code.
    """
    parts = name.split(".")
    if any(part in _ATTENTION or _ATTENTION_WORDS & _words(part) for part in parts):
        return "attention"
    return "ffn" if any(part in _FFN or _FFN_WORDS & _words(part) for part in parts) else "other"


def is_output(name: str) -> bool:
    """Return whether a layer is the last map of attention or FFN, by its name alone."""
    return role_of(name) != "other" and _ends_a_part(name)


def places(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[Role, bool]]:
    """Return the role of each layer, and whether it is the last map of its part of the block.

    Inside the innermost block, the nearest class that says so gives the role (``NemotronHMLP``, even if called "mixer"),
    else the components of the name do; if neither does, the block's own class, and then the block around it. A state space,
    a recurrence or a short convolution mixes tokens, and counts as attention. The last map is found by its name; if no
    name in a part of a block is known, it is the part's last layer in the model's order, unless that is a router or a map
    of queries or keys.

    Args:
        model: the model.
        layers: names of linear maps in it, in its order.
    """
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    found: dict[str, tuple[Role, bool]] = {}
    parts: dict[tuple[str, Role], list[str]] = {}
    for name in layers:
        role, part = _place(name, classes)
        found[name] = role, role != "other" and _ends_a_part(name)
        parts.setdefault((part, role), []).append(name)
    for (_, role), names in parts.items():
        last = names[-1]
        if role != "other" and not any(found[name][1] for name in names) and not _is_inner(last, role):
            found[last] = role, True
    return found


def _place(name: str, classes: dict[str, str]) -> tuple[Role, str]:
    """Return a layer's role, and the module (or block) whose class (or name) gives it."""
    path = name.split(".")
    for begin, end in _segments(path):
        around = [".".join(path[:length]) for length in range(begin + 1, min(end + 1, len(path)))]
        known = [(role, place) for place in around if (role := _by_class(classes.get(place, ""))) is not None]
        if known and known[-1][1] != around[0]:
            # The outermost of the same role: BERT's attention has an attention inside, and its last map outside of that.
            role = known[-1][0]
            return role, next(place for each, place in known if each == role and place != around[0])
        role = role_of(".".join(path[begin:end]))
        if role != "other":
            return role, ".".join(path[:begin])
        if known:
            return known[-1]
    return "other", ""


def _by_class(name: str) -> Role | None:
    return next((role for role, pattern in _CLASSES if pattern.search(name)), None)


def _segments(path: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the pieces of a path between the numbers of blocks in it, the innermost first. A number goes with its block."""
    end = len(path)
    for at in range(len(path) - 1, -1, -1):
        if path[at].isdigit():
            yield at, end
            end = at
    yield 0, end


def _ends_a_part(name: str) -> bool:
    """Return whether a layer's own name is one of a last map."""
    *path, last = name.split(".")
    if last in ("dense", "linear") and path:
        return path[-1] in _OUTPUTS or (last == "dense" and role_of(path[-1]) == "attention")
    return last in _OUTPUTS


def _is_inner(name: str, role: Role) -> bool:
    words = set().union(*map(_words, name.split(".")[-2:]))
    return bool(words & _INNER_WORDS) or (role == "attention" and bool(words & {"v", "value"}))


def _words(component: str) -> set[str]:
    return set(component.lower().split("_"))
