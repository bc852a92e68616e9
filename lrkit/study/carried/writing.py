"""Write a model's folder as `from_pretrained` reads it: config, weights and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Write config.json and, of arrays by name, model.safetensors."""
    import numpy as np
    from safetensors.numpy import save_file

    write_json(folder / "config.json", config)
    save_file(
        {name: np.ascontiguousarray(w) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def write_tokenizer(folder: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write tokenizer.json, with nothing cut or padded unless asked for, and its settings.

    Args:
        folder: where.
        tokenizer: a tokenizer.json, read.
        settings: special tokens, the longest input, and so on.
    """
    write_json(folder / "tokenizer.json", {**tokenizer, "truncation": None, "padding": None})
    # The plain class takes the file as it is; a model's own class makes some of its parts anew.
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    write_json(folder / "tokenizer_config.json", told)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
