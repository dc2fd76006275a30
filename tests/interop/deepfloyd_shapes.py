"""U-Nets of DeepFloyd IF made by diffusers, with random weights: the shapes of both stages, scaled down."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = dict(
    sample_size=32,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    out_channels=6,
    addition_embed_type="text",
    cross_attention_norm="group_norm",
    resnet_time_scale_shift="scale_shift",
    act_fn="gelu",
    encoder_hid_dim=32,
)
STAGE_2: dict[str, Any] = dict(
    in_channels=6,
    class_embed_type="timestep",
    time_embedding_act_fn="gelu",
    resnet_skip_time_act=True,
    resnet_out_scale_factor=1 / 0.7071,
    mid_block_scale_factor=1 / 0.7071,
)
TINY: dict[str, Any] = dict(  # of diffusers' own tests
    down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    block_out_channels=[32, 64],
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=8,
    addition_embed_type_num_heads=2,
)
IF_I: dict[str, Any] = dict(  # IF-I-XL by 22
    down_block_types=["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    up_block_types=["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    block_out_channels=[32, 64, 96, 128],
    layers_per_block=3,
    cross_attention_dim=128,
    attention_head_dim=32,
    addition_embed_type_num_heads=4,
)
IF_II: dict[str, Any] = dict(  # IF-II-L by 10, without the layers that repeat
    down_block_types=["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    up_block_types=["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
    block_out_channels=[32, 32, 64, 64, 128],
    layers_per_block=[1, 1, 2, 2, 1],
    cross_attention_dim=128,
    attention_head_dim=32,
    addition_embed_type_num_heads=4,
    time_embedding_dim=96,
)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny stage I": {**COMMON, **TINY, "in_channels": 3},
    "tiny stage II": {**COMMON, **TINY, **STAGE_2, "time_embedding_dim": 32},
    "IF-I": {**COMMON, **IF_I, "in_channels": 3},
    "IF-II": {**COMMON, **IF_II, **STAGE_2},
    "IF-II, only cross-attention": {**COMMON, **IF_II, **STAGE_2, "only_cross_attention": True},
}


def their_unet(shape: dict[str, Any]) -> Any:
    """diffusers' U-Net of a shape with random weights, biases included."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**shape).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return unet


def scheduler(variance: str = "learned_range") -> Any:
    """diffusers' scheduler with the settings of DeepFloyd IF."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        variance_type=variance,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
