"""A plain transformer over large patches of pixels, after JiT (Li and He 2025, arXiv 2511.13720), with text.

As in JiT: bottleneck patch embedding, rotary positions, normalized queries and keys, SwiGLU, modulation by the time
embedding. Differs from JiT: text in place of classes, by cross-attention or as tokens of the sequence; LayerNorm in
place of RMSNorm, which takes twice as long in PyTorch on a CPU; a branch is zero at the start because of its last
layer, and not because of its gate (adaLN-zero), which is 1.
"""

from __future__ import annotations

from collections import deque

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..network_config import PixelTransformerConfig
from ..text.embeddings import TextEmbeddings
from .attention import keys_and_values
from .conditioning import TextConditioning, TextState
from .layers import Film, Sinusoidal, positional_encoding
from .network import Network
from .rotary import rotate, rotation, without_position

TIME_FREQS = 256
"""Width of the sinusoidal time embedding, as in DiT and JiT."""

NUM_FREQS = 4
"""Frequencies of the positional encoding: half a period over the image, one, two, four."""


class TimeVector(nn.Sequential):
    """Time (B,) -> vector (B, T)."""

    def __init__(self, time_dim: int) -> None:
        super().__init__(
            Sinusoidal(TIME_FREQS), nn.Linear(TIME_FREQS, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )

    def forward(self, time: Tensor) -> Tensor:
        sinusoidal, linear, silu, to_vector = self
        embedding = sinusoidal(time).to(to_vector.weight.dtype)  # the angles stay fp32 in a bf16 network
        return to_vector(silu(linear(embedding)))  # (B, T)


class PatchAttention(nn.Module):
    """Multi-head self-attention with rotary positions and normalized queries and keys.

    The first num_text tokens are text; of these, attention reads the first text_lengths[b].
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.LayerNorm(dim // heads, bias=False)
        self.norm_k = nn.LayerNorm(dim // heads, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, turn: Tensor, num_text: int, text_lengths: Tensor | None) -> Tensor:
        """Normalized x (B, N, C) -> (B, N, C)."""
        qkv = rearrange(self.to_qkv(x), "b n (three a d) -> three b n a d", three=3, a=self.heads)  # (3, B, N, A, D)
        q, k, v = qkv.unbind()  # (B, N, A, D) each
        q, k = rotate(self.norm_q(q), turn), rotate(self.norm_k(k), turn)
        if num_text:
            out = ops.attention(
                q,
                k[:, num_text:],
                v[:, num_text:],
                context_k=k[:, :num_text],
                context_v=v[:, :num_text],
                context_lengths=text_lengths,
            )
        else:
            out = ops.attention(q, k, v)
        return self.to_out(rearrange(out, "b n a d -> b n (a d)"))  # (B, N, C)


class TextAttention(nn.Module):
    """Multi-head attention from image tokens to text tokens, with normalized queries and keys."""

    def __init__(self, dim: int, heads: int, cond_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.text_to_kv = nn.Linear(cond_dim, 2 * dim, bias=False)
        self.norm_q = nn.LayerNorm(dim // heads, bias=False)
        self.norm_k = nn.LayerNorm(dim // heads, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, A, D), of text tokens (B, L, K)."""
        k, v = keys_and_values(self.text_to_kv(tokens), self.heads)  # (B, L, A, D) each
        return self.norm_k(k), v

    def forward(self, x: Tensor, text_kv: tuple[Tensor, Tensor], text_lengths: Tensor | None) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        q = rearrange(self.to_q(self.norm(x)), "b n (a d) -> b n a d", a=self.heads)  # (B, N, A, D)
        text_k, text_v = text_kv
        out = ops.attention(self.norm_q(q), context_k=text_k, context_v=text_v, context_lengths=text_lengths)
        return self.to_out(rearrange(out, "b n a d -> b n (a d)"))  # (B, N, C)


class SwiGLU(nn.Module):
    """The feed-forward network (B, N, C) -> (B, N, C) of Shazeer 2020, "GLU variants improve transformer"."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = ops.halves(self.to_hidden(x), dim=-1)  # (B, N, hidden) each
        return self.to_out(F.silu(gate) * hidden)  # (B, N, C)


class Block(nn.Module):
    """Self-attention, cross-attention to text, feed-forward: each residual, the first and last modulated by time."""

    def __init__(self, config: PixelTransformerConfig, *, cross_attention: bool) -> None:
        super().__init__()
        dim = config.dim
        self.embedding_to_film = Film(config.time_dim or dim, 6 * dim)
        self.attention = PatchAttention(dim, config.heads)
        self.text_attention = TextAttention(dim, config.heads, config.cond_dim or dim) if cross_attention else None
        self.feed_forward = SwiGLU(dim, config.hidden_dim)
        nn.init.zeros_(self.embedding_to_film.weight)
        with torch.no_grad():
            self.embedding_to_film.bias.unflatten(0, (6, dim)).copy_(
                torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].expand(6, dim)
            )
        if config.zero_init:
            for branch in (self.attention, self.text_attention, self.feed_forward):
                if branch is not None:
                    nn.init.zeros_(branch.to_out.weight)

    def forward(
        self,
        x: Tensor,
        vector: Tensor,
        turn: Tensor,
        num_text: int,
        text_lengths: Tensor | None,
        text_kv: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x (B, N, C) and vector (B, T) -> (B, N, C). text_kv: what cross-attention reads, None without text."""
        film = rearrange(self.embedding_to_film(vector), "b (six c) -> six b c", six=6)  # (6, B, C)
        scale1, shift1, gate1, scale2, shift2, gate2 = film.unbind()  # (B, C) each
        h = self.attention(ops.modulated_norm(x, scale1, shift1), turn, num_text, text_lengths)  # (B, N, C)
        x = torch.addcmul(x, gate1[:, None], h)
        if self.text_attention is not None and text_kv is not None:
            x = x + self.text_attention(x, text_kv, text_lengths)
        h = self.feed_forward(ops.modulated_norm(x, scale2, shift2))  # (B, N, C)
        return torch.addcmul(x, gate2[:, None], h)


class PixelTransformer(Network):
    """Denoising transformer of one stage.

    Raises ValueError if the inputs of a call do not fit the configuration.
    """

    config: PixelTransformerConfig

    def __init__(self, config: PixelTransformerConfig) -> None:
        super().__init__(config)
        dim, time_dim = config.dim, config.time_dim or config.dim
        self._as_tokens = config.text_reading == "tokens"
        cond_dim = dim if self._as_tokens else config.cond_dim or dim
        patch_dim = config.channels * config.patch**2
        patch_inputs = patch_dim * (2 if config.lowres else 1)

        self.time_embedding = TimeVector(time_dim)
        self.lowres_time_embedding = TimeVector(time_dim) if config.lowres else None
        self.text: TextConditioning | None = None
        if config.text_dim:
            self.text = TextConditioning(config, cond_dim, time_dim, pooling=(config.heads, config.head_dim))
            self.norm_text = nn.LayerNorm(cond_dim)
        self.patch_embedding = (
            nn.Linear(patch_inputs, dim)
            if config.bottleneck is None
            else nn.Sequential(
                nn.Linear(patch_inputs, config.bottleneck, bias=False), nn.Linear(config.bottleneck, dim)
            )
        )
        self.positional_projection = nn.Linear(4 * NUM_FREQS, dim, bias=False) if config.positional_encoding else None
        reads = config.text_dim is not None and not self._as_tokens
        self.blocks = nn.ModuleList(
            Block(config, cross_attention=reads and index >= config.text_from) for index in range(config.depth)
        )
        self.embedding_to_film = Film(time_dim, 2 * dim)
        nn.init.zeros_(self.embedding_to_film.weight)
        nn.init.zeros_(self.embedding_to_film.bias)
        self.to_patch = nn.Linear(dim, patch_dim)
        if config.zero_init:
            nn.init.zeros_(self.to_patch.weight)
            nn.init.zeros_(self.to_patch.bias)

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextState:
        """Everything that depends on text and not on time. keep_text (B,) bool: False drops a caption."""
        self.check_text(text)
        assert self.text is not None
        tokens, lengths, vector = self.text(text, keep_text)
        tokens = self.norm_text(tokens)  # (B, L, K)
        if self._as_tokens:
            return TextState(vector, lengths, (), tokens)
        readers = [block.text_attention for block in self._blocks() if block.text_attention is not None]
        return TextState(vector, lengths, tuple(reader.project_text(tokens) for reader in readers))

    def denoise(
        self, x: Tensor, time: Tensor, text: TextState | None, lowres: Tensor | None, lowres_time: Tensor | None
    ) -> Tensor:
        vector = self.time_embedding(time)  # (B, T)
        if lowres is not None:
            assert self.lowres_time_embedding is not None
            vector = vector + self.lowres_time_embedding(lowres_time)
            x = torch.cat([x, lowres], dim=1)  # (B, 2 C, H, W)
        if text is not None:
            vector = vector + text.vector
        vector = F.silu(vector)  # (B, T)
        # One vector per film: their gradients are added in one sum and not one after the other.
        *vectors, final_vector = vector.expand(len(self.blocks) + 1, -1, -1).unbind()  # (B, T) each

        rows, columns = (side // self.config.patch for side in x.shape[-2:])
        patches = rearrange(x.to(self.to_patch.weight.dtype), "b c (h p) (w q) -> b (h w) (c p q)", h=rows, w=columns)
        tokens = self.patch_embedding(patches)  # (B, N, C)
        if self.positional_projection is not None:
            encoding = positional_encoding(rows, columns, NUM_FREQS, tokens)  # (1, 4 NUM_FREQS, rows, columns)
            tokens = tokens + self.positional_projection(rearrange(encoding, "1 f h w -> (h w) f"))
        tokens = self._run_blocks(tokens, vectors, text, rows, columns)  # (B, N, C)
        scale, shift = ops.halves(self.embedding_to_film(final_vector), dim=1)  # (B, C) each
        patches = self.to_patch(ops.modulated_norm(tokens, scale, shift))  # (B, N, C P P)
        return rearrange(
            patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=self.config.patch, q=self.config.patch
        )  # (B, C, H, W)

    def _run_blocks(self, x: Tensor, vectors: list[Tensor], state: TextState | None, rows: int, columns: int) -> Tensor:
        """The blocks on image tokens (B, N, C); from block text_from on, text tokens stand before these."""
        config = self.config
        turn = rotation(rows, columns, config.head_dim, config.rotary_range, x.device)  # (N, 1, D / 2, 2)
        lengths = None if state is None else state.lengths
        text_kv = deque(() if state is None else state.kv)
        num_text = 0
        for index, (block, vector) in enumerate(zip(self._blocks(), vectors, strict=True)):
            if index == config.text_from and state is not None and state.tokens is not None:
                num_text = state.tokens.shape[1]
                x = torch.cat([state.tokens, x], dim=1)  # (B, L + N, C)
                turn = torch.cat([without_position(num_text, turn), turn])  # (L + N, 1, D / 2, 2)
            kv = text_kv.popleft() if text_kv and block.text_attention is not None else None
            x = self.run_level(index, block, x, vector, turn, num_text, lengths, kv)
        return x[:, num_text:]  # (B, N, C)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]
