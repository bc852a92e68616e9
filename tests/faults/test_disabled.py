"""The model as it was before attach, for a while or as a module: bit for bit, sharing every weight."""

import attrs
import models
import pytest
import torch
import zoo
from test_attach import METHODS, fit, logits
from torch import nn
from zoo import IDS, said

import lrkit


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_base(method, name):
    """Whatever was trained, outputs within are the base's and outputs after are the adapted model's."""
    model = models.make(name)
    before = logits(model)
    adapted = lrkit.attach(model, METHODS[method])
    fit(model, adapted)
    trained = logits(model)
    assert not torch.equal(trained, before)
    parameters = [id(p) for p in adapted.parameters()]
    with adapted.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)
    assert [id(p) for p in adapted.parameters()] == parameters
    reference = adapted.reference()
    assert torch.equal(logits(reference), before)
    assert torch.equal(logits(model), trained)


def test_disabled_ends_by_exceptions_and_nests():
    """An error inside lets the adapters back in; the inner of two ends nothing."""
    model = models.make("bert")
    before = logits(model)
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted)
    trained = logits(model)
    with pytest.raises(KeyError), adapted.disabled():
        raise KeyError
    assert torch.equal(logits(model), trained)
    with adapted.disabled():
        with adapted.disabled():
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)


def test_what_needs_the_adapters_is_refused_within(tmp_path):
    """Saving, merging and the like find no adapters there: each is one line, and changes nothing."""
    adapted = lrkit.attach(models.make("bert"), METHODS["adalora"])
    state = adapted.state_dict()
    with adapted.disabled():
        for call in (
            adapted.merge,
            adapted.detach,
            adapted.state_dict,
            adapted.original,
            adapted.summary,
            lambda: adapted.save(tmp_path),
            lambda: adapted.load_state_dict(state),
            lambda: list(adapted.parameters()),
        ):
            with pytest.raises(lrkit.LrkitError, match=r"adapted\.disabled\(\)"):
                call()
    adapted.detach()


def test_graphs_on_both_sides_stay_right():
    """A loss that is made before or within, and differentiated after, has the gradients of its own side."""
    model = models.make("bert").eval()
    adapted = lrkit.attach(model, METHODS["lora"])
    data = models.batch()
    model(**data).loss.backward()
    wanted = [p.grad.clone() for p in adapted.parameters()]
    model.zero_grad()
    loss = model(**data).loss
    with torch.no_grad(), adapted.disabled():
        model(**data)
    loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(adapted.parameters(), wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
def test_a_compiled_model_follows():
    """torch.compile sees that the adapters are out, and that they are back."""
    model = models.make("bert").eval()
    before = logits(model)
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted)
    model.eval()
    trained = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        data = {k: v for k, v in models.batch(seed=5).items() if k != "labels"}
        for _ in range(2):
            torch.testing.assert_close(compiled(**data).logits, trained)
            with adapted.disabled():
                torch.testing.assert_close(compiled(**data).logits, before)


def test_generation_by_the_base():
    """generate() within, and the reference's, give the base's tokens."""
    model = zoo.make("llama-lm").eval()
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    before = model.generate(IDS, **kwargs)
    adapted = lrkit.attach(model, METHODS["lora"])
    for adapter in adapted.adapters.values():
        nn.init.normal_(adapter.B)
    assert not torch.equal(model.generate(IDS, **kwargs), before)
    with adapted.disabled():
        assert torch.equal(model.generate(IDS, **kwargs), before)
    assert torch.equal(adapted.reference().generate(IDS, **kwargs), before)


def test_methods_around_the_model_stand_aside():
    """A prefix before the input is left out as well."""
    lrkit_peft = pytest.importorskip("lrkit_peft")
    model = models.make("llama")
    before = logits(model)
    adapted = lrkit.attach(model, lrkit_peft.peft_prompt_tuning())
    trained = logits(model)
    assert not torch.equal(trained, before)
    with adapted.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(adapted.reference()), before)
    assert torch.equal(logits(model), trained)


def test_a_reference_is_a_module_of_its_own():
    """It has a config, a device and a mode, no parameters, and leaves the model's mode alone."""
    model = models.make("bert")
    model.train()
    base = logits(model)
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted)
    reference = adapted.reference()
    assert (reference.config, reference.device.type, reference.dtype) == (model.config, "cpu", torch.float32)
    assert list(reference.parameters()) == [] and reference.state_dict() == {} and len(list(reference.modules())) == 1
    assert not reference.training
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    data = {k: v for k, v in models.batch(seed=5).items() if k != "labels"}
    out = reference(**data).logits
    assert torch.equal(out, base) and not out.requires_grad  # no dropout
    assert [module.training for module in model.modules()] == modes
    reference.train()
    assert not torch.equal(reference(**data).logits, base)  # as it was told
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(AttributeError):
        reference.get_decoder  # what would give the adapted model's parts is not there
    adapted.detach()
    with pytest.raises(lrkit.LrkitError, match="merged or detached"):
        reference(**data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_come_back(dtype):
    """A head in float32 beside a half-precision base stands aside too."""
    model = models.make("bert").to(dtype)
    before = logits(model)
    adapted = lrkit.attach(model, attrs.evolve(METHODS["lora"]))
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1)
    assert not torch.equal(logits(model), before)
    with adapted.disabled():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("head", [[], ["lm_head"]])
def test_a_reference_s_parts_are_the_base_s(head):
    """Its base model and output embeddings, from which TRL computes log-probabilities, give the base's logits."""
    model = zoo.make("llama-lm").eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    adapted, _ = said(lambda: lrkit.attach(model, METHODS["lora"], train_also=head))
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1)
        reference = adapted.reference()
        hidden = reference.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(reference.get_output_embeddings()(hidden), before)
        assert torch.equal(nn.functional.linear(hidden, reference.get_output_embeddings().weight), before)
        assert not torch.equal(model(input_ids=IDS).logits, before)
