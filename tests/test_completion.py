"""Prompts and conversations, token by token; packed rows; perplexity and written texts; a run against a bare Trainer."""

import sys

import datasets
import numpy as np
import pytest
import talkers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.tasks import Completion, likelihood
from lrkit.tasks.packing import blocks, check_packing

BYTES, PIECES = talkers.byte_level(), talkers.piece_level()
TOKENIZERS = {"bytes": BYTES, "pieces": PIECES}
SAID = [
    ("Question: how many apples? Answer:", " there are 12 apples"),
    ("Hello", " there, and goodbye!"),
    ("The film", " was"),
    ("The plot was", " dull, and the hero was a fine man."),
    ("how many", " #### 15"),
    ("the hero", " says goodbye"),
]
TALK = [
    {"role": "system", "content": "hero"},
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "there are 12"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "goodbye!"},
]


def rows(pairs=SAID):
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])


def task(pairs=SAID, validation=None, **options):
    return Completion(name="said", train=rows(pairs), validation=rows(validation or pairs), **options)


def talks(*conversations, **options):
    made = datasets.Dataset.from_list([{"messages": each} for each in conversations])
    return Completion(name="talks", train=made, validation=made, **options)


def learnt(example):
    """The tokens that have a label, each of which must be the token itself."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    return [token for token, label in pairs if label != -100]


# Token by token

words = st.text(alphabet="Hello, there 12?!#\nAnswer:é", max_size=24)


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(sorted(TOKENIZERS)), prompt=words, answer=words)
def test_boundary_is_exact(which, prompt, answer):
    """Tokens are the whole text's and an end; learnt is all from where the prompt's tokens and those part ways."""
    tokenizer = TOKENIZERS[which]
    inner = tokenizer._tokenizer  # tokenized by the library underneath
    whole = [*inner.encode(prompt + answer).ids, tokenizer.eos_token_id]
    alone = inner.encode(prompt).ids
    first = max(n for n in range(len(alone) + 1) if whole[:n] == alone[:n])
    encoded = task().encode({"prompt": [prompt], "completion": [answer]}, tokenizer, 999, training=False)
    assert encoded["input_ids"] == [whole]
    assert encoded["labels"] == [[token if n >= max(first, 1) else -100 for n, token in enumerate(whole)]]
    assert encoded["crossed"] == [int(first < len(alone))]
    assert whole.count(1) == (which == "pieces") or which == "bytes"  # <s>, once


@pytest.mark.parametrize("which", TOKENIZERS)
def test_completion_is_learnt(which):
    """What is learnt of a row reads as its completion, with the end token once, also if the text has it already."""
    tokenizer = TOKENIZERS[which]
    for prompt, answer in [*SAID, ("Hello", " there<end>")]:
        encoded = task().encode({"prompt": [prompt], "completion": [answer]}, tokenizer, 99, training=True)
        tokens = learnt({key: encoded[key][0] for key in ("input_ids", "labels")})
        assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
        text = answer.removesuffix("<end>")
        assert tokenizer.decode(tokens[:-1]).strip() == text.strip()
        assert encoded["crossed"] == [0]


def test_merged_boundary_is_told():
    """A token over the boundary is learnt, and a warning says in how many rows."""
    merged = task([("Answer: ", "there"), ("Answer:", " there")])
    with pytest.warns(LrkitWarning, match="in 1 of 2 training rows a token spans the end of the prompt"):
        found = merged.examples(BYTES, 99, training=True)
    assert [BYTES.decode(learnt(row)) for row in found] == [" there<end>"] * 2
    assert found[0]["input_ids"] == found[1]["input_ids"]


@pytest.mark.parametrize("behind", ["<end>", "<system>"])
def test_own_end_token_counts(behind):
    """A token that a tokenizer puts behind every text is not put behind prompts, nor does it stay beside the end token."""
    from tokenizers import processors

    ended = talkers.piece_level()
    special = [("<s>", 1), (behind, ended.convert_tokens_to_ids(behind))]
    ended._tokenizer.post_processor = processors.TemplateProcessing(single=f"<s> $A {behind}", special_tokens=special)
    for metric in ("perplexity", "exact_match"):
        one, two = (
            task(metric=metric).encode(rows()[:], each, 99, training=metric == "perplexity") for each in (ended, PIECES)
        )
        assert one == two


# Conversations


@pytest.mark.parametrize("template", [talkers.CHAT, talkers.MARKED])
@pytest.mark.parametrize("made", [talkers.byte_level, talkers.piece_level])
def test_turns_are_learnt(template, made):
    """Of a conversation the assistant's turns are learnt, and nothing else, by marks as by what a turn adds."""
    tokenizer = made(template)
    found = talks(TALK).examples(tokenizer, 99, training=True)[0]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert found["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(learnt(found)).replace(" ", "") == "thereare12<end>\ngoodbye!<end>\n"


def test_messages_as_prompts():
    """Prompts and completions may be messages: the completion's are learnt, as the template writes them."""
    tokenizer = talkers.byte_level(talkers.CHAT)
    made = datasets.Dataset.from_list([{"prompt": TALK[:-1], "completion": TALK[-1:]}])
    one = Completion(name="m", train=made, validation=made)
    found = one.examples(tokenizer, 99, training=True)[0]
    assert found["input_ids"] == talks(TALK).examples(tokenizer, 99, training=True)[0]["input_ids"]
    assert tokenizer.decode(learnt(found)) == "goodbye!<end>\n"
    asked = [
        attrs_task.encode(attrs_task.validation[:], tokenizer, 99, training=False)["input_ids"][0]
        for attrs_task in (one.with_options({"metric": "exact_match"}), talks(TALK, metric="exact_match"))
    ]
    assert asked[0] == asked[1] and tokenizer.decode(asked[0]).endswith("<user>Hello\n<assistant>")
    assert one.references() == talks(TALK).references() == ["goodbye!"]


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (None, TALK, "has no chat template to write them by"),
        (talkers.FORGETS, TALK, "writes a turn in another way once the conversation goes on"),
        (
            "{{ raise_exception('no system') }}",
            TALK,
            "cannot be written by the chat template: TemplateError: no system",
        ),
        (talkers.CHAT, TALK[:2], "no message of an assistant's"),
    ],
)
def test_odd_conversations_refused(template, talk, message):
    """A template that is missing, fails or is not the same twice, and a talk without an answer, are one line each."""
    with pytest.raises(LrkitError) as error:
        talks(talk).examples(talkers.byte_level(template), 99, training=True)
    if talk is not TALK:
        with pytest.raises(LrkitError, match="no message of an assistant's"):
            talks(talk).references()
    assert message in str(error.value) and "\n" not in str(error.value)


