"""What every network of a stage is to its callers, whatever its kind."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..network_config import NetworkConfig
from ..text.embeddings import TextEmbeddings
from .conditioning import TextState


class Network(nn.Module):
    """A denoising network: a noisy image, its time and the text in, the prediction of the stage's objective out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextState:
        """Everything that depends on text and not on time. keep_text (B,) bool: False drops a caption."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        *,
        text: TextEmbeddings | TextState | None = None,
        lowres: Tensor | None = None,
        lowres_time: Tensor | None = None,
        keep_text: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) at `time` (B,) -> output (B, C, H, W).

        time is the number that the sinusoidal embedding gets: the step of a discrete schedule, or 1000 t. lowres
        (B, C, H, W) is resized to x, in [-1, 1] and noised at lowres_time (B,). keep_text (B,) bool: False drops the
        caption. text=None does not use the text path at all. Raises ValueError if the inputs do not fit the
        configuration.
        """
        self.check_inputs(x, text, keep_text, lowres, lowres_time)
        state = self.encode_text(text, keep_text) if isinstance(text, TextEmbeddings) else text
        return self.denoise(x, time, state, lowres, lowres_time)

    def denoise(
        self, x: Tensor, time: Tensor, text: TextState | None, lowres: Tensor | None, lowres_time: Tensor | None
    ) -> Tensor:
        """`forward`, for inputs that fit the configuration and text that is encoded."""
        raise NotImplementedError

    def run_level(self, index: int, level: nn.Module, *inputs: Any) -> Any:
        """Call a level or block, with activation checkpointing if checkpoint_levels has its index."""
        if index in self.config.checkpoint_levels and self.training:
            return checkpoint(level, *inputs, use_reentrant=False)
        return level(*inputs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """nn.Module.compile, with each call of einops as one node of the graph.

        torch.compile would trace how einops reads every pattern, for half of its time, and compile the first graph
        twice, because einops registers a type of tensor at the first call with it.
        """
        for operation in (rearrange, repeat):
            torch.compiler.allow_in_graph(operation)
        super().compile(*args, **kwargs)

    def check_text(self, text: TextEmbeddings) -> None:
        """Raise ValueError if the network cannot read the text embeddings."""
        if self.config.text_dim is None:
            raise ValueError("this network has no text path (text_dim is not set), but text was given")
        if text.embeds.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"text embeddings are {text.embeds.shape[-1]} wide, but the network was built for "
                f"text_dim {self.config.text_dim}"
            )

    def check_inputs(
        self,
        x: Tensor,
        text: TextEmbeddings | TextState | None,
        keep_text: Tensor | None,
        lowres: Tensor | None,
        lowres_time: Tensor | None,
    ) -> None:
        """Raise ValueError if the arguments of a call do not fit the configuration or each other."""
        if x.shape[1] != self.config.channels:
            raise ValueError(f"images have {x.shape[1]} channels, but the network was built for {self.config.channels}")
        if text is not None and len(text) != len(x):
            raise ValueError(f"{len(text)} texts for {len(x)} images")
        if keep_text is not None and not isinstance(text, TextEmbeddings):
            raise ValueError(
                "keep_text needs TextEmbeddings: the captions of a TextState are dropped when it is encoded"
            )
        if self.config.lowres and lowres is None:
            raise ValueError("this network needs lowres and lowres_time")
        if not self.config.lowres and lowres is not None:
            raise ValueError("this network is not built for a low-resolution image, but lowres was given")
        if (lowres is None) != (lowres_time is None):
            raise ValueError("lowres and lowres_time must be given together")
        if lowres is not None and lowres.shape != x.shape:
            raise ValueError(f"lowres must be resized to x: {tuple(lowres.shape)} against {tuple(x.shape)}")
        if x.shape[-1] % self.config.stride or x.shape[-2] % self.config.stride:
            raise ValueError(
                f"image sides {tuple(x.shape[-2:])} must be multiples of {self.config.stride}, the total "
                f"stride of this network"
            )
