"""A tokenizer of fourteen words and the settings of short runs, for the trainers of other packages."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "good", "bad", "film", "plot", "a", "the", "is", "was", "not", "very"]
COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "logging_steps": 4,
    "dataloader_pin_memory": False,
}
"""Settings of transformers' and TRL's trainers for a run that writes nothing."""


def tokenizer():
    """Make a tokenizer of `WORDS`, with a chat template that joins the messages."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made
