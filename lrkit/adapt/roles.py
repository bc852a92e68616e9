"""The place of a layer in a transformer's block, by the components of its name."""

from lrkit.parameterizations.base import Role

# Whole components of a layer's path inside its block, never substrings. Attention first: BERT's attention output is
# "attention.output.dense", its FFN output "output.dense".
_ATTENTION = frozenset(
    (
        *("attention", "attn", "self_attn", "self_attention", "crossattention", "cross_attn", "encoder_attn"),
        *("SelfAttention", "EncDecAttention", "selfattention", "q_lin", "k_lin", "v_lin", "out_lin", "rel_attn"),
        *("mixer", "mamba"),  # a state space mixes tokens, as attention does
    )
)
_FFN = frozenset(
    (
        *("mlp", "ffn", "intermediate", "output", "feed_forward", "feedforward", "DenseReluDense", "ffn_output"),
        *("fc1", "fc2", "linear1", "linear2", "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj"),
        *("wi", "wo", "block_sparse_moe", "experts", "ff", "ffn1", "ffn2", "pwconv1", "pwconv2", "fc_in", "fc_out"),
        *("intermediate_dense", "output_dense"),
    )
)
# The last map of attention or FFN by its own name; BERT's are "output.dense", GPT-NeoX's "attention.dense".
_OUTPUTS = frozenset(
    (
        *("o", "o_proj", "out_proj", "out_lin", "c_proj", "wo", "w2", "down_proj", "fc2", "lin2", "linear2"),
        *("dense_4h_to_h", "ffn_output", "output", "down", "Wo", "output_dense", "layer_2", "pwconv2", "fc_out"),
        *("proj", "projection", "post_proj", "linear_out", "linear_2", "dense2"),
    )
)


def role_of(name: str) -> Role:
    """Return ``"attention"``, ``"ffn"`` or ``"other"``, by the components of a layer's name.

    Covers BERT, RoBERTa, DeBERTa-v2/v3, ModernBERT, MPNet, DistilBERT, XLNet, GPT-2, OPT, Llama-style models, T5, Mamba and
    Jamba (whose mixers count as attention), Swin, ConvNext and wav2vec2. Shapes do not count: square FFNs and grouped-query
    attention would be mistaken, as they are in AFLoRA's released code.
    """
    parts = name.split(".")
    if any(part in _ATTENTION for part in parts):
        return "attention"
    return "ffn" if any(part in _FFN for part in parts) else "other"


def is_output(name: str) -> bool:
    """Return whether a layer is the last map of attention or FFN, by its name. Covers the models of `role_of`."""
    *path, last = name.split(".")
    if last == "dense":
        return bool(path) and (path[-1] == "output" or path[-1] in _ATTENTION)
    return last in _OUTPUTS and role_of(name) != "other"
