"""Places of layers in blocks, on families of every kind, built without storage."""

import itertools
import operator
import re

import families
import pytest
import torch
import transformers
from torch import nn

import lrkit
from lrkit.adapt.roles import places
from lrkit.adapt.targets import find_targets

# The published blocks, by hand: a stack's place, the configuration's number of blocks, and the linear maps of attention
# and of FFN in one block, the last map of each part with a star. A stack of experts is one map for each parameter.
LLAMA = ("self_attn.(q_proj k_proj v_proj o_proj*)", "mlp.(gate_proj up_proj down_proj*)")
EXPERTS = "mlp.experts.(gate_up_proj down_proj*)"
SHARED = f"{EXPERTS} mlp.shared_expert.(gate_proj up_proj down_proj*) mlp.shared_expert_gate"
NEOX = ("query_key_value dense*", "mlp.(dense_h_to_4h dense_4h_to_h*)")
BART = ("self_attn.(k_proj v_proj q_proj out_proj*)", "fc1 fc2*")
CROSS = (f"{BART[0]} encoder_attn.(k_proj v_proj q_proj out_proj*)", BART[1])
BERT = "intermediate.dense output.dense*"
T5 = "(q k v o*)"
SPEECH = "(intermediate_dense output_dense*)"
VIT = ("attention.(q_proj k_proj v_proj o_proj*)", "mlp.(fc1 fc2*)")
CLIP = ("self_attn.(k_proj v_proj q_proj out_proj*)", "mlp.(fc1 fc2*)")
ENCODERS = [("encoder.layers", "encoder_layers", *BART), ("decoder.layers", "decoder_layers", *CROSS)]
FAMILIES = {
    "llama": [("layers", "num_hidden_layers", *LLAMA)],
    "gemma3_text": [("layers", "num_hidden_layers", *LLAMA)],
    "qwen3_next": [("layers", "num_hidden_layers", "linear_attn.(in_proj_qkvz in_proj_ba out_proj*)", SHARED)],
    "gpt2": [("h", "n_layer", "attn.(c_attn c_proj*)", "mlp.(c_fc c_proj*)")],
    "gpt_neox": [("layers", "num_hidden_layers", f"attention.({NEOX[0]})", NEOX[1])],
    "bloom": [("h", "n_layer", f"self_attention.({NEOX[0]})", NEOX[1])],
    "opt": [("decoder.layers", "num_hidden_layers", *BART)],
    "phi3": [("layers", "num_hidden_layers", "self_attn.(qkv_proj o_proj*)", "mlp.(gate_up_proj down_proj*)")],
    "bert": [("encoder.layer", "num_hidden_layers", "attention.self.(query key value) attention.output.dense*", BERT)],
    "deberta-v2": [
        (
            "encoder.layer",
            "num_hidden_layers",
            "attention.self.(query_proj key_proj value_proj) attention.output.dense*",
            BERT,
        )
    ],
    "modernbert": [("layers", "num_hidden_layers", "attn.(Wqkv Wo*)", "mlp.(Wi Wo*)")],
    "distilbert": [("transformer.layer", "n_layers", "attention.(q_lin k_lin v_lin out_lin*)", "ffn.(lin1 lin2*)")],
    "xlm": [("attentions", "n_layers", "q_lin k_lin v_lin out_lin*", ""), ("ffns", "n_layers", "", "lin1 lin2*")],
    "bart": ENCODERS,
    "t5": [
        ("encoder.block", "num_layers", f"layer.0.SelfAttention.{T5}", "layer.1.DenseReluDense.(wi wo*)"),
        (
            "decoder.block",
            "num_decoder_layers",
            f"layer.0.SelfAttention.{T5} layer.1.EncDecAttention.{T5}",
            "layer.2.DenseReluDense.(wi wo*)",
        ),
    ],
    "whisper": ENCODERS,
    "wav2vec2": [
        ("encoder.layers", "num_hidden_layers", "attention.(k_proj v_proj q_proj out_proj*)", f"feed_forward.{SPEECH}")
    ],
    "wav2vec2-conformer": [
        (
            "encoder.layers",
            "num_hidden_layers",
            "self_attn.(linear_q linear_k linear_v linear_pos linear_out*)",
            f"ffn1.{SPEECH} ffn2.{SPEECH}",
        )
    ],
    "mixtral": [("layers", "num_hidden_layers", LLAMA[0], EXPERTS)],
    "qwen2_moe": [("layers", "num_hidden_layers", LLAMA[0], SHARED)],
    "gpt_oss": [("layers", "num_hidden_layers", LLAMA[0], EXPERTS)],
    "mamba": [("layers", "num_hidden_layers", "mixer.(in_proj x_proj dt_proj out_proj*)", "")],
    "nemotron_h": [  # two layers are left: one of Mamba's kind, one of experts
        ("layers", [0], "mixer.(in_proj out_proj*)", ""),
        ("layers", [1], "", "mixer.experts.(up_proj down_proj*) mixer.shared_experts.(up_proj down_proj*)"),
    ],
    "recurrent_gemma": [
        (
            "layers",
            "num_hidden_layers",
            "temporal_block.(linear_x linear_y linear_out*)",
            "mlp_block.(gate_proj up_proj down_proj*)",
        )
    ],
    "vit": [("layers", "num_hidden_layers", *VIT)],
    "swin": [(f"encoder.layers.{stage}.blocks", range(2), *VIT) for stage in range(2)],
    "convnextv2": [
        (f"encoder.stages.{stage}.layers", range(depth), "", "pwconv1 pwconv2*")
        for stage, depth in enumerate((3, 3, 9, 3))
    ],
    "clip": [
        (f"{tower}_model.encoder.layers", f"{tower}_config.num_hidden_layers", *CLIP) for tower in ("text", "vision")
    ],
}
OTHER = {"swin": {"encoder.layers.0.downsample.reduction": ("other", False)}}


