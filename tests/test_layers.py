"""Kinds of layers: embeddings, convolutions and what a plug-in adds, against the formula in float64."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from increments import delta_of, perturb
from torch import Tensor, nn
from torch.nn import functional as F

import lrkit

METHODS = {
    "lora": lambda: lrkit.methods.lora(rank=3),
    "svd": lambda: lrkit.methods.svd_lora(rank=3),
    "elora": lambda: lrkit.methods.elora(rank=3),
}


class Convolving(nn.Module):
    """A convolution, its activation and a sum."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@settings(max_examples=40, deadline=None)
@given(
    spatial=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    method=st.sampled_from(sorted(METHODS)),
)
def test_convolutions_are_exact(
    spatial: int, groups: int, stride: int, dilation: int, padding: Any, mode: str, method: str
) -> None:
    """Outputs and gradients are those of the convolution with W + ΔW, and merging gives that convolution."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    stride = 1 if padding == "same" else stride
    layer = kind(
        4,
        8,
        3,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        padding_mode=mode,  # type: ignore[arg-type]
    ).double()
    plain = copy.deepcopy(layer)
    model = Convolving(layer)
    adapted = lrkit.attach(model, METHODS[method](), targets=["layer"], train_also=[])
    x = torch.randn(2, 4, *[7] * spatial, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))
    perturb(adapted)
    adapter = adapted.adapters["layer"]
    weight = plain.weight + delta_of(adapter).view_as(plain.weight)
    wanted = plain._conv_forward(x, weight, plain.bias)  # type: ignore[operator]
    got = model(x)
    assert torch.allclose(got, wanted, atol=1e-12)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    ours = torch.autograd.grad(got.square().sum(), trained)
    theirs = torch.autograd.grad(wanted.square().sum(), trained)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
    adapted.merge()
    assert type(model.layer) is kind and torch.allclose(model(x), wanted, atol=1e-12)


class Tied(nn.Module):
    """An embedding, a block, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        out: Tensor = self.head(h + self.layers[0](h).tanh())
        return out


@pytest.mark.parametrize("method", METHODS)
def test_tied_embeddings_agree(method: str) -> None:
    """Both sides of a tied weight see one ΔW, and merging adds it once."""
    torch.manual_seed(0)
    model = Tied().double()
    plain = copy.deepcopy(model)
    ids = torch.tensor([[1, 5, 0, 3], [19, 2, 2, 0]])
    adapted = lrkit.attach(model, METHODS[method](), targets=["embed"], train_also=[])
    assert torch.equal(model(ids), plain(ids))
    perturb(adapted)
    delta = delta_of(adapted.adapters["embed"]).t()
    weight = plain.embed.weight + delta
    h = F.embedding(ids, weight)
    wanted = (h + plain.layers[0](h).tanh()) @ weight.t()
    assert torch.allclose(model(ids), wanted, atol=1e-12)
    with adapted.disabled():
        assert torch.equal(model(ids), plain(ids))
    adapted.merge()
    assert model.head.weight is model.embed.weight
    assert torch.allclose(model(ids), wanted, atol=1e-12)


@pytest.mark.parametrize("calls", [True, False])
def test_heads_that_are_read_are_told(calls: bool) -> None:
    """A loss that reads a tied head's weight misses its increment, which is said at the first step; a call is not."""
    model = Tied()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["embed"], train_also=[])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=2)
    hidden = model.embed(torch.tensor([[1, 2]]))
    (model.head(hidden) if calls else hidden @ model.head.weight.t()).square().sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    assert [str(each.message).split(" is tied")[0] for each in told] == ([] if calls else ["head"])


def test_heads_apart_are_told() -> None:
    """An adapter on one of two layers with one weight is said at once, and not only if it is to be merged."""
    with pytest.warns(lrkit.LrkitWarning, match="^head has its weight from embed.*: name embed instead"):
        adapted = lrkit.attach(Tied(), lrkit.methods.lora(rank=2), targets=["head"], train_also=[])
    with pytest.raises(lrkit.LrkitError, match="head: the base weight is tied"):
        adapted.merge()
    with pytest.raises(lrkit.LrkitError, match=r"slices must be True or False, not \['q'\].*c_attn.q"):
        lrkit.attach(Tied(), lrkit.methods.lora(rank=2), targets=["head"], slices=["q"])  # type: ignore[arg-type]


