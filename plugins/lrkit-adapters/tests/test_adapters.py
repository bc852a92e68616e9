"""Bottlenecks and BitFit: counted, computed, trained and resumed as they are meant."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import folders
import lrkit_adapters
import models
import paper_settings
import pytest
import torch
from command_line import ask
from lrkit_adapters import BitFit, Bottleneck, Houlsby, Pfeiffer
from torch import nn

import lrkit
from lrkit.accounting import count
from lrkit.registry import Registry
from lrkit.study.execute import check
from lrkit.study.models import empty_model
from lrkit.study.plan import lay_out, read_study
from lrkit.testing import only

METHODS: dict[str, lrkit.Method] = {
    "houlsby": lrkit_adapters.houlsby(width=6),
    "pfeiffer": lrkit_adapters.pfeiffer(width=6),
    "houlsby, layer norms": lrkit_adapters.houlsby(width=6, layer_norms=True),
    "houlsby, released": lrkit_adapters.houlsby(width=6, variant="released"),
    "pfeiffer, linear": lrkit_adapters.pfeiffer(width=6, after="linear"),
    "bitfit": lrkit_adapters.bitfit(),
}
FREEZE: dict[str, Any] = {
    "metric": lrkit.metrics.GradientUncertainty(),
    "scheduler": lrkit.schedulers.Cubic(target=0.25, final=0.3),
    "action": lrkit.actions.Freeze(),
}


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_adapters, distribution="lrkit-adapters 0.2.0") as made:
        yield made


Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line with --json."""
    return functools.partial(ask, capsys)


@pytest.mark.parametrize(
    ("method", "width", "expected"),
    [
        *(("houlsby", m, 2 * 12 * (2 * 768 * m + m + 768)) for m in (8, 16, 32)),
        *(("pfeiffer", m, 12 * (2 * 768 * m + m + 768)) for m in (16, 32, 64)),
        ("bitfit", None, 102_912),
    ],
)
def test_the_rows_of_the_papers_tables(call: Call, method: str, width: int | None, expected: int) -> None:
    settings = () if width is None else ("--set", f"width={width}")
    told = call("params", method, *settings, "--model", "deberta-v3-base")["methods"][method]
    assert told["start"] == told["end"] == told["average"] == expected
    printed = {8: 0.31, 16: (0.61, 0.30), 32: (1.22, 0.60), 64: 1.18, None: 0.1}[width]
    printed = printed[method == "pfeiffer"] if isinstance(printed, tuple) else printed
    assert expected / 1e6 == pytest.approx(printed, rel=0.04), "as AdaLoRA's Table 1 prints it"


PLACES = {
    "bert": ("attention.output.dense", "output.dense", "output.LayerNorm"),
    "roberta": ("attention.output.dense", "output.dense", "output.LayerNorm"),
    "deberta": ("attention.output.dense", "output.dense", "output.LayerNorm"),
    "mpnet": ("attention.attn.o", "output.dense", "output.LayerNorm"),
    # These normalize first: nothing follows the residual sum.
    "gpt2": ("attn.c_proj", "mlp.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj", "mlp.down_proj"),
}


@pytest.mark.parametrize("name", PLACES)
def test_bottlenecks_stand_after_attention_and_ffn(name: str) -> None:
    places = ((Houlsby(), (0, 1)), (Pfeiffer(), (2,)), (Pfeiffer(after="linear"), (1,)))
    for method, which in places:
        ends = [PLACES[name][i] for i in which]
        adapted = lrkit.attach(models.make(name), lrkit.Method(parameterization=method))
        inside = [re.sub(r"^.*?\.\d+\.", "", layer) for layer in adapted.adapters]
        assert sorted(inside) == sorted(2 * ends), "in each of the two blocks"


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_the_formula(activation: str) -> None:
    model = models.make("bert").double().eval()
    ids = models.batch()
    plain = model(**ids).logits.detach()
    adapted = lrkit.attach(model, lrkit_adapters.houlsby(width=5, activation=activation))
    assert torch.equal(model(**ids).logits, plain), "nothing has changed yet"
    weights: dict[str, list[torch.Tensor]] = {}
    for name, adapter in adapted.adapters.items():
        for p in (*adapter.down.parameters(), *adapter.up.parameters()):
            nn.init.normal_(p, std=0.3)
        weights[name] = [p.detach() for p in (*adapter.down.parameters(), *adapter.up.parameters())]
    found = model(**ids).logits.detach()
    # The same by hooks on another copy of the model, one unit at a time.
    other = models.make("bert").double().eval()
    f = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[activation]

    def add(wanted: list[torch.Tensor]) -> Any:
        w_down, b_down, w_up, b_up = wanted

        def hook(_: nn.Module, __: Any, h: torch.Tensor) -> torch.Tensor:
            out = h + b_up
            for i in range(len(b_down)):
                out = out + f((h * w_down[i]).sum(-1, keepdim=True) + b_down[i]) * w_up[:, i]
            return out

        return hook

    for name, wanted in weights.items():
        other.get_submodule(name).register_forward_hook(add(wanted))
    torch.testing.assert_close(found, other(**ids).logits.detach(), rtol=1e-10, atol=1e-12)
    assert float((found - plain).abs().max()) > 1e-3


