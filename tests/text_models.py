"""Encoder-decoders with random weights and a tokenizer of a few words, as `save_pretrained` writes them."""

from pathlib import Path

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<de>")
WORDS = ("a", "bad", "boy", "cat", "dog", "fat", "girl", "good", "man", "mat", "new", "old", "red", "sad", "sat", "and")
WORDS += ("the", "was", "young", ".", ":", "sum")


def tokenizer(**settings):
    """Words by blanks, and the end token after each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **named, additional_special_tokens=["<de>"], model_max_length=64, **settings
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(SPECIAL + WORDS), **sizes, **ids))


def bart():
    """BART starts with the end token."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "init_std": 0.5}
    heads = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 24))
    }
    ids = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=len(SPECIAL + WORDS), **sizes, **heads, **ids))


def mbart():
    """BART that is made to write a language first."""
    model = bart()
    model.generation_config.forced_bos_token_id = SPECIAL.index("<de>")
    return model


def marian():
    from transformers import MarianConfig, MarianMTModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "init_std": 0.5}
    heads = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 24))
    }
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
    return MarianMTModel(MarianConfig(vocab_size=len(SPECIAL + WORDS), **sizes, **heads, **ids))


MODELS = {"t5": t5, "bart": bart, "mbart": mbart, "marian": marian}


def make(name, seed=0):
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    torch.set_rng_state(state)
    return model


def write(name, folder: Path) -> Path:
    from lrkit.models import quiet_transformers

    with quiet_transformers():
        make(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder
