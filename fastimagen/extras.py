"""Optional dependencies: what an error says if one is missing."""

from __future__ import annotations

import re
import shlex
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parent.parent
"""The clone, if fastimagen runs from one."""


def missing_extra(user: str, package: str, extra: str) -> str:
    """The message that `user`, a part of fastimagen, needs a package that the extra `extra` installs."""
    return f"{user} needs {package}: {install_command(extra)}"


def install_command(extra: str) -> str:
    """The command that installs an extra: from a clone by its name, next to an installed wheel by its packages.

    A wheel does not say where it came from, so `pip install 'fastimagen[...]'` might find nothing, or another project.
    """
    if (SOURCE / "setup.py").is_file():
        return f"pip install --editable '.[{extra}]'"
    requirements = [line for line in metadata.requires("fastimagen") or [] if re.search(f"extra == .{extra}\\b", line)]
    packages = [line.partition(";")[0].replace(" ", "") for line in requirements]
    return f"pip install {shlex.join(packages)}"


def import_extra(module: str, *, user: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency. Raises ImportError with `missing_extra`'s line if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the package is installed, but one of its own dependencies is missing
        raise ImportError(missing_extra(user, module.rpartition(".")[2], extra)) from error


def require_extra(module: str, *, user: str, extra: str) -> None:
    """Raise `import_extra`'s error without importing: before a process that needs the module starts, for instance."""
    if find_spec(module) is None:
        raise ImportError(missing_extra(user, module, extra))
