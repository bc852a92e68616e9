"""Places of layers by name, on the models that people have."""

import re

import pytest
import zoo
from zoo import said

import lrkit
from lrkit.adapt.roles import is_output, role_of

ROLES = {
    "modernbert": {"attn.Wqkv": "attention", "attn.Wo": "attention!", "mlp.Wi": "ffn", "mlp.Wo": "ffn!"},
    "wav2vec2": {
        "attention.out_proj": "attention!",
        "attention.k_proj": "attention",
        "feed_forward.intermediate_dense": "ffn",
        "feed_forward.output_dense": "ffn!",
    },
    "xlnet": {"ff.layer_1": "ffn", "ff.layer_2": "ffn!"},
    "swin": {
        "attention.o_proj": "attention!",
        "mlp.fc1": "ffn",
        "mlp.fc2": "ffn!",
        "downsample.reduction": "other",
    },
    "convnext": {"pwconv1": "ffn", "pwconv2": "ffn!"},
    "mamba": {"mixer.in_proj": "attention", "mixer.out_proj": "attention!", "mixer.dt_proj": "attention"},
    "jamba": {"mamba.out_proj": "attention!", "feed_forward.down_proj": "ffn!", "self_attn.o_proj": "attention!"},
    "gpt2-lm": {"attn.c_attn": "attention", "attn.c_proj": "attention!", "mlp.c_fc": "ffn", "mlp.c_proj": "ffn!"},
    "t5-lm": {"SelfAttention.o": "attention!", "EncDecAttention.q": "attention", "DenseReluDense.wo": "ffn!"},
    "llava": {"self_attn.out_proj": "attention!", "mlp.fc2": "ffn!", "mlp.down_proj": "ffn!"},
}
ENDS = {"modernbert": 4, "wav2vec2": 4, "xlnet": 2, "swin": 4, "convnext": 2, "mamba": 2, "jamba": 3, "llava": 8}


@pytest.mark.parametrize("name", ROLES)
def test_roles_by_name(name):
    """Each layer stands where its model's code has it; an exclamation mark is the last map before the residual sum."""
    adapted, _ = said(lambda: lrkit.attach(zoo.make(name), lrkit.methods.lora(rank=2)))
    for suffix, role in ROLES[name].items():
        found = [layer for layer in adapted.adapters if layer.endswith(f".{suffix}")]
        assert found
        for layer in found:
            assert (role_of(layer), is_output(layer)) == (role.rstrip("!"), role.endswith("!")), layer


@pytest.mark.parametrize("name", ENDS)
def test_one_output_for_each_residual_sum(name):
    """Bottlenecks after Houlsby find as many places as the blocks have sums after linear layers."""
    adapters = pytest.importorskip("lrkit_adapters")
    adapted, _ = said(lambda: lrkit.attach(zoo.make(name), adapters.houlsby(width=2)))
    assert len(adapted.adapters) == ENDS[name]


def test_an_unknown_layer_does_not_stop_the_others():
    """AFLoRA adapts what it can place, names what it cannot, and says how to go on; alone, that is an error."""
    adapted, words = said(lambda: lrkit.attach(zoo.make("swin"), lrkit.methods.aflora(rank=2)))
    assert len(adapted.adapters) == 12
    assert words.count("swin.encoder.layers.0.downsample.reduction") == 1
    assert re.search(r'train="both" or "none"', words)
    with pytest.raises(lrkit.LrkitError, match=r'cannot place "swin.*reduction".*train="both"'):
        lrkit.attach(zoo.make("swin"), lrkit.methods.aflora(rank=2), targets=["reduction"])
    both, words = said(lambda: lrkit.attach(zoo.make("swin"), lrkit.methods.aflora(rank=2, train="both")))
    assert len(both.adapters) == 13 and not words
