"""Slices of fused projections: against unfused twins, the formula in float64, and what models do with their output."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from increments import delta_of, perturb
from torch import Tensor, nn

import lrkit
from lrkit.accounting import count
from lrkit.layers import Slice, Slices
from lrkit.layers.fused import layout_of

_SIZES: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = _SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
_MHA = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2: dict[str, Any] = _SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
_FALCON = _MHA | {"alibi": False}
# family: (class, config, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2 | {"multi_query": False}),
    "bigcode-one": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2 | {"multi_query": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _MHA),
    "japanese": ("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", _MHA),
    "bloom": ("BloomForCausalLM", "BloomConfig", _SIZES | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-one": ("FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": True}),
    "falcon-all": ("FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": False}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", _MHA),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", _GPT2 | {"rotary_dim": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", _SIZES | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40}),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        _SIZES
        | {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 40,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        }
        | {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}},
    ),
}


def made(family: str) -> Any:
    """Make a tiny model of a family in float64."""
    torch.manual_seed(0)
    model, config, settings = FAMILIES[family]
    with torch.random.fork_rng():
        built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return built.double().eval()


def slices(model: nn.Module) -> dict[str, Slice]:
    """Return all slices of a model by name."""
    kind = Slices()
    each = ((n, p, part) for n, m in model.named_modules() for p, part in kind.parts(m, n, model).items())
    return {f"{name}.{part}": layer for name, part, layer in each if isinstance(layer, Slice)}


IDS = torch.tensor([[5, 9, 3, 30, 12, 7], [8, 4, 41, 6, 20, 33]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_caches_tell_slices(family: str) -> None:
    """Keys that a model caches depend on k alone, values on v alone, and neither on q."""
    model = made(family)
    first = {name.rpartition(".")[2]: each for name, each in slices(model).items() if ".0." in name}
    assert set("qkv") <= set(first)

    def cached() -> tuple[Tensor, Tensor]:
        layer = model(IDS, use_cache=True).past_key_values.layers[0]
        return layer.keys, layer.values

    keys, values = cached()
    for part in "qkv":
        kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            Slices().write(first[part], torch.randn_like(first[part].weight))
        now_keys, now_values = cached()
        assert torch.equal(now_keys, keys) == (part != "k") and torch.equal(now_values, values) == (part != "v")
        if part != "q":  # all heads, and no row of another slice
            changed, before = (now_keys, keys) if part == "k" else (now_values, values)
            assert bool((changed != before).flatten(2).any(-1).all())
        model.load_state_dict(kept)


def test_gates_are_named() -> None:
    """Twice the rows of up double what a Phi-3 block's FFN returns; twice the rows of gate do not."""
    model = made("phi3")
    found = slices(model)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 32, dtype=torch.float64)
    for part, linear in (("up", True), ("gate", False)):
        twice, rows = copy.deepcopy(mlp), found[f"model.layers.0.mlp.gate_up_proj.{part}"]
        with torch.no_grad():
            rows.rows(twice.gate_up_proj.weight).mul_(2)
        assert torch.allclose(twice(x), 2 * mlp(x)) == linear


def unfused(model: Any) -> Any:
    """Return a Llama that computes what a Phi-3 computes."""
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, rms_norm_eps=1e-5)).double().eval()
    state = model.state_dict()
    for name in [name for name in state if "qkv_proj" in name or "gate_up_proj" in name]:
        fused = state.pop(name)
        parts = ("q", "k", "v") if "qkv" in name else ("gate", "up")
        place = name.rpartition(".")[0].rpartition(".")[0]
        for part, rows in zip(parts, fused.split((32, 16, 16) if "qkv" in name else 24), strict=True):
            state[f"{place}.{part}_proj.weight"] = rows
    twin.load_state_dict(state)
    return twin