def stirred(adapted: Any) -> list[list[torch.Tensor]]:
    """Random values in every bottleneck; they in the order of the blocks."""
    found = []
    for adapter in adapted.adapters.values():
        for p in (*adapter.down.parameters(), *adapter.up.parameters()):
            nn.init.normal_(p, std=0.3)
        found.append([p.detach() for p in (*adapter.down.parameters(), *adapter.up.parameters())])
    return found


def rewritten(model: nn.Module, name: str, weights: list[list[torch.Tensor]], method: str) -> nn.Module:
    """A model whose output modules compute what AdaLoRA's repository and AdapterHub do, written out anew."""
    blocks = model.get_submodule(f"{name}.encoder.layer")
    left = list(weights)
    for block in blocks:
        places = [block.output] if method == "pfeiffer" else [block.attention.output, block.output]
        for place in places:
            w1, b1, w2, b2 = left.pop(0)

            def forward(
                hidden: torch.Tensor, x: torch.Tensor, place: Any = place, w: Any = (w1, b1, w2, b2)
            ) -> torch.Tensor:
                h = place.dropout(hidden @ place.dense.weight.T + place.dense.bias)
                z = place.LayerNorm(h + x) if method == "pfeiffer" else h
                u = z @ w[0].T + w[1]
                u = torch.where(u > 0, u, 0 * u) if method == "pfeiffer" else u / (1 + torch.exp(-u))
                return place.LayerNorm(u @ w[2].T + w[3] + h + x)

            place.forward = forward
    assert not left
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "dropout"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("method", ["pfeiffer", "houlsby"])
def test_the_released_forms(method: str, name: str, training: bool) -> None:
    """Pfeiffer is LN(A(LN(h + x)) + h + x), Houlsby LN(A(h) + h + x) with swish, and h is what dropout leaves."""
    model = models.make(name).double().train(training)
    ids = models.batch()
    chosen = lrkit_adapters.pfeiffer(width=5) if method == "pfeiffer" else METHODS["houlsby, released"]
    torch.manual_seed(3)
    plain = model(**ids).logits.detach()
    adapted = lrkit.attach(model, chosen)
    torch.manual_seed(3)
    assert torch.equal(model(**ids).logits, plain), "nothing has changed yet"
    weights = stirred(adapted)
    torch.manual_seed(3)
    found = model(**ids).logits
    other = rewritten(models.make(name).double().train(training), name, weights, method)
    torch.manual_seed(3)
    torch.testing.assert_close(found, other(**ids).logits, rtol=1e-10, atol=1e-12)
    assert float((found.detach() - plain).abs().max()) > 1e-3
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapter_parameters())


def test_the_other_form_of_pfeiffer_is_another() -> None:
    """After the linear map it is LN(A(h) + h + x), as Houlsby's: not what the released codes compute."""
    logits = []
    for method in (METHODS["pfeiffer"], METHODS["pfeiffer, linear"]):
        model = models.make("bert").eval()
        adapted = lrkit.attach(model, method)
        torch.manual_seed(4)
        stirred(adapted)
        logits.append(model(**models.batch()).logits.detach())
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