# Lengths


def test_long_rows_are_told():
    """Rows are cut at their end; a training row without a learnt token is left out, and a warning counts both."""
    length = len(BYTES("Hello there, and goodbye!")["input_ids"])
    long = task([("Hello", " there, and goodbye!"), (SAID[0][0] * 3, " 12"), ("Hello", " 12")])
    with pytest.warns(LrkitWarning) as told:
        found = long.examples(BYTES, length, training=True)
    assert sorted(str(each.message) for each in told) == [
        f'task "said": 1 of 3 training rows have more than run.max_length = {length} tokens: they are cut',
        f'task "said": 1 of 3 training rows have nothing to learn in run.max_length = {length} tokens: they are left out',
    ]
    assert [BYTES.decode(learnt(row)) for row in found] == [" there, and goodbye!", " 12<end>"]
    with pytest.warns(LrkitWarning, match=f"2 of 3 validation rows have more than run.max_length = {length} tokens"):
        assert len(long.examples(BYTES, length, training=False)) == 3
    asked = long.with_options({"metric": "exact_match"})
    with pytest.warns(LrkitWarning, match="1 of 3 validation rows"):
        found = asked.examples(BYTES, length, training=False)
    assert BYTES.decode(found[1]["input_ids"]) == (SAID[0][0] * 3)[-len(BYTES.decode(found[1]["input_ids"])) :]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_left_refused(training):
    """If no row has a token to learn or to score, that is one line."""
    with pytest.raises(
        LrkitError, match=r"no example is left of 6 train rows in 8 tokens|leaves no token of a completion"
    ):
        task([(SAID[0][0] * 3, " 12")] * 6).examples(BYTES, 8, training=training)


