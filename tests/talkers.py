"""Small causal language models with random weights, and tokenizers of the two families that decoders have."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "Question: how many apples are there? Answer: there are 12 apples, and 3 pears. #### 15",
    "The film was good. The plot was dull, and the hero was a fine man. Hello there, and goodbye!",
    "user says hello\nassistant says goodbye\n",
]
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '<end>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + "
    "'<end>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if loop.last %}{{ 'so: ' }}{% endif %}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_level(template=None):
    """A tokenizer as GPT-2's: bytes, a blank belongs to the word behind it, no token before a text, no pad token's own."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<end>", "<user>", "<assistant>", "<system>"]
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(inner, template, eos_token="<end>", pad_token="<end>")


def piece_level(template=None):
    """A tokenizer as Llama's: a text gets a blank before its first word, and `<s>` before all of it."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "<end>", "<pad>", "<user>", "<assistant>", "<system>"]
    alphabet = [chr(n) for n in range(32, 127)] + ["\n"]
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(inner, template, bos_token="<s>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def _wrapped(inner, template, **special):
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.chat_template = template
    return made


def llama(tokenizer, attention="sdpa", seed=0, **settings):
    """A Llama of two layers, whose weights are large enough that tokens matter to each other."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, attn_implementation=attention,
        **_special(tokenizer), **settings,
    )  # fmt: skip
    return _made(transformers.LlamaForCausalLM, config, seed)


def gpt2(tokenizer, attention="sdpa", seed=0):
    """A GPT-2 of two layers, likewise."""
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        attn_implementation=attention, **_special(tokenizer),
    )  # fmt: skip
    return _made(transformers.GPT2LMHeadModel, config, seed)


def mamba(tokenizer, seed=0):
    """A Mamba of two layers: a state that goes on, without attention."""
    config = transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8, **_special(tokenizer)
    )
    return _made(transformers.MambaForCausalLM, config, seed)


def bloom(tokenizer, seed=0):
    """A Bloom of two layers: positions are in its attention, and cannot be given."""
    config = transformers.BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **_special(tokenizer)
    )
    return _made(transformers.BloomForCausalLM, config, seed)


def _special(tokenizer):
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _made(cls, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).eval()
