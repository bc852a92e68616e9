"""Quantized bases in transformers' Trainer, with the real packages."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import lrkit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
METHOD = lrkit.methods.adalora(rank=4, target_rank=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder, bits):
    quantization = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})


def trainer(model, adapted, out, **more):
    rows = [
        {"input_ids": r, "labels": r} for r in torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    ]
    settings = {
        "output_dir": str(out), "max_steps": 12, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_steps": 6, "seed": 3, "dataloader_pin_memory": False,
    } | more  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_trains_saves_resumes_loads(bits, folder, tmp_path):
    """A resumed run is bitwise the run, and what was saved loads into a model quantized anew."""

    def attached():
        model = loaded(folder, bits)
        torch.manual_seed(1)
        return model, lrkit.attach(model, METHOD)

    model, adapted = attached()
    trainer(model, adapted, tmp_path).train()
    assert adapted.step == 12
    assert adapted.history[-1].kept == adapted.history[-1].budget
    again, resumed = attached()
    trainer(again, resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.history == adapted.history
    for (name, a), (_, b) in zip(adapted.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    adapted.save(tmp_path / "saved")
    fresh = loaded(folder, bits)
    lrkit.load(fresh, tmp_path / "saved")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)


def test_plain_quantized_model_is_refused_as_before(folder, tmp_path):
    """Once the adapters are out, the Trainer refuses the model again; so it does where nothing was attached."""
    model = loaded(folder, 4)
    adapted = lrkit.attach(model, METHOD)
    callback = lrkit.trainer.AdaptCallback(adapted)
    adapted.detach()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), callbacks=[callback])