def test_first_rows_may_go():
    """A thousand rows that are left out before one that stays change nothing of it."""
    with pytest.warns(LrkitWarning, match="1,000 of 1,001"):
        found = task([(SAID[0][0] * 3, " 12")] * 1000 + [("Hello", " 12")]).examples(BYTES, 8, training=True)
    assert [BYTES.decode(learnt(row)) for row in found] == [" 12<end>"]


# Packing


@given(st.lists(st.integers(1, 10), max_size=40))
def test_blocks_hold_all_rows(lengths):
    """Each row is in one block, no block is too long, and none of them would go into another one."""
    found = blocks(lengths, 10)
    assert sorted(row for block in found for row in block) == list(range(len(lengths)))
    full = [sum(lengths[row] for row in block) for block in found]
    assert all(size <= 10 for size in full)
    assert all(full[n] + lengths[found[m][0]] > 10 for m in range(len(found)) for n in range(m))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "which", "close"), [("llama", "pieces", 1e-5), ("gpt2", "bytes", 1e-10)])
def test_packed_rows_are_alone(kind, which, close, attention):
    """In a block each row has the logits that it has alone, and their loss is the mean; Llama's norms are float32."""
    tokenizer = TOKENIZERS[which]
    model = getattr(talkers, kind)(tokenizer, attention).double()
    check_packing(model)
    packed = task(packing=True).examples(tokenizer, 30, training=True)
    assert 1 < len(packed) < len(SAID) and sum(packed["rows"]) == len(SAID)
    batch = task(packing=True).collator(tokenizer, training=True)(
        list(packed.remove_columns(["rows", "cut", "crossed"]))
    )
    model.config.use_cache = False
    got = model(**batch)
    alone = {tuple(row["input_ids"]): row for row in task().examples(tokenizer, 30, training=True)}
    total, tokens, seen = 0.0, 0, 0
    for n, positions in enumerate(packed["position_ids"]):
        starts = [at for at, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
            row = alone[tuple(packed[n]["input_ids"][start:stop])]
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            found = model(input_ids=ids, labels=labels)
            torch.testing.assert_close(got.logits[n, start:stop], found.logits[0], rtol=close, atol=close)
            assert packed[n]["labels"][start:stop] == row["labels"]
            total += float(found.loss.detach()) * int((labels[:, 1:] != -100).sum())
            tokens, seen = tokens + int((labels[:, 1:] != -100).sum()), seen + 1
    assert seen == len(SAID)
    assert float(got.loss.detach()) == pytest.approx(total / tokens, rel=1e-6)


def test_other_rows_change_nothing():
    """Other tokens in one row of a block change no logit of another, and no gradient comes from there."""
    model = talkers.llama(PIECES).double()
    model.config.use_cache = False
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    said = []
    for first in (7, 9):
        ids = torch.tensor([[first, first, 11, 12, 20, 21, 22]])
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, position_ids=positions).logits[0, 4:]
        logits.sum().backward()
        said.append(logits.detach())
        assert not embedded.grad[0, :4].any() and embedded.grad[0, 4:].any()
    assert torch.equal(*said)


