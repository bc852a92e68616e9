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


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_leaves_float_model(bits, folder, tmp_path):
    """A merged model computes as the adapted one, is no quantized model any more, and loads as it was saved."""
    model = loaded(folder, bits)
    adapted = lrkit.attach(model, METHOD)
    trainer(model, adapted, tmp_path).train()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits
        with pytest.raises(lrkit.LrkitError, match=r"merge\(dequantize=True\)"):
            adapted.merge()
        adapted.merge(dequantize=True)
        merged = model(ids).logits
    assert (merged - logits).norm() < 0.02 * logits.norm()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, merged, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_torchao_trains_merges_detaches(kind, folder):
    """torchao's weights train, merge by dequantizing, and come back with their bits."""
    import torchao.quantization

    ids = torch.arange(3, 15)[None]
    for end in ("merge", "detach"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torchao.quantization.quantize_(model.model.layers, getattr(torchao.quantization, kind)())
        before = model.eval()(ids).logits
        adapted = lrkit.attach(model, METHOD)
        optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
        adapted.bind(optimizer, total_steps=8)
        for _ in range(8):
            optimizer.zero_grad()
            (model(ids, labels=ids).loss + adapted.penalty()).backward()
            optimizer.step()
        y = model(ids).logits
        if end == "merge":
            adapted.merge(dequantize=True)
            assert (model(ids).logits - y).norm() < 0.03 * y.norm()
        else:
            adapted.detach()
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_starts_from_its_weight(bits, init, folder, tmp_path):
    """The base stays as it was quantized, a state loads onto one quantized anew, and a merge has the outputs."""
    ids = torch.arange(12).view(2, 6)
    model = loaded(folder, bits).train()  # in evaluation bitsandbytes packs 4 bits anew on some CPUs
    before = model(ids).logits.detach()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=4, init=init), train_also=[])
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    adapted.bind(optimizer, total_steps=2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(ids).logits.detach()
    assert float((after - before).abs().max()) > 0.1
    adapted.save(tmp_path / "state")
    again = loaded(folder, bits).train()
    lrkit.load(again, tmp_path / "state")
    assert torch.equal(again(ids).logits, after)
    adapted.merge(dequantize=True)
    torch.testing.assert_close(model(ids).logits, after, atol=0.02, rtol=0)
