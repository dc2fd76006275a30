"""The U-Net of DeepFloyd IF, base and super-resolution: ADM's blocks (Dhariwal and Nichol 2021) with attention to text.

Modules are named as in diffusers' UNet2DConditionModel, so that weights go both ways by name (interop/deepfloyd.py).
Text padding is not masked: the network was trained to read the text encoder's outputs for padding like words.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..network_config import IFUNetConfig
from ..text.embeddings import TextEmbeddings
from .attention import to_map, to_tokens
from .conditioning import TextState
from .convolution import Conv2d, PointwiseConv, convolutions_add_bias
from .layers import Film, NormWeights
from .network import Network

KV = tuple[Tensor, Tensor]
"""Keys and values (B, L, A, D) of the text for one attention."""


class GroupNormGELU(NormWeights):
    """gelu(GroupNorm(x + x_bias) * (1 + scale) + shift) for x (B, C, H, W); film (B, 2 C) is scale and shift."""

    def forward(
        self, x: Tensor, film: Tensor | None = None, film_bias: Tensor | None = None, x_bias: Tensor | None = None
    ) -> Tensor:
        scale, shift = (None, None) if film is None else ops.halves(film, dim=1)  # (B, C) each
        return ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            self.groups,
            scale=scale,
            shift=shift,
            activation="gelu",
            film_bias=film_bias,
            x_bias=x_bias,
        )


class GroupNorm(NormWeights):
    """GroupNorm of x (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, activation="none")


class TokenNorm(NormWeights):
    """GroupNorm of tokens (B, L, X): the statistics are over a group's channels and over all L tokens, padding too."""

    def forward(self, tokens: Tensor) -> Tensor:
        channels_first = rearrange(tokens, "b l x -> b x l")  # (B, X, L)
        normed = F.group_norm(channels_first, self.groups, self.weight, self.bias)
        return rearrange(normed, "b x l -> b l x")  # (B, L, X)


