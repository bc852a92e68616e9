"""Models that were silently others: tensors frozen by hand, weights that a method would replace, cut under DDP, resized."""

import copy

import models
import pytest
import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lrkit
from lrkit.errors import LrkitError
from lrkit.trainer import AdaptCallback

LORA = lrkit.methods.lora(rank=2)
IDS = torch.arange(3, 11)[None]


def small(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes, **settings)).eval()


def by_hand(model, train_also=()):
    """LoRA-FA: A stays as it was drawn."""
    adapted = lrkit.attach(model, LORA, train_also=list(train_also))
    for name, p in adapted.named_parameters():
        p.requires_grad_(not name.endswith(".A"))
    return adapted


def steps(adapted, optimizer, which):
    for step in which:
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        adapted.model(x).square().sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in adapted.named_parameters()}


@pytest.mark.filterwarnings("ignore:[0-9] of [0-9]* adapter tensors have no gradient:lrkit.errors.LrkitWarning")
@pytest.mark.parametrize("method", ["lora", "aflora"])
def test_what_is_frozen_by_hand_stays_so(method):
    """A resumed run with A frozen by hand is the run, though the state is of a step at which the method froze less."""
    made = LORA if method == "lora" else lrkit.methods.aflora(rank=2, train="both")

    def begin():
        torch.manual_seed(0)
        adapted = lrkit.attach(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), made, targets=["0", "2"], train_also=()
        )
        for name, p in adapted.named_parameters():
            if name.endswith("0.A"):
                p.requires_grad_(False)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.005)
        adapted.bind(optimizer, total_steps=12)
        return adapted, optimizer

    adapted, optimizer = begin()
    steps(adapted, optimizer, range(1))
    state, inner = copy.deepcopy(adapted.state_dict()), copy.deepcopy(optimizer.state_dict())
    whole = steps(adapted, optimizer, range(1, 12))
    later = {name: p.requires_grad for name, p in adapted.named_parameters()}
    # What a policy froze as well, as AFLoRA does here in the end, is its own to thaw.
    for again, its in (begin(), (adapted, optimizer))[: 2 if method == "lora" else 1]:
        again.load_state_dict(state)
        its.load_state_dict(inner)
        assert [name for name, p in again.named_parameters() if not p.requires_grad] == ["0.A"]
        found = steps(again, its, range(1, 12))
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
        assert {name: p.requires_grad for name, p in again.named_parameters()} == later


def test_a_trainer_resumes_what_is_frozen_by_hand(tmp_path):
    """The Trainer's own optimizer holds what trains; with A frozen by hand a resumed run is the run."""

    def run(resume):
        torch.manual_seed(0)
        adapted = by_hand(models.make("bert"), ["classifier"])
        rows = [{key: value[n % 4] for key, value in models.batch().items()} for n in range(8)]
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=adapted.model, args=args, train_dataset=rows, callbacks=[AdaptCallback(adapted)]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in adapted.named_parameters()}

    whole = run(None)
    again = run(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_ddp_follows_compact(tmp_path):
    """Ranks that are cut by hand after the last decision: DDP's reducer is made anew for what is left."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        method = lrkit.methods.adalora(rank=4, target_rank=1, warmup=1, final=6, interval=1, orthogonality=0.0)
        adapted = lrkit.attach(model, method, targets=["0", "2", "4"], train_also=())
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=12)
        for step in range(12):
            optimizer.zero_grad()
            ddp(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            if step == 8:
                assert min(adapted.compact().values()) < 4
        assert adapted.step == 12
    finally:
        torch.distributed.destroy_process_group()


def test_a_resized_head_is_not_saved_without_a_word(tmp_path):
    """A head in whose place another stands since attach is in no state: told before anything is written."""
    model = small(tie_word_embeddings=False)
    adapted = lrkit.attach(model, LORA, train_also=["lm_head"])
    model.resize_token_embeddings(40)
    for save in (adapted.state_dict, lambda: adapted.save(tmp_path)):
        with pytest.raises(
            LrkitError, match=r"no longer those that were attached: .*resize_token_embeddings.* before attach"
        ):
            save()
    assert not list(tmp_path.iterdir())


def test_weights_can_be_tied_again():
    """`tie_weights` of a model with an adapted embedding changes nothing."""
    model = small(tie_word_embeddings=True)
    adapted = lrkit.attach(model, LORA, targets=["embed_tokens"])
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1)
    before = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, before)
    adapted.detach()
    assert torch.equal(model(IDS).logits, small(tie_word_embeddings=True)(IDS).logits)


def test_a_layer_that_cannot_be_merged_is_one_line():
    """An error of a plug-in's layer names it."""
    adapted = lrkit.attach(nn.Sequential(nn.Linear(6, 8)), LORA, targets=["0"], train_also=())

    def merge():
        raise ValueError("no\nbias")

    adapted.adapters["0"].merge = merge
    with pytest.raises(LrkitError, match=r"0: LowRank\w* cannot be merged: no bias"):
        adapted.merge()
