"""PEFT's methods in lrkit are PEFT's: the same parameters, the same outputs to the last bit, the same training."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import attrs
import folders
import lrkit_peft
import models
import peft
import pytest
import torch
import transformers
from lrkit_peft import LAYERS, PROMPTS, Peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import lrkit
from lrkit.cli import main
from lrkit.registry import Registry
from lrkit.testing import only

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_peft, distribution="lrkit-peft 0.2.0") as made:
        yield made


# What a model of width 32 needs where PEFT's defaults are for wider ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 6},
    "VERA": {"r": 16},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "VBLORA": {"num_vectors": 16, "vector_length": 4, "r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "C3A": {"block_size": 4},
    "WAVEFT": {"n_frequency": 20},
    "RANDLORA": {"r": 8},
    "MISS": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}
CASES: dict[str, Peft] = {kind: Peft(config=kind, settings=SETTINGS.get(kind, {})) for kind in (*LAYERS, *PROMPTS)}
CASES["DoRA"] = Peft(settings={"r": 4, "use_dora": True})
CASES["prefix tuning, projected"] = Peft(
    config="PREFIX_TUNING", settings={"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
)


def ours(parameterization: Peft, name: str = "bert") -> tuple[nn.Module, Any]:
    model = models.make(name)
    torch.manual_seed(4)
    adapted = lrkit.attach(model, lrkit.Method(parameterization=parameterization))
    return model.eval(), adapted


def theirs(parameterization: Peft, adapted: Any, name: str = "bert") -> nn.Module:
    """The same with PEFT alone, and the same head in it: PEFT trains no pooler by itself."""
    settings = copy.deepcopy(dict(parameterization.settings))
    if parameterization.takes_targets:
        settings["target_modules"] = list(adapted.adapters)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(parameterization.config)](task_type="SEQ_CLS", **settings)
    model = models.make(name)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config).eval()


def their_name(name: str) -> str:
    around = "lrkit_around."
    return name.removeprefix(around) if name.startswith(around) else f"base_model.model.{name}"


def copy_over(adapted: Any, other: nn.Module) -> None:
    """lrkit's weights into PEFT's model, head and all."""
    mine = dict(adapted.model.named_parameters())
    there = dict(other.named_parameters())
    prefix = "base_model." if adapted.around is not None else "base_model.model."
    head = tuple(f"{name}." for name in adapted.head)
    added = set(map(id, adapted.added_parameters()))
    with torch.no_grad():
        for name, p in mine.items():
            if name.startswith(head):
                first, _, rest = name.partition(".")
                wrapped = f"{prefix}{first}.modules_to_save.default.{rest}"
                there[wrapped if wrapped in there else prefix + name].copy_(p)
            elif id(p) in added:
                there[their_name(name)].copy_(p)


def stir(adapted: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("case", CASES)
def test_it_is_peft_s_to_the_last_bit(case: str, tmp_path: Path) -> None:
    before = models.make("bert").state_dict()
    model, adapted = ours(CASES[case])
    other = theirs(CASES[case], adapted)
    head = sum(p.numel() for n, p in other.named_parameters() if p.requires_grad and "modules_to_save" in n)
    assert adapted.summary().start == other.get_nb_trainable_parameters()[0] - head > 0
    inputs = models.batch()
    assert torch.equal(model(**inputs).logits, other(**inputs).logits), "the same seed draws the same start"
    stir(adapted)
    copy_over(adapted, other)
    one, two = model(**inputs), other(**inputs)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.loss, two.loss)
    one.loss.backward()
    assert not [n for n, p in adapted.named_parameters() if p.grad is None]
    # Saved, loaded, taken out.
    adapted.save(tmp_path)
    again = lrkit.load(models.make("bert"), tmp_path)
    assert torch.equal(again.model.eval()(**inputs).logits, one.logits)
    plain = adapted.detach().state_dict()
    assert list(plain) == list(before) and all(torch.equal(t, before[n]) for n, t in plain.items())
    if case == "LN_TUNING" or CASES[case].config in PROMPTS:
        with pytest.raises(lrkit.LrkitError, match="cannot be merged"):
            again.merge()
    else:
        torch.testing.assert_close(again.merge().eval()(**inputs).logits, one.logits, rtol=0, atol=1e-5)
        assert list(again.model.state_dict()) == list(before)


FEW = ("LORA", "VERA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING")


@pytest.mark.parametrize("case", [*FEW, "DoRA"])
def test_it_trains_as_peft_does(case: str) -> None:
    model, adapted = ours(CASES[case])
    other = theirs(CASES[case], adapted)
    for name, p in other.named_parameters():  # PEFT leaves the pooler as it is; lrkit takes it for a part of the head
        if "pooler" in name:
            p.requires_grad_(True)
    one = torch.optim.SGD(adapted.parameters(), lr=0.05)
    two = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.05)
    adapted.bind(one, total_steps=10)
    start = model(**models.batch(50)).logits.detach()
    for step in range(10):
        for net, optimizer in ((model, one), (other, two)):
            net(**models.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found, expected = (net(**models.batch(50)).logits.detach() for net in (model, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert float((found - start).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((m, c) for m in ("gpt2", "llama") for c in ("LORA", "PREFIX_TUNING", "PROMPT_TUNING")),
        *(("deberta", c) for c in ("LORA", "VERA", "IA3", "PROMPT_TUNING")),
        *((m, c) for m in ("roberta", "mpnet") for c in ("LORA", "VERA")),
    ],
)
def test_other_models(name: str, case: str) -> None:
    model, adapted = ours(CASES[case], name)
    other = theirs(CASES[case], adapted, name)
    stir(adapted)
    copy_over(adapted, other)
    assert torch.equal(model(**models.batch()).logits, other(**models.batch()).logits)


@pytest.mark.parametrize("case", [*FEW, "LN_TUNING", "VBLORA"])
def test_a_resumed_run_is_the_run(case: str) -> None:
    def run(steps: range, state: Any = None) -> Any:
        model, adapted = ours(CASES[case])
        model.train()
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=10)
        if state is not None:
            adapted.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            torch.manual_seed(step)  # of dropout
            model(**models.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapted.state_dict(), optimizer.state_dict()

    whole, resumed = run(range(10)), run(range(6, 10), run(range(6)))
    assert whole[0]["meta"] == resumed[0]["meta"]
    assert whole[0]["tensors"].keys() == resumed[0]["tensors"].keys()
    assert all(torch.equal(t, resumed[0]["tensors"][n]) for n, t in whole[0]["tensors"].items())


@pytest.mark.parametrize("case", ["VERA", "PREFIX_TUNING"])
def test_the_trainer_saves_and_resumes(case: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[i] for k, v in models.batch(7, rows=16).items()} for i in range(16)]

    def train(steps: int, resume: str | None) -> Any:
        model, adapted = ours(CASES[case])
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / "out"), max_steps=steps, save_steps=2, report_to=[], disable_tqdm=True,
                per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", seed=3,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            callbacks=[lrkit.trainer.AdaptCallback(adapted)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return adapted.state_dict()["tensors"], trainer.predict(rows).predictions

    whole, predictions = train(4, None)
    resumed, again = train(4, str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(t, resumed[n]) for n, t in whole.items())
    first = (x[0] if isinstance(x, tuple) else x for x in (predictions, again))
    assert (next(first) == next(first)).all()


def test_a_prompt_leaves_the_model_s_own_forward_behind() -> None:
    model, adapted = ours(CASES["PROMPT_TUNING"])
    inputs = models.batch()
    by_name = model(**inputs).logits
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, by_name), "by position, too"
    plain = models.make("bert").eval()
    assert torch.equal(adapted.original().eval()(**inputs).logits, plain(**inputs).logits)
    assert not torch.equal(by_name, plain(**inputs).logits)
    assert "forward" not in adapted.detach().__dict__
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(lrkit.LrkitError, match="has places of its own: leave targets out"):
        lrkit.attach(model, lrkit_peft.peft_prompt_tuning(), targets=["query"])


def causal(kind: str) -> tuple[nn.Module, Any]:
    """A small Llama that writes, with a prompt that says something."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    adapted = lrkit.attach(model, lrkit.Method(parameterization=Peft(config=kind, settings=SETTINGS[kind])))
    with torch.no_grad():
        for p in adapted.adapter_parameters():
            p.normal_(0, 1)
    return model.eval(), adapted


