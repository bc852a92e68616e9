"""`push_to_hub`: what an export writes and a model card are uploaded; the hub's own library reads the card back."""

import json
import re
import types

import huggingface_hub
import models
import pytest
import torch
from huggingface_hub import ModelCard
from test_attach import fit, logits

import lrkit
from lrkit.peft import hub

BASE = "google/bert_uncased_L-2_H-128_A-2"


def trained(name="bert", base=BASE, method=None, **options):
    model = models.make(name)
    model.config.name_or_path = base
    adapted = lrkit.attach(model, method or lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=1), **options)
    fit(model, adapted, steps=20)
    return adapted


@pytest.fixture
def api(monkeypatch):
    """A stand-in for the hub: it keeps what it is called with and the files that it gets."""
    seen = types.SimpleNamespace(calls=[], files={})

    def create_repo(self, repo_id, **options):
        seen.calls.append(("create", repo_id, options))
        return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        seen.calls.append(("upload", repo_id, commit_message))
        seen.files = {str(f.relative_to(folder_path)): f.read_bytes() for f in folder_path.rglob("*") if f.is_file()}
        return types.SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return seen


@pytest.fixture
def no_network(monkeypatch):
    """Any call of the hub fails the test."""
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda *_, **__: pytest.fail("a dry run talks to nobody"))


def test_the_export_is_uploaded(api, tmp_path):
    """The repository is made, gets the export's files and the card, and PEFT loads them with equal logits."""
    peft = pytest.importorskip("peft")
    adapted = trained()
    pushed = lrkit.push_to_hub(adapted, "mine", private=True, message="first", base_model=BASE)
    create, upload = api.calls
    assert create == ("create", "mine", {"private": True, "exist_ok": True})
    assert upload == ("upload", "me/mine", "first")
    assert pushed.url == "https://huggingface.co/me/mine/commit/1"
    assert set(api.files) == {"README.md", *pushed.exported.files} == set(pushed.files)
    assert {name: len(content) for name, content in api.files.items()} == pushed.files
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = peft.PeftModel.from_pretrained(models.make("bert"), str(tmp_path))
    assert torch.allclose(logits(theirs), logits(adapted.model), atol=1e-6)


@pytest.mark.parametrize("to", ["peft-lora", "peft-adalora", "vllm-lora", "merged"])
def test_cards_are_valid(to, no_network, tmp_path):
    """The hub's library reads library, base, relation and tags from the file, and writes them again without a change."""
    adapted = trained()
    pushed = lrkit.push_to_hub(adapted, "me/mine", to=to, folder=tmp_path / "out", dry_run=True)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert pushed.url is None and str(card) == pushed.card
    assert card.data.base_model == BASE and "lrkit" in card.data.tags
    told = card.data.to_dict()
    expected = ("transformers", "finetune") if to == "merged" else ("peft", "adapter")
    assert (told["library_name"], told["base_model_relation"]) == expected
    assert (f"base_model:adapter:{BASE}" in told["tags"]) == (to != "merged")
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.to_dict() == told
    for name, rank in pushed.exported.ranks.items():
        assert f"| `{name}` | {rank} |" in card.text
    last = adapted.history[-1]
    assert f"kept {last.kept} of {last.units} units" in card.text
    assert "| metric | `sensitivity-uncertainty` | " in card.text and "`beta1=0.85`" in card.text
    assert sum(pushed.files.values()) == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())


def test_cards_code_loads(no_network, tmp_path, monkeypatch):
    """The lines of the card, with the hub's files in a folder, load the trained model by PEFT and by lrkit."""
    pytest.importorskip("peft")
    adapted = trained()
    plain = adapted.original()
    plain.save_pretrained(tmp_path / "base")
    pushed = lrkit.push_to_hub(adapted, "me/mine", folder=tmp_path / "me" / "mine", dry_run=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id: str(tmp_path / repo_id))
    with_peft, with_lrkit = re.findall(r"```python\n(.+?)```", pushed.card.replace(BASE, "base"), re.DOTALL)
    for code, name in ((with_peft, "model"), (with_lrkit, "base")):
        names = {}
        exec(code, names)
        assert torch.allclose(logits(names[name]), logits(adapted.model), atol=1e-6)


@pytest.mark.parametrize("base", ["", "here/model", "/home/me/a model", "a/b/c"])
def test_local_bases_stay_unnamed(base, no_network, tmp_path, monkeypatch):
    """A folder's path is no name on the hub, and is not told to anybody."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pushed = lrkit.push_to_hub(trained(base=base), "me/mine", folder=tmp_path / "out", dry_run=True)
    card = ModelCard(pushed.card)
    assert card.data.base_model is None and "base_model" not in str(card.data)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    for file in (tmp_path / "out").rglob("*"):
        assert not base or base.encode() not in file.read_bytes(), file.name
    assert not base or f'"{base}"' not in pushed.card
    named = lrkit.push_to_hub(trained(), "m", base_model="a/b", folder=tmp_path / "named", dry_run=True)
    assert ModelCard(named.card).data.base_model == "a/b"
    assert json.loads((tmp_path / "named" / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"


def test_served_with_its_head(no_network, tmp_path):
    """A card for vLLM serves the base with the trained head, which is in the repository; no path of this machine is told."""
    pushed = lrkit.push_to_hub(trained(), "me/mine", to="vllm-lora", folder=tmp_path / "out", dry_run=True)
    assert any(name.startswith("base/") for name in pushed.files)
    assert "hf download me/mine --local-dir adapter\nvllm serve adapter/base --enable-lora" in pushed.card
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert str(tmp_path).encode() not in b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())


def test_pushes_are_refused(no_network, monkeypatch, tmp_path):
    """A wrong name, an export that is refused and an upload that fails are one line; no repository is made before."""
    adapted = trained(method=lrkit.methods.lora(rank=2))
    for name in ("a/b/c", "a b", "", "-x"):
        with pytest.raises(lrkit.LrkitError, match='a name on the hub is "user/name"'):
            lrkit.push_to_hub(adapted, name)
        with pytest.raises(lrkit.LrkitError, match='a name on the hub is "user/name"'):
            lrkit.push_to_hub(adapted, "me/mine", base_model=name)
    with pytest.raises(lrkit.LrkitError, match="there is no export"):
        lrkit.push_to_hub(adapted, "me/mine", to="pickle")

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(lrkit.LrkitError, match=r"the upload to me/mine failed \(ConnectionError\): no route to host$"):
        lrkit.push_to_hub(adapted, "me/mine", folder=tmp_path / "kept")
    assert (tmp_path / "kept" / hub.CARD).is_file()


def test_many_layers_are_folded(no_network):
    """Ranks of more layers than fit a page are folded away, all of them in the table."""
    layers = {f"model.layers.{i}.mlp.up_proj": i % 3 for i in range(100)}
    adapted = trained(method=lrkit.methods.lora(rank=2))
    pushed = lrkit.push_to_hub(adapted, "me/mine", dry_run=True)
    exported = lrkit.peft.Exported(to="peft-lora", folder=None, files=(), ranks=layers, difference=0.0, largest=1.0)
    text = str(hub.card(adapted, exported, "me/mine"))
    assert "<details>" in text and text.count("| `model.layers.") == 100 and "<details>" not in pushed.card
