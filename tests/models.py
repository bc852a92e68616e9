"""Small models of the shapes people have, with random weights, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

_SMALL = {"vocab_size": 64, "num_labels": 2}
_BERT = _SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def bert():
    return BertForSequenceClassification(BertConfig(**_BERT))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**_BERT))


def mpnet():
    return MPNetForSequenceClassification(MPNetConfig(**_BERT))


def deberta():
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **_BERT,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        )
    )


def gpt2():
    config = GPT2Config(
        **_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return GPT2ForSequenceClassification(config)


def llama():
    config = LlamaConfig(
        **_SMALL,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForSequenceClassification(config)


MODELS = {"bert": bert, "roberta": roberta, "mpnet": mpnet, "deberta": deberta, "gpt2": gpt2, "llama": llama}


def make(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]()


def batch(seed=0, rows=8, length=12):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    # Something to learn: the label is whether the first token is in the upper half of the vocabulary.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] > 33).long()}


def ragged(seed=0, rows=12, length=12):
    """A batch whose rows have different lengths."""
    data = batch(seed, rows, length)
    lengths = torch.arange(length, length - rows, -1).clamp_min(5)
    return data | {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def checkpoint_activations(model):
    """Compute activations again in the backward pass, by the name that the installed transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