def run(method: lrkit.Method, steps: range, state: Any = None, name: str = "bert") -> tuple[nn.Module, Any, Any]:
    model = models.make(name)
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method)
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)
    if state is not None:
        adapted.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for step in steps:
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, (adapted.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_run(name: str, freezing: bool, tmp_path: Path) -> None:
    method = attrs.evolve(METHODS[name], **FREEZE) if freezing else METHODS[name]
    _, whole, (state, _) = run(method, range(12))
    _, _, half = run(method, range(7))
    _, again, (resumed, _) = run(method, range(7, 12), half)
    assert resumed["meta"] == state["meta"]
    assert resumed["tensors"].keys() == state["tensors"].keys()
    assert all(torch.equal(tensor, resumed["tensors"][key]) for key, tensor in state["tensors"].items())
    assert any(layer.frozen for layer in again.summary().layers) == freezing
    whole.save(tmp_path)
    loaded = lrkit.load(models.make("bert"), tmp_path)
    ids = models.batch(50)
    assert torch.equal(loaded.model.eval()(**ids).logits, whole.model.eval()(**ids).logits)


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_what_is_meant_and_detach_takes_it_back(name: str) -> None:
    before = models.make("bert").state_dict()
    model, adapted, _ = run(METHODS[name], range(4))
    own = {n.replace(".base.", "."): t for n, t in model.state_dict().items() if ".down." not in n and ".up." not in n}
    moved = {n for n, t in own.items() if not torch.equal(t, before[n])}
    head = {n for n in before if n.startswith(("bert.pooler", "classifier"))}
    expected = {
        "houlsby": head,
        "pfeiffer": head,
        "pfeiffer, linear": head,
        "houlsby, released": head,
        "houlsby, layer norms": head | {n for n in before if "LayerNorm" in n},
        "bitfit": head | {n for n in before if n.endswith(".bias")},
    }[name]
    assert own.keys() == before.keys()
    # A key's bias moves no softmax: its gradient is zero up to rounding, and AdamW may or may not move it.
    idle = {n for n in before if n.endswith("key.bias")}
    assert moved - idle == expected - idle
    trained = {n for n, _ in adapted.named_parameters() if ".down." not in n and ".up." not in n}
    assert {n.replace(".base.", ".") for n in trained} == expected
    total = sum(p.numel() for p in adapted.adapter_parameters())
    assert adapted.summary().start == adapted.summary().now == total
    plain = adapted.detach().state_dict()
    assert all(torch.equal(plain[n], t) for n, t in before.items())


def test_merging_is_refused_for_bottlenecks_and_is_nothing_for_biases(tmp_path: Path) -> None:
    _, adapted, _ = run(METHODS["houlsby"], range(2))
    with pytest.raises(lrkit.LrkitError, match=r"Bottleneck cannot be merged into the layer's weight"):
        adapted.merge()
    for to in lrkit.peft.TARGETS:
        with pytest.raises(lrkit.LrkitError, match="Bottleneck"):
            lrkit.export(adapted, tmp_path / "out", to=to)
    model, adapted, _ = run(METHODS["bitfit"], range(2))
    expected = model(**models.batch()).logits
    lrkit.export(adapted, tmp_path / "merged", to="merged")
    assert torch.equal(adapted.merge()(**models.batch()).logits, expected)
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again.eval()(**models.batch()).logits, expected)


def test_what_does_not_fit_is_refused() -> None:
    prune = {**FREEZE, "scheduler": lrkit.schedulers.Cubic(), "action": lrkit.actions.Prune()}
    for method in METHODS.values():
        with pytest.raises(lrkit.LrkitError, match="does not fit parameterization"):
            attrs.evolve(method, **prune)
    with pytest.raises(lrkit.LrkitError, match=r"BitFit.* has no place in LlamaForSequenceClassification"):
        lrkit.attach(models.make("llama"), METHODS["bitfit"])
    with pytest.raises(lrkit.LrkitError, match=r"BitFit trains biases, and model\.layers\.0\.mlp\.up_proj has none"):
        lrkit.attach(models.make("llama"), METHODS["bitfit"], targets=["up_proj"])
    with pytest.raises(lrkit.LrkitError, match=r"layer_norms=True, and LlamaFor.* has no nn\.LayerNorm"):
        lrkit.attach(models.make("llama"), METHODS["houlsby, layer norms"])
    with pytest.raises(lrkit.LrkitError, match=r'Houlsby.activation must be one of .*did you mean "relu"'):
        Houlsby(activation="rely")
    with pytest.raises(lrkit.LrkitError, match=r"Pfeiffer.* has places of its own: leave targets out"):
        lrkit.attach(models.make("bert"), METHODS["pfeiffer"], targets=["query"])
    with pytest.raises(lrkit.LrkitError, match=r"c_proj has no dropout of its own beside it: use after=\"linear\""):
        lrkit.attach(models.make("gpt2"), METHODS["houlsby, released"])
    with pytest.raises(lrkit.LrkitError, match='houlsby variant must be "paper" or "released"'):
        lrkit_adapters.houlsby(variant="code")  # type: ignore[arg-type]
    named = lrkit.attach(models.make("bert"), METHODS["pfeiffer, linear"], targets=["query"])
    assert [n.rpartition(".")[2] for n in named.adapters] == ["query"] * 2, "layers that are named are taken as named"