IDS = torch.arange(3, 17).reshape(2, 7)


@pytest.mark.parametrize("kind", PROMPTS)
def test_texts_go_on_from_the_cache(kind: str) -> None:
    """With a cache and without one a model writes what it writes token by token: the prompt comes once, and first."""
    model, _ = causal(kind)
    by_hand = IDS
    for _ in range(6):
        by_hand = torch.cat([by_hand, model(by_hand, use_cache=False).logits[:, -1].argmax(-1)[:, None]], dim=1)
    for use_cache in (True, False):
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **how)  # type: ignore[operator]
        assert torch.equal(found, by_hand)


@pytest.mark.parametrize("kind", PROMPTS)
def test_as_many_logits_as_tokens(kind: str) -> None:
    """The logits are those of PEFT's model without its prompt's, and the loss is PEFT's."""
    model, adapted = causal(kind)
    mine = model(input_ids=IDS, labels=IDS)
    adapted.around._base.call = type(model).forward.__get__(model)
    whole = adapted.around._tuner[0](input_ids=IDS, labels=IDS)
    assert mine.logits.shape[1] == IDS.shape[1]
    assert torch.equal(mine.logits, whole.logits[:, -IDS.shape[1] :]) and torch.equal(mine.loss, whole.loss)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_copy_is_its_own(kind: str) -> None:
    """A copy, by deepcopy or from a file, computes with its own weights."""
    model, _ = causal(kind)
    before = model(IDS).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(IDS).logits, before)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not twin(IDS).logits.any()
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every tensor
@pytest.mark.parametrize("wrapper", ["accelerate", "compile", "functools"])
def test_detach_under_a_wrapper(wrapper: str) -> None:
    """What somebody has put around the model's forward since stays, and the prompt goes."""
    plain = causal("PROMPT_TUNING")[1].detach()(IDS).logits
    model, adapted = causal("PROMPT_TUNING")
    if wrapper == "accelerate":
        accelerate.state.AcceleratorState._reset_state()
        model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
        plain = plain.bfloat16().float()
    elif wrapper == "compile":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        before = model.forward
        model.forward = functools.wraps(before)(lambda *args, **kwargs: before(*args, **kwargs))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.allclose(model(IDS).logits.float(), plain, atol=1e-2)
    assert calls == [1] and not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(adapted.original()(IDS).logits.float(), plain, atol=1e-2, rtol=0.0)
    adapted.detach()
    torch.testing.assert_close(
        model(IDS).logits.float(), plain, atol=1e-2 if wrapper == "accelerate" else 0.0, rtol=0.0
    )