@pytest.mark.parametrize(("kind", "why"), [("mamba", "does not tell them apart"), ("bloom", "TypeError|does not tell")])
def test_packing_refused(kind, why):
    """A model that lets packed rows see each other is refused in one line."""
    model = getattr(talkers, kind)(BYTES)
    with pytest.raises(LrkitError, match=f"the rows of a block would see each other .*({why})") as error:
        task(packing=True).check_model(model)
    assert "\n" not in str(error.value)
    task().check_model(model)


def test_positions_begin_anew():
    """A model that counts positions through a block is refused: each row must be what it is alone."""
    model = talkers.gpt2(BYTES)
    forward = model.forward

    def counted(position_ids=None, **batch):
        count = torch.arange(position_ids.shape[1])[None]
        # attends to each row alone, as from positions, and adds up positions of the whole block
        embedded = model.transformer.wte(batch.pop("input_ids"))
        moved = model.transformer.wpe(count) - model.transformer.wpe(position_ids)
        return forward(inputs_embeds=embedded + moved, position_ids=position_ids, **batch)

    model.forward = counted
    with pytest.raises(LrkitError, match="positions do not begin anew"):
        check_packing(model)


# Perplexity


def outputs(made, model, tokenizer, size, max_length=40):
    """What `predict` returns of all validation rows, in batches of a size."""
    examples = made.examples(tokenizer, max_length, training=False)
    taken = [name for name in ("input_ids", "attention_mask", "labels") if name in examples.column_names]
    collate, found = made.collator(tokenizer, training=False), []
    with torch.no_grad():
        for start in range(0, len(examples), size):
            part = examples.select(range(start, min(start + size, len(examples)))).select_columns(taken)
            found.append(made.predict(model, collate(list(part)))[1].numpy())
    width = max(part.shape[1] for part in found)
    filled = [np.pad(part, [(0, 0), (0, width - part.shape[1])], constant_values=-100) for part in found]
    return made.answers(np.concatenate(filled), examples, tokenizer)


@pytest.mark.parametrize(("kind", "which"), [("llama", "pieces"), ("gpt2", "bytes")])
def test_perplexity_of_loop(kind, which, monkeypatch):
    """The perplexity is that of a float64 loop over single rows and tokens, whatever the batch, or its parts."""
    tokenizer = TOKENIZERS[which]
    model = getattr(talkers, kind)(tokenizer)
    total, tokens = 0.0, 0
    exact = getattr(talkers, kind)(tokenizer).double()
    for prompt, answer in SAID:
        before = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        logits = exact(torch.tensor([ids])).logits[0].detach().numpy()
        for n in range(len(before), len(ids)):
            row = logits[n - 1]
            total += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[n]])
            tokens += 1
    made = task()
    for size, held in ((1, 2**27), (4, 2**27), (6, 1), (6, 400 * 12 * 3)):
        monkeypatch.setattr(likelihood, "AT_ONCE", held)
        found = outputs(made, model, tokenizer, size)
        assert found[:, 1].sum() == tokens
        assert made.score(found, made.references()) == {"perplexity": pytest.approx(np.exp(total / tokens), rel=1e-5)}


def test_perplexity_edges():
    """A row without a token counts for nothing; what is not finite is nan, and what is too large is inf."""
    made = task()
    found = np.array([[2.0, 1.0], [0.0, 0.0], [4.0, 2.0], [0, 0], [0, 0], [0, 0]])
    assert made.score(found, made.references()) == {"perplexity": pytest.approx(np.exp(2.0))}
    assert np.isnan(made.score(found * np.nan, made.references())["perplexity"])
    assert np.isnan(made.score(found * 0, made.references())["perplexity"])
    assert made.score(found * [1e6, 1], made.references()) == {"perplexity": np.inf}
    assert made.majority is None and not made.higher_is_better and made.primary == "perplexity"
    with pytest.raises(LrkitError, match="5 predictions for 6 rows"):
        made.score(found[:5], made.references())


