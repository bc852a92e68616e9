"""lrkit beside PEFT 0.21.2, from the same weights, data and optimizer."""

import copy

import models
import peft
import pytest
import torch

import lrkit

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def same_weights(adapted, other, pairs):
    """Copy PEFT's adapter tensors into lrkit's; `pairs` maps lrkit's names to functions of a PEFT layer."""
    layers = dict(other.base_model.model.named_modules())
    with torch.no_grad():
        for name, adapter in adapted.adapters.items():
            for key, get in pairs.items():
                adapter.get_parameter(key).copy_(get(layers[name]).reshape(adapter.get_parameter(key).shape))
    return layers


ADALORA = {
    "A": lambda m: m.lora_A["default"],
    "B": lambda m: m.lora_B["default"],
    "core": lambda m: m.lora_E["default"],
}


def pair(config, method, pairs, name="bert"):
    """One model with PEFT's adapters and one with lrkit's, alike to the last bit; no dropout."""
    base = models.make(name).double().eval()  # two orders of the same sums must not part the runs
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = base
    adapted = lrkit.attach(ours, method, targets=config_targets(config), train_also=[])
    return theirs, ours, adapted, same_weights(adapted, theirs, pairs)


def config_targets(config):
    return sorted(config.target_modules)


# Further schedules are in tests/integrations/test_parity.py.
@pytest.mark.parametrize(("warmup", "final", "interval", "target"), [(50, 30, 3, 3)])
def test_adalora_in_its_peft_variant_is_peft_s_for_200_steps(warmup, final, interval, target):
    steps = 200
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=target,
        tinit=warmup,
        tfinal=final,
        deltaT=interval,
        beta1=0.85,
        beta2=0.9,
        orth_reg_weight=0.3,
        lora_alpha=8,
        total_step=steps,
        target_modules=TARGETS,
        task_type="SEQ_CLS",  # without a task type PEFT passes by its own penalty
    )
    method = lrkit.methods.adalora(
        rank=4,
        target_rank=target,
        warmup=warmup,
        final=final,
        interval=interval,
        beta1=0.85,
        beta2=0.9,
        alpha=8.0,
        orthogonality=0.3,
        variant="peft",
    )
    theirs, ours, adapted, layers = pair(config, method, ADALORA)
    theirs_parameters = [p for n, p in theirs.named_parameters() if p.requires_grad and "lora_" in n]
    one = torch.optim.AdamW(theirs_parameters, lr=5e-3)
    two = torch.optim.AdamW(adapted.parameters(), lr=5e-3)
    adapted.bind(two, total_steps=steps)
    masked_seen = 0
    for step in range(steps):
        data = models.batch(seed=step % 11)
        theirs(**data).loss.backward()
        one.step()
        theirs.base_model.update_and_allocate(step)
        one.zero_grad()
        (ours(**data).loss + adapted.penalty()).backward()
        two.step()
        two.zero_grad()
        for name, adapter in adapted.adapters.items():
            expected = layers[name].lora_E["default"].flatten() != 0
            assert torch.equal(adapter.core != 0, expected), (step, name)
            masked_seen += int((~expected).sum())
    assert masked_seen > 500  # there was something to compare
    for name, adapter in adapted.adapters.items():
        for key, get in ADALORA.items():
            wanted = get(layers[name]).reshape(adapter.get_parameter(key).shape)
            torch.testing.assert_close(adapter.get_parameter(key), wanted, rtol=2e-3, atol=2e-4)
    budgets = {d.step: d.budget for d in adapted.history}
    for step, budget in budgets.items():
        assert budget == theirs.base_model.rankallocator.budget_schedule(step - 1)[0]


def compare_once(config, method, pairs, trained):
    theirs, ours, adapted, layers = pair(config, method, pairs)
    data = models.batch(seed=2)
    one, two = theirs(**data), ours(**data)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-5, atol=1e-6)
    one.loss.backward()
    two.loss.backward()
    compared = 0
    for name, adapter in adapted.adapters.items():
        for key in trained:
            expected = pairs[key](layers[name]).grad
            torch.testing.assert_close(
                adapter.get_parameter(key).grad,
                expected.reshape(adapter.get_parameter(key).shape),
                rtol=1e-4,
                atol=1e-7,
            )
            compared += 1
    assert compared == len(trained) * len(adapted.adapters)


def test_lora_is_peft_s_in_output_and_gradient():
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, init_lora_weights=False)
    pairs = {"A": lambda m: m.lora_A["default"].weight, "B": lambda m: m.lora_B["default"].weight}
    compare_once(config, lrkit.methods.lora(rank=4, alpha=10.0), pairs, ("A", "B"))


def test_elora_is_peft_s_vera_in_output_and_gradient():
    config = peft.VeraConfig(r=6, target_modules=["query", "key", "value"], init_weights=False, d_initial=0.1)
    pairs = {
        "A": lambda m: m.vera_A["default"][:, : m.in_features],
        "B": lambda m: m.vera_B["default"][: m.out_features],
        "core": lambda m: m.vera_lambda_d["default"],
        "out_scale": lambda m: m.vera_lambda_b["default"],
    }
    compare_once(config, lrkit.methods.elora(rank=6), pairs, ("core", "out_scale"))
    compare_once(config, lrkit.methods.elora(rank=6, shared=True), pairs, ("core", "out_scale"))
