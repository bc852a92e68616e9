"""PEFT's methods as baselines in lrkit: in the same study, on the same rows, in the same table. See README.md."""

from collections.abc import Callable, Mapping
from typing import Any

import lrkit
from lrkit_peft.parameterization import LAYERS, PROMPTS, Around, Peft


def peft(*, config: str = "LORA", settings: Mapping[str, Any] | None = None) -> lrkit.Method:
    """Any PEFT method by the name of its ``PeftType``, with its config's fields as settings. Source: of each, its paper.

    Args:
        config: ``"LORA"``, ``"LOHA"``, ``"OFT"``, ...
        settings: ``{"r": 4}``, on the command line ``--set 'settings={"r": 4}'``.
    """
    return lrkit.Method(parameterization=Peft(config=config, settings=settings or {}))


def peft_lora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> lrkit.Method:
    """PEFT's LoRA (Hu et al., arXiv 2106.09685), to be compared with lrkit's own.

    Args:
        rank: r.
        alpha: α; the increment is scaled by α/r.
        dropout: on the adapter's input, while training.
    """
    return peft(config="LORA", settings={"r": rank, "lora_alpha": alpha, "lora_dropout": dropout})


def peft_dora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> lrkit.Method:
    """PEFT's DoRA (Liu et al., arXiv 2402.09353): LoRA for a weight's direction, and a trained magnitude.

    Args:
        rank: r.
        alpha: α; the increment is scaled by α/r.
        dropout: on the adapter's input, while training.
    """
    lora = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return peft(config="LORA", settings={**lora, "use_dora": True})


def peft_vera(*, rank: int = 256, d_initial: float = 0.1, seed: int = 0) -> lrkit.Method:
    """PEFT's VeRA (Kopiczko et al., arXiv 2310.11454): one pair of random matrices for all layers, trained vectors.

    Args:
        rank: r.
        d_initial: first value of d.
        seed: of the random matrices (``projection_prng_key``).
    """
    return peft(config="VERA", settings={"r": rank, "d_initial": d_initial, "projection_prng_key": seed})


def peft_ia3() -> lrkit.Method:
    """PEFT's (IA)³ (Liu et al., arXiv 2205.05638): trained scales on keys, values and FFN, by PEFT's table of models."""
    return peft(config="IA3")


def peft_ln_tuning() -> lrkit.Method:
    """PEFT's LN tuning (Zhao et al., arXiv 2312.11420): every ``nn.LayerNorm`` trains."""
    return peft(config="LN_TUNING")


def peft_prefix_tuning(*, tokens: int = 20, projection: bool = False, hidden: int = 128) -> lrkit.Method:
    """PEFT's prefix tuning (Li and Liang, arXiv 2101.00190): trained keys and values before each layer's own.

    Args:
        tokens: virtual tokens.
        projection: write them as a two-layer perceptron's output while training, as the paper does.
        hidden: width of that perceptron.
    """
    settings: dict[str, Any] = {"num_virtual_tokens": tokens, "prefix_projection": projection}
    return peft(config="PREFIX_TUNING", settings=settings | ({"encoder_hidden_size": hidden} if projection else {}))


def peft_prompt_tuning(*, tokens: int = 20) -> lrkit.Method:
    """PEFT's prompt tuning (Lester et al., arXiv 2104.08691): trained embeddings before the input's own.

    Args:
        tokens: virtual tokens.
    """
    return peft(config="PROMPT_TUNING", settings={"num_virtual_tokens": tokens})


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """PEFT's methods, one class for all."""
    return {"peft": Peft}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """The common ones by name, and any other through ``peft``."""
    return {
        "peft": peft,
        "peft-lora": peft_lora,
        "peft-dora": peft_dora,
        "peft-vera": peft_vera,
        "peft-ia3": peft_ia3,
        "peft-ln-tuning": peft_ln_tuning,
        "peft-prefix-tuning": peft_prefix_tuning,
        "peft-prompt-tuning": peft_prompt_tuning,
    }


__all__ = [
    "LAYERS",
    "PROMPTS",
    "Around",
    "Peft",
    "peft",
    "peft_dora",
    "peft_ia3",
    "peft_ln_tuning",
    "peft_lora",
    "peft_prefix_tuning",
    "peft_prompt_tuning",
    "peft_vera",
]