def renamed(name: str) -> str:
    """Return a Llama's name for a tensor of a Phi-3's slice."""
    for part in ("q", "k", "v"):
        name = name.replace(f"qkv_proj.{part}.", f"{part}_proj.")
    return name.replace("gate_up_proj.gate.", "gate_proj.").replace("gate_up_proj.up.", "up_proj.")


@pytest.mark.parametrize("method", ["lora", "adalora", "elora"])
def test_slices_equal_unfused_twins(method: str) -> None:
    """A Phi-3 with adapted slices has the logits, gradients and merged weights of a Llama with adapted q_proj and so on."""
    make = {
        "lora": lambda: lrkit.methods.lora(rank=3),
        "adalora": lambda: lrkit.methods.adalora(rank=3, target_rank=2),
        "elora": lambda: lrkit.methods.elora(rank=3),
    }[method]
    model = made("phi3")
    twin = unfused(model)
    assert torch.allclose(model(IDS).logits, twin(IDS).logits)
    ours = lrkit.attach(model, make(), slices=True, train_also=[])
    theirs = lrkit.attach(twin, make(), train_also=[])
    perturb(ours)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert sorted(map(renamed, mine)) == sorted(other)
    own = [name for name, p in twin.named_parameters() if id(p) in {id(p) for p in theirs.added_parameters()}]
    state = model.state_dict()
    twin.load_state_dict({**twin.state_dict(), **{renamed(n): t for n, t in state.items() if renamed(n) in own}})
    assert torch.allclose(model(IDS).logits, twin(IDS).logits, atol=1e-12)
    for each in (model, twin):
        each(IDS).logits.square().sum().backward()
    for name, p in mine.items():
        assert p.grad is not None and torch.allclose(p.grad, other[renamed(name)].grad, rtol=1e-9), name
    assert (
        ours.coverage is not None and theirs.coverage is not None and ours.coverage.share == theirs.coverage.share == 1
    )
    logits = model(IDS).logits
    merged = unfused(ours.merge())
    assert torch.allclose(model(IDS).logits, logits, atol=1e-12)
    for name, p in theirs.merge().state_dict().items():
        assert torch.allclose(p, merged.state_dict()[name], atol=1e-13)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "neox", "falcon", "codegen"])
@pytest.mark.parametrize("hooked", [False, True])
def test_joined_is_formula(family: str, hooked: bool) -> None:
    """Some slices adapted: the fused output is x (W + ΔW)ᵀ + b, with ΔW in the slice's rows alone; merging is the same."""
    model = made(family)
    place = next(name for name, each in slices(model).items() if name.endswith(".q")).removesuffix(".q")
    plain = copy.deepcopy(model)
    fused: Any = model.get_submodule(place)
    calls: list[int] = []
    if hooked:
        fused.register_forward_hook(lambda *_: calls.append(1))
    conv1d = type(fused).__name__ == "Conv1D"
    before = fused.weight.clone()
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), targets=[f"{place}.q", f"{place}.v"], train_also=[])
    perturb(adapted)
    wanted = (before.t() if conv1d else before).clone()
    for part in "qv":
        # From the layout alone, row by row.
        layout = layout_of(place, plain, len(wanted))
        assert layout is not None
        start = sum(size for name, size in list(layout.sizes.items())[: list(layout.sizes).index(part)])
        per = sum(layout.sizes.values())
        rows = [g * per + start + i for g in range(layout.groups) for i in range(layout.sizes[part])]
        for row, delta in zip(rows, delta_of(adapted.adapters[f"{place}.{part}"]), strict=True):
            wanted[row] += delta
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = nn.functional.linear(x, wanted, fused.bias)
    joined: Any = model.get_submodule(place)
    got = joined(x)
    assert torch.allclose(got, expected, atol=1e-12) and len(calls) == hooked
    assert joined.weight is fused.weight and joined.bias is fused.bias
    trained = list(adapted.parameters())
    theirs = torch.autograd.grad(expected.square().sum(), trained)
    for a, b in zip(torch.autograd.grad(got.square().sum(), trained), theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
    adapted.merge()
    assert model.get_submodule(place) is fused
    assert torch.allclose(fused.weight, wanted.t() if conv1d else wanted, atol=1e-13)


def test_half_precision_rounds_once() -> None:
    """A bf16 weight is merged with one rounding, and rows of slices that are not adapted keep their bits."""
    model = made("neox").to(torch.bfloat16)
    place = "gpt_neox.layers.0.attention.query_key_value"
    before = model.get_submodule(place).weight.clone()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=3), targets=[f"{place}.k"], train_also=[])
    perturb(adapted)
    delta = delta_of(adapted.adapters[f"{place}.k"])
    adapted.merge()
    wanted = before.view(4, 3, 8, 32).clone()
    wanted[:, 1] = (before.view(4, 3, 8, 32)[:, 1].float() + delta.view(4, 8, 32)).to(torch.bfloat16)
    assert torch.equal(model.get_submodule(place).weight.view(4, 3, 8, 32), wanted)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "neox"])
