"""Model directories on the Hugging Face hub: download one, and share one. Needs the `hub` extra."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from ..extras import import_extra
from ..files import first_line
from .model_directory import read_cascade

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""OWNER/NAME."""


def locate_model(name_or_path: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """(model directory on this machine, what to call it) for a folder or for OWNER/NAME on the hub.

    A model from the hub is downloaded into the hub's cache once; without a network, or with HF_HUB_OFFLINE=1, the cache
    is used. revision: branch, tag or commit on the hub. Raises ValueError with one line if there is neither,
    ImportError without huggingface_hub.
    """
    name = str(name_or_path)
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        if revision is not None:
            raise ValueError(
                f'revision "{revision}" is for a model on the hub, but {name} is a folder, or not OWNER/NAME'
            )
        return Path(name), name
    hub = _import_hub(f"there is no folder {name}; a model from the hub")
    try:
        folder = Path(hub.snapshot_download(name, revision=revision))
    except (OSError, ValueError, hub.errors.HTTPError) as error:  # of repositories, revisions, names and networks
        at = f' at revision "{revision}"' if revision else ""
        raise ValueError(
            f"there is no folder {name}, and {name}{at} cannot be read from the Hugging Face hub or its cache: "
            f"{first_line(error)}"
        ) from None
    return folder, f"{name}@{folder.name}"  # .../snapshots/COMMIT


def push_model(folder: str | Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a model directory as OWNER/NAME, which is created if it does not exist; returns its address.

    revision: branch to upload to, by default the main one. The token is the one of `hf auth login`, or HF_TOKEN. Raises
    ValueError with one line if the folder is not a model directory, or if the hub refuses.
    """
    read_cascade(folder)
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{name} is no name on the hub: give OWNER/NAME")
    hub = _import_hub("sharing a model on the hub")
    try:
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload a model of fastimagen"
        )
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise ValueError(f"cannot upload {folder} as {name}: {first_line(error)}") from None
    return str(commit.commit_url)


def _import_hub(user: str) -> ModuleType:
    return import_extra("huggingface_hub", user=user, extra="hub")
