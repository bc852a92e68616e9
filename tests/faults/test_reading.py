"""Files and texts of others: special files, depth, size, numbers and patterns without end are one short line each."""

import gzip
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import folders
import models

import lrkit
from lrkit import reading
from lrkit.adapt import checkpoint, foresight, tensorfile
from lrkit.cli import main
from lrkit.errors import LrkitError, shown
from lrkit.patterns import compiled
from lrkit.study.plan import read_study as read_plan
from lrkit.study.records import read_study as read_records
from lrkit.tasks import load_task


@pytest.fixture(autouse=True)
def _soon():
    """Nothing here may wait: an alarm after twenty seconds fails the test."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_hole(path):
    with path.open("wb") as file:
        file.truncate(10**11)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a file of /proc without end": lambda path: path.symlink_to("/proc/self/pagemap"),
    "a folder": lambda path: path.mkdir(),
    "a hole": a_hole,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    folders.write_model(folder / "model")
    folders.write_data(folder / "data")
    adapted = lrkit.attach(models.make("bert", seed=3).eval(), lrkit.methods.lora(rank=2))
    adapted.save(folder / "run")
    return folder


def exits(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def model_of(world, path):
    from lrkit.study.models import load_config

    for name in ("tokenizer.json", "model.safetensors"):
        (path.parent / name).write_bytes((world / "model" / name).read_bytes())
    load_config(str(path.parent))


READERS = {
    "lrkit.safetensors": lambda world, path: lrkit.load(models.make("bert"), path.parent),
    "config.json": model_of,
    "adapter_config.json": lambda world, path: lrkit.from_peft(models.make("bert"), path.parent),
    "adapter_model.safetensors": lambda world, path: lrkit.from_peft(models.make("bert"), peft_beside(path)),
    "study.toml": lambda world, path: read_plan(str(path)),
    "study.json": lambda world, path: read_records(path.parent),
    "train.jsonl": lambda world, path: load_task(data=folder_beside(path)),
    "train.jsonl.gz": lambda world, path: load_task(data=folder_beside(path)),
}


def peft_beside(path):
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "target_modules": ["query"]}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path.parent


def folder_beside(path):
    (path.parent / "validation.jsonl").write_text('{"sentence": "a", "label": 1}\n')
    return path.parent


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_special_files_are_refused(name, kind, world, tmp_path):
    """Whatever stands where a file should be: one line that names it, at once, for every file that lrkit reads."""
    SPECIAL[kind](tmp_path / name)
    with pytest.raises(LrkitError) as error:
        READERS[name](world, tmp_path / name)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000 and str(tmp_path) in text


@pytest.mark.parametrize("kind", ["a FIFO", "a device without end", "a file of /proc without end", "a hole"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_special_model_files(name, kind, tmp_path):
    """Transformers would read them for ever."""
    from lrkit.study.pretrained import load_pretrained
    from lrkit.tasks import Head

    folders.write_model(tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    SPECIAL[kind](tmp_path / "m" / name)
    with pytest.raises(LrkitError, match=f"{name}' in it is"):
        load_pretrained(str(tmp_path / "m"), Head(num_labels=2, problem_type="single_label_classification"))


def test_fifo_checkpoints_pass(tmp_path):
    """A checkpoint that cannot be read whole is none, and one of another name is not looked at."""
    from lrkit.study.run import Record

    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-x").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-7").write_text("")
    (tmp_path / "checkpoints" / "checkpoint-5" / "files.json").write_text('{"a": 5}')
    os.mkfifo(tmp_path / "checkpoints" / "checkpoint-5" / "a")
    assert Record(folder=tmp_path).latest() is None


DEEP = {
    "lists": "[" * 100_000,
    "tables": '{"a":' * 50_000,
    "a number": '{"format": ' + "9" * 5000 + "}",
    "level": "[" * 90 + "]" * 90,
}


@pytest.mark.parametrize("what", DEEP)
def test_deep_texts_are_refused(what, world, tmp_path):
    """As a state's metadata, PEFT's config, a model's config, a study and a value: no recursion error, no overflow."""
    save_file({"x": torch.zeros(1)}, tmp_path / checkpoint.FILE, metadata={"lrkit": DEEP[what]})
    for name in ("adapter_config.json", "config.json", "study.json"):
        (tmp_path / name).write_text(DEEP[what])
    (tmp_path / "study.toml").write_text(f"base = {DEEP[what]}")
    for name in ("lrkit.safetensors", "adapter_config.json", "config.json", "study.json", "study.toml"):
        with pytest.raises(LrkitError):
            READERS[name](world, tmp_path / name)
    assert exits("params", "lora", "--set", f"parameterization.rank={DEEP[what]}") == 2


