"""Embedded captions: the input of text-conditioned networks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import first_line, write_safetensors

LENGTH_MULTIPLE = 64
"""Text for a network that may be compiled is padded to a multiple of this many tokens. torch.compile and CUDA graphs
make one graph per shape: with captions of up to 256 tokens there are at most 4 graphs, without padding up to 256. The
attention kernels stop at the real length of a caption, so only the projections of the text see the padding."""


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embedded captions: embeds (B, L, E) floating point, mask (B, L) bool, real tokens first in every row.

    Raises ValueError on other shapes or dtypes and on a mask with a gap. Padding may contain anything.
    """

    embeds: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.embeds.shape)
        if len(shape) != 3 or not self.embeds.is_floating_point():
            raise ValueError(f"text embeddings are floating point (B, L, E), not {self.embeds.dtype} {shape}")
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape[:2]:
            raise ValueError(
                f"the mask of text embeddings {shape} must be bool {shape[:2]}, "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        if self.mask.device != self.embeds.device:
            raise ValueError(f"text embeddings on {self.embeds.device}, their mask on {self.mask.device}")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise ValueError("the mask of text embeddings must begin with the real tokens: found a gap")

    @staticmethod
    def _derive(embeds: Tensor, mask: Tensor) -> TextEmbeddings:
        """From parts that are known to be valid: checking the mask again would be a host synchronisation."""
        derived = object.__new__(TextEmbeddings)
        object.__setattr__(derived, "embeds", embeds)
        object.__setattr__(derived, "mask", mask)
        return derived

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens of each caption, (B,) int64."""
        return self.mask.sum(dim=1)  # (B,)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbeddings:
        """Some of the captions, by slice, index tensor, bool tensor or list; L stays as it is."""
        if not isinstance(index, (slice, Tensor, list)) or (isinstance(index, Tensor) and index.ndim != 1):
            raise TypeError(f"index with a slice, list or 1-d tensor (one caption: [i:i+1]), not {index!r}")
        return self._derive(self.embeds[index], self.mask[index])

    def to(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> TextEmbeddings:
        """The same captions on another device, in another floating point dtype.

        non_blocking: as in Tensor.to; from the CPU it helps after `pin_memory` only.
        """
        embeds = self.embeds.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return self._derive(embeds, self.mask.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> TextEmbeddings:
        """The same captions in page-locked memory of the CPU."""
        return self._derive(self.embeds.pin_memory(), self.mask.pin_memory())

    def where(self, keep: Tensor, other: TextEmbeddings) -> TextEmbeddings:
        """These captions where keep (B,) is true, else those of `other`, of (B or 1) captions of the same length L."""
        embeds = torch.where(keep[:, None, None], self.embeds, other.embeds)  # (B, L, E)
        return self._derive(embeds, torch.where(keep[:, None], self.mask, other.mask))  # mask (B, L)

    def padded(self, max_length: int) -> TextEmbeddings:
        """The same captions with L rounded up to a multiple of LENGTH_MULTIPLE, but to no more than max_length.

        The mask, and so the lengths, say the same as before. Longer text is returned unchanged.
        """
        return self._padded_to(padded_length(self.embeds.shape[1], max_length))

    def _padded_to(self, length: int) -> TextEmbeddings:
        missing = length - self.embeds.shape[1]
        embeds = F.pad(self.embeds, (0, 0, 0, missing))  # (B, length, E)
        return self._derive(embeds, F.pad(self.mask, (0, missing)))  # mask (B, length)

    @classmethod
    def from_list(cls, captions: Sequence[Tensor]) -> TextEmbeddings:
        """Pad one (L_i, E) per caption with zeros to the longest. Raises ValueError if E or dtype differ."""
        if not captions:
            raise ValueError("no captions: text embeddings need at least one")
        first = captions[0]
        for tokens in captions:
            if tokens.ndim != 2 or tokens.shape[1] != first.shape[-1] or tokens.dtype != first.dtype:
                raise ValueError(
                    f"captions must be (L, E) with the same E and dtype, got {tokens.dtype} {tuple(tokens.shape)} "
                    f"and {first.dtype} {tuple(first.shape)}"
                )
        embeds = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)  # (B, L, E)
        lengths = torch.tensor([len(tokens) for tokens in captions], device=embeds.device)
        mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]  # (B, L)
        return cls(embeds, mask)

    @classmethod
    def cat(cls, parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All captions of `parts` in order; L is the largest of theirs, E and dtype must agree (ValueError)."""
        kinds = {(part.embeds.dtype, part.embeds.shape[2]) for part in parts}
        if len(kinds) != 1:
            found = ", ".join(f"{dtype} of width {width}" for dtype, width in sorted(kinds, key=str)) or "none"
            raise ValueError(f"text embeddings can be joined if E and dtype agree, got {found}")
        length = max(part.embeds.shape[1] for part in parts)
        padded = [part._padded_to(length) for part in parts]
        embeds = torch.cat([part.embeds for part in padded])  # (B, L, E)
        return cls._derive(embeds, torch.cat([part.mask for part in padded]))  # mask (B, L)

    def unpadded(self) -> list[Tensor]:
        """One (L_i, E) tensor per caption."""
        return [row[:length] for row, length in zip(self.embeds, self.lengths.tolist())]  # (L_i, E) each

    def save(self, path: str | Path, captions: Sequence[str] | None = None) -> None:
        """Write safetensors without padding: tokens (sum of L_i, E), offsets (B + 1,), captions."""
        if captions is not None and len(captions) != len(self):
            raise ValueError(f"{len(captions)} captions for {len(self)} text embeddings")
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cpu().cumsum(0)])  # (B + 1,)
        metadata = {"format": "fastimagen.text"}
        if captions is not None:
            metadata["captions"] = json.dumps(list(captions))
        write_safetensors(path, {"tokens": self.embeds[self.mask], "offsets": offsets}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> TextEmbeddings:
        """Read what `save` wrote, onto the CPU. Raises ValueError for a missing, damaged or foreign file."""
        with _open_saved(path) as file:
            tokens, offsets = file.get_tensor("tokens"), file.get_tensor("offsets")
        return cls.from_list(tokens.split(offsets.diff().tolist()))

    @staticmethod
    def load_captions(path: str | Path) -> list[str] | None:
        """The captions stored by `save`, or None. Raises ValueError as `load` does."""
        with _open_saved(path) as file:
            captions = file.metadata().get("captions")
        return None if captions is None else json.loads(captions)


def _open_saved(path: str | Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(os.fspath(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read text embeddings {path}: {first_line(error)}") from error
    if (file.metadata() or {}).get("format") != "fastimagen.text":
        raise ValueError(f"{path} was not written by TextEmbeddings.save")
    return file


@dataclass(frozen=True, eq=False)
class PackedEmbeddings:
    """Embedded captions without padding, on the CPU: tokens (sum of L_i, E), lengths (B,) int64.

    One long caption makes most of a batch padding, which is neither written here nor copied to a GPU.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def from_list(cls, captions: Sequence[Tensor]) -> PackedEmbeddings:
        """From one (L_i, E) per caption, all of the same E and dtype."""
        assert len({(tokens.shape[1], tokens.dtype) for tokens in captions}) == 1, "captions of several encoders"
        return cls(torch.cat(list(captions)), torch.tensor([len(tokens) for tokens in captions]))

    def __len__(self) -> int:
        return len(self.lengths)

    def pin_memory(self) -> PackedEmbeddings:
        """The same captions in page-locked memory of the CPU."""
        return PackedEmbeddings(self.tokens.pin_memory(), self.lengths.pin_memory())

    def unpacked(self, device: torch.device, max_length: int | None = None) -> TextEmbeddings:
        """The captions on `device`, padded with zeros to the longest; with max_length as by TextEmbeddings.padded."""
        length = int(self.lengths.max())
        if max_length is not None:
            length = padded_length(length, max_length)
        lengths = self.lengths.to(device, non_blocking=True)  # (B,)
        steps = torch.arange(length, device=device)
        mask = steps < lengths[:, None]  # (B, L)
        rows = (lengths.cumsum(0) - lengths)[:, None] + steps  # (B, L), beyond the caption where it is padding
        tokens = self.tokens.to(device, non_blocking=True)[rows.clamp_(max=len(self.tokens) - 1)]  # (B, L, E)
        return TextEmbeddings._derive(tokens.masked_fill_(~mask[..., None], 0), mask)


def padded_length(length: int, max_length: int) -> int:
    """A number of tokens rounded up to a multiple of LENGTH_MULTIPLE, but to no more than max_length."""
    return max(length, min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length))