def test_half_precision_and_autocast() -> None:
    for name in ("houlsby", "pfeiffer"):
        model = models.make("bert").bfloat16()
        adapted = lrkit.attach(model, METHODS[name])
        assert {p.dtype for p in adapted.adapter_parameters()} == {torch.float32}
        model(**models.batch()).loss.backward()
        model = models.make("bert")
        adapted = lrkit.attach(model, METHODS[name])
        with torch.autocast("cpu", torch.bfloat16):
            model(**models.batch()).loss.backward()
        assert all(p.grad is not None for p in adapted.parameters())


def test_the_command_line_trains_them(call: Call, tmp_path: Path) -> None:
    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    short = ("--model", model, "--data", data, "--set", "run.steps=6", "--set", "run.batch_size=6")
    for name, settings in (("houlsby", ("--set", "width=4")), ("pfeiffer", ("--set", "width=4")), ("bitfit", ())):
        told = call("run", name, *settings, *short)
        assert told["steps"] == 6 and told["summary"]["start"] > 0
        assert told["method"]["parameterization"]["name"] == name
        counted = call("params", name, *settings, "--model", model)["methods"][name]
        assert told["summary"]["start"] == counted["start"], "biases outside of linear layers too"


def test_they_are_offered_by_name(registry: Registry) -> None:
    for name, cls in (("houlsby", Houlsby), ("pfeiffer", Pfeiffer), ("bitfit", BitFit)):
        method = registry.get("method", name)()
        assert type(method.parameterization) is cls
        assert lrkit.from_plain(lrkit.to_plain(method, registry), registry) == method
    assert issubclass(Bottleneck, nn.Module)


@pytest.mark.parametrize("profile", ["minilm", "paper"])
def test_adalora_s_table_one(profile: str) -> None:
    """Every row has the number of trainable parameters that the table prints, and trains by its settings."""
    plan = lay_out(read_study("adalora-table-1", profile=profile))
    printed = {
        "Full FT": 184,
        "BitFit": 0.1,
        "HAdapter, 1.22M": 1.22,
        "PAdapter, 1.18M": 1.18,
        "LoRA, 1.33M": 1.33,
        "AdaLoRA, 1.27M": 1.33,  # what is left of the counts: 1.33 at a mean rank of 8 over all matrices alike
        "HAdapter, 0.61M": 0.61,
        "PAdapter, 0.60M": 0.60,
        "HAdapter, 0.31M": 0.31,
        "PAdapter, 0.30M": 0.30,
        "LoRA, 0.33M": 0.33,
        "AdaLoRA, 0.32M": 0.33,
    }
    if profile == "minilm":
        paper_settings.check_minilm(plan)
        check(plan)
        assert [row.label for row in plan.rows][1:] == [
            *("Full FT", "BitFit", "HAdapter, 1.22M", "PAdapter, 1.18M", "LoRA, 1.33M")
        ]
        return
    paper_settings.check_adalora(plan, ["mnli", "sst2", "cola", "qqp", "qnli", "rte", "mrpc", "stsb"])
    assert {row.label for row in plan.rows} == printed.keys()
    net = empty_model("deberta-v3-base")
    for row in plan.rows:
        found = count(row.method, net, total_steps=10_000).end / 1e6
        assert found == pytest.approx(printed[row.label], rel=0.04), row.label
    ranks = {
        r.label: (r.method.scheduler.target, r.method.parameterization.rank) for r in plan.rows if r.method.scheduler
    }
    assert ranks == {"AdaLoRA, 1.27M": (8, 12), "AdaLoRA, 0.32M": (2, 4)}


# AdaLoRA's Tables 9 and 10: width of Houlsby's and of Pfeiffer's bottlenecks, final and initial rank; epochs and t_f.
SQUAD_BUDGETS = {"0.65 %": (32, 64, 8, 12), "0.32 %": (16, 32, 4, 6), "0.16 %": (8, 16, 2, 4), "0.08 %": (4, 8, 1, 2)}
SQUAD_RUNS = {"squad": (10, 25_000), "squad_v2": (12, 50_000)}


