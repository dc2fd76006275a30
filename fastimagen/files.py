"""Files: written completely or not at all; an error about a file that cannot be read is one line that names it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)\.[0-9a-f]{8}\.tmp$")
"""In the name of a temporary file: machine, process number and start of the process that writes it."""

ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file of a process elsewhere counts as one of a killed process."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def require_empty(folder: str | Path) -> None:
    """Raise ValueError if `folder` exists and is not an empty folder, so that results never mix with older files."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder, or remove it first")


def temporary_path(path: str | Path) -> Path:
    """A new name beside `path`, on the same file system, hidden and with the suffix .tmp. It names this process."""
    path = Path(path)
    owner = f"{_machine()}-{os.getpid()}-{_started(os.getpid()) or 0}"
    return path.with_name(f".{path.name}.{owner}.{uuid.uuid4().hex[:8]}.tmp")


def remove_abandoned(folder: str | Path) -> int:
    """Remove the temporary files and folders in `folder` whose process was killed, and return how many.

    Whether one of this machine lives is known. Those of other machines, and of earlier versions, which name no process,
    are removed when nobody has changed them for ABANDONED seconds. One line says what was removed.
    """
    removed, folder = 0, Path(folder)
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".tmp")]
    except OSError:
        return 0  # who needs the folder says what is wrong with it
    for path in (folder / name for name in names):
        with suppress(OSError):  # another process has removed it, or may remove it and this one may not
            if not _is_abandoned(path):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed += 1
    if removed:
        logger.warning("%s: removed %d temporary files of killed processes", folder, removed)
    return removed


def _is_abandoned(path: Path) -> bool:
    """Whether no process writes a temporary file or folder any more."""
    owner = OWNER.search(path.name)
    if owner is None or owner[1] != _machine():
        return time.time() - path.stat().st_mtime > ABANDONED
    return _started(int(owner[2])) != int(owner[3])


def _started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if there is none. 0 if only that is known
    that it lives, as without /proc."""
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])  # field 22 of proc(5)


@lru_cache(maxsize=1)
def _machine() -> str:
    """What tells this machine, since it was started, and this container apart from others: process numbers are unique
    within it."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


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

    In a temporary folder, because safetensors makes a temporary file of its own. Raises OSError if the file cannot be
    written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_path(path)
    folder.mkdir()
    try:
        with atomic_file(folder / "content") as temporary:
            try:
                save_file(on_cpu, temporary, dict(metadata))
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {first_line(error)}") from error
        os.replace(folder / "content", path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
