"""Sizes of images that need not be square, written WIDTHxHEIGHT, as in "80x48"."""

from __future__ import annotations

import re
from typing import NamedTuple

PATTERN = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class ImageSize(NamedTuple):
    """Height and width in pixels, in the order of a tensor's dimensions. Its text is WIDTHxHEIGHT."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """The size of a text WIDTHxHEIGHT. Raises ValueError for any other."""
        match = PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'"{text}" is not a size: write WIDTHxHEIGHT in pixels, such as "80x48"')
        return cls(height=int(match[2]), width=int(match[1]))

    @classmethod
    def of(cls, size: int | ImageSize) -> ImageSize:
        """A number is the side of a square."""
        return size if isinstance(size, ImageSize) else cls(size, size)

    def scaled(self, factor: int, divisor: int) -> ImageSize:
        """The size times factor / divisor. Raises ValueError if that leaves parts of a pixel."""
        if self.height * factor % divisor or self.width * factor % divisor:
            raise ValueError(
                f"{self} becomes {self.width * factor / divisor:.6g}x{self.height * factor / divisor:.6g} where "
                f"{divisor} pixels become {factor}: choose sizes that stay whole"
            )
        return ImageSize(self.height * factor // divisor, self.width * factor // divisor)

    def same_shape(self, height: int, width: int) -> bool:
        """Whether an image of this height and width has the same aspect ratio."""
        return self.height * width == self.width * height