def test_pruned_slices_end_to_end(family: str, tmp_path: Path) -> None:
    """Slices are pruned to ranks of their own, saved, loaded, resumed, generated with, and taken out bit for bit."""
    model = made(family).float()
    plain = copy.deepcopy(model)
    logits = model(IDS).logits
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=2, interval=1)
    counted = count(method, model, total_steps=12, slices=True, train_also=[])
    adapted = lrkit.attach(model, method, slices=True, train_also=[])
    assert counted.layers == len(adapted.adapters) and any(name.endswith(".q") for name in adapted.adapters)
    assert counted.start == sum(p.numel() for p in adapted.parameters())
    assert set(plain.state_dict()) <= set(model.state_dict())

    def train(adapted: lrkit.Adapted, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss = adapted.model(input_ids=IDS, labels=IDS).loss + adapted.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)
    train(adapted, optimizer, 6)
    adapted.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(adapted, optimizer, 6)
    again = lrkit.load(copy.deepcopy(plain), tmp_path)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    other.load_state_dict(state)
    again.bind(other, total_steps=12)
    train(again, other, 6)
    trained = model(IDS).logits
    assert torch.equal(again.model(IDS).logits, trained)
    ranks = adapted.allocation().layers()
    kinds = {name.rpartition(".")[2] for name in ranks}
    assert {"q", "k", "v"} <= kinds and len(set(ranks.values())) > 1
    with adapted.disabled():
        assert torch.equal(model(IDS).logits, logits)
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(IDS, **ask)
    assert torch.equal(tokens, model.generate(IDS, use_cache=False, **ask))
    assert torch.equal(tokens, again.merge().generate(IDS, **ask))
    adapted.detach()
    assert all(torch.equal(p, plain.state_dict()[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(IDS).logits, logits)


def test_allocations_name_slices() -> None:
    """A table of ranks gives each slice its own, by name or pattern."""
    model = made("gpt2")
    table = {r".*c_attn\.q": 5, r".*c_attn\.v": 2}
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=table), targets=["c_attn.q", "c_attn.v"], train_also=[])
    ranks = adapted.allocation().layers()
    assert ranks == {f"transformer.h.{i}.attn.c_attn.{p}": r for i in (0, 1) for p, r in (("q", 5), ("v", 2))}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "neox"])
@pytest.mark.parametrize("to", ["peft-lora", "peft-adalora", "vllm-lora", "merged"])
def test_peft_holds_slices_as_blocks(family: str, to: str, tmp_path: Path) -> None:
    """PEFT reads slices of different ranks and scales back as one pair of factors; the ranks add up."""
    model = made(family)
    plain = copy.deepcopy(model)
    method = lrkit.methods.svd_lora(rank=lrkit.Allocation({"q": 3, "v": 1, "*": 2}), alpha=4)
    adapted = lrkit.attach(model, method, slices=True, train_also=[])
    perturb(adapted)
    done = lrkit.export(adapted, tmp_path / "out", to=to)
    assert done.difference < 1e-9
    if to == "peft-lora":
        place = next(name for name in adapted.adapters if name.endswith(".q")).removesuffix(".q")
        assert done.ranks[place] == 6 and not any(name.endswith((".q", ".v")) for name in done.ranks)
        again = lrkit.from_peft(plain, tmp_path / "out")
        assert torch.allclose(again.model(IDS).logits, model(IDS).logits, atol=1e-9)


