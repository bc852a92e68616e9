"""What trains, trains in float32 beside half precision; what cannot be added to exactly is not merged into."""

import copy
import warnings

import models
import pytest
import torch
import zoo
from test_attach import METHODS
from torch import nn
from zoo import said

import lrkit

HALF = [torch.float16, torch.bfloat16]
LORA = lrkit.methods.lora(rank=2)


def halved(name, dtype):
    make = models.make if name in models.MODELS else zoo.make
    return make(name).to(dtype).eval()


def outputs(model, name="bert"):
    with torch.no_grad():
        return model(**{k: v for k, v in models.batch().items() if k != "labels"}).logits


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", models.MODELS)
def test_heads_train_in_float32(name, dtype):
    """Head and adapters are float32, outputs are as before, gradients arrive, and detach gives every bit back."""
    model = halved(name, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = outputs(model)
    adapted = lrkit.attach(model, LORA)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    assert torch.equal(outputs(model), base)
    model(**models.batch()).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.head_parameters())
    with torch.autocast("cpu", dtype=dtype):
        model(**models.batch()).loss.backward()
    torch.optim.SGD(adapted.parameters(), lr=0.1).step()
    assert not torch.equal(outputs(model), base)
    adapted.detach()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].dtype == dtype and torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(outputs(model), base)


def test_small_updates_of_a_head_are_not_lost():
    """A hundred updates below bfloat16's last bit add up."""
    model = halved("bert", torch.bfloat16)
    adapted = lrkit.attach(model, LORA)
    weight = model.classifier.weight
    start = weight.detach().clone()
    for _ in range(100):
        weight.grad = torch.full_like(weight, 1e-5)
        said(torch.optim.SGD([weight], lr=1.0).step)
    torch.testing.assert_close(start - weight, torch.full_like(weight, 1e-3), rtol=1e-3, atol=0)
    assert model.classifier.weight is weight and adapted.head


def test_a_grad_scaler_takes_the_gradients():
    """GradScaler refuses float16 gradients: none is left."""
    model = halved("bert", torch.float16)
    adapted = lrkit.attach(model, LORA)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(**models.batch()).loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("dtype", HALF)
def test_full_fine_tuning_raises_the_model(dtype):
    """Where all of a half-precision model trains, all of it is float32, and half again after detach."""
    model = halved("bert", dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = lrkit.attach(model, lrkit.methods.full())
    assert model.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert outputs(model).dtype == torch.float32
    model(**models.batch()).loss.backward()
    adapted.detach()
    after = model.state_dict()
    assert all(after[key].dtype == dtype and torch.equal(after[key], before[key]) for key in before)


def test_biases_alone_train_in_float32():
    """A layer of which the bias alone trains runs, with a float32 gradient: BitFit in half precision."""
    lrkit_adapters = pytest.importorskip("lrkit_adapters")
    model = halved("bert", torch.bfloat16)
    base = outputs(model)
    adapted = lrkit.attach(model, lrkit_adapters.bitfit())
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    assert torch.equal(outputs(model), base)
    model(**models.batch()).loss.backward()
    bias = model.bert.encoder.layer[0].output.dense.bias
    assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_merged_and_copied_models_run():
    """After merge the head is in the model's precision again, with the adapted model's outputs; a copy runs by itself."""
    model = halved("bert", torch.bfloat16)
    base = outputs(model)
    adapted = lrkit.attach(model, LORA)
    with torch.no_grad():
        for p in adapted.head_parameters():
            p.add_(0.1)
    trained = outputs(model)
    twin = copy.deepcopy(model)
    original = adapted.original()
    assert torch.equal(outputs(twin), trained) and torch.equal(outputs(original), base)
    assert {p.dtype for p in original.parameters()} == {torch.bfloat16}
    adapted.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(model), trained)  # ΔW is still zero
    assert torch.equal(outputs(twin), trained)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
