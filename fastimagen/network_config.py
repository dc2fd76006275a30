"""The networks of a stage, as sections of the configuration.

Every kind of network is one subclass of NetworkConfig, whose field `kind` names it. `AnyNetworkConfig`, at the end, is
the type of a stage's `unet`; networks/build.py builds the network of each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from . import config_rules
from .section import Section

T = TypeVar("T", int, bool)


class NetworkConfig(Section):
    """What every network of a stage has, whatever its kind."""

    channels: int = Field(3, ge=1)
    """Image channels, in and out. Stages have 3 for colour or 1 for grey: files of the other kind are converted, and
    transparent pixels are blended with white."""
    lowres: bool = False
    """Whether the network takes a low-resolution image as a second input (super-resolution)."""
    text_dim: int | None = Field(None, ge=1)
    """Width of the text embeddings (T5-XXL: 4096); None builds a network without text conditioning."""
    max_text_length: int = Field(256, ge=1)
    """Largest number of text tokens; longer text is an error."""

    checkpoint_levels: tuple[int, ...] = ()
    """Levels of a U-Net, or blocks of a transformer, with activation checkpointing: the backward pass recomputes their
    activations to save memory."""

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        raise NotImplementedError

    @property
    def sees_positions(self) -> bool:
        """Whether the network knows where in the whole image a pixel is, so that it fits no crops and no tiles."""
        return False

    @property
    def has_null_text(self) -> bool:
        """Whether the network has learned what stands for a dropped caption. If not, it is the empty caption."""
        return True

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: the prediction, and what else a subclass appends."""
        return self.channels


class UNetConfig(NetworkConfig):
    """One U-Net. Presets (presets.py) give MinImagen's and the paper's networks."""

    kind: Literal["unet"] = "unet"
    """The network that this section describes."""
    dim: int = Field(128, ge=2)
    """Channels after the stem; level i has dim * dim_mults[i]."""
    dim_mults: tuple[int, ...] = (1, 2, 4)
    """Channels of each resolution level, as multiples of dim."""
    num_blocks: int | tuple[int, ...] = 1
    """Residual blocks of each level in addition to its first; one number for all levels, or one per level."""
    self_attention: bool | tuple[bool, ...] = True
    """Whether a level ends with a transformer block (self-attention and feed-forward); one value, or one per level."""
    cross_attention: bool | tuple[bool, ...] = True
    """Whether the first residual block of a level has cross-attention to the text; one value, or one per level."""
    middle_attention: bool = False
    """Self-attention between the two middle blocks."""
    heads: int = Field(8, ge=1)
    """Query heads of self-attention and attention pooling."""
    cross_heads: int | None = Field(None, ge=1)
    """Heads of cross-attention; None takes heads."""
    head_dim: int = Field(64, ge=16, le=128, multiple_of=8)
    """Channels per head."""
    cond_dim: int | None = Field(None, ge=1)
    """Width of the conditioning tokens (time and text); None takes dim."""
    time_tokens: int = Field(2, ge=1)
    """Number of conditioning tokens from the time embedding, and as many from the time of the low-res image."""
    stem_kernels: tuple[int, ...] = (3, 7, 15)
    """Odd kernel sizes of the parallel convolutions of the stem; the paper has a single 3x3 convolution."""
    downsample_first: bool = False
    """Efficient U-Net: downsample before the blocks of a level, upsample after them (Imagen, appendix B.1)."""
    full_resolution: Literal["plain", "extra_block"] = "plain"
    """Layers of an Efficient U-Net at full resolution besides stem and last block. "extra_block" adds a residual
    block after the stem, its skip connection, and the low-res image before the last convolution, which prevents
    colour shift."""
    stem_stride: int = Field(1, ge=1)
    """Patch side folded into channels before the stem (pixel-unshuffle) and unfolded after the last convolution."""
    positional_encoding: bool = False
    """Add sines and cosines of every pixel's position, through a 1x1 convolution, to the stem's output. Small networks
    learn words like "left" sooner. Not allowed for stages that train on crops."""
    groups: int = Field(8, ge=1)
    """Groups of GroupNorm."""
    text_padding: Literal["none", "null"] = "none"
    """"none": a sample attends to its real tokens only; "null": to max_text_length tokens, with padding replaced by
    learned null tokens (MinImagen)."""
    text_pooling: Literal["mean", "attention"] = "attention"
    """How text tokens become the vector that is added to the time embedding (Imagen, section 2.5: attention)."""
    text_in_self_attention: bool = False
    """Text keys and values inside self-attention, as in the paper's 64 and 256 models (appendix B)."""
    qk_norm: bool = False
    """l2-normalize queries and keys, with learned scales per channel."""
    zero_init: bool = True
    """Initialize the last layer of every residual branch, and of the network, to zero: the first output is zero."""

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        config_rules.check_unet(self)
        return self

    def per_level(self, value: T | tuple[T, ...]) -> tuple[T, ...]:
        """One value for each level, from a field that may hold a single value for all."""
        return value if isinstance(value, tuple) else (value,) * len(self.dim_mults)

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        halvings = len(self.dim_mults) - (0 if self.downsample_first else 1)
        return self.stem_stride * 2**halvings

    @property
    def sees_positions(self) -> bool:
        """Whether the network knows where in the whole image a pixel is."""
        return self.positional_encoding


