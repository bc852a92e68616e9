"""Mixtures of experts in a run: what is compiled and counted, and which actions are taken or refused."""

import attrs
import pytest
import torch
import transformers
import zoo

import lrkit
from lrkit.accounting import flops, flops_on
from lrkit.actions import Freeze, Prune, Zero
from lrkit.errors import LrkitError
from lrkit.methods import adalora, elora, full, lora
from lrkit.parameterizations import LoRA

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STEPS = 6


def model(kind="mixtral"):
    torch.manual_seed(0)
    return zoo.ZOO[kind]()


def pruned(action, **settings):
    method = adalora(rank=3, target_rank=1, warmup=1, final=2, interval=1)
    scheduler = attrs.evolve(method.scheduler, **settings)
    return attrs.evolve(method, action=action, scheduler=scheduler)


@attrs.frozen(kw_only=True)
class Grown(Prune):
    """Prune by a rule that may add components."""

    grows = True


def train(net, adapted):
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(ids, labels=ids).loss + adapted.penalty()).backward()
        optimizer.step()


def by_hand(config, tokens, rank, adapted):
    """Count 2 · d_in · d_out per token and map, of the experts those that a token is routed to; attention's products too."""
    h, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    size = getattr(config, "head_dim", None) or h // heads
    q, kv = heads * size, config.num_key_value_heads * size
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    attention = sum(a * b + rank * (a + b) for a, b in ((h, q), (h, kv), (h, kv), (q, h)))
    called = sum(a * b + rank * (a + b) * adapted for a, b in ((h, 2 * inner), (inner, h)))
    layer = attention + 2 * tokens * q + h * experts + config.num_experts_per_tok * called
    return 2 * tokens * (config.num_hidden_layers * layer + h * config.vocab_size)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "qwen3-moe"])
def test_flops_of_called_experts(kind):
    """A forward pass is counted for the experts that are called, adapted or not, on the meta device too."""
    for device in ("cpu", "meta"):
        net = model(kind).to(device)
        net.set_attn_implementation("eager")  # torch does not count its fused attention on the CPU
        for exclude in ((), EXPERTS):
            expected = by_hand(net.config, 7, 2, not exclude)
            assert flops_on(lora(rank=2), net, 7, exclude=exclude).forward == expected


def test_frozen_factors_save_work():
    """A frozen B of the experts saves its weight gradient, which is counted as the products that it takes."""
    net = model()
    adapted = lrkit.attach(net, lora(rank=2))
    ids = torch.arange(3, 10)[None]
    before = flops(net, {"input_ids": ids})
    gate_up = adapted.adapters["model.layers.1.mlp.experts.gate_up_proj"]
    gate_up.B.requires_grad_(False)
    after = flops(net, {"input_ids": ids})
    assert before.forward == after.forward
    assert before.backward - after.backward == 2 * (7 * 2) * gate_up.d_out * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole():
    """A block of experts compiles without a graph break, once for all routings, and computes the same."""
    net = model()
    adapted = lrkit.attach(net, adalora(rank=2, target_rank=1), targets=EXPERTS)
    for p in adapted.parameters():
        torch.nn.init.normal_(p, std=0.1)
    block = net.model.layers[0].mlp
    leaves = [p for name, adapter in adapted.adapters.items() if "layers.0." in name for p in adapter.parameters()]
    leaves = [p for p in leaves if p.requires_grad]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(seed))
        plain, traced = block(x), compiled(x)
        torch.testing.assert_close(traced, plain)
        wanted, found = (torch.autograd.grad(y.square().mean(), leaves) for y in (plain, traced))
        torch.testing.assert_close(found, wanted)
    torch.compiler.reset()


@pytest.mark.parametrize("action", [Prune(cut="end"), Prune(cut="always"), Grown()], ids=repr)
def test_cuts_and_growth_are_refused(action):
    """An action that changes how many components a stack has is refused at attach, with what to do instead."""
    net = model()
    with pytest.raises(LrkitError) as told:
        lrkit.attach(net, pruned(action))
    line = str(told.value)
    assert line.startswith(
        f"{action!r} cuts or adds components, and all experts of model.layers.0.mlp.experts.gate_up_proj"
    )
    assert 'Prune(cut="never")' in line and "leave experts out by exclude" in line and "\n" not in line
    lrkit.attach(net, pruned(action), exclude=EXPERTS)


