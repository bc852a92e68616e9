"""Out to PEFT, vLLM and transformers, and in from PEFT. PEFT itself is the oracle, on a base model made anew."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import folders
import models
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lrkit
from lrkit.cli import main
from lrkit.parameterizations import LowRank
from lrkit.registry import Registry

# PEFT's own remarks while it makes and loads adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # It looks for AdaLoRA's pattern, written for loading, among the layers, and says so of its own files as well.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

METHODS: dict[str, lrkit.Method] = {
    "lora": lrkit.methods.lora(rank=4, alpha=6.0),
    "svd-lora": lrkit.methods.svd_lora(rank=3, alpha=8.0),
    "adalora": lrkit.methods.adalora(rank=4, target_rank=1, interval=1),
    "elora": lrkit.methods.elora(rank=8),
    "elora, shared": lrkit.methods.elora(rank=8, shared=True),
    "aflora": lrkit.methods.aflora(rank=4, train="both"),
    "freeze and prune": attrs.evolve(
        lrkit.methods.aflora(rank=4),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.SensitivityUncertainty(),
                scheduler=lrkit.schedulers.Cubic(target=2),
                action=lrkit.actions.Prune(),
            ),
        ),
    ),
}
LORAS = ("peft-lora", "peft-adalora", "vllm-lora")


def train(model: nn.Module, adapted: Any, steps: int = 8) -> None:
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=2e-2)
    adapted.bind(optimizer, total_steps=steps)
    for step in range(steps):
        (model(**models.batch(step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.unbind()
    model.eval()


def trained(name: str, method: lrkit.Method) -> Any:
    model = models.make(name)
    adapted = lrkit.attach(model, method)
    train(model, adapted)
    return adapted


@functools.cache
def trained_once(name: str, method: str) -> Any:
    """For tests that only export it."""
    return trained(name, METHODS[method])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    inputs = models.batch(99)
    inputs.pop("labels")  # PEFT's AdaLoRA has no loss in evaluation: it looks for a trainable adapter
    return model.eval()(**inputs).logits


def base(name: str) -> nn.Module:
    """The base as anybody makes it who has no lrkit; another head, since it is not pretrained."""
    model = models.make(name)
    torch.manual_seed(77)
    for part in ("classifier", "score"):
        for p in getattr(model, part, nn.Identity()).parameters():
            nn.init.normal_(p)
    return model


def read(folder: Path, to: str, name: str) -> nn.Module:
    kind = type(models.make(name))
    if to == "merged":
        return kind.from_pretrained(folder)
    plain = kind.from_pretrained(folder / "base") if to == "vllm-lora" else base(name)
    return peft.PeftModel.from_pretrained(plain, str(folder))


@pytest.mark.parametrize("to", lrkit.peft.TARGETS)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("bert", m) for m in METHODS),
        ("gpt2", "adalora"),
        ("gpt2", "lora"),
        ("deberta", "adalora"),
        ("llama", "aflora"),
    ],
)
def test_exports_read_back(name: str, method: str, to: str, tmp_path: Path) -> None:
    """PEFT or transformers alone, on a base made anew, gives the adapted model's logits for every method and format."""
    adapted = trained_once(name, method)
    expected = logits(adapted.model)
    assert float((expected - logits(models.make(name))).abs().max()) > 0.01, "it has learnt something"
    done = lrkit.export(adapted, tmp_path / "out", to=to)
    assert done.difference < 1e-6
    found = logits(read(tmp_path / "out", to, name))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()} == set(
        done.files
    )