class PixelTransformerConfig(NetworkConfig):
    """One transformer over patches of pixels, after JiT (Li and He 2025, "Back to Basics")."""

    kind: Literal["pixel_transformer"]
    """The network that this section describes."""
    patch: int = Field(16, ge=1)
    """Side of a patch in pixels; a patch is one token."""
    bottleneck: int | None = Field(None, ge=1)
    """Width that a patch is reduced to before it is embedded (JiT: 128 or 256); None embeds it directly."""
    dim: int = Field(768, ge=8)
    """Width of the tokens."""
    depth: int = Field(12, ge=1)
    """Transformer blocks."""
    heads: int = Field(12, ge=1)
    """Attention heads, of dim / heads channels each."""
    hidden: int | None = Field(None, ge=1)
    """Hidden width of the feed-forward networks (SwiGLU); None takes 8/3 dim, rounded down to a multiple of 32."""
    time_dim: int | None = Field(None, ge=1)
    """Width of the time embedding; None takes dim."""
    text_reading: Literal["cross_attention", "tokens"] = "cross_attention"
    """"cross_attention": blocks attend to the text after the image; "tokens": text tokens join the image's in the
    sequence."""
    text_from: int = Field(0, ge=0)
    """First block that reads text."""
    cond_dim: int | None = Field(None, ge=1)
    """Width of the text tokens that cross-attention reads; None takes dim."""
    positional_encoding: bool = False
    """Add sines and cosines of every patch's position in the image to its token. Small networks learn words like "left"
    sooner. Not allowed for stages that train on crops: there, rotary positions alone say where patches lie."""
    rotary_range: int = Field(16, ge=1)
    """Distance in patches at which the slowest rotary frequency has turned by half a circle: the image side in
    patches."""
    zero_init: bool = True
    """Initialize the last layer of every residual branch, and of the network, to zero: the first output is zero."""

    @model_validator(mode="after")
    def _consistent(self) -> PixelTransformerConfig:
        config_rules.check_pixel_transformer(self)
        return self

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward networks."""
        return self.hidden or max(32, 8 * self.dim // 3 // 32 * 32)

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        return self.patch

    @property
    def sees_positions(self) -> bool:
        """Whether the network knows where in the whole image a pixel is."""
        return self.positional_encoding


class IFUNetConfig(NetworkConfig):
    """A U-Net of DeepFloyd IF, which diffusers can load (docs/deepfloyd.md)."""

    kind: Literal["if"]
    """The network that this section describes."""
    text_dim: int = Field(4096, ge=1)
    """Width of the text embeddings (T5-XXL: 4096)."""
    max_text_length: int = Field(77, ge=1)
    """Number of text tokens. The network reads padding like words: text has this length exactly, with the encoder's
    outputs for padding (text.encoding "if")."""
    dims: tuple[int, ...] = (192, 384, 576, 768)
    """Channels of each resolution level."""
    num_blocks: int | tuple[int, ...] = 3
    """Residual blocks of each level on the way down, and one more on the way up; one number, or one per level."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Whether attention to text and image follows the residual blocks of a level."""
    only_cross_attention: bool = False
    """Attention to the text alone."""
    head_dim: int = Field(64, ge=8, le=128, multiple_of=8)
    """Channels per head of attention to text and image."""
    pool_heads: int = Field(64, ge=1)
    """Heads of the attention that pools the text."""
    context_dim: int | None = Field(None, ge=1)
    """Channels of the text tokens that attention reads; None takes those of the last level."""
    time_dim: int | None = Field(None, ge=1)
    """Width of the time embedding; None takes 4 times the channels of the first level."""
    groups: int = Field(32, ge=1)
    """Groups of GroupNorm."""
    residual_divisor: float = Field(1.0, gt=0)
    """The sum at the end of a residual block is divided by this; the second stages of IF have 1 / 0.7071."""
    learned_variance: bool = True
    """Whether the output has as many channels again, for the variance of the sampler's steps."""
    zero_init: bool = True
    """Initialize the last layer of every residual branch, and of the network, to zero: the first output is zero."""

    @model_validator(mode="after")
    def _consistent(self) -> IFUNetConfig:
        config_rules.check_if_unet(self)
        return self

    @property
    def blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way down."""
        return self.num_blocks if isinstance(self.num_blocks, tuple) else (self.num_blocks,) * len(self.dims)

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        return 2 ** (len(self.dims) - 1)

    @property
    def has_null_text(self) -> bool:
        """Whether the network has learned what stands for a dropped caption: IF has not."""
        return False

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: the prediction, and behind it the variance."""
        return 2 * self.channels if self.learned_variance else self.channels


class LoraConfig(Section):
    """Low-rank adapters of linear layers, trained in place of the network, which stays as it is (Hu et al. 2021)."""

    rank: int = Field(16, ge=1)
    """Rank of the matrix that is added to a layer's weight."""
    alpha: float | None = Field(None, gt=0)
    """The added matrix is multiplied by alpha / rank; None takes the rank, as diffusers' training scripts do."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Linear layers that get adapters, by the end of their names, such as "to_q"; None takes all of attention."""

    @property
    def scale(self) -> float:
        """Factor on the added matrix."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _kind_of_network(value: Any) -> str:
    """The tag of a network's section: its kind. Sections without one are U-Nets, as in files from before there were
    kinds."""
    kind = value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", "unet")
    return f"<{kind}>"


AnyNetworkConfig = Annotated[
    Annotated[UNetConfig, Tag("<unet>")]
    | Annotated[PixelTransformerConfig, Tag("<pixel_transformer>")]
    | Annotated[IFUNetConfig, Tag("<if>")],
    Discriminator(
        _kind_of_network,
        custom_error_type="network_kind",
        custom_error_message='kind must be "unet", "pixel_transformer" or "if"',
    ),
]
"""The network of a stage. A further kind needs its section above, its tag here, and its class in networks/build.py."""
