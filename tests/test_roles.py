"""Places of layers in blocks, on families of every kind, built without storage."""

import collections

import families
import pytest
from torch import nn

import lrkit
from lrkit.adapt.roles import places
from lrkit.adapt.targets import find_targets

# Read off each model's code and names: layers of attention, of FFN, others; last maps of attention, of FFN.
# A stack of experts is one layer for each of its parameters; an encoder-decoder has six attentions in four blocks.
COUNTS = {
    "llama": (8, 6, 0, 2, 2),
    "gemma3_text": (8, 6, 0, 2, 2),
    "qwen3_next": (6, 12, 0, 2, 4),
    "gpt2": (4, 4, 0, 2, 2),
    "gpt_neox": (4, 4, 0, 2, 2),
    "bloom": (4, 4, 0, 2, 2),
    "opt": (8, 4, 0, 2, 2),
    "phi3": (4, 4, 0, 2, 2),
    "bert": (8, 4, 0, 2, 2),
    "deberta-v2": (8, 4, 0, 2, 2),
    "modernbert": (4, 4, 0, 2, 2),
    "distilbert": (8, 4, 0, 2, 2),
    "xlm": (8, 4, 0, 2, 2),
    "bart": (24, 8, 0, 6, 4),
    "t5": (24, 8, 0, 6, 4),
    "whisper": (24, 8, 0, 6, 4),
    "wav2vec2": (8, 4, 0, 2, 2),
    "wav2vec2-conformer": (10, 8, 0, 2, 4),
    "mixtral": (8, 4, 0, 2, 2),
    "qwen2_moe": (8, 12, 0, 2, 4),
    "gpt_oss": (8, 4, 0, 2, 2),
    "mamba": (8, 0, 0, 2, 0),
    "nemotron_h": (2, 4, 0, 1, 2),
    "recurrent_gemma": (6, 6, 0, 2, 2),
    "vit": (8, 4, 0, 2, 2),
    "swin": (16, 8, 1, 4, 4),
    "convnextv2": (0, 36, 0, 0, 18),
    "clip": (16, 8, 0, 4, 4),
}


@pytest.mark.parametrize("name", COUNTS)
def test_roles_of_a_family(name):
    """Each family has as many layers of attention and FFN, and as many last maps, as its code says."""
    found = find_targets(families.build(name, depth=2), "all-linear")
    roles = collections.Counter(target.role for target in found)
    outputs = collections.Counter(target.role for target in found if target.output)
    assert (*(roles[r] for r in ("attention", "ffn", "other")), outputs["attention"], outputs["ffn"]) == COUNTS[name]


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