def test_masked_ranks_stay_out(tmp_path: Path) -> None:
    """Files hold the ranks that were kept, and no layer of rank 0; PEFT's config says the same."""
    adapted = trained("bert", METHODS["adalora"])
    for adapter in list(adapted.adapters.values())[:2]:
        adapter.core.data.zero_()
    expected = {n: int((a.core != 0).sum()) for n, a in adapted.adapters.items()}
    assert len(set(expected.values())) > 2, "ranks differ"
    done = lrkit.export(adapted, tmp_path / "lora")
    assert done.ranks == {name: rank for name, rank in expected.items() if rank}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    shapes = {key: tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}
    assert shapes == {f"base_model.model.{n}.lora_A.weight": rank for n, rank in done.ranks.items()}
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert {n: config.rank_pattern.get(n, config.r) for n in done.ranks} == done.ranks
    assert set(config.target_modules) == set(done.ranks)
    lrkit.export(adapted, tmp_path / "adalora", to="peft-adalora")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adalora"))
    assert {n.removesuffix(".lora_E"): sum(p) for n, p in config.rank_pattern.items()} == done.ranks
    assert {len(p) for p in config.rank_pattern.values()} == {4} == {config.init_r}
    assert (config.target_r, config.total_step, config.tinit, config.tfinal, config.deltaT) == (1, 8, 1, 4, 1)
    for adapter in adapted.adapters.values():
        adapter.core.data.zero_()
    with pytest.raises(lrkit.LrkitError, match=r'every layer has rank 0, .* export to "merged"'):
        lrkit.export(adapted, tmp_path / "none")
    lrkit.export(adapted, tmp_path / "merged", to="merged")


