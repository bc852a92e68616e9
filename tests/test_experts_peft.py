"""Experts in PEFT's format, both ways, against PEFT itself in float64."""

import copy
import json

import peft
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

import lrkit
from lrkit.errors import LrkitError
from lrkit.methods import adalora, lora

# It looks for them among modules alone.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:left out. .*Llama4Router"),
]
DOWN = "model.layers.0.mlp.experts.down_proj"


def deepseek():
    """Make a mixture whose dense layers and shared experts have the names that PEFT gives to parts of experts."""
    config = transformers.DeepseekV3Config(
        **zoo._DECODER | {"num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def model(kind="mixtral"):
    torch.manual_seed(0)
    net = (deepseek if kind == "deepseek" else zoo.ZOO[kind])().double().eval()
    net.config._experts_implementation = "eager"  # torch's product of sorted rows has no float64
    return net


def logits(net):
    return net.eval()(input_ids=zoo.IDS).logits


def drawn(net, method, **settings):
    """Adapt a model, with all factors drawn, and core values of single experts zero."""
    adapted = lrkit.attach(net, method, **settings)
    for p in adapted.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for adapter in adapted.adapters.values():
        if adapter.core is not None:
            adapter.core.data[torch.rand(len(adapter.core)) < 0.4] = 0
    return adapted


def saved(folder, net, **settings):
    """Save what PEFT drew for the experts and one other layer; return its logits."""
    names = [name for name, p in net.named_parameters() if p.ndim == 3]
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": names} | settings
    wrapped = peft.get_peft_model(net, peft.LoraConfig(init_lora_weights=False, **settings))
    wrapped.save_pretrained(folder)
    return logits(wrapped)


@pytest.mark.parametrize("method", [lora(rank=2), adalora(rank=4, target_rank=2)], ids=["lora", "adalora"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "qwen3-moe", "deepseek", "llama4"])
def test_export_loads_in_peft(kind, method, tmp_path):
    """PEFT computes what lrkit does, though experts kept other components, and lrkit reads the same file back."""
    net = model(kind)
    plain = copy.deepcopy(net)
    done = lrkit.export(drawn(net, method), tmp_path / "out")
    assert done.difference < 1e-12
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "out")
    torch.testing.assert_close(logits(read), logits(net))
    assert (logits(plain) - logits(net)).abs().max() > 1e-3
    again = copy.deepcopy(plain)
    lrkit.from_peft(again, tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(net))


def test_export_of_one_stack(tmp_path):
    """A stack alone needs no other target, and its rank in the file is one expert's."""
    net = model()
    plain = copy.deepcopy(net)
    done = lrkit.export(drawn(net, lora(rank=3), targets=[DOWN]), tmp_path / "out")
    assert done.ranks == {DOWN: 3}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"], config["r"]) == ([], [DOWN], 3)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out")), logits(net))


@pytest.mark.parametrize("other", [None, lora(rank=5), adalora(rank=4, target_rank=1)], ids=["none", "lora", "adalora"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "llama4"])
def test_peft_experts_train_on(kind, other, tmp_path):
    """What PEFT trained with ranks and scales of its own per parameter is taken over exactly."""
    net = model(kind)
    patterns = {"rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 7}}
    expected = saved(tmp_path, copy.deepcopy(net), **patterns)
    assert (logits(net) - expected).abs().max() > 1e-3
    adapted = lrkit.from_peft(net, tmp_path, other)
    torch.testing.assert_close(logits(net), expected)
    if other is None:
        assert {adapter.rank // 4 for name, adapter in adapted.adapters.items() if "gate_up" in name} == {3}
    lrkit.export(adapted, tmp_path / "again")
    adapted.detach()
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(net, tmp_path / "again")), expected)


def test_peft_names_by_endings(tmp_path):
    """PEFT's setting may name parameters by their endings, and linear weights too."""
    net = model()
    targets = ["experts.down_proj", "q_proj.weight"]
    expected = saved(tmp_path, copy.deepcopy(net), target_modules=[], target_parameters=targets)
    adapted = lrkit.from_peft(net, tmp_path)
    assert set(adapted.adapters) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.experts.down_proj")
    }
    torch.testing.assert_close(logits(net), expected)


def edit(folder, change=lambda key, tensor: tensor, **settings):
    """Change PEFT's files."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    weights = folder / "adapter_model.safetensors"
    save_file({key: change(key, tensor) for key, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("version", ["0.18.1", None])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_older_files(kind, version, tmp_path):
    """PEFT 0.18 took every expert's matrix for [d_in, d_out], by its formula "o r e, e r i -> e i o"."""
    net = model(kind)
    expected, shapes = copy.deepcopy(net), {}
    parameters = {name: p for name, p in expected.named_parameters() if p.ndim == 3}
    saved(tmp_path, copy.deepcopy(net), target_modules=[])
    for name, p in parameters.items():
        a, b = torch.randn(4 * 2, p.shape[1]).double(), torch.randn(p.shape[2], 4 * 2).double()
        p.data += 2.0 * torch.einsum("ore,eri->eio", b.view(-1, 2, 4), a.view(4, 2, -1))
        key = "base_model.model." + name.replace("gate_up_proj", "base_layer").replace(".down_proj", "")
        shapes |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    edit(tmp_path, lambda key, tensor: shapes[key], peft_version=version)
    lrkit.from_peft(net, tmp_path)
    torch.testing.assert_close(logits(net), logits(expected))


def test_unfit_files_are_refused(tmp_path):
    """Missing parameters and experts of another number are each told in one line."""
    net = model()
    saved(tmp_path, copy.deepcopy(net))
    edit(tmp_path, target_parameters=["experts.down_proj"])
    with pytest.raises(LrkitError, match=r"mlp\.experts has no 2 parameters that target_parameters names"):
        lrkit.from_peft(net, tmp_path)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    cut = {"experts.lora_A.weight": lambda a: a[:7], "experts.lora_B.weight": lambda b: b[:, :7].contiguous()}
    edit(tmp_path, lambda k, t: cut.get(".".join(k.split(".")[-3:]), lambda t: t)(t), target_parameters=names)
    with pytest.raises(
        LrkitError, match=r"lora_A of model\.layers\.0\.mlp\.experts\.down_proj has 7 rows, and there are 4"
    ):
        lrkit.from_peft(net, tmp_path)


def test_formats_without_experts(tmp_path):
    """Formats that hold linear layers alone say what to export to."""
    adapted = drawn(model(), adalora(rank=2, target_rank=1))
    for to in ("peft-adalora", "vllm-lora"):
        with pytest.raises(LrkitError, match=r"experts.* export to \"peft-lora\"") as told:
            lrkit.export(adapted, tmp_path / to, to=to)
        assert "\n" not in str(told.value)
