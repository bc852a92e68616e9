"""Which head is new, which is tied, which the loss never reaches; and what save_pretrained leaves behind."""

import models
import pytest
import torch
import torch.multiprocessing as mp
import zoo
from torch import nn
from zoo import IDS, said

import lrkit

LORA = lrkit.methods.lora(rank=2)
NEW = {
    "modernbert": ["head", "classifier"],
    "modernbert-mlm": [],  # a masked-language head was pretrained
    "siglip": [],  # its two heads were pretrained
    "siglip-classifier": ["classifier"],
    "detr": ["class_labels_classifier", "bbox_predictor"],  # its backbone's pooler has no parameters
    "wav2vec2": ["projector", "classifier"],
    "xlnet": ["sequence_summary", "logits_proj"],
    "gpt2-lm": [],
    "llama-lm": [],
    "t5-lm": [],
    "llava": [],
    "mamba": [],
}


@pytest.mark.parametrize("name", NEW)
def test_new_heads_are_told_from_pretrained(name):
    """The new task head trains; what was pretrained stays frozen."""
    adapted, _ = said(lambda: lrkit.attach(zoo.make(name), LORA))
    assert adapted.head == NEW[name]
    assert all(p.numel() for p in adapted.head_parameters())


def test_a_lone_pooler_is_left_out_and_named():
    """A base model has no task head: its pooler stays frozen, which is said, and trains where it is named."""
    with pytest.warns(lrkit.LrkitWarning, match=r'pooler stays as it is: BertModel.*train_also=\["pooler"\]'):
        adapted = lrkit.attach(zoo.make("bert-alone"), LORA)
    assert adapted.head == []
    assert lrkit.attach(zoo.make("bert-alone"), LORA, train_also=["pooler"]).head == ["pooler"]


def test_models_inside_of_others_speak_for_themselves():
    """In a container, a base model's pooler is left out, and a task model's head is its own."""

    class Pooled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.score = nn.Linear(32, 2)

    with pytest.warns(lrkit.LrkitWarning, match=r"inner\.pooler stays"):
        adapted = lrkit.attach(Pooled(zoo.make("bert-alone")), LORA)
    assert adapted.head == ["score"]
    adapted = lrkit.attach(Pooled(models.make("bert")), LORA)
    assert adapted.head == ["inner.bert.pooler", "inner.classifier", "score"]


TIED = {
    "gpt2-lm": "transformer.wte",
    "llama-lm": "model.embed_tokens",
    "gemma-lm": "model.embed_tokens",
    "t5-lm": "shared",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TIED)
def test_tied_heads_train(name, dtype, tmp_path):
    """A head whose tensor is the embedding's trains, says what moves with it, is saved, loaded, and put back."""
    model = zoo.make(name).to(dtype).eval()
    before = model.lm_head.weight.detach().clone()
    with pytest.warns(lrkit.LrkitWarning, match=f"lm_head is tied to {TIED[name]}.*moves with it"):
        adapted = lrkit.attach(model, LORA, train_also=["lm_head"])
    assert sum(p.numel() for p in adapted.head_parameters()) == before.numel()
    assert model.get_submodule(TIED[name]).weight is model.lm_head.weight
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert model.lm_head.weight.dtype == torch.float32
    assert not torch.equal(before, model.lm_head.weight.to(dtype))
    with torch.no_grad():
        trained = model(input_ids=IDS, labels=IDS).logits
    adapted.save(tmp_path)
    adapted.detach()
    assert torch.equal(model.lm_head.weight, before)
    lrkit.load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).logits, trained)


@pytest.mark.parametrize(
    ("train_also", "left"),
    [(["word_embeddings"], "pooler, classifier"), ("query", "pooler, classifier"), (["classifier"], ""), ([], "")],
)
def test_left_heads_are_told(train_also, left):
    """A new head that other modules' names leave out is named; one that is left out on purpose is not."""
    _, told = said(lambda: lrkit.attach(models.make("bert"), LORA, targets=["key"], train_also=train_also))
    assert (f"{left} stays as it is: train_also names other" in told) if left else not told


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d])
def test_running_statistics_are_told(kind):
    """Statistics that move in training are named, since they are not saved; with momentum 0 they stay."""
    settings = {"track_running_stats": True}
    with pytest.warns(lrkit.LrkitWarning, match="^2: running statistics move in training mode"):
        lrkit.attach(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), kind(4, **settings)), LORA, targets=["0"], train_also=[])
    for still in (kind(4, momentum=0.0, **settings), kind(4, track_running_stats=False)):
        lrkit.attach(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), still), LORA, targets=["0"], train_also=[])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.classifier, self.score = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.classifier(self.layers[1](self.layers[0](x).tanh()))


@pytest.mark.parametrize("bound", [True, False])
def test_a_head_that_no_gradient_reaches_is_named(bound):
    """At the first step, once; the head that trains is not."""
    model = TwoHeads()
    adapted = lrkit.attach(model, LORA)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    if bound:
        adapted.bind(optimizer, total_steps=3)

    def steps():
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()

    _, words = said(steps)
    assert words.count("score") == 1 and "classifier" not in words


def an_unread_pooler_under_ddp(tmp_path):
    """Mean pooling runs under DDP; a pooler that was asked for ends in one line that names it, not in the reducer's.

    See tests/integrations/test_more_processes.py.
    """
    mp.spawn(zoo.pooler_rank, (f"file://{tmp_path}/init", tmp_path), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}-False") == ("", 4)
        error, steps = torch.load(tmp_path / f"{rank}-True")
        assert (steps, "pooler" in error, "find_unused_parameters" in error) == (0, True, True)


# ---- save_pretrained ----


def test_saving_an_adapted_model_is_warned_of_once(tmp_path):
    """The warning says how such a folder is loaded; a plain model, after merge or detach, saves without it."""
    model = models.make("llama")
    adapted = lrkit.attach(model, LORA)
    with pytest.warns(lrkit.LrkitWarning, match=r"adapted\.save\(folder\).*lrkit\.load.*merge\(\)"):
        model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")  # a second one would be an error here
    original = adapted.original()
    adapted.merge()
    model.save_pretrained(tmp_path / "c")
    original.save_pretrained(tmp_path / "d")
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(original)
    adapted = lrkit.attach(model, LORA)
    with pytest.warns(lrkit.LrkitWarning, match="merge"):
        model.model.save_pretrained(tmp_path / "e")  # the base inside of it


def test_the_trainer_s_checkpoints_are_expected(tmp_path):
    """Beside the model's folder the callback writes the adapters: nothing to say, until the user saves alone."""
    from test_trainer import trainer

    t, _ = trainer("bert", LORA, tmp_path, save_strategy="steps", save_steps=4)
    t.train()
    with pytest.warns(lrkit.LrkitWarning, match="adapted.save"):
        t.save_model(str(tmp_path / "mine"))
