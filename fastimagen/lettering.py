"""Text in any script on images, with the fonts of this machine where Pillow's own, which knows ASCII, is not enough."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

FOLDERS = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (os.path.expandvars(r"%WINDIR%\Fonts"),),
}
"""Where fonts are, by sys.platform."""

PREFERRED = (
    "dejavusans.",
    "notosans-regular",
    "liberationsans-regular",
    "arial",
    "notosanscjk-regular",
    "droidsansfallback",
)
"""Beginnings of file names, in lower case, that are tried first: plain upright letters of many scripts."""

STYLES = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "condensed", "black")
"""Parts of file names that are tried last."""


@dataclass(frozen=True)
class Lettering:
    """Fonts of one size, the first of them for everything that it has."""

    fonts: Sequence[ImageFont.FreeTypeFont]

    @classmethod
    def of(cls, texts: Sequence[str], size: int) -> Lettering:
        """Lettering for some texts: Pillow's font, and further ones until every character is in one of them.

        Characters that no font of this machine has are said once, and become the empty box of the first font.
        """
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont)  # Pillow's default since 10.1, where FreeType is built in
        fonts, missing = [default], {letter for text in texts for letter in text if not has(default, letter)}
        for path in font_files() if missing else ():
            try:
                font = ImageFont.truetype(path, size)
            except OSError:  # bitmaps of another size, or damaged
                continue
            found = {letter for letter in missing if has(font, letter)}
            if found:
                fonts.append(font)
                missing -= found
            if not missing:
                break
        if missing:
            shown = "".join(sorted(missing)[:10])
            logger.warning(f"no font here has {shown}: grids show boxes instead; install a font of that script")
        return cls(fonts)

    @property
    def size(self) -> float:
        """Pixels."""
        return self.fonts[0].size

    def runs(self, text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        """(part of the text, its font): one font for all if there is one, so that words are of one style."""
        if text.isascii():
            yield text, self.fonts[0]
            return
        whole = next((font for font in self.fonts if all(has(font, letter) for letter in text)), None)
        if whole is not None:
            yield text, whole
            return
        first = {letter: next((font for font in self.fonts if has(font, letter)), self.fonts[0]) for letter in text}
        for font, letters in groupby(text, key=first.__getitem__):
            yield "".join(letters), font

    def width(self, text: str) -> float:
        """Pixels."""
        return sum(font.getlength(part) for part, font in self.runs(text))

    def draw(self, canvas: ImageDraw.ImageDraw, left: float, top: float, text: str, fill: tuple[int, int, int]) -> None:
        """Draw one line; all fonts stand on one base line."""
        base = top + self.fonts[0].getmetrics()[0]
        for part, font in self.runs(text):
            canvas.text((left, base), part, fill=fill, font=font, anchor="ls")
            left += font.getlength(part)


@cache
def has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a character, and not the box that stands for all others."""
    if letter.isspace() or not letter.isprintable():
        return True
    glyph, box = font.getmask(letter), font.getmask("\uffff")  # never a character
    return glyph.size != box.size or bytes(glyph) != bytes(box)


@cache
def font_files() -> tuple[str, ...]:
    """The font files of this machine, plain styles first."""
    folders = FOLDERS.get(sys.platform, ())
    found = [
        path
        for folder in folders
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]

    def rank(path: Path) -> tuple[int, bool, str]:
        name = path.name.lower()
        preferred = next((place for place, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return preferred, any(style in name for style in STYLES), str(path)

    return tuple(map(str, sorted(found, key=rank)))
