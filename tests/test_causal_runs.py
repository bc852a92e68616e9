"""Runs of causal language models: a bare Trainer's losses, killed runs, plain text, GSM8K as the hub has it."""

import itertools

import datasets
import killed_causal
import numpy as np
import pytest
import talkers
import torch
import transformers
from test_completion import PIECES, SAID, outputs, task

import lrkit
from lrkit.errors import LrkitError
from lrkit.study.checkpoints import Record
from lrkit.study.pretrained import load_pretrained
from lrkit.study.run import train
from lrkit.study.run_settings import RunSettings
from lrkit.tasks import LanguageModelling, load_task
from lrkit.tasks.gsm8k import load_gsm8k
from lrkit.testing import TaskContract
from lrkit.trainer import AdaptCallback


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    talkers.llama(PIECES).save_pretrained(folder)
    PIECES.save_pretrained(folder)
    return str(folder)


def by_hand(packed):
    """Training rows as a user would write them down, and the function that makes batches of them."""
    made = []
    for prompt, answer in SAID * 3:
        before, ids = PIECES(prompt)["input_ids"], PIECES(prompt + answer)["input_ids"] + [PIECES.eos_token_id]
        made.append({"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]})
    if not packed:
        made = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in made]
        return made, transformers.DataCollatorForSeq2Seq(PIECES)
    joined = []
    order = sorted(range(len(made)), key=lambda n: -len(made[n]["input_ids"]))
    for row in [made[n] for n in order]:
        block = next((each for each in joined if len(each["input_ids"]) + len(row["input_ids"]) <= 30), None)
        if block is None:
            joined.append(block := {"input_ids": [], "labels": [], "position_ids": []})
        for name in row:
            block[name] = block[name] + row[name]
        block["position_ids"] = block["position_ids"] + list(range(len(row["input_ids"])))

    def collate(blocks):
        longest = max(len(block["input_ids"]) for block in blocks)
        fill = {"input_ids": PIECES.pad_token_id, "labels": -100, "position_ids": 0}
        return {
            name: torch.tensor([block[name] + [value] * (longest - len(block[name])) for block in blocks])
            for name, value in fill.items()
        }

    return joined, collate


@pytest.mark.parametrize("packed", [False, True])
def test_run_is_a_trainers(place, packed, tmp_path):
    """A run has the losses of transformers' Trainer with rows tokenized by hand and the same seed, packed too."""
    given = RunSettings(steps=8, batch_size=4, max_length=30, lr=1e-2, seed=5)
    method = lrkit.methods.lora(rank=2)
    ours = train(method, task(SAID * 3, SAID, packing=packed), model=place, settings=given)

    made, collate = by_hand(packed)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    torch.manual_seed(5)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, seed=5, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_list(made),
        data_collator=collate,
        optimizers=(optimizer, transformers.get_linear_schedule_with_warmup(optimizer, 0, 8)),
        callbacks=[AdaptCallback(adapted)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == list(ours.losses)
    before = outputs(task(), talkers.llama(PIECES), PIECES, 6)
    assert ours.scores["perplexity"] < 0.9 * task().score(before, task().references())["perplexity"]


@pytest.mark.parametrize("kind", ["packed"])  # the others: tests/integrations/test_killed.py
def test_stopped_run_goes_on(place, kind, tmp_path):
    """A run that is stopped halfway, and begun again, is bitwise the run that never was."""
    whole = killed_causal.told(killed_causal.run(place, kind))
    asked = iter([False] * 3 + [True] * 9)
    with pytest.raises(KeyboardInterrupt):
        killed_causal.run(place, kind, Record(folder=tmp_path, stop=lambda: next(asked)))
    assert Record(folder=tmp_path).step() == 4
    assert killed_causal.told(killed_causal.run(place, kind, Record(folder=tmp_path))) == whole


def test_packing_refused_early(tmp_path):
    """A run with packed rows on a model that cannot keep them apart is refused before its first step."""
    tokenizer = talkers.byte_level()
    talkers.bloom(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LrkitError, match="in a BloomForCausalLM the rows of a block would see each other"):
        train(
            lrkit.methods.lora(rank=2),
            task(packing=True),
            model=str(tmp_path),
            settings=RunSettings(steps=2, max_length=30),
            progress=lambda *_: pytest.fail("it trains"),
        )


@pytest.mark.parametrize(
    ("kind", "family"), [("Bert", "an encoder"), ("T5", "an encoder-decoder"), ("Bart", "an encoder-decoder")]
)
def test_other_kinds_refused(kind, family, tmp_path):
    """An encoder, or one with a decoder, is refused in one line that says what would be right."""
    PIECES.save_pretrained(tmp_path)
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    for made in (task(), plain(TEXTS)):
        with pytest.raises(LrkitError, match=f"is {family} .*needs a causal language model.*smollm2") as error:
            load_pretrained(str(tmp_path), made.head)
        assert "\n" not in str(error.value)


# Plain text


def plain(texts, **options):
    made = datasets.Dataset.from_dict({"text": texts})
    return LanguageModelling(name="text", train=made, validation=made, **options)


TEXTS = [a + b for a, b in SAID] + ["", "Hello"]


@pytest.mark.parametrize("end", [True, False])
def test_texts_become_blocks(end):
    """Blocks one behind the other are the tokens of all texts, each with its end; all but a block's first are learnt."""
    wanted = [PIECES(text)["input_ids"] + [PIECES.eos_token_id] * end for text in TEXTS]
    found = plain(TEXTS, end=end).examples(PIECES, 16, training=True)
    assert list(itertools.chain(*found["input_ids"])) == list(itertools.chain(*wanted))
    assert {len(ids) for ids in found["input_ids"][:-1]} == {16}
    for row in found:
        assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize("end", [True, False])
def test_text_perplexity_of_loop(end):
    """The perplexity is that of a loop over blocks; each row has its own tokens' part of it."""
    made, model = plain(TEXTS, end=end), talkers.llama(PIECES)
    stream = [
        (token, row)
        for row, text in enumerate(TEXTS)
        for token in PIECES(text)["input_ids"] + [PIECES.eos_token_id] * end
    ]
    wanted = np.zeros((len(TEXTS), 2))
    for start in range(0, len(stream), 16):
        block = stream[start : start + 16]
        logits = model(torch.tensor([[token for token, _ in block]])).logits[0].detach().double()
        losses = -torch.log_softmax(logits, -1)
        for n in range(1, len(block)):
            wanted[block[n][1]] += [float(losses[n - 1, block[n][0]]), 1]
    for size in (1, 3, 64):
        found = outputs(made, model, PIECES, size, max_length=16)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    score = made.score(found, made.references())
    assert score == {"perplexity": pytest.approx(np.exp(wanted[:, 0].sum() / wanted[:, 1].sum()), rel=1e-5)}
    assert [each.reference for each in made.samples(model, PIECES, 16, 2)] != ["", ""]


# GSM8K

WORDED = {"question": ["How many apples? 1 and 2."], "answer": ["There are <<1+2=3>>3.\n#### 3"]}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, with GSM8K's columns and splits."""
    asked = []

    def load_dataset(*names):
        asked.append(names)
        train, test = ({key: [f"{value[0]}"] * count for key, value in WORDED.items()} for count in (5, 3))
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_dict(train), "test": datasets.Dataset.from_dict(test)}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lrkit.tasks.hub.reachable", lambda: True)
    return asked


def test_gsm8k_from_hub(hub):
    """GSM8K is asked of the hub by its name; its test split is what is scored, by the final number."""
    made = load_task("gsm8k")
    assert hub == [("openai/gsm8k", "main")]
    assert (len(made.train), len(made.validation), made.metric, made.primary) == (5, 3, "final_number", "em")
    assert made.train[0] == {
        "prompt": "Question: How many apples? 1 and 2.\nAnswer:",
        "completion": " There are <<1+2=3>>3.\n#### 3",
    }
    assert made.score(["3", "It is 3.0 apples.", "4"], made.references()) == {"em": pytest.approx(2 / 3)}
    assert made.with_options({"metric": "perplexity"}).primary == "perplexity"
    with pytest.raises(LrkitError, match=r'write "gsm8k", not "gsm8k/main"'):
        load_task("gsm8k/main")


def of_prompts(rest):
    """Prompts with completions: a few that are made up. Source: this file."""
    return loaded(rest, task)


def of_text(rest):
    """Plain text: a few lines that are made up. Source: this file."""
    return loaded(rest, lambda: plain(TEXTS))


def loaded(rest, made):
    if rest is not None:
        raise LrkitError("it has no parts")
    return made()


class TestTasks(TaskContract):
    component = (of_prompts, of_text)


@pytest.mark.usefixtures("hub")
class TestGsm8k(TaskContract):
    component = staticmethod(load_gsm8k)


def test_room_to_write(place):
    """Prompts behind which the model has no positions left for all that it may write are one line before the first step."""
    rows = [("Hello you" * 4, " there"), ("Hello", " there")]
    asked = task(rows, metric="exact_match", max_new_tokens=60)
    with pytest.raises(LrkitError, match=r"a prompt of \d+ tokens and task.max_new_tokens = 60 are more than"):
        train(
            lrkit.methods.lora(rank=1), asked, model=place, settings=RunSettings(steps=1, batch_size=1, max_length=32)
        )


def test_stops_where_it_learns_to(tmp_path):
    """A model stops at its tokenizer's end token too, which it learns, and fills up with the tokenizer's pad token."""
    model = talkers.llama(PIECES)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 5, 7
    model.save_pretrained(tmp_path)
    PIECES.save_pretrained(tmp_path)
    writing = load_pretrained(str(tmp_path), task().head).model.generation_config
    assert (writing.eos_token_id, writing.pad_token_id) == ([5, PIECES.eos_token_id], PIECES.pad_token_id)
