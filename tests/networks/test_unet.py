"""The U-Net: dependence of the output on its inputs, gradients, precision, layouts, and errors for invalid inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fastimagen.network_config import UNetConfig
from fastimagen.networks.attention import AttentionPooling, Context, SelfAttention
from fastimagen.networks.unet import UNet
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import TOY_UNET

B, D = 3, 64
LENGTHS = torch.tensor([4, 1, 2])
TIME = torch.tensor([0.0, 123.5, 999.0])

# Each optional part of the network is in at least one of these.
VARIANTS: dict[str, dict[str, Any]] = {
    "regular": {},
    "minimagen": dict(
        text_padding="null", max_text_length=9, text_pooling="mean", stem_kernels=(3, 7, 15), cross_heads=2
    ),
    "mean pooling": dict(text_pooling="mean", middle_attention=True),
    "text in self-attention": dict(
        text_in_self_attention=True, cross_attention=False, qk_norm=True, middle_attention=True
    ),
    "patches": dict(stem_stride=2, positional_encoding=True, num_blocks=(0, 2)),
    "wider first level": dict(dim_mults=(2, 3), time_tokens=3, self_attention=True),
    "efficient": dict(
        lowres=True,
        downsample_first=True,
        dim_mults=(2, 1, 3),
        num_blocks=(1, 0, 2),
        self_attention=True,
        cross_attention=True,
    ),
    "extra_block": dict(
        lowres=True,
        downsample_first=True,
        full_resolution="extra_block",
        stem_stride=2,
        qk_norm=True,
        text_in_self_attention=True,
    ),
    "without text": dict(text_dim=None),
}


def network(seed: int = 0, **changes: Any) -> UNet:
    """A toy U-Net with an output other than zero: all parameters are random, also gains and null keys."""
    torch.manual_seed(seed)
    unet = UNet(UNetConfig(**{**TOY_UNET, "zero_init": False, **changes}))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def captions(lengths: Tensor = LENGTHS, seed: int = 1, dtype: torch.dtype = torch.float32) -> TextEmbeddings:
    torch.manual_seed(seed)
    return TextEmbeddings.from_list([torch.randn(length, D).to(dtype) for length in lengths.tolist()])


def inputs(unet: UNet, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments of `unet`: x and time, and for super-resolution lowres and lowres_time."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, B, unet.config.channels, 16, 16, generator=generator, dtype=dtype)
    found = {"x": images[0], "time": TIME}
    return found | {"lowres": images[1], "lowres_time": TIME.flip(0)} if unet.config.lowres else found


def padded(text: TextEmbeddings, length: int, filler: float) -> TextEmbeddings:
    """The same captions padded to `length` tokens with the value `filler`."""
    missing = length - text.embeds.shape[1]
    mask = F.pad(text.mask, (0, missing))
    return TextEmbeddings(F.pad(text.embeds, (0, 0, 0, missing)).masked_fill(~mask[..., None], filler), mask)


# ---- text


@pytest.mark.parametrize("name", ["regular", "mean pooling", "text in self-attention", "minimagen"])
@torch.inference_mode()
def test_padding_of_the_batch_does_not_change_the_output(name: str) -> None:
    unet, text = network(**VARIANTS[name]).double(), captions(dtype=torch.float64)
    given = inputs(unet, torch.float64)
    exact = unet(**given, text=text)
    for filler in (0.0, 1e3, math.nan):
        torch.testing.assert_close(unet(**given, text=padded(text, 9, filler)), exact, rtol=0, atol=1e-12)
    alone = torch.cat(
        [
            unet(given["x"][i : i + 1], TIME[i : i + 1], text=TextEmbeddings.from_list([tokens]))
            for i, tokens in enumerate(text.unpadded())
        ]
    )
    torch.testing.assert_close(alone, exact, rtol=0, atol=1e-12)


def test_nan_in_padding_does_not_reach_gradients() -> None:
    for name in ("regular", "mean pooling", "minimagen"):
        unet = network(**VARIANTS[name])
        unet(**inputs(unet), text=padded(captions(), 9, math.nan)).sum().backward()
        assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None), name


@pytest.mark.parametrize("name", ["regular", "mean pooling", "text in self-attention", "minimagen"])
@torch.inference_mode()
def test_all_dropped_captions_give_the_same_output(name: str) -> None:
    unet, text = network(**VARIANTS[name]).double(), captions(dtype=torch.float64)
    x, time = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(B, -1, -1, -1), torch.full((B,), 77.0)
    kept = unet(x, time, text=text)
    dropped = unet(x, time, text=text, keep_text=torch.zeros(B, dtype=torch.bool))
    other = unet(
        x,
        time,
        text=captions(torch.tensor([7, 2, 3]), seed=5, dtype=torch.float64),
        keep_text=torch.zeros(B, dtype=torch.bool),
    )
    torch.testing.assert_close(dropped, dropped[:1].expand_as(dropped), rtol=0, atol=1e-12)
    torch.testing.assert_close(other, dropped, rtol=0, atol=1e-12)
    keep = torch.tensor([False, True, False])
    mixed = unet(x, time, text=text, keep_text=keep)
    torch.testing.assert_close(mixed, torch.where(keep[:, None, None, None], kept, dropped), rtol=0, atol=1e-12)
    assert min((a - b).abs().max() for a, b in ((kept[0], kept[1]), (kept[0], dropped[0]))) > 1e-3


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "without text"])
@torch.inference_mode()
def test_encoding_text_in_advance_gives_the_same_bits(name: str) -> None:
    unet, keep = network(**VARIANTS[name]), torch.tensor([True, False, True])
    state = unet.encode_text(captions(), keep)
    assert torch.equal(unet(**inputs(unet), text=state), unet(**inputs(unet), text=captions(), keep_text=keep))


@torch.inference_mode()
def test_call_without_text_differs_from_a_dropped_caption() -> None:
    unet = network()
    none = unet(**inputs(unet))
    assert not torch.allclose(none, unet(**inputs(unet), text=captions(), keep_text=torch.zeros(B, dtype=torch.bool)))


@torch.inference_mode()
def test_defect_8_mean_pooling_covers_real_tokens_only() -> None:
    """For two unrelated captions of 8 tokens, MinImagen's mean includes 248 shared null tokens, so they look alike."""
    text = captions(torch.tensor([8, 8]))
    similarity = {}
    for padding in ("none", "null"):
        unet = network(text_padding=padding, text_pooling="mean", max_text_length=256, cond_dim=32)
        pooled = []
        unet.text.pooled_embedding.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
        unet.encode_text(padded(text, 20, 1e3))
        similarity[padding] = F.cosine_similarity(pooled[0][0], pooled[0][1], dim=0)
        if padding == "none":
            tokens = [
                caption.double() @ unet.text.project.weight.double().T + unet.text.project.bias.double()
                for caption in text.unpadded()
            ]
            expected = torch.stack([token.sum(dim=0) / 8 for token in tokens])
            torch.testing.assert_close(pooled[0].double(), expected, rtol=0, atol=1e-5)
    assert similarity["null"] > 0.9 and similarity["none"] < 0.6