@pytest.mark.parametrize(
    "method",
    [
        *(
            pruned(Prune(ties="threshold"), **s)
            for s in ({}, {"amount": "parameters"}, {"amount": "flops", "target": 0.3})
        ),
        *(pruned(action) for action in (Zero(), Zero(once=True), Freeze(), Freeze(together=True))),
    ],
    ids=lambda method: f"{type(method.action).__name__}-{method.scheduler.amount}",
)
def test_other_actions_run(method):
    """Masks and freezing go over single experts' components; compacting and merging keep the outputs."""
    net = model()
    adapted = lrkit.attach(net, method)
    train(net, adapted)
    ids = zoo.IDS
    expected = net.eval()(ids).logits
    ranks = adapted.compact()
    assert all(ranks[name] % 4 == 0 for name in ranks if "experts" in name)
    torch.testing.assert_close(net(ids).logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapted.merge()(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_experts_without_components():
    """Stacks of rank 0, and those of which every component was masked and cut, add nothing."""
    net = model()
    plain = net.eval()(zoo.IDS).logits
    adapted = lrkit.attach(net, lora(rank={".*experts.*": 0, "*": 2}))
    assert adapted.adapters["model.layers.0.mlp.experts.down_proj"].A.shape == (0, 48)
    torch.testing.assert_close(net(zoo.IDS).logits, plain)
    assert torch.equal(adapted.merge()(zoo.IDS).logits, plain)
    adapted = lrkit.attach(net, pruned(Prune(), target=0.0), targets=EXPERTS)
    train(net, adapted)
    assert set(adapted.compact().values()) == {0}
    torch.testing.assert_close(net.eval()(zoo.IDS).logits, plain)
    torch.testing.assert_close(adapted.merge()(zoo.IDS).logits, plain)


def test_experts_that_cannot_be_held():
    """Full fine-tuning leaves stacks to the model; shared matrices are refused in one line."""
    net = model()
    adapted = lrkit.attach(net, full())
    assert not any("experts" in name for name in adapted.adapters)
    assert net.model.layers[0].mlp.experts.down_proj.requires_grad
    adapted.detach()
    with pytest.raises(
        LrkitError, match=r"one A and B for all layers, and model\.layers\.0\.mlp.experts\.gate_up_proj stacks"
    ):
        lrkit.attach(net, elora(rank=4, shared=True))


def strangers():
    """Make mixtures whose experts are 3-D parameters of classes that are not known."""
    sizes = zoo._DECODER | {"num_key_value_heads": 4}
    longcat = {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "n_routed_experts": 4}
    longcat |= {"zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    longcat |= {"qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}
    return {
        "JetMoeParallelExperts": transformers.JetMoeForCausalLM(
            transformers.JetMoeConfig(**sizes, num_local_experts=4, kv_channels=8)
        ),
        "LongcatFlashExperts": transformers.LongcatFlashForCausalLM(transformers.LongcatFlashConfig(**sizes | longcat)),
    }


def test_unknown_experts_are_told():
    """Experts of unknown classes are named with their share of the weights, and refused in one line if they are named."""
    for kind, net in strangers().items():
        with pytest.warns(lrkit.LrkitWarning, match=f"% {kind} ") as told:
            adapted = lrkit.attach(net, lora(rank=2))
        assert len(told) == 1 and not any("experts.gate_up" in name or "linear" in name for name in adapted.adapters)
        net(zoo.IDS)
        adapted.detach()
        name = next(name for name, p in net.named_parameters() if p.ndim == 3)
        with pytest.raises(LrkitError, match="adapters take layers of known kinds") as refused:
            lrkit.attach(net, lora(rank=2), targets=[name])
        assert kind in str(refused.value) and "\n" not in str(refused.value)


def test_ranks_are_one_experts():
    """A rank is one expert's: two components for each of eight experts."""
    net = model("qwen3-moe")
    adapted = lrkit.attach(net, lrkit.Method(parameterization=LoRA(rank={".*experts.*": 2, "*": 1})))
    assert adapted.adapters["model.layers.1.mlp.experts.down_proj"].rank == 16
    assert adapted.adapters["model.layers.1.self_attn.q_proj"].rank == 1
