"""The model families of transformers, each with few layers and without storage."""

import contextlib
import copy
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

DEPTH = 6
"""At most so many layers each stack of blocks has: enough for mixed kinds of layers."""
_DEPTHS = (
    *(
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
    ),
    *("num_decoder_layers", "depth", "num_mamba_layers", "vision_layers", "n_decoder_layers", "num_text_layers"),
)
_MISSING: dict[str, dict[str, Any]] = {
    **{name: {"prediction_length": 24} for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 6,
    },
}
"""Settings that a family's configuration asks for and has no usable default of."""


def families() -> dict[str, type]:
    """Return the configuration classes of all families that `AutoModel` knows, by model type."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    known = dict.fromkeys(MODEL_MAPPING, True)
    return {name: CONFIG_MAPPING[name] for name in sorted(CONFIG_MAPPING) if CONFIG_MAPPING[name] in known}


def build(name: str, depth: int = DEPTH) -> nn.Module:
    """Build a family's base model on the meta device with default sizes, and few layers where that is possible."""
    from transformers import AutoModel

    config = families()[name](**_MISSING.get(name, {}))
    small = copy.deepcopy(config)
    _shorten(small, depth)
    with torch.device("meta"):
        try:
            return AutoModel.from_config(small)
        except Exception:
            return AutoModel.from_config(config)


LLAMAS = {"1 B": (2048, 8192, 16, 32), "70 B": (8192, 28672, 80, 64)}
"""Width, width of the FFN, blocks and heads of Llamas by size; each has 8 heads of keys and values."""


def llama(size: str, **settings: Any) -> nn.Module:
    """Build a Llama of 1 B or 70 B parameters with its head on the meta device; settings are its configuration's."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, inner, blocks, heads = LLAMAS[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=size == "1 B",
        use_cache=False,
        **settings,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shorten(config: Any, depth: int) -> None:
    """Cut the number of layers, and the lists that have one entry per layer."""
    longest = {getattr(config, field, None) for field in _DEPTHS}
    longest = {n for n in longest if type(n) is int and n > depth}
    for field, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _shorten(value, depth)
        elif isinstance(value, (list, tuple)) and len(value) in longest:
            setattr(config, field, value[:depth])
        elif field in _DEPTHS and type(value) is int and value > depth:
            setattr(config, field, depth)


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not built in {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
