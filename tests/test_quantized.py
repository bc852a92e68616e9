"""Layers of quantizers that are no ``nn.Linear``, by stand-ins: attributes and arithmetic as in the packages, each cited."""

import copy

import attrs
import pytest
import torch
from torch import nn

import lrkit
from lrkit import accounting
from lrkit.layers import Quantized
from lrkit.layers.dequantized import whole_weight

METHOD = lrkit.methods.adalora(rank=4, target_rank=2)
CUT = attrs.evolve(METHOD, action=lrkit.actions.Prune(cut="always"))
FREEZE = lrkit.methods.aflora(rank=4, train="both", final=0.0)
GROUP = 16


class GPTQ(nn.Module):
    """``TorchQuantLinear`` in 4 bits (ModelCloud/GPTQModel, nn_modules/qlinear/torch.py: eight rows per int32)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = d_in, d_out, 4
        self.q, self.z = torch.randint(0, 16, (d_in, d_out)), torch.randint(0, 16, (d_in // GROUP, d_out))
        self.register_buffer("qweight", _packed(self.q.t(), range(8)).t().contiguous())
        self.register_buffer("qzeros", _packed(self.z, range(8)))
        self.register_buffer("scales", torch.rand(d_in // GROUP, d_out) * 0.02)
        self.register_buffer("g_idx", torch.arange(d_in) // GROUP)
        self.register_buffer("bias", torch.randn(d_out))

    def dequantize_weight(self, num_itr: int = 1) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4)
        weight = (self.qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(self.in_features, -1)
        zeros = (self.qzeros[:, :, None] >> shifts & 15).flatten(1)
        return self.scales[self.g_idx] * (weight - zeros[self.g_idx])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantize_weight().to(x.dtype) + self.bias

    def truth(self) -> torch.Tensor:
        """Return the weight [d_out, d_in] in float64, from the integers before packing."""
        return (self.scales[self.g_idx].double() * (self.q - self.z[self.g_idx])).t()


class AWQ(nn.Module):
    """``WQLinear_GEMM`` (casper-hansen/AutoAWQ, awq/modules/linear/gemm.py, awq/utils/packing_utils.py), trainable."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bit, self.group_size = d_in, d_out, 4, GROUP
        self.q, self.z = torch.randint(0, 16, (d_in, d_out)), torch.randint(0, 16, (d_in // GROUP, d_out))
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        self.register_buffer("qweight", _packed(self.q, order))
        self.register_buffer("qzeros", _packed(self.z, order))
        self.register_buffer("scales", torch.rand(d_in // GROUP, d_out) * 0.02)
        self.register_buffer("bias", torch.randn(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.truth().t().to(x.dtype) + self.bias

    def truth(self) -> torch.Tensor:
        """Return the weight [d_out, d_in] in float64, from the integers before packing."""
        q, z = self.q, self.z.repeat_interleave(GROUP, 0)
        return ((q - z) * self.scales.double().repeat_interleave(GROUP, 0)).t()


class HQQ(nn.Module):
    """``HQQLinear`` in 4 bits (mobiusml/hqq, hqq/core/quantize.py, hqq/core/bitpack.py: halves of rows in one byte)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = d_in, d_out, torch.float32
        self.q = torch.randint(0, 16, (d_in * d_out // GROUP, GROUP), dtype=torch.uint8)
        half = len(self.q) // 2
        self.W_q = nn.Parameter(self.q[:half] << 4 | self.q[half:], requires_grad=False)
        self.meta = {
            "shape": (d_out, d_in),
            "scale": torch.rand(len(self.q), 1) * 0.02,
            "zero": torch.rand(len(self.q), 1) * 15,
        }
        self.bias = torch.randn(d_out)

    @torch.inference_mode()
    def dequantize(self) -> torch.Tensor:
        q = torch.cat([self.W_q >> 4, self.W_q & 15])
        return ((q - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantize().clone().t() + self.bias

    def truth(self) -> torch.Tensor:
        """Return the weight [d_out, d_in] in float64, from the integers before packing."""
        return ((self.q.double() - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])


class Gradientless(GPTQ):
    """A kernel for inference only."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Curved(GPTQ):
    """A layer that names its features, and is no linear map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


def _packed(values: torch.Tensor, order) -> torch.Tensor:
    """Pack columns, eight per int32; the i-th four bits hold column ``order[i]`` of the eight."""
    grouped = values.unflatten(1, (-1, 8)).long()
    return sum(grouped[:, :, column] << 4 * i for i, column in enumerate(order)).to(torch.int32)


class Block(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.up, self.down = kind(32, 64), kind(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(kind), Block(kind)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model_of(kind):
    torch.manual_seed(0)
    return Model(kind)


def trained(model, steps, state=None, optimizer_state=None, method=METHOD):
    """Attach, and train from a state's step to `steps` of 8."""
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method)
    if state is not None:
        adapted.load_state_dict(state)
    optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
    if state is not None:
        optimizer.load_state_dict(optimizer_state)
    adapted.bind(optimizer, total_steps=8)
    x = torch.linspace(-1, 1, 5 * 32).view(5, 32)
    for _ in range(adapted.step, steps):
        optimizer.zero_grad()
        (model(x).square().mean() + adapted.penalty()).backward()
        optimizer.step()
    return adapted, optimizer


@pytest.mark.parametrize("kind", [GPTQ, AWQ, HQQ])
def test_weight_is_unpacked(kind):
    """The whole weight is that of the integers before they were packed."""
    torch.manual_seed(0)
    layer = kind(32, 64)
    assert torch.allclose(whole_weight(layer).double(), layer.truth(), atol=1e-6)


@pytest.mark.parametrize("kind", [GPTQ, AWQ, HQQ])
def test_merge_makes_float_layers(kind):
    """A merged layer holds the dequantized weight and ΔW, and computes as the adapted one did."""
    model = model_of(kind)
    adapted, _ = trained(model, 8)
    x = torch.randn(3, 32)
    y, layer, adapter = model(x), model.layers[0].up.base, model.layers[0].up
    wanted = layer.truth() + adapter.delta().double()
    with pytest.raises(lrkit.LrkitError, match=r"quantized.*merge\(dequantize=True\)"):
        adapted.merge()
    adapted.merge(dequantize=True)
    assert type(model.layers[0].up) is nn.Linear
    assert torch.allclose(model.layers[0].up.weight.double(), wanted, atol=1e-6)
    assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize("method", [METHOD, CUT, FREEZE], ids=["mask", "cut", "freeze"])
@pytest.mark.parametrize("kind", [GPTQ, AWQ, HQQ])
def test_resume_and_detach_are_bitwise(kind, method):
    """A resumed run is the run, whatever becomes of the losers, and detach gives the layers back with their bits."""
    whole, _ = trained(model_of(kind), 8, method=method)
    half, optimizer = trained(model_of(kind), 3, method=method)
    assert 0 < len(half.history) < len(whole.history)
    model = model_of(kind)
    layers, x = [model.layers[0].up, model.layers[1].down], torch.randn(3, 32)
    y = model(x)
    resumed, _ = trained(model, 8, half.state_dict(), copy.deepcopy(optimizer.state_dict()), method)
    assert resumed.history == whole.history
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    resumed.detach()
    assert [model.layers[0].up, model.layers[1].down] == layers
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", [GPTQ, AWQ, HQQ])
def test_sizes_are_the_float_layers(kind):
    """Parameters and operations are those of the model with float layers, by the definition of a linear layer."""
    model, x = model_of(kind), torch.randn(5, 32)
    assert accounting.count(METHOD, model, total_steps=8).model == 2 * (32 * 64 + 64 + 64 * 32 + 32)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=4))
    work = accounting.flops(model, {"x": x})
    product, factors = 2 * 5 * 32 * 64, 2 * 5 * 4 * (32 + 64)
    assert work.forward == 4 * (product + factors)
    # The first layer's input needs no gradient: neither W nor A is gone through backwards there.
    assert work.backward == 4 * (product + 2 * factors) - product - 2 * 5 * 4 * 32
    assert type(adapted.adapters["layers.0.up"].base) is kind


@pytest.mark.parametrize("kind", [GPTQ, AWQ, HQQ])
def test_export_holds_the_increments(kind, tmp_path):
    """PEFT's own model reads the files on the dequantized base; the increments are those of the adapters in float64."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj = kind(32, 64), kind(64, 32)
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["up_proj", "down_proj", "q_proj"])
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.3 * torch.randn_like(p))
    done = lrkit.export(adapted, tmp_path / "peft", to="peft-lora")
    read = peft.PeftModel.from_pretrained(adapted.original(dequantize=True), str(tmp_path / "peft"))
    for name, adapter in adapted.adapters.items():
        delta = read.base_model.model.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(delta.double(), adapter.delta().double(), atol=1e-6), name
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(read.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4)
    assert done.difference < 1e-6 and type(model.model.layers[0].mlp.up_proj.base) is kind
    lrkit.export(adapted, tmp_path / "merged", to="merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = model.model.layers[0].mlp.down_proj.base.truth() + adapted.adapters["model.layers.0.mlp.down_proj"].delta()
    assert torch.allclose(again.model.layers[0].mlp.down_proj.weight.double(), wanted.double(), atol=1e-6)


class Packing(nn.Linear):
    """``Linear4bit``: evaluation packs its weight for a kernel without a gradient (bitsandbytes 0.50, nn/modules.py)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.support_avx512bf16_for_cpu, self.packed = True, False
        self.weight = nn.Parameter(self.weight.detach().mul(100).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.packed = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.packed):
            return x @ (self.weight.float() / 100).t() + self.bias


def test_evaluation_leaves_layers_trainable():
    """A layer that packs its weight for inference does not while it is adapted; one that has is refused with the reason."""
    model = model_of(Packing)
    with torch.no_grad():
        model.eval()(torch.randn(2, 32))
    for targets in ("all-linear", ["up"], ".*up"):
        with pytest.raises(lrkit.LrkitError, match=r"no gradient to its input.*load the model again"):
            lrkit.attach(model, METHOD, targets=targets)
    model = model_of(Packing)
    adapted, _ = trained(model, 4)
    with torch.no_grad():
        model.eval()(torch.randn(2, 32))
    assert not any(module.packed for module in model.modules() if isinstance(module, Packing))
    adapted.detach()
    with torch.no_grad():
        model(torch.randn(2, 32))
    assert model.layers[0].up.packed


@pytest.mark.parametrize("end", ["merge", "detach"])
def test_layers_replaced_under_adapters(end):
    """Layers that others put into adapters, as ``dequantize()`` of transformers does, are merged into and detached."""
    model = model_of(GPTQ)
    adapted, _ = trained(model, 8)
    x, plain = torch.randn(3, 32), {}
    for name, adapter in adapted.adapters.items():
        layer = adapter.base
        plain[name] = adapter.base = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            plain[name].weight.copy_(layer.truth())
            plain[name].bias.copy_(layer.bias)
    y, wanted = model(x), plain["layers.0.up"].weight.double() + adapted.adapters["layers.0.up"].delta().double()
    getattr(adapted, end)()
    assert model.layers[0].up is plain["layers.0.up"]
    if end == "merge":
        assert torch.allclose(model.layers[0].up.weight.double(), wanted, atol=1e-6)
        assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize(("kind", "reason"), [(Gradientless, "passes no gradient"), (Curved, "no linear map")])
def test_unfit_layers_are_refused(kind, reason):
    """A kernel that loses gradients and a layer that is not linear are refused with the reason."""
    torch.manual_seed(0)
    assert reason in Quantized().refusal(kind(32, 64))
    with pytest.raises(lrkit.LrkitError, match=reason):
        lrkit.attach(model_of(kind), METHOD, targets=["up"])


def test_wrong_weight_is_refused():
    """A weight that is not what the layer computes with is never merged into."""

    class Other(GPTQ):
        def dequantize_weight(self, num_itr: int = 1) -> torch.Tensor:
            return super().dequantize_weight().roll(1, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ super().dequantize_weight() + self.bias

    with pytest.raises(lrkit.LrkitError, match="cannot be dequantized"):
        whole_weight(Other(32, 64))