class EmbeddingMLP(nn.Module):
    """A number (B,) -> vector (B, T): cosines and sines, linear, GELU, linear."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        index = torch.arange(half, device=time.device, dtype=torch.float32)  # (dim / 2,)
        angle = time.float()[:, None] * torch.exp(index * (-math.log(10000) / half))  # (B, dim / 2)
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim); the angles stay fp32 in a bf16 network
        return self.linear_2(F.gelu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))  # (B, T)


class TextPool(nn.Module):
    """Text (B, L, E) -> (B, E): attention whose query is the mean of the tokens, which is also a key."""

    def __init__(self, text_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, text_dim) / text_dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(text_dim, text_dim) for _ in range(3))

    def forward(self, text: Tensor) -> Tensor:
        mean = text.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, E)
        tokens = torch.cat([mean, text], dim=1)  # (B, 1 + L, E)
        q, k, v = (_heads(y, self.heads) for y in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens)))
        return rearrange(ops.attention(q, k, v), "b 1 heads d -> b (heads d)")  # (B, E)


class TextVector(nn.Module):
    """Text (B, L, E) -> the vector (B, T) that is added to the time embedding."""

    def __init__(self, config: IFUNetConfig, time_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.text_dim)
        self.pool = TextPool(config.text_dim, config.pool_heads)
        self.proj = nn.Linear(config.text_dim, time_dim)
        self.norm2 = nn.LayerNorm(time_dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))  # (B, T)


class Resnet(nn.Module):
    """Residual block: x (B, I, H, W), or x and a skip behind it, and vector (B, T) -> (B, O, H', W').

    resample "down" or "up" halves or doubles height and width on both branches, before the first convolution.
    """

    def __init__(self, config: IFUNetConfig, dim_in: int, dim_out: int, time_dim: int, resample: str = "none") -> None:
        super().__init__()
        self.resample, self.divisor = resample, config.residual_divisor
        self.norm1 = GroupNormGELU(dim_in, config.groups)
        self.conv1 = Conv2d(dim_in, dim_out, 3, padding=1)
        self.time_emb_proj = Film(time_dim, 2 * dim_out)
        self.norm2 = GroupNormGELU(dim_out, config.groups)
        self.conv2 = Conv2d(dim_out, dim_out, 3, padding=1, zero_init=config.zero_init)
        self.conv_shortcut = PointwiseConv(dim_in, dim_out) if dim_in != dim_out else None

    def forward(self, x: Tensor, vector: Tensor, skip: Tensor | None = None) -> Tensor:
        plain = convolutions_add_bias(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # (B, I, H, W)
        h = self._resampled(self.norm1(x))  # (B, I, H', W')
        x = self._resampled(x)  # (B, I, H', W')
        h = self.conv1(h, add_bias=plain)  # (B, O, H', W')
        film = self.time_emb_proj(vector, add_bias=plain)  # (B, 2 O)
        h = self.norm2(h, film, None if plain else self.time_emb_proj.bias, None if plain else self.conv1.bias)
        h = self.conv2(h)  # (B, O, H', W')
        total = ops.add_residual(h, x if self.conv_shortcut is None else self.conv_shortcut(x))
        return total if self.divisor == 1 else total / self.divisor

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x


class Attention(nn.Module):
    """Image tokens attend to the text and to each other: x (B, C, H, W) -> x + attention, (B, C, H, W)."""

    def __init__(self, config: IFUNetConfig, dim: int, slot: int) -> None:
        super().__init__()
        context_dim = config.context_dim or config.dims[-1]
        self.heads, self.slot = dim // config.head_dim, slot
        self.group_norm = GroupNorm(dim, config.groups)
        self.norm_cross = TokenNorm(context_dim, config.groups)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = None if config.only_cross_attention else nn.Linear(dim, dim)
        self.to_v = None if config.only_cross_attention else nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(context_dim, dim)
        self.add_v_proj = nn.Linear(context_dim, dim)
        out = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([out])
        if config.zero_init:
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def project_text(self, tokens: Tensor) -> KV:
        """Keys and values, each (B, L, A, D), of text tokens (B, L, X)."""
        tokens = self.norm_cross(tokens)
        return _heads(self.add_k_proj(tokens), self.heads), _heads(self.add_v_proj(tokens), self.heads)

    def forward(self, x: Tensor, text: tuple[KV, ...]) -> Tensor:
        tokens = to_tokens(self.group_norm(x))  # (B, N, C)
        q = _heads(self.to_q(tokens), self.heads)  # (B, N, A, D)
        k = v = None
        if self.to_k is not None and self.to_v is not None:
            k, v = _heads(self.to_k(tokens), self.heads), _heads(self.to_v(tokens), self.heads)  # (B, N, A, D) each
        text_k, text_v = text[self.slot]
        out = ops.attention(q, k, v, context_k=text_k, context_v=text_v)  # (B, N, A, D)
        out = self.to_out[0](rearrange(out, "b n heads d -> b n (heads d)"))  # (B, N, C)
        return x + to_map(out, x)


class Level(nn.Module):
    """The blocks of one resolution. Base class of DownLevel and UpLevel."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def block(self, index: int, x: Tensor, vector: Tensor, text: tuple[KV, ...], skip: Tensor | None = None) -> Tensor:
        """Residual block `index`, and the attention behind it if the level has attention."""
        x = self.resnets[index](x, vector, skip)
        return self.attentions[index](x, text) if len(self.attentions) else x


class DownLevel(Level):
    """x (B, I, H, W) -> x (B, O, H', W') and skips: the output of every block."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention], down: Resnet | None) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if down is None else [down])

    def forward(self, x: Tensor, vector: Tensor, text: tuple[KV, ...]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self.block(index, x, vector, text)
            skips.append(x)
        for down in self.downsamplers:
            x = down(x, vector)
            skips.append(x)
        return x, skips


class UpLevel(Level):
    """x (B, I, H, W) and one skip for each block, the last of them first -> (B, O, H', W')."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention], up: Resnet | None) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(self, x: Tensor, vector: Tensor, text: tuple[KV, ...], skips: list[Tensor]) -> Tensor:
        for index, skip in enumerate(skips):
            x = self.block(index, x, vector, text, skip)
        for up in self.upsamplers:
            x = up(x, vector)
        return x


class Middle(Level):
    """Residual block, attention, residual block."""

    def forward(self, x: Tensor, vector: Tensor, text: tuple[KV, ...]) -> Tensor:
        x = self.block(0, x, vector, text)
        return self.resnets[1](x, vector)