def test_gzip_bombs_are_refused(tmp_path):
    """A gzip file that unpacks to a thousand times its size is left at a bound."""
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"\n" * 2**20) * 200)
    with pytest.raises(LrkitError, match="blank lines"):
        load_task(data=folder_beside(tmp_path / "train.jsonl.gz"))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b" " * 2**20) * 200)
    with pytest.raises(LrkitError, match="a line of more than"):
        load_task(data=folder_beside(tmp_path / "train.jsonl.gz"))


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_tensors_are_exact(shapes, dtype, tmp_path_factory):
    """Tensors are those that were saved, and those that safetensors maps, bit for bit."""
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    tensors = {f"t{i}": torch.randint(0, 2, shape, generator=generator).to(kind) for i, shape in enumerate(shapes)}
    save_file(tensors, path, metadata={"a": "b"})
    with tensorfile.open_tensors(path) as file:
        mine = file.tensors()
        assert file.metadata == {"a": "b"}
    theirs = load_file(path)
    assert mine.keys() == theirs.keys()
    for oracle in (theirs, tensors):
        assert all(torch.equal(mine[n], t) and mine[n].dtype == t.dtype for n, t in oracle.items())


def test_shrinking_files(tmp_path):
    """A mapped file that is cut while it is read kills the process; this one is read."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(100_000)}, path)
    with tensorfile.open_tensors(path) as file:
        os.truncate(path, 10_000)
        with pytest.raises(LrkitError, match="truncated"):
            file.tensors()


PLACES = {
    "an overlap": {"b": {"data_offsets": [0, 8]}},
    "a gap": {"b": {"data_offsets": [12, 20], "shape": [2]}},
    "a tensor less": {"b": None},
    "a place before the data": {"a": {"data_offsets": [-8, 0]}},
    "a place beyond the file": {"b": {"data_offsets": [8, 2**62], "shape": [2**60]}},
    "a place that is no number": {"a": {"data_offsets": [0.0, 8.0]}},
    "a shape that is no number": {"a": {"shape": [True, 2]}},
    "a shape below zero": {"a": {"shape": [-1, -2]}},
    "a shape of another size": {"a": {"shape": [3]}},
    "a type of another size": {"a": {"dtype": "F64"}},
    "a type that is none": {"a": {"dtype": "Q8"}},
    "no shape": {"a": {"shape": None}},
    "truth values that are none": {"a": {"dtype": "BOOL", "shape": [8]}},
}


@pytest.mark.parametrize("change", PLACES)
def test_unsound_headers_are_refused(change, tmp_path):
    """A header that says anything but where the tensors are in this file is one line, at the opening or the reading."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((2,), 3.0), "b": torch.zeros(2)}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, told in PLACES[change].items():
        header[name] = None if told is None else header[name] | told
    text = json.dumps({name: told for name, told in header.items() if told is not None}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(LrkitError, match="no safetensors file") as error, tensorfile.open_tensors(path) as file:
        file.tensors()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


ENDLESS = ["([a-z.0-9]+)+!", "(a|a)*b", "(.*)*x", "(x+x+)+y", "(.?){500}z", "(?:(?:a+)+)+$", "a?" * 40 + "a" * 40]
ENDLESS += [".*" * 12 + "!", "(?x)(a +) +!", "((a*)*)*", "(a+)(?#c)+!", "(" * 500, "a" * 10_000, "a{99999999999}", "["]
FINE = [
    r".*\.(query|value)",
    r"bert\.encoder\.layer\.[0-3]\..*(query|key)",
    r"(?!.*lm_head).*proj",
    r"(?:.*\.)?layers\.\d+\.q_proj",
]
FINE += [
    r"^(?=.*a)(?=.*b).*$",
    "model.layers.(0|1|2|3|4|5|6|7|8|9|10|11).q",
    r"h\.\d{1,2}\.attn\.c_attn",
    "[(+]+",
    r"\(+\)+",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_patterns_are_refused(pattern):
    """Before they are tried."""
    with pytest.raises(LrkitError):
        compiled(pattern, "targets")


@pytest.mark.parametrize("pattern", FINE)
def test_plain_patterns_match(pattern):
    """And come to an end on a name that they do not match."""
    name = "bert.encoder.layer.3.attention.self.query" * 3
    assert bool(compiled(pattern, "targets").fullmatch(name)) == bool(re.fullmatch(pattern, name))


@given(st.text(alphabet="ab.()|*+?{}2,[]\\", max_size=14))
def test_passed_patterns_end(pattern):
    """Any pattern that is let through is done with names of a hundred letters in a moment."""
    try:
        found = compiled(pattern, "targets")
    except LrkitError:
        return
    begin = time.monotonic()
    for name in ("a" * 100 + "!", "ab" * 50 + "!", "b.a" * 33):
        found.fullmatch(name)
    assert time.monotonic() - begin < 5


def save_query(folder):
    """Save adapters, and as PEFT has them those of one layer."""
    lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2)).save(folder)
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("pattern", ["([a-z.0-9]+)+!", "(?i)query", "a" * 10_000])
def test_peft_patterns(pattern, tmp_path):
    """A flag in the middle of a pattern is none; one that backtracks for ever is not begun."""
    save_query(tmp_path)
    peft_beside(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert lrkit.from_peft(models.make("bert"), tmp_path).adapters
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {pattern: 8}}))
    with pytest.raises(LrkitError, match="alpha_pattern"):
        lrkit.from_peft(models.make("bert"), tmp_path)