# ---- attention compared with loops


def softmax_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """One query (D,) attends to lists of keys and values (D,)."""
    weight = torch.softmax(torch.stack([q @ k for k in keys]) * scale, dim=0)
    return sum(w * v for w, v in zip(weight, values))


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_self_attention_reads_null_key_text_and_pixels(qk_norm: bool) -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        **{**TOY_UNET, "heads": 2, "text_in_self_attention": True, "qk_norm": qk_norm, "zero_init": False}
    )
    attention = SelfAttention(config, 8, slot=0).double()
    for parameter in attention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x, tokens, lengths = torch.randn(2, 4, 8).double(), torch.randn(2, 3, 16).double(), torch.tensor([2, 0])
    out = attention(x, Context(tokens, lengths, (attention.project_text(tokens),)))
    for b in range(2):
        normed = F.layer_norm(x[b], (8,), attention.norm.weight)
        text = F.layer_norm(
            tokens[b, : lengths[b]], (16,), attention.text_to_kv[0].weight, attention.text_to_kv[0].bias
        )
        kv = torch.cat([attention.null_kv.flatten()[None], attention.text_to_kv[1](text), attention.to_kv(normed)])
        keys, values = kv[:, :16], kv[:, 16:]  # one head of keys for both heads of queries
        scale = 16**-0.5
        queries = attention.to_q(normed).unflatten(-1, (2, 16))
        if qk_norm:
            queries, keys = (t / t.norm(dim=-1, keepdim=True) * s for t, s in zip((queries, keys), attention.qk_scales))
            scale = 8.0
        heads = torch.stack(
            [
                torch.cat([softmax_attention(queries[n, h], list(keys), list(values), scale) for h in range(2)])
                for n in range(4)
            ]
        )
        expected = F.layer_norm(attention.to_out(heads), (8,), attention.norm_out.weight)
        torch.testing.assert_close(out[b], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_attention_pooling_reads_real_tokens_only() -> None:
    torch.manual_seed(0)
    pool = AttentionPooling(12, heads=2, head_dim=16).double()
    tokens, lengths = torch.randn(2, 5, 12).double(), torch.tensor([3, 5])
    kv = pool.to_kv(F.layer_norm(tokens, (12,))).unflatten(-1, (2, 2, 16))  # (B, L, 2, H, D)
    for b in range(2):
        rows = kv[b, : lengths[b]]
        heads = [softmax_attention(pool.query[h], list(rows[:, 0, h]), list(rows[:, 1, h]), 16**-0.5) for h in range(2)]
        torch.testing.assert_close(pool(tokens, lengths)[b], pool.to_out(torch.cat(heads)), rtol=0, atol=1e-10)


# ---- training


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    unet = network(**VARIANTS[name])
    text = {} if unet.config.text_dim is None else {"text": captions(), "keep_text": torch.tensor([True, False, True])}
    out = unet(**inputs(unet), **text)
    assert out.shape == (B, 3, 16, 16)
    (out * torch.randn_like(out)).sum().backward()
    idle = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", ["regular", "extra_block"])
def test_zero_init_outputs_zero_and_trains_all_parameters(name: str) -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**{**TOY_UNET, **VARIANTS[name]}))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    assert not unet(**inputs(unet), text=captions()).any()
    keep = torch.tensor([True, False, True])
    for _ in range(5):  # up to three zero layers in a row: each step trains one more of them
        optimizer.zero_grad()
        F.mse_loss(unet(**inputs(unet), text=captions(), keep_text=keep), inputs(unet)["x"]).backward()
        optimizer.step()
    stuck = [name for name, p in unet.named_parameters() if not p.grad.any()]
    assert stuck == []


