"""Quantized bases in transformers' Trainer, with the real packages."""

import copy

import attrs
import bitsandbytes
import peft
import pytest
import torch
from torchao import quantization as torchao
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import lrkit
from lrkit import accounting
from lrkit.models import minilm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*:Warning")
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


BITS4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES = {
    "bnb-4": lambda: BitsAndBytesConfig(**BITS4, bnb_4bit_compute_dtype=torch.float32),
    "bnb-4-nested": lambda: BitsAndBytesConfig(
        **BITS4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True
    ),
    "bnb-8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int8-dynamic": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
    "torchao-int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao-float8": lambda: TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "quanto-int8": lambda: QuantoConfig(weights="int8"),
    "quanto-int4": lambda: QuantoConfig(weights="int4"),
    "quanto-float8": lambda: QuantoConfig(weights="float8"),
}
ROUND_INPUTS = ("bnb-8", "torchao-int8-dynamic")
METHODS = {
    "mask": METHOD,
    "cut": attrs.evolve(METHOD, action=lrkit.actions.Prune(cut="always")),
    "freeze": lrkit.methods.aflora(rank=4, train="both"),
}
IDS = torch.arange(3, 15)[None]


def loaded(folder, base):
    base = {4: "bnb-4", 8: "bnb-8"}.get(base, base)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BASES[base](), device_map={"": "cpu"})


def trained(folder, base, method, steps=8, state=None, optimizer_state=None, evaluated=()):
    """Attach, and train from a state's step to `steps` of 8, with evaluations after some."""
    model = loaded(folder, base)
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method)
    if state is not None:
        adapted.load_state_dict(state)
    optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    adapted.bind(optimizer, total_steps=8)
    for step in range(adapted.step, steps):
        optimizer.zero_grad()
        (model.train()(IDS, labels=IDS).loss + adapted.penalty()).backward()
        optimizer.step()
        if step in evaluated:
            logits(model)
    return adapted, optimizer


def same(one, other):
    assert one.history == other.history
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def whole(layer):
    """Return a layer's weight in float64, by its package."""
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is not None:
        return bitsandbytes.functional.dequantize_4bit(weight.data, state).double()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.dequantize().double()


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


@pytest.mark.parametrize("bits", [4, 8, "torchao-int8", "torchao-float8"])
def test_trainer_saves_resumes_loads(bits, folder, tmp_path):
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_resumes_bitwise(base, method, folder, tmp_path):
    """A run that was saved and loaded is the run; its file fits a model quantized anew; its base is what it was."""
    plain = logits(loaded(folder, base)) if "bnb-4" not in base else None  # packed for inference on some CPUs
    adapted, _ = trained(folder, base, METHODS[method])
    half, optimizer = trained(folder, base, METHODS[method], 4)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    again, _ = trained(folder, base, METHODS[method], 8, half.state_dict(), optimizer.state_dict())
    same(adapted, again)
    if method == "freeze":
        assert not all(p.requires_grad for p in adapted.adapter_parameters())
    adapted.save(tmp_path)
    fresh = lrkit.load(loaded(folder, base), tmp_path)
    assert torch.equal(logits(fresh.model), logits(adapted.model))
    if plain is not None:
        with adapted.disabled():
            assert torch.equal(logits(adapted.model), plain)
        assert torch.equal(logits(adapted.detach()), plain)


@pytest.mark.parametrize("base", BASES)
def test_merge_is_the_float64_sum(base, folder):
    """A merged weight is the package's own dequantized weight + ΔW, summed in float64; without the setting it is refused."""
    adapted, _ = trained(folder, base, METHOD)
    wanted = {n: whole(adapted.originals[n]) + adapter.delta().double() for n, adapter in adapted.adapters.items()}
    before = logits(adapted.model)
    with pytest.raises(lrkit.LrkitError, match=r"merge\(dequantize=True\)"):
        adapted.merge()
    model = adapted.merge(dequantize=True)
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-7)
    assert (logits(model) - before).norm() < (0.02 if base in ROUND_INPUTS else 1e-5) * before.norm()