def test_vllm_takes_it(tmp_path: Path) -> None:
    """Its file keeps to the rules of vLLM's peft_helper.py and utils.py, and one rank and scale give ΔW."""
    # vllm/lora/peft_helper.py and vllm/lora/utils.py: no modules_to_save, tensors of lora_A and lora_B alone, one r, and
    # one scale lora_alpha / r whatever the patterns say.
    adapted = trained("llama", METHODS["adalora"])
    lrkit.export(adapted, tmp_path / "out", to="vllm-lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["bias"] == "none" and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in tensors)
    for name, adapter in adapted.adapters.items():
        if not adapter.core.any():
            assert not any(f".{name}." in key for key in tensors)
            continue
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
        torch.testing.assert_close(
            config["lora_alpha"] / config["r"] * b @ a, adapter.delta().double(), rtol=1e-5, atol=1e-9
        )
    headless = lrkit.attach(models.make("llama"), METHODS["lora"], train_also=[])
    done = lrkit.export(headless, tmp_path / "headless", to="vllm-lora")
    assert done.files == ("adapter_config.json", "adapter_model.safetensors"), "no head, no base"


def test_training_goes_on(tmp_path: Path) -> None:
    """A run that is exported in its middle is bitwise the run that is not."""
    method = METHODS["adalora"]
    runs = []
    for exporting in (False, True):
        model = models.make("bert")
        adapted = lrkit.attach(model, method)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=10)
        model.train()
        torch.manual_seed(5)  # of dropout
        for step in range(10):
            if exporting and step == 6:
                for to in lrkit.peft.TARGETS:
                    lrkit.export(adapted, tmp_path / to, to=to)
                assert model.training
            (model(**models.batch(step)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(adapted.state_dict())
    assert runs[0]["meta"] == runs[1]["meta"]
    assert all(torch.equal(tensor, runs[1]["tensors"][name]) for name, tensor in runs[0]["tensors"].items())


@pytest.mark.parametrize("to", lrkit.peft.TARGETS)
def test_wrong_exports_are_removed(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If factors or the merged weight are a hundredth off, nothing is left in the folder."""
    adapted = trained("bert", METHODS["lora"])
    (tmp_path / "out").mkdir()  # an empty folder is as good as a new one
    adapter = adapted.adapters["bert.encoder.layer.1.output.dense"]
    off = lambda self, *a: (lambda f: (f[0], f[1] * 1.01, *f[2:]))(LowRank.export_factors(self))  # noqa: E731
    monkeypatch.setattr(type(adapter), "merge", lambda self: self.base)
    monkeypatch.setattr(adapter, "export_factors", lambda: off(adapter), raising=False)
    with pytest.raises(lrkit.LrkitError, match=f"the export to {to} was removed: read back, its logits are off by"):
        lrkit.export(adapted, tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


def test_lost_heads_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the head in the file is a little off, the export is removed."""
    adapted = trained("bert", METHODS["lora"])

    def forgetful(tensors: dict[str, torch.Tensor], *rest: Any, **more: Any) -> None:
        save_file({k: v + 0.01 if "pooler.dense.bias" in k else v for k, v in tensors.items()}, *rest, **more)

    monkeypatch.setattr("lrkit.peft.draft.save_file", forgetful)
    with pytest.raises(lrkit.LrkitError, match="was removed"):
        lrkit.export(adapted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unfit_exports_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason is one line: other parameters, an unknown target, a full folder, no PEFT, detached adapters."""
    full = trained("bert", lrkit.methods.full())
    for to in LORAS:
        with pytest.raises(lrkit.LrkitError, match=r"trains \d+ of the model's own parameters.*\"merged\""):
            lrkit.export(full, tmp_path / "out", to=to)
    lrkit.export(full, tmp_path / "merged", to="merged")
    torch.testing.assert_close(logits(read(tmp_path / "merged", "merged", "bert")), logits(full.model))
    adapted = trained("bert", METHODS["lora"])
    with pytest.raises(lrkit.LrkitError, match=r'no export to "peft-lore" \(did you mean "peft-lora"\?\); there are'):
        lrkit.export(adapted, tmp_path / "out", to="peft-lore")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(lrkit.LrkitError, match="is not empty: nothing is overwritten"):
        lrkit.export(adapted, tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "kept"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lrkit.LrkitError, match=r'pip install "lrkit\[peft\]"'):
        lrkit.export(adapted, tmp_path / "out")
    lrkit.export(adapted, tmp_path / "plain", to="merged")  # needs no PEFT
    adapted.detach()
    with pytest.raises(lrkit.LrkitError, match="merged or detached"):
        lrkit.export(adapted, tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()


def test_half_precision_exports(tmp_path: Path) -> None:
    """Compacted ranks beside a bfloat16 base are exact as factors; formats that would round ΔW are refused."""
    model = models.make("bert").bfloat16()
    adapted = lrkit.attach(model, METHODS["adalora"])
    train(model, adapted)
    adapted.compact()
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.core.normal_().mul_(10)  # a ΔW that is large enough for its rounding to be seen
    for to in ("peft-lora", "vllm-lora"):
        assert lrkit.export(adapted, tmp_path / to, to=to).difference < 1e-6
    # bfloat16 cannot hold W + ΔW; and PEFT's AdaLoRA cuts a layer's rank in the base's type, whatever its factors have.
    for to in ("merged", "peft-adalora"):
        with pytest.raises(lrkit.LrkitError, match=f"the export to {to} was removed"):
            lrkit.export(adapted, tmp_path / to, to=to)


# ---- in --------------------------------------------------------------------------------------------------------------

ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
FIRST = r"bert\.encoder\.layer\.0\.output\.dense"


def peft_lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "SEQ_CLS"} | settings)


def peft_adalora(steps: int = 8, **settings: Any) -> peft.AdaLoraConfig:
    plain = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": steps, "lora_alpha": 10}
    return peft.AdaLoraConfig(**plain | {"target_modules": ALL, "task_type": "SEQ_CLS"} | settings)


def from_elsewhere(name: str, config: Any, folder: Path, steps: int = 8) -> nn.Module:
    """An adapter trained by PEFT, saved by PEFT, and loaded by PEFT."""
    model = peft.get_peft_model(models.make(name), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(steps):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        if config.peft_type == peft.PeftType.ADALORA:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(base(name), str(folder))


CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("bert", peft_lora),
    "rslora": ("bert", lambda: peft_lora(use_rslora=True)),
    "patterns": (
        "bert",
        lambda: peft_lora(rank_pattern={FIRST: 2, "key": 3}, alpha_pattern={"layer.1.*.value": 11, "key": 1.5}),
    ),
    "a pooler, too": ("bert", lambda: peft_lora(modules_to_save=["pooler"], target_modules=["query"])),
    "Conv1D": ("gpt2", lambda: peft_lora(target_modules=["c_attn", "c_fc"])),
    "adalora": ("bert", peft_adalora),
    "adalora on Conv1D": ("gpt2", lambda: peft_adalora(target_modules=["c_attn", "c_fc"])),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_peft_adapters_train_on(case: str, tmp_path: Path) -> None:
    """PEFT's outputs come in, training goes on by three methods, and both of PEFT's formats take the result."""
    name, config = CONFIGS[case]
    theirs = from_elsewhere(name, config(), tmp_path / "theirs")
    expected = logits(theirs)
    default = {"ADALORA": lrkit.parameterizations.SVD, "LORA": lrkit.parameterizations.LoRA}[config().peft_type.value]
    for method in (None, lrkit.methods.adalora(rank=5, target_rank=2), lrkit.methods.aflora(rank=4, train="both")):
        adapted = lrkit.from_peft(base(name), tmp_path / "theirs", method)
        torch.testing.assert_close(logits(adapted.model), expected, rtol=0, atol=1e-6)
        assert type(adapted.method.parameterization) is default or method is not None
        trains = {n for n, p in theirs.named_parameters() if "modules_to_save" in n}
        assert len(adapted.head_parameters()) == len(trains) > 0
        train(adapted.model, adapted)
        assert adapted.history or not adapted.method.policies
        assert float((logits(adapted.model) - expected).abs().max()) > 1e-3
        for to in ("peft-lora", "peft-adalora"):
            folder = tmp_path / f"{method is None}-{type(adapted.method.parameterization).__name__}-{to}"
            lrkit.export(adapted, folder, to=to)
            again = peft.PeftModel.from_pretrained(base(name), str(folder))
            torch.testing.assert_close(logits(again), logits(adapted.model), rtol=0, atol=1e-6)


def test_untouched_weights_are_exact(tmp_path: Path) -> None:
    """Out again without a step, tensors and settings are PEFT's own."""
    for config, to in ((peft_lora(), "peft-lora"), (peft_adalora(), "peft-adalora")):
        from_elsewhere("bert", config, tmp_path / to)
        adapted = lrkit.from_peft(models.make("bert"), tmp_path / to)
        lrkit.export(adapted, tmp_path / f"again-{to}", to=to)
        one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in (to, f"again-{to}"))
        # AdaLoRA's file may hold triplets whose E is zero; what lrkit writes does not.
        same = {k for k in two if one[k].shape == two[k].shape}
        assert len(same) > 20 and all(torch.equal(one[k], two[k]) for k in same)
        if to == "peft-lora":
            assert set(one) == set(two) == same
            keep = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "task_type", "bias")
            first, second = (
                json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in (to, f"again-{to}")
            )
            assert {k: first[k] for k in keep} == {k: second[k] for k in keep}


def test_adalora_keeps_its_schedule(tmp_path: Path) -> None:
    """The method that is read from an AdaLoRA config has every setting of its schedule."""
    from_elsewhere("bert", peft_adalora(beta1=0.7, beta2=0.8, orth_reg_weight=0.2), tmp_path)
    adapted = lrkit.from_peft(models.make("bert"), tmp_path)
    assert adapted.method == lrkit.methods.adalora(
        rank=4,
        target_rank=2,
        warmup=1,
        final=2,
        interval=1,
        beta1=0.7,
        beta2=0.8,
        alpha=10.0,
        orthogonality=0.2,
        variant="peft",
    )


def test_other_dropout_warns(tmp_path: Path) -> None:
    """PEFT's dropout goes on by itself; a method with another one is warned of."""
    from_elsewhere("bert", peft_lora(lora_dropout=0.2), tmp_path / "it")
    assert lrkit.from_peft(models.make("bert"), tmp_path / "it").method.parameterization.dropout == 0.2
    with pytest.warns(lrkit.LrkitWarning, match="lora_dropout=0.2"):
        lrkit.from_peft(models.make("bert"), tmp_path / "it", lrkit.methods.svd_lora(rank=4))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3), st.integers(0, 99))