def test_detach_restores_ties() -> None:
    """Detaching puts the tied layers back."""
    model = Tied()
    before = list(model.named_modules())
    lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["embed", "head"], train_also=[]).detach()
    assert list(model.named_modules()) == before


def test_padding_gets_no_gradient() -> None:
    """The column of A for padding_idx has no gradient, as the embedding's row has none."""
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(9, 4, padding_idx=2))
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["embed"], train_also=[])
    perturb(adapted)
    model(torch.tensor([2, 3, 2, 4])).sum().backward()
    grad = adapted.adapters["embed"].A.grad
    assert grad is not None and not grad[:, 2].any() and grad[:, [3, 4]].any(dim=0).all()


@pytest.mark.parametrize("name", ["lora", "svd"])
def test_padding_stays_as_it_was(name: str) -> None:
    """After training with weight decay and penalty, the row of padding_idx is the base's, bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(9, 4, padding_idx=2))
    before = model.embed.weight.detach().clone()
    method = METHODS[name]()
    adapted = lrkit.attach(model, method, targets=["embed"], train_also=[])
    new = method.parameterization.fresh(adapted.adapters["embed"], 2, torch.Generator().manual_seed(0), {})["A"]
    assert not new[:, 2].any() and new[:, [0, 1, 3]].all()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1, weight_decay=0.1)
    adapted.bind(optimizer, total_steps=20)
    for _ in range(20):
        (model(torch.tensor([2, 3, 2, 4])).sub(1).square().sum() + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.merge()
    assert torch.equal(model.embed.weight[2], before[2]) and not torch.equal(model.embed.weight[3], before[3])


def test_token_dropout_drops_tokens() -> None:
    """Dropout on an embedding's input drops whole increments, since its input is one-hot."""
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(9, 4))
    method = lrkit.Method(parameterization=lrkit.parameterizations.LoRA(rank=2, dropout=0.5))
    adapted = lrkit.attach(model, method, targets=["embed"], train_also=[])
    perturb(adapted)
    ids = torch.arange(9).repeat(50)
    delta = delta_of(adapted.adapters["embed"]).t()[ids]
    with torch.no_grad():
        seen = model.train()(ids) - model.embed.base.weight[ids]
    kept = seen.abs().sum(dim=1) > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.allclose(seen[kept], 2 * delta[kept], atol=1e-5)


def test_renormalising_embeddings_are_left_out() -> None:
    """An embedding with max_norm changes its weight at every call, and is refused in one line."""
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(lrkit.LrkitError, match="max_norm changes its weight"):
        lrkit.attach(model, lrkit.methods.lora(), targets=["embed"], train_also=[])


SCALED = {
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
    ),
    "bigbird-pegasus": ("BigBirdPegasusConfig", "BigBirdPegasusForCausalLM", {"attention_type": "original_full"}),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", {"scale_embedding": True}),
    "bart": ("BartConfig", "BartForCausalLM", {"scale_embedding": True, "tie_word_embeddings": False}),
}  # fmt: skip
"""Models whose embedding multiplies its rows, and settings that make them small."""


@pytest.mark.parametrize("family", SCALED)
def test_scaled_embeddings_are_exact(family: str, tmp_path: Path) -> None:
    """An embedding that scales its rows scales ΔW's too: adapted, merged and PEFT's outputs are one."""
    import transformers

    torch.manual_seed(4)
    named, of, more = SCALED[family]
    config = getattr(transformers, named)(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, d_model=16,
        attention_heads=2, num_layers=1, ffn_dim=24, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    model = getattr(transformers, of)(config).double().eval()
    plain, ids = copy.deepcopy(model), torch.randint(3, 50, (2, 6))
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["embed_tokens"], train_also=[])
    perturb(adapted)
    (name,) = adapted.adapters
    layer = plain.get_submodule(name)
    assert layer.embed_scale != 1 and type(layer) is not nn.Embedding
    delta = delta_of(adapted.adapters[name]).t()
    with torch.no_grad():
        wanted = (layer.weight + delta)[ids] * layer.embed_scale
        assert torch.allclose(model.get_submodule(name)(ids), wanted, rtol=1e-6)
        logits = model(ids).logits
    lrkit.export(adapted, tmp_path / "out")
    again = copy.deepcopy(plain)
    lrkit.from_peft(again, tmp_path / "out")
    assert torch.allclose(again(ids).logits, logits, atol=1e-5)
    assert torch.allclose(adapted.merge()(ids).logits, logits, atol=1e-9)


