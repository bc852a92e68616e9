"""Two tiny tasks on models with random weights: a perplexity, of which a lower one is better, and answers in words."""

import math

import attrs
import datasets
import torch

from lrkit.models import quiet_transformers
from lrkit.tasks import Task, generating
from lrkit.tasks.learnt import Sample

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "bad", "boy", "cat", "dog", "girl", "good", "man", "sad", "the", "was"]
WORDS += ["young"]
ROWS = ["the cat was good", "a boy was young", "the sad man", "a bad dog was a dog", "the girl was the girl"]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=64))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ids))


def write(make, folder):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with quiet_transformers():
        make().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def rows():
    return datasets.Dataset.from_dict({"text": ROWS * 4})


@attrs.frozen(kw_only=True, eq=False)
class Perplexity(Task):
    """Language modelling, a row each."""

    spread: float = 1.0
    """Of the scores, so that a test can make a run diverge."""

    @property
    def columns(self):
        return ("text",)

    @property
    def auto_class(self):
        return "AutoModelForCausalLM"

    @property
    def higher_is_better(self):
        return False

    def texts(self, rows):
        return list(rows["text"])

    def encode(self, batch, tokenizer, max_length, *, training):
        return dict(tokenizer(list(batch["text"]), truncation=True, max_length=max_length))

    def collator(self, tokenizer, *, training=True):
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def predict(self, model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["labels"][:, 1:].clone()
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        counted = (labels != generating.IGNORED).sum(1)
        return None, torch.stack([each.sum(1), counted.float()], 1)

    def references(self):
        return [0.0] * len(self.validation)

    def score(self, predictions, references):
        loss = float(predictions[:, 0].sum() / predictions[:, 1].sum()) * self.spread
        return {"perplexity": math.exp(loss) if loss < 100 else math.inf, "nats": loss}

    def perfect(self):
        import numpy as np

        return np.asarray([[0.0, 1.0]] * len(self.validation))


@attrs.frozen(kw_only=True, eq=False)
class Echo(Task):
    """A text that becomes its last word."""

    max_new_tokens: int = 3

    @property
    def columns(self):
        return ("text",)

    @property
    def auto_class(self):
        return "AutoModelForSeq2SeqLM"

    def texts(self, rows):
        return list(rows["text"])

    def encode(self, batch, tokenizer, max_length, *, training):
        encoded = dict(tokenizer(list(batch["text"]), truncation=True, max_length=max_length))
        encoded["asked"] = [len(text) for text in batch["text"]]  # nothing that a model takes
        if training:
            encoded["labels"] = tokenizer([text.split()[-1] for text in batch["text"]])["input_ids"]
        return encoded

    def collator(self, tokenizer, *, training=True):
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer)

    def predict(self, model, batch):
        return None, generating.generate(model, batch, max_new_tokens=self.max_new_tokens)

    def answers(self, outputs, examples, tokenizer):
        return generating.read(outputs, tokenizer)

    def references(self):
        return [text.split()[-1] for text in self.validation["text"]]

    def score(self, predictions, references):
        hits = [said == right for said, right in zip(predictions, references, strict=True)]
        return {
            "em": sum(hits) / len(hits),
            "words": sum(len(said.split()) for said in predictions) / len(hits),
        }

    def samples(self, model, tokenizer, max_length, count):
        texts = self.validation["text"][:count]
        batch = tokenizer(list(texts), padding=True, return_tensors="pt").to(model.device)
        said = generating.read(generating.generate(model, batch, max_new_tokens=3).cpu(), tokenizer)
        return [Sample(text, text.split()[-1], each) for text, each in zip(texts, said, strict=True)]


def perplexity(rest=None, **settings):
    return Perplexity(name="ppl", train=rows(), validation=rows().select(range(5)), **settings)


def echo(rest=None, **settings):
    return Echo(name="echo", train=rows(), validation=rows().select(range(5)), **settings)
