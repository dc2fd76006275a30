"""Presets have the published sizes and run. Parameters are counted on the meta device, without allocation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastimagen import presets, transformer_presets
from fastimagen.config import CascadeChanges, CascadeConfig
from fastimagen.interop.minimagen_unet import minimagen_config
from fastimagen.network_config import NetworkConfig, PixelTransformerConfig, UNetConfig
from fastimagen.networks.attention import CrossAttention, SelfAttention
from fastimagen.networks.build import build_network
from fastimagen.networks.unet import UNet
from fastimagen.presets import PRESETS, resolve
from fastimagen.text.embeddings import TextEmbeddings


def on_meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def parameters(config: NetworkConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(config).parameters())


# ---- MinImagen; the expected numbers were counted in MinImagen


@pytest.mark.parametrize(
    "preset, text_dim, count",
    [
        (presets.minimagen_base, 512, 1_618_334_979),
        (presets.minimagen_base, 4096, 1_620_169_987),
        (presets.minimagen_super, 768, 715_760_003),
        (presets.minimagen_super, 4096, 716_185_987),
    ],
)
def test_minimagen_networks_have_the_original_sizes(
    preset: Callable[[int], UNetConfig], text_dim: int, count: int
) -> None:
    assert parameters(preset(text_dim)) == count


@pytest.mark.parametrize(
    "preset, count_512, count_768",
    [
        (presets.minimagen_base_test, 104_115, 106_163),
        (presets.minimagen_super_test, 156_099, 158_147),
    ],
)
def test_defect_3_test_networks_are_small(preset: Callable[[int], UNetConfig], count_512: int, count_768: int) -> None:
    """MinImagen's class BaseTest has the 1.6 B parameters of Base, and SuperTest has those of Super."""
    assert (parameters(preset(512)), parameters(preset(768))) == (count_512, count_768)


@pytest.mark.parametrize(
    "preset, kwargs",
    [
        (
            presets.minimagen_base,
            dict(
                dim=512,
                dim_mults=[1, 2, 3, 4],
                num_resnet_blocks=3,
                text_embed_dim=768,
                layer_attns=[False, True, True, True],
                layer_cross_attns=[False, True, True, True],
            ),
        ),
        (
            presets.minimagen_super,
            dict(
                dim=128,
                dim_mults=[1, 2, 4, 8],
                num_resnet_blocks=[2, 4, 8, 8],
                text_embed_dim=768,
                layer_attns=[False, False, False, True],
                memory_efficient=True,
                lowres_cond=True,
                layer_cross_attns=[False, False, False, True],
            ),
        ),
    ],
)
def test_presets_equal_the_configuration_of_imported_weights(preset: Callable[[], UNetConfig], kwargs: dict) -> None:
    assert preset() == minimagen_config(kwargs)


def test_minimagen_cascades_train_and_sample_like_minimagen() -> None:
    for name, steps, sizes in (("minimagen", 1000, [64, 256]), ("minimagen-test", 25, [64, 128])):
        cascade = resolve(name)
        assert [stage.size for stage in cascade.stages] == sizes
        for stage in cascade.stages:
            assert (stage.schedule.name, stage.schedule.timesteps, stage.sampling.steps) == ("linear", steps, steps)
            assert (stage.objective.prediction, stage.objective.caption_dropout) == ("epsilon", 0.15)
            assert (stage.sampling.sampler, stage.sampling.guidance, stage.sampling.percentile) == ("ddpm", 3.0, 0.9)
        augmentation = cascade.stages[1].augmentation
        assert (augmentation.schedule, augmentation.sample_level) == (cascade.stages[1].schedule, 0.2)


# ---- the paper


@pytest.mark.parametrize(
    "preset, low, high",
    [
        (presets.paper_base64, 2.0e9, 2.2e9),
        (presets.paper_sr256, 580e6, 680e6),
        (presets.paper_sr1024, 380e6, 450e6),
        (presets.paper_base64_light, 475e6, 525e6),
        (presets.paper_sr256_light, 380e6, 420e6),
    ],
)
def test_paper_networks_have_the_published_sizes(preset: Callable[[], UNetConfig], low: float, high: float) -> None:
    assert low < parameters(preset()) < high


def test_paper_networks_have_attention_at_the_published_levels() -> None:
    for preset in (presets.paper_base64, presets.paper_sr256):
        unet = on_meta(preset())
        levels = [*unet.downs, *unet.ups]
        self_attention = [m for level in levels for m in level.modules() if isinstance(m, SelfAttention)]
        assert len(self_attention) == 2 * sum(preset().self_attention)
        assert all(m.slot is not None for m in self_attention)  # it also reads the text
        assert not any(isinstance(m, CrossAttention) for level in levels for m in level.modules())
    unet = on_meta(presets.paper_sr1024())
    assert not any(isinstance(m, SelfAttention) for m in unet.modules())
    assert any(isinstance(m, CrossAttention) for m in unet.downs[3].modules())


def test_paper_cascade_has_the_published_stages() -> None:
    base, sr256, sr1024 = resolve("paper").stages
    assert [stage.size for stage in (base, sr256, sr1024)] == [64, 256, 1024]
    assert [stage.crop for stage in (base, sr256, sr1024)] == [None, None, 256]
    assert [stage.schedule.name for stage in (base, sr256, sr1024)] == ["cosine", "cosine", "linear"]
    assert sr1024.schedule.timesteps == 1000
    assert all(stage.objective.prediction == "epsilon" for stage in (base, sr256, sr1024))
    assert [stage.unet.full_resolution for stage in (base, sr256, sr1024)] == ["plain", "extra_block", "extra_block"]


