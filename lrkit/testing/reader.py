"""A tokenizer and models that know every text and no language: made here, so that a task is tried without a network."""

from typing import TYPE_CHECKING, Any

from lrkit.models import quiet_transformers
from lrkit.tasks import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_SPECIAL = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "eos_token": "<end>",
}
_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<end>\n{% endfor %}"
_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
POSITIONS = 512
"""The longest input of the models."""


def tokenizer() -> "PreTrainedTokenizerFast":
    """Make a fast tokenizer whose tokens are the bytes of UTF-8, with special tokens around texts and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = {each: n for n, each in enumerate([*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(each, tokens[each]) for each in ("<cls>", "<sep>")],
    )
    how: Any = PreTrainedTokenizerFast
    words: PreTrainedTokenizerFast = how(
        tokenizer_object=made, chat_template=_CHAT, model_max_length=POSITIONS, **_SPECIAL
    )
    return words


def model(head: Head, words: "PreTrainedTokenizerFast") -> "PreTrainedModel | None":
    """Make a model with a task's head for `tokenizer`, with the same random weights each time: BERT, Llama or T5.

    None if the head is on none of them: an image's, for example.
    """
    import torch
    import transformers

    settings: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, **head.settings()}
    begin: dict[str, Any] = {"decoder_start_token_id": words.pad_token_id}
    end = {"eos_token_id": words.eos_token_id, "bos_token_id": None}
    kinds: dict[str, Any] = {
        "AutoModelForCausalLM": lambda: transformers.LlamaConfig(
            **_SIZES, **settings, **end, max_position_embeddings=POSITIONS
        ),
        "AutoModelForSeq2SeqLM": lambda: transformers.T5Config(
            **_T5, **settings, eos_token_id=words.eos_token_id, **begin
        ),
    }
    made = kinds.get(
        head.auto_class, lambda: transformers.BertConfig(**_SIZES, **settings, max_position_embeddings=POSITIONS)
    )
    torch.default_generator.manual_seed(0)
    with quiet_transformers():
        try:
            found: PreTrainedModel = getattr(transformers, head.auto_class).from_config(made())
        except ValueError:  # transformers': there is no such class for this config
            return None
    return found