def test_whole_layers_come_first() -> None:
    """Without slices=True, all-linear, expressions and names mean whole projections wherever they match them."""
    model = made("gpt2")
    found = [
        list(lrkit.attach(copy.deepcopy(model), lrkit.methods.lora(rank=1), targets=targets, train_also=[]).adapters)
        for targets in ("all-linear", r"transformer\.h\..*", ["c_attn", "c_proj", "c_fc"])
    ]
    assert found[0] == found[1] == found[2] and not any(name.endswith((".q", ".k", ".v")) for name in found[0])
    part = lrkit.attach(model, lrkit.methods.lora(rank=1), targets=r".*\.0\..*(\.k|c_fc)", train_also=[])
    assert list(part.adapters) == ["transformer.h.0.attn.c_attn.k", "transformer.h.0.mlp.c_fc"]
    mixed = Fused(24, num_heads=2)
    mixed.layers[0].q = nn.Linear(8, 8)
    whole = lrkit.attach(mixed, lrkit.methods.lora(rank=1), targets=["q"], train_also=[])
    assert list(whole.adapters) == ["layers.0.q"]


class Fused(nn.Module):
    """A projection that is called as fused ones are, with nothing to tell its heads by."""

    def __init__(self, rows: int, **settings: Any) -> None:
        super().__init__()
        block = nn.Module()
        block.qkv_proj = nn.Linear(8, rows)
        for name, value in settings.items():
            setattr(block, name, value)
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[0].qkv_proj(x)
        return out


def test_unknown_slices_are_refused() -> None:
    """One line says why a slice cannot be had; nothing is changed."""
    lora = lrkit.methods.lora(rank=1)
    for model, targets, slices, words in (
        (Fused(24), ["qkv_proj.q"], False, "does not know how its rows are divided"),
        (Fused(24, num_heads=2, head_dim=5), ["qkv_proj.q"], False, "does not know how its rows are divided"),
        (Fused(24, num_heads=2, head_dim=4), ["qkv_proj.o"], False, 'no part "o".*it has q, k, v'),
        (Fused(24, num_heads=2, head_dim=4), ["qkv_proj", "qkv_proj.q"], False, "name one of them"),
        (Fused(24), "all-linear", True, "no fused projection whose parts are known.*qkv_proj"),
    ):
        with pytest.raises(lrkit.LrkitError, match=words):
            lrkit.attach(model, lora, targets=targets, slices=slices, train_also=[])
        assert type(model.layers[0].qkv_proj) is nn.Linear
    with pytest.raises(lrkit.LrkitError, match=r"no tensors of its own.*name layers\.0\.qkv_proj"):
        lrkit.attach(Fused(24, num_heads=2), lrkit.methods.full(), targets=["qkv_proj.q"], train_also=[])


def test_owner_decides_on_merging() -> None:
    """A projection whose weight is computed or tied refuses the merging of its slices."""
    model = Fused(24, num_heads=2)
    nn.utils.parametrizations.weight_norm(model.layers[0].qkv_proj)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=1), targets=["qkv_proj.q"], train_also=[])
    with pytest.raises(lrkit.LrkitError, match="computed"):
        adapted.merge()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", ["phi3", "neox"])
def test_compiled_slices_agree(family: str) -> None:
    """A compiled model with adapted slices computes the same."""
    model = made(family).float()
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=3), slices=True, train_also=[])
    perturb(adapted)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-4)
