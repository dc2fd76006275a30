"""A batch of training samples, as the loader makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..images import from_uint8
from ..network_config import NetworkConfig
from ..text.embeddings import PackedEmbeddings, TextEmbeddings

Origin = tuple[int, int]
"""Where a sample is: (shard, index)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples.

    images (B, C, H, W): uint8; packed: None if the loader has no embeddings; positions (B,): int64, in the
    data order; keys: of the samples, or of the replacement if an image was unreadable; origins: where these are;
    loss_weights (B,): factors on their losses, None if all are 1.
    """

    images: Tensor
    packed: PackedEmbeddings | None
    positions: Tensor
    keys: list[str]
    origins: Sequence[Origin] = ()
    loss_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def text(self) -> TextEmbeddings | None:
        """The embeddings on the CPU, padded to the longest caption."""
        return None if self.packed is None else self.packed.unpacked(torch.device("cpu"))

    def images_for(self, device: torch.device) -> Tensor:
        """The images (B, C, H, W) on `device`, float32 in [-1, 1]. uint8 is a quarter of the bytes to copy, and copies
        from pinned memory do not block."""
        return from_uint8(self.images.to(device, non_blocking=True))

    def weighted(self, losses: Tensor) -> Tensor:
        """The losses (B,) with the weights of the samples' data sets."""
        if self.loss_weights is None:
            return losses
        return losses * self.loss_weights.to(losses.device, losses.dtype, non_blocking=True)

    def text_for(self, unet: NetworkConfig, device: torch.device) -> TextEmbeddings | None:
        """The embeddings on `device`, or None for a U-Net without text path.

        They are padded (TextEmbeddings.padded), except on a CPU: nothing is compiled there, and padding costs time.
        """
        if unet.text_dim is None:
            return None
        assert self.packed is not None, "a text-conditioned U-Net needs a loader with embeddings"
        return self.packed.unpacked(device, None if device.type == "cpu" else unet.max_text_length)