# Written texts


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("kind", "which"), [("llama", "pieces"), ("gpt2", "bytes")])
def test_batches_write_alike(kind, which, beams):
    """What is written does not depend on the batch; alone, without padding, it is transformers' own."""
    tokenizer = TOKENIZERS[which]
    model = getattr(talkers, kind)(tokenizer)
    made = task(metric="exact_match", max_new_tokens=6, num_beams=beams)
    found = [outputs(made, model, tokenizer, size) for size in (1, 4, 6)]
    assert found[0] == found[1] == found[2] and any(found[0])
    ids = tokenizer(SAID[0][0], return_tensors="pt")["input_ids"]
    alone = model.generate(input_ids=ids, max_new_tokens=6, num_beams=beams, do_sample=False)[0, ids.shape[1] :]
    assert found[0][0] == tokenizer.decode(alone, skip_special_tokens=True).strip()
    told = task(max_new_tokens=6, num_beams=beams).samples(model, tokenizer, 40, 2)
    assert [each.output for each in told] == found[0][:2]
    assert [(each.input, each.reference) for each in told] == [(p, a.strip()) for p, a in SAID[:2]]


def test_empty_prompts_are_written():
    """Without a prompt a model goes on from the token that begins texts, or the end token of a text before."""
    for tokenizer, begin in ((BYTES, BYTES.eos_token_id), (PIECES, PIECES.bos_token_id)):
        made = task([("", " there"), ("Hello", " there")], metric="exact_match", max_new_tokens=4)
        assert made.examples(tokenizer, 20, training=False)["input_ids"][0] == [begin]
        model = talkers.llama(tokenizer)
        assert outputs(made, model, tokenizer, 1) == outputs(made, model, tokenizer, 2)


@pytest.mark.parametrize("pair", [(None, " there"), ("Hello", None), ("Hello", TALK[:1])])
def test_odd_pairs_refused(pair):
    """A prompt or completion that is no text beside one that is, is told in one line."""
    with pytest.raises(LrkitError, match="both must be texts, or both lists of messages"):
        task().encode({"prompt": ["Hello", pair[0]], "completion": [" there", pair[1]]}, BYTES, 20, training=True)


def test_written_within_positions():
    """A model writes as far as it has positions; a prompt that leaves none is one line."""
    model = talkers.gpt2(BYTES)
    made = task(metric="exact_match", max_new_tokens=50)
    batch = {"input_ids": torch.full((1, 60), 7), "attention_mask": torch.ones(1, 60, dtype=torch.int64)}
    assert made.predict(model, batch)[1].shape[1] <= 4
    batch = {key: torch.cat([value, value[:, :4]], 1) for key, value in batch.items()}
    with pytest.raises(LrkitError, match=r"fills all 64 positions of the model: lower run.max_length"):
        made.predict(model, batch)


def test_scores_of_texts():
    """Exact match but for white space, and the final number; the best constant answer is the most frequent one."""
    made = task([("q", " #### 12"), ("q", " 6 + 6 = 12"), ("q", " #### 7")], metric="final_number")
    assert made.score(["12.0", "so 13", "I say 7."], made.references()) == {"em": pytest.approx(2 / 3)}
    assert made.majority == pytest.approx(2 / 3) and made.higher_is_better
    made = made.with_options({"metric": "exact_match"})
    assert made.score(["#### 12", "6 + 6\n = 12 ", "7"], made.references()) == {"em": pytest.approx(2 / 3)}
    assert made.majority == pytest.approx(1 / 3)
    with pytest.raises(LrkitError, match="validation row 1 has no number in its completion: 'none'"):
        task([("q", " 1"), ("q", " none")], metric="final_number")
    with pytest.raises(LrkitError, match=r"Completion\.metric must be"):
        task(metric="loss")


def test_rouge_needs_its_package(monkeypatch):
    """ROUGE without its package is told before anything is trained."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(LrkitError, match="ROUGE needs the package rouge-score"):
        task(metric="rouge").examples(BYTES, 40, training=True)
    assert task(metric="rouge").majority is None
