"""The penalty and the schedule in other people's real trainers: TRL, sentence-transformers, Lightning."""

import attrs
import pytest
import small_words
import torch
from datasets import Dataset
from small_words import WORDS, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import lrkit
from lrkit.models import minilm_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CONFIG = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
COMMON = small_words.COMMON | {"max_steps": 12}


def made(gamma, cls=LlamaForCausalLM, scheduler=None):
    torch.manual_seed(0)
    model = cls(LlamaConfig(**CONFIG, **({"num_labels": 1} if cls is LlamaForSequenceClassification else {})))
    torch.manual_seed(1)
    method = lrkit.methods.adalora(rank=4, target_rank=2, orthogonality=gamma, variant="paper")
    if scheduler is not None:
        method = attrs.evolve(method, scheduler=scheduler, action=lrkit.actions.Prune(cut="always"))
    return model, lrkit.attach(model, method)


ONCE = lrkit.schedulers.Once(target=2, calibration=3)


def sft(gamma, folder, scheduler=None):
    from trl import SFTConfig, SFTTrainer

    model, adapted = made(gamma, scheduler=scheduler)
    rows = Dataset.from_dict(
        {"text": ["a good film", "the plot was bad", "not a very good film", "the film is bad"] * 4}
    )
    return adapted, SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **COMMON, max_length=16),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


def pairs():
    return Dataset.from_dict(
        {
            "prompt": ["the film is", "a plot"] * 8,
            "chosen": [" good", " very good"] * 8,
            "rejected": [" bad", " not"] * 8,
        }
    )


def dpo(gamma, folder):
    from trl import DPOConfig, DPOTrainer

    model, adapted = made(gamma)
    return adapted, DPOTrainer(
        model=model,
        ref_model=made(gamma)[0],
        args=DPOConfig(str(folder), **COMMON, max_length=16),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


def grpo(gamma, folder):
    from trl import GRPOConfig, GRPOTrainer

    model, adapted = made(gamma)

    def reward(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    return adapted, GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(str(folder), **COMMON, num_generations=4, max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": ["the film is", "a plot"] * 8}),
        processing_class=tokenizer(),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


def reward(gamma, folder):
    from trl import RewardConfig, RewardTrainer

    model, adapted = made(gamma, LlamaForSequenceClassification)
    return adapted, RewardTrainer(
        model=model,
        args=RewardConfig(str(folder), **COMMON, max_length=16),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


def sentences(gamma, folder, **settings):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    torch.manual_seed(1)
    method = lrkit.methods.adalora(rank=4, target_rank=2, orthogonality=gamma, variant="paper")
    adapted = lrkit.attach(model[0].auto_model, method)
    rows = Dataset.from_dict(
        {"anchor": ["a good film", "the plot"] * 8, "positive": ["a very good film", "the story"] * 8}
    )
    return adapted, SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder), **(COMMON | settings)),
        train_dataset=rows,
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


def translation(gamma, folder, **settings):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    torch.manual_seed(1)
    adapted = lrkit.attach(model, lrkit.methods.adalora(rank=4, target_rank=2, orthogonality=gamma, variant="paper"))
    ids = torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    return adapted, Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(folder), predict_with_generate=True, generation_max_length=6, **(COMMON | settings)
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


@pytest.mark.parametrize("start", [sentences, translation])
def test_resumed_run_is_bitwise(start, tmp_path):
    """Resumed before its budget is reached, with evaluations on the way, the run ends with the same weights and history."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    if start is translation:
        saving |= {"eval_strategy": "steps", "eval_steps": 4}
    whole, trainer = start(0.1, tmp_path, **saving)
    trainer.train()
    assert whole.step == 12 and whole.history[-1].kept == whole.history[-1].budget
    torch.manual_seed(9)
    again, trainer = start(0.1, tmp_path, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.step == 12 and again.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("start", [sft, dpo, grpo, reward, sentences, translation])
def test_trainers_feel_the_penalty(start, tmp_path):
    """With γ = 1 the factors end nearer to orthogonal than with γ = 1e-6; the method takes every step and decides."""
    ends = []
    for gamma in (1e-6, 1.0):
        adapted, trainer = start(gamma, tmp_path / str(gamma))
        trainer.train()
        assert adapted.step == 12
        assert adapted.history[-1].kept == adapted.history[-1].budget
        ends.append(float(adapted.method.parameterization.penalty(list(adapted.adapters.values())).detach()) / gamma)
        assert any("penalty" in line for line in trainer.state.log_history)
    assert ends[1] < 0.9 * ends[0]


def test_lightning_steps_with_a_closure(tmp_path):
    """Lightning's automatic optimization always steps with a closure: the run is the one of a plain loop."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.adapted = made(0.1)

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss + self.adapted.penalty()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.adapted.parameters(), lr=1e-2)
            self.adapted.bind(optimizer, total_steps=12)
            return optimizer

    batches = torch.randint(4, len(WORDS), (12, 4, 8), generator=torch.Generator().manual_seed(0))
    module = Module()
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(list(batches), batch_size=None))
    model, adapted = made(0.1)
    model.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert module.adapted.history == adapted.history
    assert len(adapted.history) > 2
    assert all(torch.equal(a, b) for a, b in zip(module.adapted.parameters(), adapted.parameters(), strict=True))


