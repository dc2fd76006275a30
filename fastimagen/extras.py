"""Optional dependencies: what an error says if one is missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def missing_extra(user: str, package: str, extra: str) -> str:
    """The message that `user`, a part of fastimagen, needs a package that the extra `extra` installs."""
    return f"{user} needs {package}: pip install --editable '.[{extra}]'"


def import_extra(module: str, *, user: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency. Raises ImportError with `missing_extra`'s line if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the package is installed, but one of its own dependencies is missing
        raise ImportError(missing_extra(user, module.rpartition(".")[2], extra)) from error