@pytest.mark.parametrize("name", ["regular", "extra_block"])
def test_activation_checkpointing_keeps_gradients(name: str) -> None:
    gradients, runs = {}, {}
    for levels in ((), (1,), (0, 1)):
        unet = network(**VARIANTS[name], checkpoint_levels=levels).train()
        runs[levels] = [0] * 4
        for index, level in enumerate([*unet.downs, *unet.ups]):
            level.blocks[0].register_forward_pre_hook(
                lambda module, args, index=index: runs[levels].__setitem__(index, runs[levels][index] + 1)
            )
        unet(**inputs(unet), text=captions()).square().mean().backward()
        gradients[levels] = [p.grad for p in unet.parameters() if p.grad is not None]
    assert runs == {(): [1, 1, 1, 1], (1,): [1, 2, 2, 1], (0, 1): [2, 2, 2, 2]}
    for levels in ((1,), (0, 1)):
        assert all(torch.equal(a, b) for a, b in zip(gradients[levels], gradients[()], strict=True))


def test_activation_checkpointing_is_off_in_eval_mode() -> None:
    unet, runs = network(checkpoint_levels=(0,)).eval(), []
    unet.downs[0].register_forward_pre_hook(
        lambda *_: runs.append(1)
    )  # not a post hook: recomputation stops before the end of a level
    unet(**inputs(unet), text=captions()).sum().backward()
    assert runs == [1]


# ---- images, precision, layout


@torch.inference_mode()
def test_height_and_width_may_be_any_multiples_of_the_stride() -> None:
    unet = network(**VARIANTS["efficient"])
    assert unet.config.stride == 8
    for height, width in ((8, 24), (16, 8)):
        x = torch.randn(B, 3, height, width)
        assert unet(x, TIME, text=captions(), lowres=x, lowres_time=TIME).shape == x.shape


@torch.inference_mode()
def test_output_depends_on_the_lowres_image_and_its_time() -> None:
    unet = network(**VARIANTS["extra_block"])
    given = inputs(unet)
    out = unet(**given, text=captions())
    for name in ("lowres", "lowres_time"):
        assert not torch.allclose(unet(**{**given, name: given[name] + 1}, text=captions()), out)


@pytest.mark.parametrize("stride", [1, 2])
@torch.inference_mode()
def test_last_convolution_reads_the_lowres_image_with_the_extra_block(stride: int) -> None:
    unet = network(**{**VARIANTS["extra_block"], "stem_stride": stride})
    unet.final_conv.bias.zero_()
    unet.final_conv.weight.zero_()  # (O, 3 * 3 * I)
    added = torch.arange(3 * stride**2)
    unet.final_conv.weight.unflatten(1, (3, 3, -1))[added, 1, 1, 8 + added] = 1
    given = inputs(unet)
    assert torch.equal(unet(**given, text=captions()), given["lowres"])