class IFUNet(Network):
    """Denoising U-Net of one stage of DeepFloyd IF. The output has 2 C channels if it has a learned variance.

    Raises ValueError if the inputs of a call do not fit the configuration.
    """

    config: IFUNetConfig

    def __init__(self, config: IFUNetConfig) -> None:
        super().__init__(config)
        dims, context_dim = config.dims, config.context_dim or config.dims[-1]
        self._time_dim = time_dim = config.time_dim or 4 * dims[0]
        self._slots = 0
        self.time_embedding = EmbeddingMLP(dims[0], time_dim)
        self.class_embedding = EmbeddingMLP(dims[0], time_dim) if config.lowres else None
        self.encoder_hid_proj = nn.Linear(config.text_dim, context_dim)
        self.add_embedding = TextVector(config, time_dim)
        self.conv_in = Conv2d(config.channels * (2 if config.lowres else 1), dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(self._down_level(level) for level in range(len(dims)))
        middle = [Resnet(config, dims[-1], dims[-1], time_dim) for _ in range(2)]
        self.mid_block = Middle(middle, [self._attention(dims[-1])])
        self.up_blocks = nn.ModuleList(self._up_level(level) for level in reversed(range(len(dims))))
        self.conv_norm_out = GroupNormGELU(dims[0], config.groups)
        self.conv_out = Conv2d(dims[0], config.out_channels, 3, padding=1, zero_init=config.zero_init)

    # ---- construction

    def _attention(self, dim: int) -> Attention:
        self._slots += 1
        return Attention(self.config, dim, self._slots - 1)

    def _attentions(self, level: int, count: int) -> list[Attention]:
        return [self._attention(self.config.dims[level]) for _ in range(count if self.config.attention[level] else 0)]

    def _resnet(self, dim_in: int, dim_out: int, resample: str = "none") -> Resnet:
        return Resnet(self.config, dim_in, dim_out, self._time_dim, resample)

    def _down_level(self, level: int) -> DownLevel:
        dims, count = self.config.dims, self.config.blocks[level]
        before, dim = dims[max(level - 1, 0)], dims[level]
        resnets = [self._resnet(dim if index else before, dim) for index in range(count)]
        down = self._resnet(dim, dim, "down") if level < len(dims) - 1 else None
        return DownLevel(resnets, self._attentions(level, count), down)

    def _up_level(self, level: int) -> UpLevel:
        """One block more than on the way down: its skip is the input of the level there."""
        dims, count = self.config.dims, self.config.blocks[level] + 1
        dim, below, before = dims[level], dims[min(level + 1, len(dims) - 1)], dims[max(level - 1, 0)]
        skips = [dim] * (count - 1) + [before]
        resnets = [self._resnet((dim if index else below) + skip, dim) for index, skip in enumerate(skips)]
        return UpLevel(resnets, self._attentions(level, count), self._resnet(dim, dim, "up") if level else None)

    # ---- calls

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextState:
        """See Network.encode_text. Raises ValueError for another length, and for keep_text: there is no null text."""
        self.check_text(text)
        if keep_text is not None:
            raise ValueError("this network has no null text: give the embeddings of the empty caption instead")
        length = self.config.max_text_length
        if text.embeds.shape[1] != length:
            raise ValueError(
                f"this network reads {length} text tokens, padding included, but got {text.embeds.shape[1]}: encode "
                f'captions with text.encoding "if" and text.max_length {length}'
            )
        embeds = text.embeds.to(self.encoder_hid_proj.weight.dtype)  # (B, L, E)
        tokens = self.encoder_hid_proj(embeds)  # (B, L, X)
        attentions = sorted((m for m in self.modules() if isinstance(m, Attention)), key=lambda module: module.slot)
        return TextState(self.add_embedding(embeds), None, tuple(module.project_text(tokens) for module in attentions))

    def denoise(
        self, x: Tensor, time: Tensor, text: TextState | None, lowres: Tensor | None, lowres_time: Tensor | None
    ) -> Tensor:
        if text is None:
            raise ValueError("this network has no path without text: give the embeddings of the empty caption")
        vector = self.time_embedding(time)  # (B, T)
        if lowres is not None:
            assert self.class_embedding is not None and lowres_time is not None
            vector = vector + self.class_embedding(lowres_time)
            x = torch.cat([x, lowres], dim=1)  # (B, 2 C, H, W)
        vector = F.gelu(vector + text.vector)  # (B, T): every block modulates from it
        x = x.to(self.conv_out.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)  # (B, dims[0], H, W)
        skips = [x]
        for index, level in enumerate(self.down_blocks):
            x, level_skips = self.run_level(index, level, x, vector, text.kv)
            skips += level_skips
        x = self.mid_block(x, vector, text.kv)
        for index, level in zip(reversed(range(len(self.up_blocks))), self.up_blocks):
            assert isinstance(level, UpLevel)
            x = self.run_level(index, level, x, vector, text.kv, [skips.pop() for _ in level.resnets])
        return self.conv_out(self.conv_norm_out(x))  # (B, C or 2 C, H, W)


def _heads(y: Tensor, heads: int) -> Tensor:
    """(B, J, A D) -> (B, J, A, D)."""
    return rearrange(y, "b j (heads d) -> b j heads d", heads=heads)  # (B, J, A, D)