@pytest.mark.parametrize(
    ("head", "task"), [("ForTokenClassification", "TOKEN_CLS"), ("ForQuestionAnswering", "QUESTION_ANS")]
)
@pytest.mark.parametrize("kind", PROMPTS)
def test_losses_of_tokens(kind: str, head: str, task: str) -> None:
    """PEFT's losses of tokens count the prompt's as well: refused, but for prefixes, which have no outputs."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, f"Bert{head}")(transformers.BertConfig(vocab_size=40, **sizes))
    method = lrkit.Method(parameterization=Peft(config=kind, settings=SETTINGS[kind]))
    if kind == "PREFIX_TUNING":
        lrkit.attach(model, method)
    else:
        with pytest.raises(lrkit.LrkitError, match=f"PEFT's loss of {task} takes them for tokens of the text"):
            lrkit.attach(model, method)


def test_an_encoder_that_runs_by_itself() -> None:
    """An encoder-decoder that writes runs its encoder past the prompt: refused in one line."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))
    lrkit.attach(model, lrkit.Method(parameterization=CASES["PROMPT_TUNING"]))
    with pytest.raises(lrkit.LrkitError, match="generate runs an encoder by itself"):
        model.generate(input_ids=IDS, max_new_tokens=2)  # type: ignore[operator]


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_and_row_fit_into_the_positions(kind: str) -> None:
    """A row that leaves no positions for the prompt is refused in one line; one that just leaves enough is not."""
    model, _ = ours(CASES[kind])
    positions = model.config.max_position_embeddings
    model(input_ids=torch.ones(1, positions - 3, dtype=torch.long))
    with pytest.raises(lrkit.LrkitError, match=f"of {positions - 2} tokens .* 3 are more than the model's {positions}"):
        model(input_ids=torch.ones(1, positions - 2, dtype=torch.long))