@pytest.mark.parametrize("name", ["regular", "minimagen", "extra_block"])
@torch.inference_mode()
def test_bfloat16_output_is_close_to_fp32(name: str) -> None:
    unet = network(**VARIANTS[name])
    exact = unet(**inputs(unet), text=captions())
    half = unet.bfloat16()(**inputs(unet), text=captions())  # images, times and text stay fp32
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() / exact.norm() < 0.05


@torch.inference_mode()
def test_times_are_not_rounded_to_bfloat16() -> None:
    unet = network().bfloat16()  # the neighbours of 1000 in bf16 are 996 and 1004
    x = inputs(unet)["x"][:1].expand(2, -1, -1, -1)
    late = unet.time_embedding(torch.tensor([998.0, 999.0]))[0]
    out = unet(x, torch.tensor([998.0, 999.0]), text=captions(torch.tensor([2, 2])))
    assert not torch.equal(late[0], late[1]) and not torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", ["regular", "patches", "extra_block"])
@torch.inference_mode()
def test_output_is_channels_last_for_inputs_of_either_layout(name: str) -> None:
    unet = network(**VARIANTS[name])
    given = inputs(unet)
    out = unet(**given, text=captions())
    assert out.is_contiguous(memory_format=torch.channels_last)
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(unet(**given, text=captions()), out)


@pytest.mark.parametrize("name", ["regular", "extra_block"])
@torch.inference_mode()
def test_patches_are_folded_into_channels_and_back(name: str) -> None:
    """stem_stride 2 equals a network with four times the channels on images of half the size."""
    unet = network(**{**VARIANTS[name], "stem_stride": 2})
    folded = network(**{**VARIANTS[name], "stem_stride": 1, "channels": 12})
    folded.load_state_dict(unet.state_dict())
    given = inputs(unet)
    images = {
        key: rearrange(value, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2) if value.ndim == 4 else value
        for key, value in given.items()
    }
    expected = rearrange(folded(**images, text=captions()), "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
    torch.testing.assert_close(unet(**given, text=captions()), expected, rtol=0, atol=1e-5)


# ---- invalid inputs


def error_of(unet: UNet, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        unet(**{**inputs(unet), **changes})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_of_wrong_shape_are_an_error() -> None:
    """MinImagen's sizes (defect 10) fail in the middle of the network, with an error about torch.cat."""
    unet = network()
    assert (
        error_of(unet, x=torch.zeros(B, 3, 16, 15))
        == "image sides (16, 15) must be multiples of 2, the total stride of this network"
    )
    assert error_of(unet, x=torch.zeros(B, 1, 16, 16)) == "images have 1 channels, but the network was built for 3"
    assert "not built for a low-resolution image" in error_of(unet, lowres=torch.zeros(B, 3, 16, 16), lowres_time=TIME)
    assert "lowres and lowres_time must be given together" in error_of(unet, lowres_time=TIME)


def test_missing_or_unresized_lowres_is_an_error() -> None:
    unet = network(**VARIANTS["efficient"])
    assert error_of(unet, lowres=None, lowres_time=None) == "this network needs lowres and lowres_time"
    assert "lowres and lowres_time must be given together" in error_of(unet, lowres_time=None)
    assert "lowres must be resized to x" in error_of(unet, lowres=torch.zeros(B, 3, 8, 8))


def test_text_that_does_not_fit_is_an_error() -> None:
    unet = network(max_text_length=5)
    long = captions(torch.tensor([6, 1, 1]))
    assert error_of(unet, text=long) == "text of 6 tokens, but max_text_length is 5"  # defect 10
    wide = TextEmbeddings(torch.zeros(B, 2, 32), torch.ones(B, 2, dtype=torch.bool))
    assert (
        error_of(unet, text=wide) == "text embeddings are 32 wide, but the network was built for text_dim 64"
    )  # defect 11: MinImagen silently rebuilds the U-Net instead
    assert error_of(unet, text=captions()[:1]) == "1 texts for 3 images"
    state = unet.encode_text(captions())
    assert "keep_text needs TextEmbeddings" in error_of(unet, text=state, keep_text=torch.ones(B, dtype=torch.bool))
    assert "has no text path" in error_of(network(text_dim=None), text=captions())


def test_defect_10_dim_mults_may_begin_with_any_number() -> None:
    for changes in (dict(dim_mults=(2, 3)), dict(dim_mults=(2, 3), downsample_first=True)):
        unet = network(**changes)
        assert unet(**inputs(unet), text=captions()).shape == (B, 3, 16, 16)
