"""Causal language models beside TRL, with a real model, and killed for good."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import datasets
import killed_causal
import pytest
import talkers
import torch
import transformers
from test_completion import SAID, TALK, rows
from trl import SFTConfig, SFTTrainer

import lrkit
from lrkit.study import carried
from lrkit.study.checkpoints import Record
from lrkit.study.run import train
from lrkit.study.run_settings import RunSettings
from lrkit.tasks import Completion
from lrkit.trainer import AdaptCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
HERE = Path(__file__).resolve().parents[1]


def of_trl(made, tokenizer, tmp_path, **settings):
    """Token ids and labels of each row as TRL's SFTTrainer prepares them."""
    config = SFTConfig(output_dir=str(tmp_path), max_length=20, report_to=[], use_cpu=True, **settings)
    trainer = SFTTrainer(model=talkers.llama(tokenizer), args=config, train_dataset=made, processing_class=tokenizer)
    return [(row["input_ids"], [-100, *row["labels"][1:]]) for row in trainer.train_dataset]


def of_lrkit(made, tokenizer):
    found = Completion(name="it", train=made, validation=made).examples(tokenizer, 20, training=True)
    return [(row["input_ids"], row["labels"]) for row in found]


@pytest.mark.parametrize("tokenizer", [talkers.byte_level, talkers.piece_level])
def test_prompts_are_trls(tokenizer, tmp_path):
    """Prompts and completions have TRL's tokens and labels: merged, too long, with an end token, without a prompt."""
    odd = [("Answer: ", "there"), ("Hello", " there<end>"), ("", "Hello there"), (SAID[0][0] * 9, " 12")]
    made = rows([*SAID, *odd])
    assert of_lrkit(made, tokenizer()) == of_trl(made, tokenizer(), tmp_path)


@pytest.mark.parametrize("tokenizer", [talkers.byte_level, talkers.piece_level])
def test_talks_are_trls(tokenizer, tmp_path):
    """Messages have TRL's tokens and labels, as prompts with completions, and whole with a template that marks turns."""
    pairs = datasets.Dataset.from_list(
        [{"prompt": TALK[:-1], "completion": TALK[-1:]}, {"prompt": TALK[1:2], "completion": TALK[2:3]}]
    )
    assert of_lrkit(pairs, tokenizer(talkers.CHAT)) == of_trl(pairs, tokenizer(talkers.CHAT), tmp_path)
    talks = datasets.Dataset.from_list([{"messages": TALK}, {"messages": TALK[1:3]}])
    marked = tokenizer(talkers.MARKED)
    assert of_lrkit(talks, marked) == of_trl(talks, marked, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("kind", ["plain", "packed", "written", "text"])
def test_killed_run_goes_on(kind, tmp_path):
    """A run that is killed behind a step, and begun again, is bitwise the run that never was."""
    model = tmp_path / "model"
    tokenizer = talkers.piece_level()
    talkers.llama(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    whole = killed_causal.told(killed_causal.run(str(model), kind))
    again = [sys.executable, "-W", "ignore", str(HERE / "killed_causal.py"), str(model), str(tmp_path / "out"), kind]
    killed = subprocess.run([*again, "4"], capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 3 <= Record(folder=tmp_path / "out").step() <= 4
    done = subprocess.run(again, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(whole)


FACTS = [
    (f"Question: What colour is the {thing} of the house?\nAnswer:", f" The {thing} of the house is {colour}.")
    for thing, colour in (
        ("door", "green"), ("roof", "violet"), ("wall", "white"), ("floor", "orange"), ("fence", "blue"), ("gate", "pink"),
        ("step", "grey"), ("lamp", "golden"),
    )
]  # fmt: skip


def test_smollm2_learns(tmp_path):
    """smollm2's perplexity on completions falls, with the losses of a bare Trainer that has the same seed."""
    given = RunSettings(steps=4, batch_size=4, max_length=48, lr=1e-3, seed=2, lr_warmup=0)
    made = rows(FACTS)
    task = Completion(name="facts", train=made, validation=made, max_new_tokens=4)
    method = lrkit.methods.lora(rank=8)
    before = train(method, task, model="smollm2", settings=attrs.evolve(given, steps=1, lr=1e-12))
    ours = train(method, task, model="smollm2", settings=given)
    assert ours.scores["perplexity"] < 0.7 * before.scores["perplexity"]
    assert ours.parameters.head == 0
    folder = carried.folder_of("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    by_hand = []
    for prompt, answer in FACTS:
        first, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(first) + ids[len(first) :]
        by_hand.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(2)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3, weight_decay=0.0)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, seed=2, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_list(by_hand),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, transformers.get_linear_schedule_with_warmup(optimizer, 0, 4)),
        callbacks=[AdaptCallback(adapted)],
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == pytest.approx(list(ours.losses), rel=1e-6)
    packed = train(
        method, attrs.evolve(task, packing=True), model="smollm2", settings=attrs.evolve(given, max_length=96)
    )
    assert packed.scores["perplexity"] < 0.7 * before.scores["perplexity"]