def maps(text):
    """Return the names in a text such as "mlp.(fc1 fc2*)", and for each whether it has a star."""
    for place, inner, name in re.findall(r"(\S*)\(([^)]*)\)|(\S+)", text):
        for leaf in inner.split() or [name]:
            yield (place + leaf).removesuffix("*"), leaf.endswith("*")


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_of_a_family(name):
    """Each family's layers of attention and FFN, and the last map of each, are those of its published blocks."""
    model = families.build(name, depth=2)
    found = {t.name: (t.role, t.output) for t in find_targets(model, "all-linear")}
    wanted = dict(OTHER.get(name, {}))
    for place, blocks, *texts in FAMILIES[name]:
        if isinstance(blocks, str):
            blocks = range(operator.attrgetter(blocks)(model.config))
        for block, (role, text) in itertools.product(blocks, zip(("attention", "ffn"), texts, strict=True)):
            wanted |= {f"{place}.{block}.{map}": (role, last) for map, last in maps(text)}
    assert found == wanted


class StrangeAttention(nn.Module):
    """Attention whose names say nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(4, 4) for _ in range(3))


class StrangeMLP(nn.Module):
    """An FFN whose names say nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)


class AttentionDecoderLayer(nn.Module):
    """A block whose own name says less than that of its parts."""

    def __init__(self):
        super().__init__()
        self.mixer, self.x, self.y, self.z = StrangeMLP(), StrangeAttention(), nn.Linear(4, 4), StrangeMLP()


def test_classes_tell_roles():
    """Classes say the role if names do not, against a name that says another, and never the block's own class."""
    model = nn.ModuleDict({"layers": nn.ModuleList([AttentionDecoderLayer()])})
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name.removeprefix("layers.0."): place for name, place in places(model, names).items()}
    assert found == {
        "mixer.a": ("ffn", False),
        "mixer.b": ("ffn", True),
        "x.one": ("attention", False),
        "x.two": ("attention", False),
        "x.last": ("attention", True),
        "y": ("other", False),
        "z.a": ("ffn", False),
        "z.b": ("ffn", True),
    }


@pytest.mark.parametrize("size", families.LLAMAS)
def test_llamas_without_storage(size):
    """A Llama of 1 B or 70 B parameters takes adapters on the meta device, as many numbers as its shapes say."""
    width, inner, blocks, heads = families.LLAMAS[size]
    model = families.llama(size)
    narrow = 8 * width // heads
    sizes = 2 * 2 * width + 2 * (width + narrow) + 3 * (width + inner)
    for method, core in ((lrkit.methods.lora(rank=8), 0), (lrkit.methods.adalora(rank=8, target_rank=4), 8)):
        adapted = lrkit.attach(model, method)
        assert len(adapted.adapters) == 7 * blocks
        assert sum(p.numel() for p in adapted.adapter_parameters()) == blocks * (8 * sizes + 7 * core)
        adapted.detach()


# Of each: adapted layers, and the sums of d_in + d_out over all maps, from the shapes that its paper or card gives.
MIXTURES = {
    # 32 blocks; q and o, k and v; 8 experts: gate with up, down.
    "Mixtral": (6 * 32, 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 8 * (4096 + 2 * 14336 + 14336 + 4096))),
    # 61 blocks, 3 of them dense; attention with q, k and v by way of 1536 and 512 (and 64) features for 128 heads.
    "DeepseekV3": (
        61 * 5 + 3 * 3 + 58 * 5,
        61 * (7168 + 1536 + 1536 + 128 * 192 + 7168 + 576 + 512 + 128 * 256 + 128 * 128 + 7168)
        + 3 * 3 * (7168 + 18432)
        + 58 * (256 * (7168 + 2 * 2048 + 2048 + 7168) + 3 * (7168 + 2048)),
    ),
    # 36 blocks, 64 heads of 64, 8 of keys and values; 128 experts.
    "GptOss": (
        36 * 6,
        36 * (2 * (2880 + 4096) + 2 * (2880 + 512) + 128 * (2880 + 2 * 2880 + 2880 + 2880)),
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_without_storage(name):
    """Mixtral 8x7B, DeepSeek-V3 and GPT-OSS 120B take adapters at every expert, as many numbers as their shapes say."""
    layers, sizes = MIXTURES[name]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, f"{name}Config")())
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=8))
    assert len(adapted.adapters) == layers
    assert sum(p.numel() for p in adapted.adapter_parameters()) == 8 * sizes
