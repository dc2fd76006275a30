"""The files to start from: ds.json, and the configurations and scripts of launch/.

They lie in the repository, where a clone uses them; a wheel contains copies, which `fastimagen starting-files` writes
into a folder of the user's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGED = Path(__file__).parent / "_starting_files"
"""The copies in a wheel, made by setup.py."""


def starting_folder() -> Path:
    """The folder that holds ds.json and launch/: inside the package if a wheel is installed, else the repository."""
    return PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parent.parent


def starting_files() -> list[Path]:
    """The files relative to `starting_folder`, in order."""
    root = starting_folder()
    inside = [path for path in (root / "launch").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path.relative_to(root) for path in sorted([root / "ds.json", *inside])]


def copy_missing(folder: str | Path) -> list[Path]:
    """Copy the starting files that `folder` does not have yet; returns their paths relative to it."""
    missing = [path for path in starting_files() if not (Path(folder) / path).exists()]
    for path in missing:
        (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(starting_folder() / path, Path(folder) / path)
    return missing


def copy_all(folder: str | Path) -> list[Path]:
    """Copy all starting files; returns their paths relative to `folder`. Raises ValueError if one is there already."""
    present = [path for path in starting_files() if (Path(folder) / path).exists()]
    if present:
        raise ValueError(f"{Path(folder) / present[0]} exists: choose another folder with --out, or remove it first")
    return copy_missing(folder)
