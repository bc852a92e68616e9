"""Does a model's architecture fit a task's head? An encoder writes no text, and a decoder is no encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WORDS = {
    "AutoModel": "a model without a head",
    "AutoModelForSequenceClassification": "a sequence classifier",
    "AutoModelForTokenClassification": "a token classifier",
    "AutoModelForQuestionAnswering": "a model that marks answers in a text",
    "AutoModelForSeq2SeqLM": "an encoder-decoder, which writes a text from a text",
    "AutoModelForCausalLM": "a causal language model, which goes on with a text",
}

_ARTICLES = {
    "encoder-decoder": "an encoder-decoder",
    "encoder": "an encoder",
    "decoder": "a decoder",
    "other": "another kind of model",
}


def words_of(auto_class: str) -> str:
    """Say in words which kind of model one of transformers' Auto classes makes, with its article."""
    return _WORDS.get(auto_class, f"a model of transformers' {auto_class}")


def fits(config: PretrainedConfig, auto_class: str) -> bool:
    """Say whether transformers has a model of a config for an Auto class that is not alien to the weights.

    transformers has some classes that no pretrained weights are for, for example BERT as a causal language model, which
    would attend to the words that it is to say.
    """
    if auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    if not _has(config, auto_class):
        return False
    return auto_class != "AutoModelForCausalLM" or _family(config) == "decoder"


def check_kind(spec: str, config: PretrainedConfig, auto_class: str, others: Iterable[tuple[str, Any]]) -> None:
    """Raise LrkitError if a model's architecture is not the one that a task needs.

    Args:
        spec: the model's name, as the user gave it.
        config: its config.
        auto_class: name of the Auto class that the task needs.
        others: names and configs of models that may be suggested.
    """
    if fits(config, auto_class):
        return
    right = [name for name, other in others if fits(other, auto_class)]
    hint = f"; give --model {', '.join(right)} or another one" if right else ""
    raise LrkitError(
        f'model "{spec}" is {_ARTICLES[_family(config)]} ({config.model_type}), and the task needs '
        f"{words_of(auto_class)}{hint}"
    )


def _has(config: PretrainedConfig, auto_class: str) -> bool:
    import transformers

    mapping = getattr(getattr(transformers, auto_class), "_model_mapping", {})
    return type(config) in mapping


def _family(config: PretrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    # Decoders have no class for masked words; encoders that are to be decoders must say so.
    if _has(config, "AutoModelForMaskedLM") and not getattr(config, "is_decoder", False):
        return "encoder"
    return "decoder" if _has(config, "AutoModelForCausalLM") else "other"
