"""What packing did: samples, shards, and everything that was not taken, by reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...words import counted

EXAMPLES = 5
"""Names that a report lists for each reason."""


@dataclass
class Tally:
    """Counts of one shard, or of many."""

    packed: int = 0
    """Samples written."""
    resized: int = 0
    """Samples whose image was made smaller."""
    captions: int = 0
    """Captions of all samples; more than `packed` if samples have several."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Images, files and rows that were not taken, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """A few of their names, by reason."""

    def skip(self, reason: str, name: str | Path, count: int = 1) -> None:
        """Count something that is not taken."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(str(name))

    def add(self, other: Tally) -> None:
        """Add the counts of another shard."""
        self.packed += other.packed
        self.resized += other.resized
        self.captions += other.captions
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: EXAMPLES - len(examples)]

    def reasons(self) -> list[str]:
        """Each reason for skipping, with the count and some names."""
        reasons = []
        for reason, count in self.skipped.items():
            more = ", ..." if count > len(self.examples[reason]) else ""
            reasons.append(f"{reason}: {count} ({', '.join(self.examples[reason])}{more})")
        return reasons


@dataclass
class PackReport(Tally):
    """Result of packing into `folder`."""

    folder: Path = Path()
    held_out: int = 0
    """Samples in the validation split."""
    shards: int = 0
    """Shards of all splits."""
    kept: int = 0
    """Those that an earlier, interrupted run had written."""
    notes: list[str] = field(default_factory=list)
    """Choices that the packer made: which column has the captions, for instance."""

    def __str__(self) -> str:
        lines = [f"{counted(self.packed, 'sample')} in {counted(self.shards, 'shard')}: {self.folder}"]
        if self.kept:
            lines.append(f"{self.kept} of the shards were there from an interrupted run")
        if self.held_out:
            lines.append(f"{self.held_out} of them held out for validation: {self.folder / 'val'}")
        if self.resized:
            lines.append(f"{self.resized} images made smaller")
        if self.captions > self.packed:
            lines.append(f'{self.captions} captions: set fastimagen.data.caption_key to "captions" to use all of them')
        lines += self.notes
        lines += [f"skipped, {reason}" for reason in self.reasons()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The counts, for OUT/report.json."""
        names = ("packed", "held_out", "shards", "resized", "captions", "notes", "skipped", "examples")
        return {name: getattr(self, name) for name in names}
