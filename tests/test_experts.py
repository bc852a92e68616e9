"""Experts as 3-D parameters, against a reference that goes from token to token and from expert to expert in float64."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lrkit.layers import Experts
from lrkit.layers.grouped import grouped_mm, grouped_outer
from lrkit.parameterizations import LowRank
from lrkit.parameterizations.base import Target

KIND = Experts()
HIDDEN, INNER, EXPERTS, RANK = 12, 8, 5, 2
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS}),
    "deepseek_v3": ("DeepseekV3", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "nemotron_h": ("NemotronH", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "muse_spark": (
        "MuseSpark",
        {"moe_hidden_size": HIDDEN, "num_local_experts": EXPERTS, "moe_intermediate_size": INNER},
    ),
}


def experts(kind, implementation="eager"):
    """Make the experts of one family, with random weights in float64."""
    name, settings = CONFIGS[kind]
    module = getattr(transformers.models, kind)
    config = getattr(module, f"{name}TextConfig", None) or getattr(module, f"{name}Config")
    config = config(**_SIZES, **settings)
    config._experts_implementation = implementation
    made = getattr(getattr(module, f"modeling_{kind}"), f"{name}Experts")(config).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.5).requires_grad_(False)
    return made


def parts(module):
    return KIND.parts(module, "experts", module)


def adapters(module, names, *, core=True, out_scale=True):
    """Make random low-rank adapters of stacks, as a parameterization does."""
    made = {}
    for name in names:
        layer = parts(module)[name]
        sizes = KIND.sizes(layer)
        target = Target(name, layer, sizes.d_in, sizes.d_out, "ffn", kind=KIND, maps=sizes.maps)
        r = sizes.maps * RANK
        shapes = {"a": (r, sizes.d_in), "b": (sizes.d_out, r)}
        shapes |= {"core": (r,)} if core else {}
        shapes |= {"out_scale": (sizes.maps * sizes.d_out,)} if out_scale else {}
        tensors = {key: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for key, shape in shapes.items()}
        made[name] = LowRank(target, tensors.pop("a"), tensors.pop("b"), **tensors, scaling=0.7)
    return made


def draw(tokens=9, k=2, *, sentinels=False):
    """Draw tokens and their routing; the last expert is called by none."""
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:k] for _ in range(tokens)]).view(tokens, k)
    weights = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
    if sentinels:
        index[::2, 0] = EXPERTS
    return x, index, weights


def increments(adapter):
    """Write ΔW_e = s · diag(b_e) B_e diag(c_e) A_e of every expert by the formula."""
    deltas = []
    for e in range(EXPERTS):
        rows = slice(e * RANK, (e + 1) * RANK)
        a, b = adapter.A[rows], adapter.B[:, rows]
        c = torch.ones(RANK, dtype=torch.float64) if adapter.core is None else adapter.core[rows]
        d_out = len(adapter.B)
        s = torch.ones(d_out).double() if adapter.out_scale is None else adapter.out_scale[e * d_out : (e + 1) * d_out]
        deltas.append(0.7 * torch.diag(s) @ b @ torch.diag(c) @ a)
    return deltas


def reference(module, made, x, index, weights):
    """Compute the module's output token by token and expert by expert, with W + ΔW written out."""
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def linear(name, e, row):
        w = getattr(module, name)[e]
        w = w.t() if module.is_transposed else w
        w = w + increments(made[name])[e] if name in made else w
        y = w @ row
        return y + getattr(module, f"{name}_bias")[e] if module.has_bias else y

    def gate(h):
        if not module.has_gate:
            return module.act_fn(h)
        if module.is_concatenated:
            return module.act_fn(h[: len(h) // 2]) * h[len(h) // 2 :]
        glu, up = h[::2].clamp(max=module.limit), h[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * glu * torch.sigmoid(glu * module.alpha)

    rows = []
    for t in range(len(x)):
        out = torch.zeros(HIDDEN, dtype=torch.float64)
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if e == EXPERTS:
                continue
            y = linear("down_proj", e, gate(linear(first, e, x[t])))
            y = module.post_expert_norm(y) if module.has_post_expert_norm else y
            out = out + weights[t, j] * y
        rows.append(out)
    return torch.stack(rows)


def gradients(y, leaves):
    torch.manual_seed(7)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)


def leaves_of(made, x, weights):
    return [x, weights, *[p for adapter in made.values() for p in adapter.parameters()]]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_values_and_gradients(kind, sentinels):
    """Outputs and all gradients are those of the loop over tokens and experts."""
    module = experts(kind)
    x, index, weights = draw(sentinels=sentinels)
    made = adapters(module, parts(module))
    y = KIND.join(module, made)(x, index, weights)
    expected = reference(module, made, x, index, weights)
    torch.testing.assert_close(y, expected)
    leaves = leaves_of(made, x, weights)
    torch.testing.assert_close(gradients(y, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_increment_changes_nothing(kind, implementation):
    """Without an increment the module computes as transformers' own implementations do."""
    module = experts(kind, implementation)
    x, index, weights = draw()
    made = adapters(module, parts(module))
    for adapter in made.values():
        nn.init.zeros_(adapter.core)
    joined = KIND.join(module, made)
    if implementation == "grouped_mm":  # torch's has no float64
        joined.float()
        x, weights = x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    y, expected = joined(x, index, weights), module(x, index, weights)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, [x, weights]), gradients(expected, [x, weights]))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_stack_alone(kind, name):
    """A stack that is not adapted is computed as it is."""
    module = experts(kind)
    x, index, weights = draw()
    made = adapters(module, [name], core=False, out_scale=False)
    y = KIND.join(module, made)(x, index, weights)
    torch.testing.assert_close(y, reference(module, made, x, index, weights))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merged_weights(kind):
    """The plain module computes the same once every increment is in its weight."""
    module = experts(kind)
    x, index, weights = draw()
    made = adapters(module, parts(module))
    y = KIND.join(module, made)(x, index, weights)
    for adapter in made.values():
        adapter.merge()
    torch.testing.assert_close(module(x, index, weights), y)


def undecorated(kind):
    """Make experts without transformers' decorator, and what they are called with: rows of all experts, or routed ones."""
    x, index, weights = draw()
    if kind == "llama4":
        config = transformers.Llama4TextConfig(**_SIZES, num_local_experts=EXPERTS)
        made = transformers.models.llama4.modeling_llama4.Llama4TextExperts(config)
        given = (torch.randn(EXPERTS * 3, HIDDEN, dtype=torch.float64, requires_grad=True),)
    else:
        config = transformers.Step3p7TextConfig(**_SIZES, moe_intermediate_size=INNER)
        config.num_local_experts = EXPERTS
        made = transformers.models.step3p7.modeling_step3p7.Step3p7Experts(config, swiglu_limit=0.5)
        given = x, index, weights
    made = made.double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.5).requires_grad_(False)
    return made, given


@pytest.mark.parametrize("kind", ["llama4", "step3p7"])
def test_undecorated_experts(kind):
    """Values and gradients are those of the module's own code with W + ΔW in the place of W."""
    module, given = undecorated(kind)
    made = adapters(module, parts(module))
    y = KIND.join(module, made)(*given)
    grown = {name: torch.stack(increments(adapter)) for name, adapter in made.items()}
    weights = {n: getattr(module, n) + (d.transpose(1, 2) if kind == "llama4" else d) for n, d in grown.items()}
    expected = torch.func.functional_call(module, weights, given)
    torch.testing.assert_close(y, expected)
    leaves = [t for t in given if t.requires_grad] + [p for adapter in made.values() for p in adapter.parameters()]
    torch.testing.assert_close(gradients(y, leaves), gradients(expected, leaves))
    for adapter in made.values():
        adapter.merge()
    torch.testing.assert_close(module(*given), y)


def test_a_copy_has_its_own_weights():
    """A deep copy of adapted experts reads the weights of the copy."""
    module = experts("mixtral")
    joined = KIND.join(module, adapters(module, parts(module)))
    twin, given = copy.deepcopy(joined), draw()
    before = joined(*given)
    for p in twin.parameters():
        p.data.zero_()
    assert not twin(*given).any()
    assert torch.equal(joined(*given), before)


def test_parameters_are_registered_once():
    """Every parameter has one name, and the module's own keep theirs behind ``base``."""
    module = experts("gpt_oss")
    joined = KIND.join(module, adapters(module, ["down_proj"], core=False, out_scale=False))
    assert [name for name, _ in joined.named_parameters(remove_duplicate=False)] == [
        "base.gate_up_proj",
        "base.gate_up_proj_bias",
        "base.down_proj",
        "base.down_proj_bias",
        "down_proj.A",
        "down_proj.B",
    ]
    assert joined.num_experts == EXPERTS
    assert joined.gate_up_proj is module.gate_up_proj


def test_products_have_derivatives_of_any_order():
    """First and second derivatives of both operators agree with differences."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, w, g = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 4, 3), (6, 4)))
    for operator, left, right in ((grouped_mm, x, w), (grouped_outer, g, x)):
        assert torch.autograd.gradcheck(lambda a, b, f=operator: f(a, b, ends), (left, right))
        assert torch.autograd.gradgradcheck(lambda a, b, f=operator: f(a, b, ends), (left, right))


def test_other_modules_have_no_stacks():
    """Modules without the decorator's settings, or without 3-D weights, are left alone."""
    assert not parts(nn.Linear(2, 2))
    odd = nn.Module()
    odd.is_transposed, odd.has_bias, odd.gate_up_proj = False, False, nn.Parameter(torch.zeros(2, 2))
    assert not parts(odd)


def test_quantized_experts_are_refused():
    """Weights in 8-bit floats are named as the reason."""
    module = experts("mixtral")
    module.down_proj = nn.Parameter(module.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    stacks = parts(module)
    assert KIND.refusal(stacks["gate_up_proj"]) is None
    assert KIND.refusal(stacks["down_proj"]) == "its experts are quantized (Parameter, torch.float8_e4m3fn)"