@pytest.fixture
def squad(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub, with as many rows as SQuAD has."""
    import datasets

    def load_dataset(name: str) -> datasets.DatasetDict:
        rows = {"train": 87_599, "validation": 20} if name.endswith("squad") else {"train": 130_319, "validation": 20}
        row = {"question": "Where?", "context": "In France.", "answers": {"text": ["France"], "answer_start": [3]}}
        one = datasets.Dataset.from_list([row])
        return datasets.DatasetDict({split: one.select([0] * count) for split, count in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_adalora_s_table_two(squad: None) -> None:
    """Every row has the width or ranks of the paper, its printed budget as near as they come, and its printed scores."""
    plan = lay_out(read_study("adalora-table-2", profile="paper"))
    assert plan.study.model == "microsoft/deberta-v3-base"
    assert [task.name for task in plan.tasks] == list(SQUAD_RUNS)
    net = empty_model("deberta-v3-base")
    whole = sum(p.numel() for p in net.deberta.parameters())
    left = {row.label: row for row in plan.rows}
    assert left.pop("Full FT").method.parameterization == lrkit.methods.full().parameterization
    for budget, (houlsby, pfeiffer, target, rank) in SQUAD_BUDGETS.items():
        printed = float(budget.split(" ")[0])
        for name, expected, within in (
            ("HAdapter", lrkit_adapters.houlsby(width=houlsby, variant="released"), 0.13),
            ("PAdapter", lrkit_adapters.pfeiffer(width=pfeiffer), 0.07),
            ("LoRA", lrkit.methods.lora(rank=target), 0.13),
            ("AdaLoRA", None, 0.13),
        ):
            row = left.pop(f"{name}, {budget}")
            if expected is None:
                assert (row.method.scheduler.target, row.method.parameterization.rank) == (target, rank)
            else:
                assert row.method == expected
            share = 100 * count(row.method, net, total_steps=50_000).end / whole
            assert printed * 0.99 < share < printed * (1 + within), f"{row.label}: {share:.3f} %"
    assert not left
    printed_scores = plan.study.published
    assert printed_scores is not None and printed_scores.values.keys() == {row.label for row in plan.rows}
    assert printed_scores.of("AdaLoRA, 0.08 %", "squad_v2") == "85.6/88.7"
    assert printed_scores.of("PAdapter, 0.65 %", "squad") == "86.6/93.0"


def test_table_two_trains_so(squad: None) -> None:
    """Its tasks train as the paper's appendix and the released script say; the first profile on the embedded model."""
    plan = lay_out(read_study("adalora-table-2", profile="paper"))
    for task in plan.tasks:
        epochs, final = SQUAD_RUNS[task.name]
        assert task.options == {"stride": 128} | ({"unanswerable": True} if task.name == "squad_v2" else {})
        for row in plan.rows:
            run, method = plan.settings(row, task, 0), plan.method(row, task)
            assert (run.epochs, run.batch_size, run.max_length, run.lr_warmup) == (epochs, 16, 384, 1000)
            assert run.lr == row.run.get("lr", 1e-3) and run.weight_decay == 0.0
            if method.scheduler is not None:
                assert (method.scheduler.warmup, method.scheduler.interval, method.scheduler.final) == (
                    5000,
                    100,
                    final,
                )
                assert method.parameterization.orthogonality == 0.1
            assert getattr(method.parameterization, "alpha", 16.0) == 16.0
    small = lay_out(read_study("adalora-table-2"))
    assert (small.study.model, [task.name for task in small.tasks]) == ("minilm", ["squad"])
    assert [row.label for row in small.rows] == [
        *("AdaLoRA, 0.65 %", "Full FT", "HAdapter, 0.65 %", "PAdapter, 0.65 %", "LoRA, 0.65 %")
    ]
    for row in small.rows:
        run = small.settings(row, small.tasks[0], 0)
        assert run.lr == row.method.parameterization.learning_rate and run.steps == 300


def test_table_two_is_shown(squad: None, call: Call) -> None:
    """`lrkit ablate --dry-run` checks its rows on the model, and lists them."""
    told = call("ablate", "adalora-table-2", "--dry-run")
    assert len(told["rows"]) == 5


def test_layers_that_a_method_cannot_take() -> None:
    """An embedding has no bias, and outputs of a convolution do not lie along the last axis: one line names the layer."""
    for method, layer, says in (
        (lrkit_adapters.bitfit(), nn.Embedding(5, 4), "BitFit trains biases, and 0 has none"),
        (
            lrkit_adapters.pfeiffer(after="linear"),
            nn.Conv1d(4, 4, 1),
            "0: a bottleneck comes after a linear map, not a Conv1d",
        ),
    ):
        with pytest.raises(lrkit.LrkitError, match=says):
            lrkit.attach(nn.Sequential(layer), method, targets=["0"], train_also=())