@pytest.mark.parametrize("number", [10**400, 1e308, -(10**30), 2**63, True, None])
def test_boundless_numbers(number, tmp_path):
    """As PEFT's alpha, and as a method's setting."""
    save_query(tmp_path)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "lora_alpha": number}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if number not in (2**63, -(10**30)):
        with pytest.raises(LrkitError):
            lrkit.from_peft(models.make("bert"), tmp_path)
    with pytest.raises(LrkitError):
        lrkit.schedulers.Cubic(warmup=number)
    if not isinstance(number, int) or isinstance(number, bool) or number == 10**400:
        with pytest.raises(LrkitError):
            lrkit.methods.svd_lora(rank=2, orthogonality=number if number != 1e308 else float("inf"))


@pytest.mark.parametrize(
    "path", ["also.\u00b2.metric", "also.\u0661.metric", "also.99999999999999999999.metric", "also.-1.metric", "..."]
)
def test_odd_paths_are_one_line(path, capsys):
    """A digit that is no number of a policy leads nowhere."""
    assert exits("params", "adalora", "--model", "minilm", "--set", f"{path}=1") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("values", [90, 13])
def test_a_grid_has_a_bound(values, capsys):
    """The rows are counted before they are laid out, and the count is told."""
    keys = ("metric.beta1", "metric.beta2", "orthogonality")
    tried = ",".join(f"0.{n:02d}" for n in range(1, values))
    swaps = [part for key in keys for part in ("--swap", f"{key}={tried}")]
    if values == 13:
        from lrkit.study.plan import lay_out, study_from

        swap = {key: [n / 100 for n in range(1, 5)] for key in keys}
        assert len(lay_out(study_from({"base": "adalora", "swap": swap, "grid": True})).rows) == 65
        return
    assert exits("ablate", "adalora", *swaps, "--grid", "--dry-run") == 2
    assert f"{(values - 1) ** 3 + 1:,} rows; at most" in capsys.readouterr().err


def test_messages_are_short(capsys):
    """Whatever was given, and wherever it is quoted."""
    long = "x" * 100_000
    assert len(str(LrkitError(long))) < 1000
    assert len(shown(10**5000)) < 200 and len(shown([long] * 5)) < 200
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(shown(nested)) < 200
    for command in (
        ["params", long],
        ["params", "lora", "--set", long],
        ["params", "lora", "--set", f"{long}=1"],
        [long],
    ):
        assert exits(*command) == 2
        assert len(capsys.readouterr().err) < 1100


@pytest.mark.parametrize(
    "base", [{}, [], 5, "x", {"class": "pipeline"}, {"class": 5}, {"dtype": "load"}, {"name": 5}, {"config": []}]
)
def test_hostile_bases(base, world, tmp_path, capsys):
    """Nothing is looked up by a name that is no model's, and nothing is written."""
    state = checkpoint.read(world / "run")
    good = state["meta"]["base"]
    told = {**good, "name": str(world / "model"), **base} if isinstance(base, dict) and base else base
    save_file(
        state["tensors"], tmp_path / checkpoint.FILE, metadata={"lrkit": json.dumps({**state["meta"], "base": told})}
    )
    assert exits("export", tmp_path, "--to", "merged", "--out", tmp_path / "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**12}, {"vocab_size": 2**63}])
def test_endless_models(change, world, tmp_path):
    """By its config's sizes, before a layer of it is made."""
    config = json.loads((world / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert exits("params", "lora", "--model", tmp_path, "--steps", "5") == 2


def test_huge_ranks():
    """Before it is allocated: with gradients and Adam's state it would not fit."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8, hidden_size=1024, num_hidden_layers=12, num_attention_heads=2, intermediate_size=64
    )
    with torch.device("meta"):
        weightless = BertForSequenceClassification(config)
    assert lrkit.attach(weightless, lrkit.methods.lora(rank=65536)).adapters
    plain = models.make("bert")
    foresight.check_room([], lrkit.parameterizations.LoRA(rank=65536))
    memory, foresight._memory = foresight._memory, lambda: 2**20
    try:
        with pytest.raises(LrkitError, match="give a lower rank"):
            lrkit.attach(plain, lrkit.methods.lora(rank=65536))
    finally:
        foresight._memory = memory
    assert not any("base" in name for name, _ in plain.named_modules())


def test_plain_data_is_bounded():
    """Sixty-four levels and sixty-four bits."""
    nested = 0
    for _ in range(reading.DEPTH):
        nested = [nested]
    reading.check_plain(nested, "it")
    with pytest.raises(LrkitError, match="deep"):
        reading.check_plain([nested], "it")
    reading.check_plain([2**64 - 1, -(2**63), True, 1.5, None], "it")
    with pytest.raises(LrkitError, match="64 bits"):
        reading.check_plain({"a": [2**64]}, "it")
