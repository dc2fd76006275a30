"""Finished images on the disk while the page is served, so that a visitor finds the last ones after a reload."""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json_object, write_json
from ..images import save_image
from ..sampling.output import Output

MAX_RESULTS = 100  # kept of all visitors; the oldest are removed
KEY = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True)
class Result:
    """Image files with their captions, the line below them, and the file of settings that reproduce them."""

    images: list[tuple[str, str]]
    status: str
    settings: Path

    @property
    def record(self) -> dict[str, Any]:
        """The content of the file of settings."""
        return read_json_object(self.settings)


@dataclass(frozen=True)
class Results:
    """The results below a folder, each under a key that cannot be guessed: it is all that a browser remembers."""

    folder: Path

    def add(self, output: Output, status: str) -> str:
        """Store a finished request; returns its key."""
        key = secrets.token_urlsafe(16)
        folder = self.folder / key
        folder.mkdir(parents=True)
        for index, image in enumerate(output.images):
            save_image(image, folder / f"{index:06d}.png")
        write_json(folder / "settings.json", output.record)
        write_json(folder / "page.json", {"status": status, "captions": output.captions})
        older = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-MAX_RESULTS]
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        return key

    def get(self, key: Any) -> Result | None:
        """The result of a key that a browser sent; None if it is no key, or if the result is gone."""
        if not isinstance(key, str) or not KEY.fullmatch(key) or not (self.folder / key / "page.json").is_file():
            return None
        folder = self.folder / key
        page = read_json_object(folder / "page.json")
        files = [str(path) for path in sorted(folder.glob("*.png"))]
        return Result(list(zip(files, page["captions"])), page["status"], folder / "settings.json")