class Normed(nn.Embedding):
    """Normalises the rows."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    """Learnt positions, as BART's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1], device=ids.device).expand_as(ids) + 1)


class Masked(nn.Embedding):
    """Positions by a mask, as OPT's."""

    def forward(self, mask: Tensor, past: int) -> Tensor:
        return super().forward(mask.cumsum(1) + past)


class Decoupled(nn.Embedding):
    """Two tables, as Idefics'."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.more = nn.Embedding(3, sizes[1])

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids.clamp(max=self.num_embeddings - 1))
        return torch.where((ids < self.num_embeddings)[..., None], rows, self.more(ids % 3))


@pytest.mark.parametrize("kind", [Normed, Shifted, Masked, Decoupled])
@pytest.mark.parametrize("targets", [["layer", "other"], ".*"])
def test_strange_embeddings_are_left_out(kind: type[nn.Embedding], targets: Any) -> None:
    """What is an embedding by its class and none by what it does is left out, and said."""
    model = nn.Sequential()
    model.add_module("layer", kind(9, 4))
    model.add_module("other", nn.Embedding(9, 4))
    with pytest.warns(lrkit.LrkitWarning, match=f"layer .{kind.__name__}: "):
        adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=targets, train_also=[])
    assert "layer" not in adapted.adapters and "other" in adapted.adapters


def test_unknown_layers_are_named() -> None:
    """An expression that matches a module with a matrix, and of no known kind, says that it is left out."""
    model = nn.Sequential()
    model.add_module("known", nn.Linear(4, 4))
    model.add_module("turned", nn.ConvTranspose1d(4, 4, 3))
    model.add_module("norm", nn.LayerNorm(4))
    with pytest.warns(
        lrkit.LrkitWarning, match=r"^left out: .*: turned \(ConvTranspose1d: no layer of a known kind\)$"
    ):
        adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=".*", train_also=[])
    assert list(adapted.adapters) == ["known"]


def test_embeddings_save_and_load(tmp_path: Path) -> None:
    """A saved embedding adapter with pruned components comes back with the same outputs."""
    torch.manual_seed(1)
    model = Tied()
    fresh = copy.deepcopy(model)
    ids = torch.randint(1, 20, (4, 6))
    adapted = lrkit.attach(model, lrkit.methods.adalora(rank=4, target_rank=2), targets=["embed", r"0"], train_also=[])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=30)
    for _ in range(30):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()) + adapted.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(layer.rank or 0 for layer in adapted.summary().layers) == 4
    adapted.save(tmp_path)
    other = lrkit.load(fresh, tmp_path)
    assert torch.equal(fresh(ids), model(ids))
    assert other.allocation() == adapted.allocation()


class Scale(nn.Module):
    """A layer of a third party: a diagonal of weights before a linear map."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class ScaleKind(lrkit.layers.LayerKind):
    """The kind of `Scale`."""

    linear = True

    def sizes(self, layer: nn.Module) -> lrkit.layers.Sizes | None:
        return lrkit.layers.Sizes(*reversed(layer.weight.shape)) if isinstance(layer, Scale) else None  # type: ignore

    def weight(self, layer: nn.Module) -> Tensor:
        assert isinstance(layer, Scale)
        return layer.weight

    def down(self, layer: nn.Module, x: Tensor, a: Tensor, *where: Any) -> Tensor:
        return x @ a.t()

    def up(self, layer: nn.Module, h: Tensor, b: Tensor, *where: Any) -> Tensor:
        return h @ b.t()


def test_plugins_add_kinds() -> None:
    """A kind that a plug-in offers is found by all-linear, trained and merged."""

    class Plugin:
        @lrkit.hookimpl
        def lrkit_layers(self) -> Mapping[str, Any]:
            return {"scale": ScaleKind}

    model = nn.Sequential()
    model.add_module("blocks", nn.ModuleList([Scale(5, 4)]))
    model.forward = lambda x: model.blocks[0](x)  # type: ignore
    with lrkit.current().lend("layer", "scale", ScaleKind):
        adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=2), train_also=[])
    perturb(adapted)
    x = torch.randn(3, 5)
    wanted = x @ (adapted.originals["blocks.0"].weight + delta_of(adapted.adapters["blocks.0"])).t()
    assert torch.allclose(model(x), wanted, atol=1e-5)
    adapted.merge()
    assert torch.allclose(model(x), wanted, atol=1e-5)


