"""A folder of images with captions beside them, or a list of both -> WebDataset tars in img2dataset's format.

A sample becomes KEY.jpg (or jpeg, png, webp, with unchanged bytes), KEY.txt and KEY.json with its original path.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..files import atomic_folder, require_empty
from ..images import open_rgb
from ..seeds import random_bits
from .order import SAMPLES
from .shards import IMAGES
from .tar_writer import write_tars

logger = logging.getLogger(__name__)

OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "jfif", "jp2", "tif", "tiff")
"""File extensions of images that shards cannot contain; they must be converted first."""

EXAMPLES = 5
"""Paths that a report lists for each reason."""


@dataclass
class PackReport:
    """Result of packing: samples and shards written, and files skipped, by reason, with a few paths of each."""

    folder: Path
    packed: int = 0
    held_out: int = 0
    shards: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, path: str | Path) -> None:
        """Count one file that is skipped."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(str(path))

    def __str__(self) -> str:
        lines = [f"{self.packed} samples in {self.shards} shards: {self.folder}"]
        if self.held_out:
            lines.append(f"{self.held_out} of them held out for validation: {self.folder / 'val'}")
        lines += [f"skipped, {reason}" for reason in self.reasons()]
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """Each reason for skipping, with the number of files and some paths."""
        reasons = []
        for reason, count in self.skipped.items():
            more = ", ..." if count > len(self.examples[reason]) else ""
            reasons.append(f"{reason}: {count} ({', '.join(self.examples[reason])}{more})")
        return reasons


Item = tuple[str, Path, str]  # path as named by the source, path on disk, caption