@pytest.mark.parametrize("to", ["peft-lora", "peft-adalora"])
@pytest.mark.parametrize("base", BASES)
def test_peft_reads_exports_on_the_base(base, to, folder, tmp_path):
    """PEFT loads what was exported over the same quantized base with equal logits, and lrkit reads PEFT's folder back."""
    adapted, _ = trained(folder, base, METHODS["cut"])
    lrkit.export(adapted, tmp_path / "out", to=to)
    wanted, close = logits(adapted.model), 2e-2 if base in ROUND_INPUTS else 1e-5
    again = lrkit.from_peft(loaded(folder, base), tmp_path / "out")
    assert (logits(again.model) - wanted).norm() < close * wanted.norm()
    model = loaded(folder, base)
    for module in model.modules():  # in evaluation it packs its weights, and rounds their scales, on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    read = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    assert (logits(read) - wanted).norm() < close * wanted.norm()


@pytest.mark.parametrize("base", ["bnb-4", "bnb-8", "torchao-int8"])
def test_evaluation_changes_no_run(base, folder):
    """A run that is evaluated on the way is bitwise the run that is not."""
    same(trained(folder, base, METHOD)[0], trained(folder, base, METHOD, evaluated=(1, 4))[0])


@pytest.mark.parametrize("base", BASES)
def test_sizes_are_the_float_models(base, folder):
    """Parameters, FLOPs and the method's count are those of the float model."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert accounting.count(METHOD, loaded(folder, base), total_steps=9) == accounting.count(
        METHOD, plain, total_steps=9
    )
    assert accounting.flops_on(METHOD, loaded(folder, base), 12) == accounting.flops_on(METHOD, plain, 12)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_under_adapters(bits, folder):
    """transformers' ``dequantize()`` under the adapters leaves float layers, into which they are merged as usual."""
    adapted, _ = trained(folder, bits, METHOD)
    model, before = adapted.model, logits(adapted.model)
    model.dequantize()
    between = logits(model)
    assert (between - before).norm() < (0.02 if bits == 8 else 1e-5) * before.norm()
    adapted.merge()
    torch.testing.assert_close(logits(model), between, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["bnb-4", "torchao-int8", "quanto-int8"])
def test_compiled_and_checkpointed_gradients(base, folder):
    """After PEFT's preparation for k-bit training, ``torch.compile`` and activation checkpointing leave gradients alone."""
    model = peft.prepare_model_for_kbit_training(loaded(folder, base), use_gradient_checkpointing=False).train()
    torch.manual_seed(1)
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=4))
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def gradients(run):
        model.zero_grad()
        run(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in adapted.parameters()]

    wanted = gradients(model)
    ways = [torch.compile(model, backend="aot_eager")]
    for found in (gradients(way) for way in ways):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", ["bnb-4", "torchao-int8"])
def test_minilm_resumes_in_the_trainer(base, tmp_path):
    """A real encoder with a new head: a resumed run of the Trainer is bitwise the run."""

    def start():
        torch.manual_seed(0)
        settings = BASES[base]()
        if base == "bnb-4":
            settings.llm_int8_skip_modules = ["classifier"]  # a new head has no values to quantize
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=2, quantization_config=settings, device_map={"": "cpu"}
        )
        torch.manual_seed(1)
        adapted = lrkit.attach(model, METHOD, train_also=["classifier"])
        ids = torch.randint(1000, 20000, (24, 8), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]
        args = TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
            per_device_train_batch_size=4, dataloader_pin_memory=False, learning_rate=1e-3,
        )  # fmt: skip
        return adapted, Trainer(model, args, train_dataset=rows, callbacks=[lrkit.trainer.AdaptCallback(adapted)])

    adapted, run = start()
    run.train()
    again, run = start()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.step == 6 and len(again.adapters) == 36
    same(adapted, again)


def test_slices_merge_into_the_dequantized_base(tmp_path):
    """Slices of a quantized projection count as float ones; merge refuses them with a way out, which is exact."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = loaded(tmp_path, "bnb-4")
    assert accounting.count(METHOD, model, total_steps=9).model == sum(p.numel() for p in plain.parameters())
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=2), targets=["c_attn"], slices=True)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(lrkit.LrkitError, match=r"load what was saved into original\(dequantize=True\)"):
        adapted.merge(dequantize=True)
    adapted.save(tmp_path / "saved")
    merged = lrkit.load(adapted.original(dequantize=True), tmp_path / "saved").merge()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_quantized_embeddings_are_not_merged():
    """An adapter beside a quantized embedding trains, and cannot be merged, whatever is asked for."""
    model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 16))
    torchao.quantize_(
        model,
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Embedding),
    )
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["0"])
    model(torch.arange(4)).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())
    for dequantize in (False, True):
        with pytest.raises(lrkit.LrkitError, match="Embedding is no linear layer, and only these are dequantized"):
            adapted.merge(dequantize=dequantize)


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
