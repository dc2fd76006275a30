"""Text in any script on images, with the fonts of this machine where Pillow's own, which knows ASCII, is not enough."""

from __future__ import annotations

import logging
import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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

BITMAP_SIZES = (109, 160)
"""Pixels of the only size of colour emoji: Noto's (and others with bitmaps of 128 pixels) and Apple's."""

JOINING = ("Mn", "Mc", "Me", "Cf")
"""Unicode categories of what belongs to the character before it: accents, vowel signs, variation selectors, joiners."""


@dataclass(frozen=True)
class Lettering:
    """Fonts of one size, the first of them for everything that it has. Fonts of colour emoji are scaled to it."""

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
            font = load(path, size)
            if font is None:
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
        whole = (font for font in self.fonts if font.size == self.size and all(has(font, letter) for letter in text))
        if font := next(whole, None):
            yield text, font
            return
        clusters: list[str] = []
        for letter in text:
            if clusters and unicodedata.category(letter) in JOINING:
                clusters[-1] += letter
            else:
                clusters.append(letter)
        for font, parts in groupby(clusters, key=self._font_of):
            yield "".join(parts), font

    def _font_of(self, cluster: str) -> ImageFont.FreeTypeFont:
        """The first font that has a character and all that joins it, or else the character."""
        complete = (font for font in self.fonts if all(has(font, letter) for letter in cluster))
        usable = (font for font in self.fonts if has(font, cluster[0]))
        return next(complete, None) or next(usable, self.fonts[0])

    def width(self, text: str) -> float:
        """Pixels."""
        return sum(font.getlength(part) * self.size / font.size for part, font in self.runs(text))

    def draw(self, canvas: Image.Image, left: float, top: float, text: str, fill: tuple[int, int, int]) -> None:
        """Draw one line; all fonts stand on one base line."""
        base = top + self.fonts[0].getmetrics()[0]
        for part, font in self.runs(text):
            if font.size == self.size:
                ImageDraw.Draw(canvas).text((left, base), part, fill=fill, font=font, anchor="ls")
            else:
                ascent, descent = font.getmetrics()
                emoji = Image.new("RGBA", (max(1, math.ceil(font.getlength(part))), ascent + descent))
                ImageDraw.Draw(emoji).text((0, ascent), part, font=font, anchor="ls", embedded_color=True)
                scale = self.size / font.size
                emoji = emoji.resize((max(1, round(emoji.width * scale)), max(1, round(emoji.height * scale))))
                canvas.paste(emoji, (round(left), round(base - ascent * scale)), emoji)
            left += font.getlength(part) * self.size / font.size


def load(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font in this size, or in that of its bitmaps; None for damaged files."""
    for pixels in (size, *BITMAP_SIZES):
        try:
            return ImageFont.truetype(path, pixels)
        except OSError:  # there is no such size, or the file is damaged
            continue
    return None


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