class Speech(nn.Module):
    """A convolution, an embedding and a linear map, as PEFT wants a model: with a config."""

    config: ClassVar[Any] = {"tie_word_embeddings": False, "model_type": "custom"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.layers = nn.ModuleList([nn.Linear(8, 5)])

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.layers[0](self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))
        return out


def test_peft_reads_embeddings_and_convolutions(tmp_path: Path) -> None:
    """PEFT computes the same from an export, and lrkit reads the same back."""
    torch.manual_seed(2)
    model, ids = Speech(), torch.randint(0, 20, (2, 8))
    plain = copy.deepcopy(model)
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["embed", "conv", "0"], train_also=[])
    perturb(adapted)
    done = lrkit.export(adapted, tmp_path / "out", to="peft-lora", batch={"input_ids": ids})
    assert done.difference < 1e-6 and set(done.ranks) == {"embed", "conv", "layers.0"}
    again = copy.deepcopy(plain)
    lrkit.from_peft(again, tmp_path / "out")
    assert torch.allclose(again(ids), model(ids), atol=1e-5)
    with pytest.raises(lrkit.LrkitError, match="AdaLoRA adapts linear layers"):
        lrkit.export(adapted, tmp_path / "other", to="peft-adalora", batch={"input_ids": ids})


class Pictures(nn.Module):
    """A convolution that does not cast its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.last(self.conv(pixel_values).mean(dim=(2, 3)))
        return out


class Aliased(Pictures):
    """Pictures whose convolution has a second name, and so has a layer that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.again, self.other = self.conv, self.norm

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.last(self.conv(self.other(pixel_values)).mean(dim=(2, 3)))
        return out


def test_exports_leave_aliases_alone(tmp_path: Path) -> None:
    """A model whose modules have two names is exported, and stays what it was, tensor by tensor."""
    model = Aliased()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["conv", "last"], train_also=[])
    perturb(adapted)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    before, wanted = dict(model.named_parameters(remove_duplicate=False)), model(**batch)
    assert lrkit.export(adapted, tmp_path / "out", batch=batch).difference < 1e-6
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items()) and torch.equal(model(**batch), wanted)
    assert adapted.detach() is model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_wrappers_are_refused() -> None:
    """What torch.compile returns has other names: one line says to attach first."""
    with pytest.raises(lrkit.LrkitError, match="attach to the model, then compile it"):
        lrkit.attach(torch.compile(Pictures()), lrkit.methods.lora(rank=2), targets=["conv"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_takes_ordinary_batches(dtype: torch.dtype, tmp_path: Path) -> None:
    """The batch of the check may be in the model's dtype or in float64."""
    adapted = lrkit.attach(Pictures(), lrkit.methods.lora(rank=2), targets=["conv", "last"], train_also=[])
    perturb(adapted)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=dtype)}
    assert lrkit.export(adapted, tmp_path / "out", batch=batch).difference < 1e-6


def test_peft_reads_tied_embeddings(tmp_path: Path) -> None:
    """PEFT ties the head to the embedding's adapter, as lrkit does; without that, from_peft refuses."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    plain = copy.deepcopy(model)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=3), targets=["embed_tokens", "q_proj"], train_also=[])
    perturb(adapted)
    ids = torch.randint(0, 50, (2, 6))
    lrkit.export(adapted, tmp_path / "out")
    again = copy.deepcopy(plain)
    lrkit.from_peft(again, tmp_path / "out")
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(file.read_text().replace('"ensure_weight_tying": true', '"ensure_weight_tying": false'))
    with pytest.raises(lrkit.LrkitError, match="ensure_weight_tying=True"):
        lrkit.from_peft(copy.deepcopy(plain), tmp_path / "out")


def test_generate_agrees_with_merged() -> None:
    """Generating with a cache gives the tokens of the merged model."""
    import transformers

    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["wte", "wpe", "c_attn"], train_also=[])
    perturb(adapted)
    ids = torch.randint(0, 50, (2, 5))
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(ids, **ask)
    assert torch.equal(before, model.generate(ids, use_cache=False, **ask))
    assert torch.equal(before, adapted.merge().generate(ids, **ask))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_agree() -> None:
    """A compiled model with adapted embeddings and convolutions computes the same."""
    torch.manual_seed(6)
    model, ids = Speech(), torch.randint(0, 20, (2, 8))
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=["embed", "conv", "0"], train_also=[])
    perturb(adapted)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-6)
