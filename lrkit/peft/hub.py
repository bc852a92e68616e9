"""Upload an export to the Hugging Face hub, with a model card."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from huggingface_hub import HfApi
from torch import Tensor

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError, shown
from lrkit.peft.card import base_of, card, refusal
from lrkit.peft.exporting import Exported, export
from lrkit.peft.files import CONFIG

CARD = "README.md"


@attrs.frozen(kw_only=True)
class Pushed:
    """What `push_to_hub` uploaded, or would have.

    Args:
        repo_id: where.
        url: of the commit; None after a dry run.
        files: name of each file to its size in bytes, the card included.
        card: the model card's text.
        exported: what `export` said.
    """

    repo_id: str
    url: str | None
    files: dict[str, int]
    card: str = attrs.field(repr=False)
    exported: Exported


def push_to_hub(
    adapted: Adapted,
    repo_id: str,
    *,
    to: str = "peft-lora",
    base_model: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    dry_run: bool = False,
    tokenizer: Any = None,
    batch: Mapping[str, Tensor] | None = None,
) -> Pushed:
    """Export an adapted model, write a model card beside it, and upload both to the Hugging Face hub.

    For example ``lrkit.push_to_hub(adapted, "me/my-adapter", dry_run=True)`` shows files and card without a network.

    Args:
        adapted: the trained handle. It stays as it is.
        repo_id: ``"user/name"``, or a name of one's own. The repository is made if it is not there.
        to: as `export` takes it.
        base_model: the base's name on the hub, for the card and PEFT's configuration; None for the one in the model's
            config, unless that is a folder, whose path is told to nobody.
        folder: a new or empty folder in which the files stay; None for none.
        private: whether a new repository is private; None for the account's default.
        token: of the hub; None for the one that is stored.
        message: of the commit.
        dry_run: do all but talk to the hub.
        tokenizer: as `export` takes it.
        batch: as `export` takes it.

    Raises:
        LrkitError: a name that the hub does not take, an export that is refused, or an upload that fails.
    """
    for name in (repo_id, *([] if base_model is None else [base_model])):
        if not isinstance(name, str):
            raise LrkitError(f'a name on the hub is "user/name", not {shown(name)}')
        if (reason := refusal(name)) is not None:
            raise LrkitError(f'a name on the hub is "user/name", not {shown(name)}: {reason}')
    with tempfile.TemporaryDirectory() as place:
        inside = Path(place) / "export" if folder is None else Path(folder)
        exported = export(adapted, inside, to=to, tokenizer=tokenizer, batch=batch)
        _name_base(inside, base_of(adapted) if base_model is None else base_model)
        text = str(card(adapted, exported, repo_id, base_model))
        (inside / CARD).write_text(text, encoding="utf-8")
        sizes = {name: (inside / name).stat().st_size for name in (CARD, *exported.files)}
        url = None if dry_run else _upload(inside, repo_id, private, token, message or f"Upload {to} by lrkit")
    return Pushed(repo_id=repo_id, url=url, files=sizes, card=text, exported=exported)


def _name_base(folder: Path, base: str | None) -> None:
    """Write the base's name on the hub into PEFT's configuration, in place of a folder's path on this machine."""
    if not (folder / CONFIG).is_file():
        return
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    own = (folder / "base").is_dir()  # a folder in a repository has no name on the hub
    settings["base_model_name_or_path"] = None if own else base
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _upload(folder: Path, repo_id: str, private: bool | None, token: str | bool | None, message: str) -> str:
    api = HfApi(token=token)
    try:
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
        return api.upload_folder(repo_id=whole, folder_path=folder, commit_message=message).commit_url
    except Exception as error:  # the hub's, httpx's and the system's errors have no common class
        first = " ".join(str(error).split())[:200]
        raise LrkitError(f"the upload to {repo_id} failed ({type(error).__name__}): {first}") from error