def lit(folder, checkpoint=None, scheduler=None):
    """Return a Lightning run with lrkit's callback, of 3 epochs of 4 steps, from its beginning or from a checkpoint."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lrkit.lightning import AdaptCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.adapted = made(0.1, scheduler=scheduler)

        def training_step(self, batch, _):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss)
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.AdamW(self.adapted.parameters(), lr=1e-2)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, gradient_clip_val=0.1, accumulate_grad_batches=2,
        callbacks=[AdaptCallback(module.adapted), ModelCheckpoint(folder, save_top_k=-1)],
    )  # fmt: skip
    batches = torch.randint(4, len(WORDS), (8, 4, 8), generator=torch.Generator().manual_seed(0))
    trainer.fit(module, torch.utils.data.DataLoader(batches.flatten(0, 1), batch_size=4), ckpt_path=checkpoint)
    return module.adapted, batches


def test_lightning_callback_is_the_loop(tmp_path):
    """With accumulation and clipping, Lightning with the callback is the bare loop with the penalty in the loss."""
    ours, batches = lit(tmp_path)
    model, adapted = made(0.1)
    model.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)
    for first, second in batches.view(4, 2, 4, 8).repeat(3, 1, 1, 1):
        for batch in (first, second):
            ((model(input_ids=batch, labels=batch).loss + adapted.penalty()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert len(ours.history) > 2 and [d.kept for d in ours.history] == [d.kept for d in adapted.history]
    for a, b in zip(ours.parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_lightning_resumes_bitwise(tmp_path):
    """``fit(ckpt_path=...)`` from the end of the first or second epoch, within the schedule, ends as the whole run."""
    whole, _ = lit(tmp_path / "a")
    for epoch, step in enumerate((4, 8)):
        torch.manual_seed(9)
        again, _ = lit(tmp_path / f"b{epoch}", tmp_path / "a" / f"epoch={epoch}-step={step}.ckpt")
        assert again.step == 12 and again.history == whole.history
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_lightning_calibrates_by_itself(tmp_path):
    """The callback calibrates by the first batches, as a bare loop does; a run that is resumed does not again."""
    ours, batches = lit(tmp_path / "a", scheduler=ONCE)
    _, adapted = made(0.1, scheduler=ONCE)
    adapted.calibrate([{"input_ids": batch, "labels": batch} for batch in batches[:3]])
    assert ours.history == adapted.history and [d.step for d in ours.history] == [0]
    again, _ = lit(tmp_path / "b", tmp_path / "a" / "epoch=1-step=8.ckpt", ONCE)
    assert again.history == ours.history
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_sft_calibrates_by_itself(tmp_path):
    """TRL's trainer calibrates by its own loss and batches, of the length that training sees."""
    adapted, trainer = sft(0.0, tmp_path, ONCE)
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    trainer.train()
    assert [d.step for d in adapted.history] == [0]
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:6], strict=True))


def test_accelerate_loop_is_the_loop():
    """accelerate's accumulation and clipping with the penalty in the loss: the run is that of plain torch."""
    from accelerate import Accelerator

    batches = torch.randint(4, len(WORDS), (96, 8), generator=torch.Generator().manual_seed(0))
    model, ours = made(0.1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    prepared, optimizer, loader = accelerator.prepare(
        model.train(), optimizer, torch.utils.data.DataLoader(batches, batch_size=4)
    )
    ours.bind(optimizer, total_steps=12)
    for ids in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=ids, labels=ids).loss + ours.penalty())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(ours.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    model, adapted = made(0.1)
    model.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)
    for pair in batches.view(12, 2, 4, 8):
        for ids in pair:
            ((model(input_ids=ids, labels=ids).loss + adapted.penalty()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert ours.step == 12 and ours.history == adapted.history
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), adapted.parameters(), strict=True))
