"""Files: written completely or not at all; an error about a file that cannot be read is one line that names it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def require_empty(folder: str | Path) -> None:
    """Raise ValueError if `folder` exists and is not an empty folder, so that results never mix with older files."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder, or remove it first")


def temporary_path(path: str | Path) -> Path:
    """A new name beside `path`, on the same file system, hidden and with the suffix .tmp."""
    path = Path(path)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; it replaces `path` when the block ends, after a sync to the disk.

    At any time `path` is absent, the old file or the whole new one. Creates the folder. If the block raises, `path`
    stays as it was and the temporary file is removed. The file gets the permissions of a file made by `open`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors creates files that only their owner may read
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes `path` when the block ends, complete or not at all.

    Raises ValueError if `path` is not empty. If the block raises, the temporary folder is removed.
    """
    path = Path(path)
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: str | Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError that names the file and the line at fault."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. tensors: any device, any shape; metadata: strings for the header.

    Raises OSError if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(on_cpu, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {first_line(error)}") from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU. Raises ValueError that names the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights {path}: {first_line(error)}") from None


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .pth file by name, on the CPU; nothing else in it is executed. Raises ValueError that names the
    file if it is damaged or holds anything else."""
    import torch
    from torch import Tensor

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:  # what a damaged file may raise
        raise ValueError(f"cannot read weights {path}: {first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict: tensors by parameter name")
    return content
