"""Sampled images and the record that reproduces them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from torch import Tensor

from ..files import require_empty, write_json
from ..images import FileType, grid, save_image, to_pil


@dataclass(frozen=True, eq=False)
class Output:
    """Sampled images and everything needed to reproduce them."""

    images: Tensor
    """(B, C, H, W) float in [-1, 1]."""
    captions: list[str]
    seeds: list[int]
    record: dict[str, Any] = field(default_factory=dict)
    """The content of samples.json: model, version, inputs, the sampling settings of each stage."""
    warnings: list[str] = field(default_factory=list)
    """Captions that the text encoder truncated or could not represent, one line each."""

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[2:]))
        return f"Output({len(self.images)} images of {size}, stages: {', '.join(self.record.get('stages', {}))})"

    @property
    def pil(self) -> list[Image.Image]:
        """The images as PIL images, 8 bits per channel."""
        return [to_pil(image) for image in self.images]

    def grid(self) -> Image.Image:
        """All images with their captions, in one image."""
        return grid(self.images, self.captions)

    def save(self, folder: str | Path, *, filetype: FileType = "png") -> Path:
        """Write images/000000.png ..., grid.png, captions.txt (line i = image i) and samples.json into a new folder.

        filetype: of the images; "png" and "webp" keep every pixel, "jpg" does not. A line break in a caption
        becomes a space in captions.txt; samples.json has the exact caption. Raises ValueError, and writes nothing, if
        the folder is not empty, an image contains NaN or the file type is another one.
        """
        folder = Path(folder)
        if filetype not in get_args(FileType):
            raise ValueError(f'filetype must be one of {", ".join(get_args(FileType))}, got "{filetype}"')
        require_empty(folder)
        overview = self.grid()
        (folder / "images").mkdir(parents=True)
        for index, image in enumerate(self.images):
            save_image(image, folder / "images" / f"{index:06d}.{filetype}")
        overview.save(folder / "grid.png")
        lines = "".join(" ".join(caption.splitlines()) + "\n" for caption in self.captions)
        (folder / "captions.txt").write_text(lines, encoding="utf-8")
        record = dict(self.record)
        if "samples" in record:
            named = enumerate(record["samples"])
            record["samples"] = [{**sample, "image": f"images/{index:06d}.{filetype}"} for index, sample in named]
        write_json(folder / "samples.json", record)
        return folder
