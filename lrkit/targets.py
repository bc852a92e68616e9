"""Which layers of a model are adapted, where in a block they stand, and which of its own modules train in full."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lrkit.errors import LrkitError, cut, nearest, shown
from lrkit.parameterizations.base import Role, Target
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.patterns import compiled

# Whole components of a layer's path inside its block, never substrings. Attention first: BERT's attention output is
# "attention.output.dense", its FFN output "output.dense".
_ATTENTION = frozenset(
    (
        *("attention", "attn", "self_attn", "self_attention", "crossattention", "cross_attn", "encoder_attn"),
        *("SelfAttention", "EncDecAttention", "selfattention", "q_lin", "k_lin", "v_lin", "out_lin"),
    )
)
_FFN = frozenset(
    (
        *("mlp", "ffn", "intermediate", "output", "feed_forward", "feedforward", "DenseReluDense", "ffn_output"),
        *("fc1", "fc2", "linear1", "linear2", "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj"),
        *("wi", "wo", "block_sparse_moe", "experts"),
    )
)
# The last map of attention or FFN by its own name; BERT's are "output.dense", GPT-NeoX's "attention.dense".
_OUTPUTS = frozenset(
    (
        *("o", "o_proj", "out_proj", "out_lin", "c_proj", "wo", "w2", "down_proj", "fc2", "lin2", "linear2"),
        *("dense_4h_to_h", "ffn_output", "output", "down"),
    )
)
_HEADS = ("classifier", "score", "head", "classification_head", "qa_outputs")


def role_of(name: str) -> Role:
    """``"attention"``, ``"ffn"`` or ``"other"``, by the components of a layer's name.

    Covers BERT, RoBERTa, DeBERTa-v2/v3, MPNet, DistilBERT, GPT-2, OPT, Llama-style models and T5. Shapes are not looked
    at: square FFNs and grouped-query attention would be mistaken (AFLoRA's released code does so).
    """
    parts = name.split(".")
    if any(part in _ATTENTION for part in parts):
        return "attention"
    return "ffn" if any(part in _FFN for part in parts) else "other"


def is_output(name: str) -> bool:
    """Whether a layer is the last map of attention or FFN, by the components of its name. Covers what `role_of` does."""
    *path, last = name.split(".")
    if last == "dense":
        return bool(path) and (path[-1] == "output" or path[-1] in _ATTENTION)
    return last in _OUTPUTS and role_of(name) != "other"


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # torch's own encoder layer has a fast path that reads its linear layers' weights without calling them.
    fast = tuple(f"{n}." if n else "" for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer))
    for name, module in model.named_modules():
        if name and layer_shape(module) is not None and not (fast and name.startswith(fast)):
            yield name, module


def _in_blocks(model: nn.Module) -> set[str]:
    """Names of the linear layers inside the transformer's blocks: the elements of its module lists."""
    base = getattr(model, "base_model", None)
    inside = base if isinstance(base, nn.Module) else model
    within = {id(module) for module in inside.modules()}
    lists = [f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in within]
    return {
        name
        for name, _ in _linear_layers(model)
        if any(name.startswith(prefix) for prefix in lists) and "pooler" not in name.split(".")
    }


def find_targets(model: nn.Module, targets: str | Sequence[str], *, exact: bool = False) -> list[Target]:
    """The layers to adapt, in the model's order.

    Args:
        model: the model.
        targets: ``"all-linear"``: every linear map inside the transformer's blocks. Another string: a regular
            expression that must match a layer's whole name. A list: names, or name suffixes at a dot.
        exact: a list holds whole names only.

    Raises:
        LrkitError: nothing matches, a list's entry matches nothing (with the nearest name), or one names a module that
            is no linear map.
    """
    layers = dict(_linear_layers(model))
    if not isinstance(targets, str) and not (
        isinstance(targets, Sequence) and all(isinstance(target, str) for target in targets)
    ):
        raise LrkitError(f'targets must be "all-linear", a regular expression or a list of names, not {shown(targets)}')
    if targets == "all-linear":
        chosen = _in_blocks(model)
        if not chosen:
            raise LrkitError(
                'targets="all-linear" found no linear layer inside transformer blocks (no nn.ModuleList holds one) in '
                f"{type(model).__name__}: name the layers; it has {_some(layers)}"
            )
    elif isinstance(targets, str):
        pattern = compiled(targets, "targets")
        chosen = {name for name in layers if pattern.fullmatch(name)}
        if not chosen:
            raise LrkitError(
                f'targets="{cut(targets, 160)}" matches no linear layer of {type(model).__name__} (a regular expression '
                f"must match the whole name); it has {_some(layers)}"
            )
    else:
        chosen = set()
        for suffix in targets:
            found = {name for name in layers if name == suffix or (not exact and name.endswith(f".{suffix}"))}
            if not found:
                raise LrkitError(_no_suffix(model, suffix, layers))
            chosen |= found
        if not chosen:
            raise LrkitError("targets is an empty list: name at least one layer, or use targets='all-linear'")
    found_targets = []
    for name, layer in layers.items():
        if name in chosen:
            shape = layer_shape(layer)
            assert shape is not None
            found_targets.append(Target(name, layer, *shape, role_of(name), is_output(name)))
    return found_targets


def _no_suffix(model: nn.Module, suffix: str, layers: dict[str, nn.Module]) -> str:
    others = [m for n, m in model.named_modules() if n and (n == suffix or n.endswith(f".{suffix}"))]
    if others:
        if layer_shape(others[0]) is not None:
            return (
                f'target "{suffix}" lies in an nn.TransformerEncoderLayer, whose fast path reads weights without '
                "calling the layer: an adapter there would be passed by"
            )
        return f'target "{suffix}" is a {type(others[0]).__name__}: adapters take nn.Linear and Conv1D layers'
    endings = {name.rsplit(".", 1)[-1] for name in layers}
    return f'target "{suffix}" matches no layer of {type(model).__name__}{nearest(suffix, endings)}; it has {_some(layers)}'


def _some(layers: dict[str, nn.Module]) -> str:
    names = sorted({re.sub(r"\.\d+\.", ".<i>.", name) for name in layers})
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def find_head(model: nn.Module, train_also: str | Sequence[str], *, exact: bool = False) -> list[str]:
    """Names of the modules that train in full beside the adapters.

    Args:
        model: the model.
        train_also: ``"auto"``: what a transformers model has outside its base model (classifier, score, ...) except the
            output embeddings, which are pretrained, and every ``pooler``; in other models modules called classifier,
            score, head, classification_head or qa_outputs. A list: names, or name suffixes at a dot.
        exact: a list holds whole names only.

    Raises:
        LrkitError: an entry of the list matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if not isinstance(train_also, str) and not (
        isinstance(train_also, Sequence) and all(isinstance(name, str) for name in train_also)
    ):
        raise LrkitError(f'train_also must be "auto" or a list of names, not {shown(train_also)}')
    if train_also == "auto":
        return _auto_head(model, modules)
    chosen: list[str] = []
    for suffix in [train_also] if isinstance(train_also, str) else train_also:
        found = [name for name in modules if name == suffix or (not exact and name.endswith(f".{suffix}"))]
        if not found:
            endings = {name.rsplit(".", 1)[-1] for name in modules}
            raise LrkitError(
                f'train_also: "{suffix}" matches no module of {type(model).__name__}{nearest(suffix, endings)}'
            )
        chosen += found
    return chosen


def _auto_head(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    base = getattr(model, "base_model", None)
    poolers = [name for name in modules if name.rsplit(".", 1)[-1] == "pooler"]
    if not isinstance(base, nn.Module) or base is model:
        return poolers + [name for name in modules if name.rsplit(".", 1)[-1] in _HEADS]
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(p) for p in base.parameters()}
    head = []
    for name, child in model.named_children():
        if child is base or any(m is embeddings for m in child.modules() if embeddings is not None):
            continue
        parameters = list(child.parameters())
        if parameters and not all(id(p) in inside for p in parameters):
            head.append(name)
    inner = [name for name in poolers if name not in head and not name.startswith(tuple(f"{h}." for h in head))]
    return inner + head
