"""Sampled images and the record that reproduces them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..files import require_empty
from ..images import grid, save_png


@dataclass(frozen=True)
class Output:
    """Sampled pictures and all that is needed to make them again."""

    images: Tensor
    """(B, 3, H, W) float in [-1, 1]."""
    captions: list[str]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    """Model, version, and the sampling settings of each stage."""
    unread: list[str] = field(default_factory=list)
    """What the text encoder could not read of the captions, a line each."""

    def grid(self) -> Image.Image:
        """All pictures with their captions."""
        return grid(self.images, self.captions)

    def save(self, folder: str | Path) -> Path:
        """Write images/000000.png ..., grid.png, captions.txt (line i = image i) and samples.json into a new folder.

        A line break in a caption is a space in captions.txt; samples.json has the caption as it is. Raises ValueError,
        and writes nothing, if the folder holds anything or a picture holds NaN.
        """
        folder = Path(folder)
        require_empty(folder)
        overview = self.grid()
        (folder / "images").mkdir(parents=True)
        for index, image in enumerate(self.images):
            save_png(image, folder / "images" / f"{index:06d}.png")
        overview.save(folder / "grid.png")
        lines = "".join(" ".join(caption.splitlines()) + "\n" for caption in self.captions)
        (folder / "captions.txt").write_text(lines, encoding="utf-8")
        (folder / "samples.json").write_text(json.dumps(self.record(), indent=2) + "\n")
        return folder

    def record(self) -> dict[str, Any]:
        """All that is needed to make the pictures again, as samples.json holds it."""
        samples = [
            {"image": f"images/{index:06d}.png", "caption": caption, "seed": seed}
            for index, (caption, seed) in enumerate(zip(self.captions, self.seeds))
        ]
        return {**self.settings, "samples": samples}