@pytest.mark.parametrize("name", ["paper", "paper-light"])
def test_narrow_paper_networks_run(name: str) -> None:
    text = TextEmbeddings(torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[5], [2]]))
    for stage in resolve(name).stages:
        narrow = dict(dim=8, cond_dim=16, text_dim=32, heads=2, head_dim=16, zero_init=False)
        unet = UNet(UNetConfig(**{**stage.unet.model_dump(), **narrow}))
        x, time = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
        lowres = dict(lowres=x, lowres_time=time) if stage.unet.lowres else {}
        with torch.inference_mode():
            kept, dropped = (
                unet(x, time, text=text, keep_text=torch.full((2,), keep), **lowres) for keep in (True, False)
            )
        assert kept.shape == x.shape and not torch.equal(kept, dropped)


# ---- JiT


@pytest.mark.parametrize(
    "preset, published, class_embedding",
    [
        (transformer_presets.jit_b, 131e6, 1001 * 768),
        (transformer_presets.jit_l, 459e6, 1001 * 1024),
        (transformer_presets.jit_h, 953e6, 1001 * 1280),
    ],
)
def test_transformers_have_the_published_sizes(
    preset: Callable[[int | None], PixelTransformerConfig], published: float, class_embedding: int
) -> None:
    assert parameters(preset(None)) + class_embedding == pytest.approx(published, rel=0.005)


def test_transformer_cascades_have_tokens_of_one_size_of_patch_and_whole_images() -> None:
    base, super_resolution = resolve("jit-1024").stages
    assert [(s.size // s.unet.patch) ** 2 for s in (base, super_resolution)] == [256, 1024]
    assert [s.unet.rotary_range * s.unet.patch for s in (base, super_resolution)] == [256, 1024]
    base, super_resolution = resolve("jit-unet-1024").stages
    assert (base.unet.kind, super_resolution.unet) == ("pixel_transformer", presets.paper_sr1024())
    unet, transformer = (parameters(resolve(name).stages[0].unet) for name in ("shapes", "shapes-transformer"))
    assert transformer == pytest.approx(unet, rel=0.05)


@pytest.mark.parametrize(
    ("name", "base", "super_resolution"),
    [
        ("if-m", 371_605_830, 482_483_334),
        ("if-l", 935_365_830, 1_243_277_190),
        ("if-xl", 4_304_695_110, 1_243_277_190),
    ],
)
def test_deepfloyd_networks_have_the_published_sizes(name: str, base: int, super_resolution: int) -> None:
    with torch.device("meta"):
        networks = [build_network(stage.unet) for stage in resolve(name).stages]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert sizes == [base, super_resolution]


def test_the_third_stage_of_deepfloyd_is_ours_on_the_same_text() -> None:
    """What an imported model has two stages of takes its weights; the third one is trained."""
    first, second, third = resolve("if-xl-1024").stages
    assert (first, second) == resolve("if-xl").stages and third.unet == presets.paper_sr1024()
    assert third.unet.max_text_length >= first.unet.max_text_length and third.unet.text_dim == first.unet.text_dim


# ---- names


@pytest.mark.parametrize("name", PRESETS)
def test_preset_takes_the_text_width_and_round_trips_through_json(name: str) -> None:
    cascade = resolve(name, text_dim=1024)
    assert {stage.unet.text_dim for stage in cascade.stages} == {1024}
    assert CascadeConfig.model_validate_json(cascade.model_dump_json()) == cascade
    assert resolve(cascade) is cascade


@pytest.mark.parametrize(
    "name, message",
    [
        ("papr", 'unknown cascade preset "papr"; did you mean "paper"?'),
        ("minimagen_test", 'unknown cascade preset "minimagen_test"; did you mean "minimagen-test"?'),
        ("xyz", 'unknown cascade preset "xyz"; presets: shapes, minimagen'),
    ],
)
def test_error_for_an_unknown_preset_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(name)
    assert str(caught.value).startswith(message)


# ---- changes


def test_changes_are_merged_into_a_preset() -> None:
    changes = {"base64": {"unet": {"dim": 192, "dim_mults": [1, 2, 3, 3]}}, "sr1024": None}
    cascade = resolve(CascadeChanges(preset="paper", stages=changes), text_dim=1024)
    base, sr256 = resolve("paper", text_dim=1024).stages[:2]
    unet = base.unet.model_copy(update={"dim": 192, "dim_mults": (1, 2, 3, 3)})
    assert cascade.stages == (base.model_copy(update={"unet": unet}), sr256)


def test_changes_can_take_the_text_away() -> None:
    no_text = {"unet": {"text_dim": None}}
    stages = {"base": no_text | {"sampling": {"guidance": 1.0}}, "sr": no_text}
    cascade = resolve(CascadeChanges(preset="shapes", stages=stages), text_dim=64)
    assert {stage.unet.text_dim for stage in cascade.stages} == {None}


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"top": {"size": 32}}, 'fastimagen.cascade.stages: no stage "top"; the cascade has base, sr; to add a stage'),
        ({"base": {"unet": {"dims": 8}}}, 'unknown key fastimagen.cascade.stages.base.unet.dims; did you mean "dim"?'),
        ({"base": {"size": 66}}, 'fastimagen.cascade.stages.base: stage "base": size 66 is not a multiple of 8'),
        ({"base": {"size": 64}}, "fastimagen.cascade: stage sizes must ascend, got [64, 64]"),
        ({"base": {"augmentation": {}}}, "fastimagen.cascade.stages.base: "),
    ],
)
def test_changes_that_do_not_fit_name_their_key(stages: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(CascadeChanges(preset="shapes", stages=stages))
    assert str(caught.value).startswith(message)