def test_lora_becomes_svd(d_in: int, d_out: int, rank: int, more: int, seed: int) -> None:
    """For any shape ΔW is the same, and the singular vectors are orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    b[:, : seed % 3] = 0  # an adapter that has hardly been trained
    model = nn.Sequential(nn.Linear(d_in, d_out))
    adapted = lrkit.attach(model, lrkit.methods.svd_lora(rank=rank + more, alpha=3.0), targets=["0"], train_also=[])
    (adapter,) = adapted.adapters.values()
    adapter.import_factors(a, b, None, 1.5)
    expected = 1.5 * b.double() @ a.double()
    torch.testing.assert_close(
        adapter.delta().double(), expected, rtol=0, atol=1e-5 * (1 + float(expected.abs().max()))
    )
    u = adapter.B[:, : min(rank, d_in, d_out)]
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]), rtol=0, atol=1e-5)


def spoil(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA without magnitudes": ({"use_dora": True}, "is no LORA of a linear layer: it has lora_A [4, 32], lora_B"),
    "biases": ({"bias": "all"}, "cannot represent an adapter with bias='all' exactly"),
    "a bias in B": ({"lora_bias": True}, "cannot represent an adapter with lora_bias=True exactly"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices="),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
    "what is not there yet": ({"use_the_new_thing": 0.5}, "use_the_new_thing=0.5"),
    "another method": ({"peft_type": "VERA"}, "takes LORA and ADALORA adapters, not 'VERA'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_settings_are_refused(case: str, tmp_path: Path) -> None:
    """A setting of PEFT's that lrkit does not compute is named, and the model stays as it was."""
    from_elsewhere("bert", peft_lora(target_modules=["query"]), tmp_path, steps=1)
    changes, message = REFUSED[case]
    spoil(tmp_path, **changes)
    model = models.make("bert")
    with pytest.raises(lrkit.LrkitError, match=re.escape(message)):
        lrkit.from_peft(model, tmp_path)
    untouched(model)