def pack_folder(source: str | Path, out: str | Path, *, shard_size: int = 1000, validation: float = 0.0) -> PackReport:
    """Pack all images below `source` that have a caption beside them: a/b.jpg and a/b.txt.

    They are shuffled, always in the same order, so that images of one folder do not fill whole shards.
    validation: share of the images, in [0, 1). Above 0, that share goes into `out`/val and the rest into `out`/train.
    Skipped and reported: images without caption, captions without image, empty captions, captions that are not UTF-8
    and unreadable images. Raises ValueError if `source` is not a folder, `out` is not empty or nothing is left to pack;
    then `out` is not touched.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    require_empty(out)
    report = PackReport(Path(out))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix[1:].lower() in IMAGES]
    captioned = {path.with_suffix("") for path in images}
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    others = {path.with_suffix(""): path for path in files if path.suffix[1:].lower() in OTHER_IMAGES}
    for stem, path in captions.items():
        if stem in captioned:
            continue
        if stem in others:
            report.skip(f"image of another type than {', '.join(IMAGES)}", others[stem].relative_to(root))
        else:
            report.skip("caption without image", path.relative_to(root))
    order = np.argsort(random_bits(0, SAMPLES, (0, 0), len(images)), kind="stable")

    def items() -> Iterator[Item]:
        for index in order:
            path = images[index]
            name, caption_path = str(path.relative_to(root)), captions.get(path.with_suffix(""))
            if caption_path is None:
                report.skip("image without caption", name)
                continue
            try:
                caption = caption_path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                report.skip("caption not in UTF-8", name)
            else:
                yield name, path, caption

    return _pack(items(), report, shard_size, validation)


def captioned_images(source: str | Path) -> tuple[list[tuple[Path, str]], int]:
    """(image, caption) of all images below a folder that `pack_folder` would pack if they are readable, and the number
    of images without caption."""
    pairs, uncaptioned = [], 0
    for path in sorted(path for path in Path(source).rglob("*") if path.suffix[1:].lower() in IMAGES):
        texts = [path.with_suffix(suffix) for suffix in (".txt", ".TXT") if path.with_suffix(suffix).is_file()]
        caption = texts[0].read_text(encoding="utf-8-sig", errors="replace").strip() if texts else ""
        uncaptioned += not caption
        pairs += [(path, caption)] if caption else []
    return pairs, uncaptioned


def manifest_images(manifest: Path) -> list[tuple[Path, str]]:
    """(image, caption) of a JSONL manifest's lines whose image exists. Raises ValueError as `pack_manifest` does."""
    if not manifest.is_file():
        raise ValueError(f"there is no manifest {manifest}")
    lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    entries = [_entry(line, f"{manifest}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return [(manifest.parent / name, caption) for name, caption in entries if (manifest.parent / name).is_file()]


def pack_manifest(
    manifest: str | Path, out: str | Path, *, shard_size: int = 1000, validation: float = 0.0
) -> PackReport:
    """Pack the images that a JSONL file lists, in its order: {"image": path from the file's folder, "caption": text}.

    validation: share of the images, in [0, 1). Above 0, that share goes into `out`/val and the rest into `out`/train.
    Skipped and reported: images that are missing, unreadable or of another file type, and empty captions. Raises
    ValueError if the file is missing, a line is not such an object, `out` is not empty or nothing is left to pack;
    then `out` is not touched.
    """
    manifest = Path(manifest)
    if not manifest.is_file():
        raise ValueError(f"there is no manifest {manifest}")
    require_empty(out)
    report = PackReport(Path(out))

    def items() -> Iterator[Item]:
        with open(manifest, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                name, caption = _entry(line, f"{manifest}:{number}")
                path = manifest.parent / name
                if path.suffix[1:].lower() not in IMAGES:
                    report.skip(f"image of another type than {', '.join(IMAGES)}", name)
                elif not path.is_file():
                    report.skip("image not found", name)
                else:
                    yield name, path, caption

    return _pack(items(), report, shard_size, validation)


def _entry(line: str, where: str) -> tuple[str, str]:
    """Image path and caption in a line. where: the file and the number of the line, for errors."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if isinstance(entry, dict):
        image, caption = entry.get("image"), entry.get("caption")
        if isinstance(image, str) and isinstance(caption, str):
            return image, caption
    raise ValueError(f'{where}: expected {{"image": "path", "caption": "text"}}, got {line.strip():.80}')


def _pack(items: Iterable[Item], report: PackReport, shard_size: int, validation: float) -> PackReport:
    """Write the shards, or the shards of both splits, complete or not at all."""
    if shard_size < 1:
        raise ValueError(f"a shard holds at least one sample: got a shard size of {shard_size}")
    if not 0 <= validation < 1:
        raise ValueError(f"the validation share must lie in [0, 1), got {validation}")
    with atomic_folder(report.folder.resolve()) as temporary:
        if validation:
            usable = list(_usable(items, report))
            if not usable:
                raise ValueError(_nothing_to_pack(report))
            held_out = _choose_held_out([name for name, _, _ in usable], validation)
            _write_shards((item for item in usable if item[0] not in held_out), temporary / "train", report, shard_size)
            _write_shards((item for item in usable if item[0] in held_out), temporary / "val", report, shard_size)
            report.held_out = len(held_out)
        else:
            _write_shards(_usable(items, report), temporary, report, shard_size)
    return report


def _choose_held_out(names: list[str], share: float) -> set[str]:
    """The names of the usable images in the validation split: those with the smallest hashes, at least one.

    The choice depends on the names alone, so that packing the same folder again holds out the same images.
    """
    if len(names) < 2:
        raise ValueError(f"a validation split needs at least 2 images with captions, found {len(names)}")
    ranked = sorted(names, key=lambda name: blake2b(name.encode(), digest_size=8).digest())
    count = max(1, round(share * len(names)))
    return set(ranked[: min(count, len(names) - 1)])


def _usable(items: Iterable[Item], report: PackReport) -> Iterator[Item]:
    """The items with a caption and a readable image; the others are counted in `report`."""
    for name, path, caption in items:
        if not caption.strip():
            report.skip("empty caption", name)
            continue
        try:
            open_rgb(path.read_bytes())
        except ValueError as error:
            report.skip("unreadable image", f"{name}: {error}")
            continue
        yield name, path, caption


def _write_shards(items: Iterable[Item], folder: Path, report: PackReport, shard_size: int) -> None:
    """Write items as tars of `shard_size` samples into `folder` and count them in `report`."""
    packed = write_tars(folder, map(_files, items), shard_size)
    if not packed:
        raise ValueError(_nothing_to_pack(report))
    report.packed += packed
    report.shards += -(-packed // shard_size)


def _nothing_to_pack(report: PackReport) -> str:
    return f"nothing to pack for {report.folder}: {'; '.join(report.reasons()) or 'there are no images'}"


def _files(item: Item) -> dict[str, bytes]:
    """The files of a sample, by extension."""
    name, path, caption = item
    return {
        path.suffix[1:].lower(): path.read_bytes(),
        "txt": caption.strip().encode(),
        "json": json.dumps({"path": name}).encode(),
    }