def test_a_half_precision_head_compiles():
    """The rounding of a head is part of one graph."""
    model = halved("bert", torch.bfloat16)
    lrkit.attach(model, LORA)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled), outputs(model))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_a_cast_after_attach_is_obeyed_and_said(cast, tmp_path):
    """The cast holds, is said once, and its state is loaded again as it was, in a plain load too."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.adalora(rank=4, target_rank=2))
    model.to(cast)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=4)

    def steps():
        for _ in range(2):
            (model(**models.batch()).loss + adapted.penalty()).backward()
            optimizer.step()

    _, words = said(steps)
    assert words.count(f"cast to {cast}") == 1
    assert {p.dtype for p in adapted.parameters()} == {cast}
    trained = outputs(model.eval())
    adapted.save(tmp_path)
    again, words = said(lambda: lrkit.load(models.make("bert"), tmp_path))
    assert words.count(f"saved in {cast}") == 1
    assert {p.dtype for p in again.parameters()} == {cast}
    for one, two in zip(adapted.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    again.model.to(cast)
    assert torch.equal(outputs(again.model.eval()), trained)
    # Who has cast the model before the load keeps that.
    other = models.make("bert")
    third = lrkit.attach(other, adapted.method)
    other.to(torch.float16)
    _, words = said(lambda: third.load_state_dict(adapted.state_dict()))
    assert "to which the model was cast" in words
    assert {p.dtype for p in third.parameters()} == {torch.float16}


def test_a_cast_back_and_forth_restores():
    """A half-precision model that was cast to float32 after attach is a float32 model after detach."""
    model = halved("bert", torch.bfloat16)
    adapted = lrkit.attach(model, LORA)
    model.float()
    outputs(model)
    adapted.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    outputs(model)


# ---- weights that are no plain tensors ----


class Scaled(torch.Tensor):
    """A tensor that is a product, with a floating dtype: as quantized ones of torchao and quanto are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].values * args[1].scale, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} has no {func}")


def quantized(wrap):
    model = models.make("llama").eval()
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(wrap(values, scale), requires_grad=False)
    return model


@pytest.mark.parametrize("method", ["lora", "adalora", "aflora"])
def test_tensor_subclasses_train_by_their_own_product(method):
    """The fused path and merging go by the weight's class, not by the layer's: gradients are the dequantized model's."""

    def gradients(model):
        torch.manual_seed(3)
        adapted = lrkit.attach(model, METHODS[method])
        model(**models.batch()).loss.backward()
        return adapted, torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])

    _, plain = gradients(quantized(lambda values, scale: values * scale))
    model = quantized(Scaled)
    base = outputs(model)
    adapted, odd = gradients(model)
    torch.testing.assert_close(odd, plain, rtol=1e-5, atol=1e-6)
    before = outputs(model)
    with pytest.raises(lrkit.LrkitError, match=r"q_proj: the base weight is quantized \(Scaled\)"):
        adapted.merge()
    assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(adapted.original()), base)
    adapted.detach()
    with pytest.raises(lrkit.LrkitError, match=r"quantized Scaled.*cannot train in full"):
        lrkit.attach(model, lrkit.methods.full())


class Rounds(nn.Linear):
    """A layer that quantizes its plain weight in every call, as quanto's do until they are frozen."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 64).round() / 64, self.bias)


def test_a_layer_that_rounds_its_weight_is_not_merged():
    """What a layer computes says whether adding to its weight is exact; nothing is touched before the refusal."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(16, 16), Rounds(16, 16)])
    adapted = lrkit.attach(model, LORA)
    for adapter in adapted.adapters.values():
        nn.init.normal_(adapter.B)
    before = model.layers[0].base.weight.clone()
    with pytest.raises(lrkit.LrkitError, match=r"layers\.1: Rounds does not compute with its weight as it is"):
        adapted.merge()
    assert torch.equal(model.layers[0].base.weight, before)


def test_nothing_is_said_of_plain_models():
    """A float32 model is attached to, trained, saved and loaded without a word on precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = lrkit.attach(models.make("bert"), LORA)
        state = adapted.state_dict()
        adapted.load_state_dict(state)


def head_of(model):
    """A head that trains beside a half-precision model; its master is float32."""
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2))
    return adapted, torch.optim.SGD(adapted.parameters(), lr=0.1)


def test_interrupted_call_loses_no_head():
    """Ctrl-C within the head's forward leaves it in training, in the state and in float32."""
    model = models.make("bert").to(torch.bfloat16)
    adapted, optimizer = head_of(model)

    def interrupted(_):
        raise KeyboardInterrupt

    model.classifier.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(**models.batch())
    del model.classifier.forward
    before = adapted.state_dict()["tensors"]["weight.classifier.weight"]
    assert before.dtype == torch.float32
    model(**models.batch()).loss.backward()
    optimizer.step()
    assert not torch.equal(adapted.state_dict()["tensors"]["weight.classifier.weight"], before)
    assert model.classifier.weight.dtype == torch.float32


class Again(nn.Module):
    """A head that calls itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x, times=1):
        x = x * self.scale
        return self(x, times - 1) if times else x


@pytest.mark.parametrize("head", [Again, lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)])
def test_odd_heads_train_in_half_precision(head):
    """A head that calls itself, and one whose parent reads a weight without a call, train."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers, model.head = nn.ModuleList([nn.Linear(16, 16)]), head()
    model.forward = lambda x: model.head(torch.relu(model.layers[0](x)))
    model = model.to(torch.bfloat16)
    adapted, optimizer = head_of(model)
    before = [p.detach().clone() for p in adapted.head_parameters()]
    out = model.forward(torch.randn(2, 3, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    (out.float() * torch.randn(2, 3, 16)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, adapted.head_parameters(), strict=True)]
    assert all(moved)
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