def test_what_peft_or_lrkit_cannot_do_is_one_line() -> None:
    def refused(message: str, parameterization: Callable[[], Peft], name: str = "bert", **settings: Any) -> None:
        model = models.make(name)
        fresh = models.make(name).state_dict()
        with pytest.raises(lrkit.LrkitError, match=message) as caught:
            lrkit.attach(model, lrkit.Method(parameterization=parameterization()), **settings)
        assert "\n" not in str(caught.value)
        assert list(model.state_dict()) == list(fresh) and all(p.requires_grad for p in model.parameters())

    refused("update_and_allocate in every step; lrkit's own adalora", lambda: Peft(config="ADALORA"))
    refused(r'must be one of .*, not \'LORE\' \(did you mean "LORA"\?\)', lambda: Peft(config="LORE"))
    refused(r'has no field "lora_alpa" \(did you mean "lora_alpha"\?\); there', lambda: Peft(settings={"lora_alpa": 4}))
    refused("modules_to_save is not taken from there: .*train_also", lambda: Peft(settings={"modules_to_save": ["x"]}))
    refused("bias='all' trains the model's own biases", lambda: Peft(settings={"bias": "all"}))
    refused("settings must be a table", lambda: Peft(settings=["r"]))  # type: ignore[arg-type]
    refused("PEFT refuses: ValueError: `r` should be a positive integer", lambda: Peft(settings={"r": 0}))
    refused("PEFT refuses: .*: Target modules .* not found", lambda: Peft(settings={"target_modules": ["nothing"]}))
    refused("takes no past_key_values", lambda: CASES["PREFIX_TUNING"], "deberta")
    refused("PEFT refuses: ValueError: Please specify `target_modules`", lambda: CASES["IA3"], "mpnet")
    refused("has no nn.LayerNorm", lambda: Peft(config="LN_TUNING"), "llama")
    refused("both a target and part of the head", lambda: Peft(settings={"target_modules": ["classifier"]}))
    with pytest.raises(lrkit.LrkitError, match="does not fit parameterization Peft"):
        attrs.evolve(lrkit.methods.aflora(), parameterization=Peft())


def test_settings_are_plain_data_and_stay_what_they_are(registry: Registry) -> None:
    given: dict[str, Any] = {"r": 4, "target_modules": ["query"]}
    made = Peft(settings=given)
    given["r"] = 5
    assert made.settings == {"r": 4, "target_modules": ["query"]}
    lrkit.attach(models.make("bert"), lrkit.Method(parameterization=made))
    assert made.settings == {"r": 4, "target_modules": ["query"]}, "PEFT writes into its configs, not into ours"
    assert hash(made) == hash(Peft(settings={}))
    for name in registry.names("method"):
        method = registry.get("method", name)()
        plain = json.loads(json.dumps(lrkit.to_plain(method)))
        assert lrkit.from_plain(plain) == method


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, json.loads(out) if out else None, err

    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    for name, settings in (
        ("peft-lora", ("rank=2",)),
        ("peft-prefix-tuning", ("tokens=2",)),
        ("peft-vera", ("rank=4",)),
    ):
        flags = [flag for setting in settings for flag in ("--set", setting)]
        short = ("--model", model, "--data", data, "--set", "run.steps=6", "--set", "run.max_length=8")
        code, told, err = call("run", name, *flags, *short, "--out", tmp_path / name)
        assert (code, told["steps"]) == (0, 6), err
        _, counted, _ = call("params", name, *flags, "--model", model)
        assert told["summary"]["start"] == counted["methods"][name]["start"]
    code, told, err = call("params", "--model", "deberta-v3-base")
    assert (
        code == 0 and "peft-prefix-tuning" not in told["methods"] and told["methods"]["peft-lora"]["start"] == 1_327_104
    )
    assert err.count("\n") == 1 and err.startswith("lrkit: peft-prefix-tuning is left out: ")
    code, _, err = call("params", "peft-prefix-tuning", "--model", "deberta-v3-base")
    assert code == 2 and err.count("\n") == 1
    code, told, _ = call("params", "peft", "--set", "config=LOHA", "--set", 'settings={"r": 4}', "--model", model)
    assert code == 0 and told["methods"]["peft"]["start"] > 0
    _, base, _ = call("params", "lora", "--model", "deberta-v3-base")
    assert base["methods"]["lora"]["start"] == 1_327_104