def untouched(model: nn.Module) -> None:
    fresh = models.make("bert").state_dict()
    assert list(model.state_dict()) == list(fresh)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_unfit_files_are_refused(tmp_path: Path) -> None:
    """Each file, layer, head or method that does not fit is one line, and the model stays as it was."""

    def refused(message: str, method: Any = None, folder: Path = tmp_path, name: str = "bert") -> None:
        model = models.make(name)
        with pytest.raises(lrkit.LrkitError, match=message) as caught:
            lrkit.from_peft(model, folder, method)
        assert "\n" not in str(caught.value)
        if name == "bert":
            untouched(model)

    from_elsewhere("bert", peft_lora(), tmp_path, steps=1)
    weights = tmp_path / "adapter_model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is written over below
    refused("there is no adapter_config.json", folder=tmp_path / "nowhere")
    refused("rank 2 cannot hold 4 components", lrkit.methods.svd_lora(rank=2))
    refused("cannot hold .*: layers share one A and B", lrkit.methods.elora(rank=8, shared=True))
    refused("Full.* has no low-rank adapters", lrkit.methods.full())
    refused("takes a lrkit.Method", lrkit.methods.lora)
    refused("does not fit GPT2ForSequenceClassification|matches no layer", name="gpt2")
    some = "base_model.model.bert.encoder.layer.0.output.dense.lora_B.weight"
    for change, message in (
        ({some: None}, "is no LORA of a linear layer: it has lora_A"),
        ({some: torch.zeros(32, 3)}, "of different ranks"),
        ({some: torch.zeros(31, 4)}, "the layer is 32 x 48, and what is given is 31 x 48"),
        ({some.replace("lora_B.weight", "lora_gate"): torch.zeros(32)}, "lora_gate is no part"),
        ({some.replace("lora_B.weight", "lora_magnitude_vector"): torch.zeros(32)}, r"lora_magnitude_vector \[32\]"),
        (
            {"base_model.model.bert.pooler.dense.weight": torch.zeros(32, 32)},
            "pooler.dense.weight is in the file, and in no",
        ),
        ({"base_model.model.classifier.bias": None}, "classifier.bias is not in the file"),
        (
            {"base_model.model.classifier.bias": None, "base_model.model.classifier.weight": None},
            "is damaged: adapter_config.json says that classifier was saved, and it is not there",
        ),
        ({some: torch.full((32, 4), torch.nan)}, "lora_B of .* is not made of finite floating-point numbers"),
        ({some: torch.zeros(32, 4, dtype=torch.int64)}, "is not made of finite floating-point numbers"),
        ({"base_model.model.classifier.bias": torch.zeros(3)}, r"classifier.bias is \[3\] there, and \[2\] here"),
    ):
        merged = {**whole, **change}
        save_file({k: v for k, v in merged.items() if v is not None}, weights)
        refused(message)
    save_file(whole, weights)
    config = tmp_path / "adapter_config.json"
    plain = json.loads(config.read_text())
    for change, message in (
        ({"alpha_pattern": [1]}, r"alpha_pattern must be a table of numbers, not \[1\]"),
        ({"alpha_pattern": {"a": "b"}}, "alpha_pattern must be a table of numbers"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"modules_to_save": 3}, "modules_to_save must be a list of names, not 3"),
        ({"lora_alpha": True}, "lora_alpha must be a number, not True"),
    ):
        config.write_text(json.dumps(plain | change))
        refused(message)
    config.write_text(json.dumps(plain))
    weights.write_bytes(b"cut")
    refused("is truncated, or no safetensors file")
    weights.unlink()
    refused("pickled files are not read")
    (tmp_path / "adapter_config.json").write_text("{")
    refused("cannot be read")


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    registry = Registry(discover=False)
    monkeypatch.setattr("lrkit.registry.current", lambda: registry)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lrkit run --out` leaves."""
    folder = tmp_path_factory.mktemp("ran")
    model, data = folders.write_model(folder / "model", layers=2), folders.write_data(folder / "data")
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *("run", "adalora", "--model", str(model), "--data", str(data), "--out", str(folder / "run"), "--json"),
                *("--set", "rank=4", "--set", "target_rank=2", "--set", "run.steps=10", "--set", "run.lr=0.05"),
            ]
        )
    assert caught.value.code == 0
    return folder


def test_half_precision_is_widened(call: Any, ran: Path, tmp_path: Path) -> None:
    """A run in bfloat16 is merged in float32 on request; in bfloat16 it is refused with the option's name."""
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(ran / "model", dtype=torch.bfloat16)
    adapted = lrkit.attach(plain, lrkit.methods.lora(rank=2))
    for adapter in adapted.adapters.values():
        nn.init.normal_(adapter.B, std=0.1)
    adapted.save(tmp_path / "run")
    base = ("--model", ran / "model")
    code, _, err = call("export", tmp_path / "run", "--to", "merged", *base, "--out", tmp_path / "narrow")
    assert code == 2 and "which rounds ΔW; export it in float32 (--dtype float32)" in " ".join(err.split())
    words = ("--dtype", "float32", "--out", tmp_path / "wide")
    assert call("export", tmp_path / "run", "--to", "merged", *base, *words)[0] == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "wide")
    assert found.dtype == torch.float32
    wide = AutoModelForSequenceClassification.from_pretrained(ran / "model", dtype=torch.float32)
    again = lrkit.load(wide, tmp_path / "run")
    ids = {"input_ids": torch.tensor([[2, 5, 6, 7, 8, 3]])}
    torch.testing.assert_close(found.eval()(**ids).logits, again.model.eval()(**ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", lrkit.peft.TARGETS)
def test_command_exports_run(call: Any, ran: Path, tmp_path: Path, to: str) -> None:
    """``lrkit export`` writes what a run saved in every format, and says what it wrote."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    code, out, err = call("export", ran / "run", "--to", to, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["to"] == to and told["difference"] <= told["tolerance"] == 1e-6
    torch.manual_seed(3)
    plain = AutoModelForSequenceClassification.from_pretrained(ran / "model")
    adapted = lrkit.load(plain, ran / "run")
    ids = {"input_ids": torch.tensor([[2, 5, 6, 7, 8, 3]])}
    expected = adapted.model.eval()(**ids).logits
    where = tmp_path / "out"
    if to == "merged":
        found = AutoModelForSequenceClassification.from_pretrained(where)
        tokenizer = AutoTokenizer.from_pretrained(where)
        assert (
            tokenizer("the film")["input_ids"] == AutoTokenizer.from_pretrained(ran / "model")("the film")["input_ids"]
        )
    elif to == "vllm-lora":
        assert AutoTokenizer.from_pretrained(where / "base").pad_token == "[PAD]"
        found = peft.AutoPeftModel.from_pretrained(str(where))
    else:
        found = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(where))
        assert told["ranks"] == {
            n: int((a.core != 0).sum()) for n, a in adapted.adapters.items() if (a.core != 0).any()
        }
    torch.testing.assert_close(found.eval()(**ids).logits, expected, rtol=0, atol=1e-6)
    code, out, err = call("export", ran / "run", "--to", to, "--out", tmp_path / "again")
    assert code == 0 and "logits are within" in out and "config.json" in out


def test_command_pushes(call: Any, ran: Path, tmp_path: Path) -> None:
    """``lrkit export --push --dry-run`` says which files of what size would be uploaded; a folder keeps them."""
    asked = ("export", ran / "run", "--to", "peft-lora", "--push", "me/mine", "--dry-run")
    code, out, err = call(*asked, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["pushed"]
    there = {str(f.relative_to(tmp_path / "out")): f.stat().st_size for f in (tmp_path / "out").iterdir()}
    assert told == {"repo_id": "me/mine", "url": None, "files": there} and "README.md" in there
    code, out, err = call(*asked)
    assert (code, err) == (0, "") and "written" not in out
    assert f"me/mine would get README.md ({there['README.md']:,} bytes)" in " ".join(out.split())
    code, out, err = call(*asked, "--out", tmp_path / "named", "--base-model", "a/b")
    assert (code, err) == (0, "") and "base_model: a/b\n" in (tmp_path / "named" / "README.md").read_text()


def test_command_refuses(call: Any, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake ends with code 2 and one line, and nothing is written."""

    def refused(message: str, *arguments: object) -> None:
        code, out, err = call("export", *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err, err
        assert re.search(message, err), err
        assert not (tmp_path / "out").exists()

    to, out = ("--to", "peft-lora"), ("--out", tmp_path / "out")
    refused("no lrkit state at", tmp_path / "nothing", *to, *out)
    refused("say where to: --out DIR, --push USER/NAME, or both", ran / "run", *to)
    refused("--dry-run, --private and --base-model are of --push", ran / "run", *to, *out, "--dry-run")
    refused('a name on the hub is "user/name"', ran / "run", *to, *out, "--push", "a/b/c")
    refused(
        'no export to "peft" .*there are peft-lora, peft-adalora, vllm-lora, merged', ran / "run", "--to", "peft", *out
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    refused("is not empty: nothing is overwritten", ran / "run", *to, "--out", tmp_path / "full")
    refused("no such folder", ran / "run", *to, *out, "--model", "./gone")
    other = folders.write_model(tmp_path / "other", layers=1)
    refused(
        "is not the BertForSequenceClassification that was adapted: it has no weights for",
        ran / "run",
        *to,
        *out,
        "--model",
        other,
    )
    toy = lrkit.attach(nn.Sequential(nn.Linear(3, 3)), METHODS["lora"], targets=["0"], train_also=[])
    toy.save(tmp_path / "toy")
    refused("does not say which transformers model", tmp_path / "toy", *to, *out)
    lrkit.attach(models.make("bert"), METHODS["lora"]).save(tmp_path / "nameless")
    refused("give it with --model", tmp_path / "nameless", *to, *out)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("needs PEFT", ran / "run", *to, *out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing half written is left"


def test_command_takes_minilm(call: Any, tmp_path: Path) -> None:
    """A handle that was saved in a loop of one's own goes out on the base that ``--model`` names."""
    from transformers import AutoModelForSequenceClassification

    from lrkit.models import minilm_folder, quiet_transformers

    def minilm() -> nn.Module:
        with quiet_transformers():
            return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)

    torch.manual_seed(0)
    adapted = lrkit.attach(minilm(), lrkit.methods.adalora(rank=6, target_rank=3))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=4)
    ids = torch.randint(1000, 20000, (4, 12))
    for _ in range(4):
        (adapted.model(input_ids=ids, labels=ids[:, 0] % 2).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save(tmp_path / "run")
    expected = adapted.model.eval()(input_ids=ids).logits
    for to in ("peft-lora", "merged"):
        code, out, err = call(
            "export", tmp_path / "run", "--to", to, "--out", tmp_path / to, "--model", "minilm", "--json"
        )
        assert (code, err) == (0, "")
        assert json.loads(out)["difference"] < 1e-6
    found = peft.PeftModel.from_pretrained(minilm(), str(tmp_path / "peft-lora"))
    torch.testing.assert_close(found.eval()(input_ids=ids).logits, expected, rtol=0, atol=2e-6)
