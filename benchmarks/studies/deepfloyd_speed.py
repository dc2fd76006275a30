"""DeepFloyd IF beside diffusers on one core: the same weights, guided sampling loops, scaled-down networks.

    python -m benchmarks.studies.deepfloyd_speed [--out benchmarks/results/cpu/deepfloyd_speed.json]

Both stages have the shape of IF's with fewer channels and random weights. Both sides get prompt embeddings and run the
same steps of ddpm with the learned variance, guidance and thresholding: diffusers through its pipelines, fastimagen
through Stage.sample, which encodes the text once for all steps. The two alternate; a row has the median CPU seconds
of a step. `evaluations` are the steps of an image: diffusers' defaults, and 25 of dpmpp_2m (docs/samplers.md).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastimagen.cascade import Stage
from fastimagen.config import AugmentationConfig, ObjectiveConfig, SamplingConfig, StageConfig
from fastimagen.interop.deepfloyd_unet import config_for_diffusers, weights_for_diffusers
from fastimagen.network_config import IFUNetConfig
from fastimagen.networks.build import build_network
from fastimagen.presets import SQUARED_COS, if_base, if_super
from fastimagen.text.embeddings import TextEmbeddings

from ..harness.checkout import ROOT

ROUNDS, STEPS, WIDTH, TOKENS = 4, 3, 512, 77
STAGES: dict[str, tuple[IFUNetConfig, int, int]] = {  # network, size, default steps of diffusers' pipeline
    "IF-I, width 64": (if_base(64, WIDTH), 64, 100),
    "IF-II, width 32": (if_super(32, WIDTH).model_copy(update={"head_dim": 32}), 128, 50),
}
FEW_STEPS = 25  # of dpmpp_2m


def stage_of(network: IFUNetConfig, size: int) -> StageConfig:
    return StageConfig(
        name="stage",
        size=size,
        lowres_size=size // 4 if network.lowres else None,
        unet=network,
        schedule=SQUARED_COS,
        objective=ObjectiveConfig(prediction="epsilon"),
        augmentation=AugmentationConfig(schedule=SQUARED_COS, sample_level=0.25, resize="bilinear_corners")
        if network.lowres
        else None,
        sampling=SamplingConfig(
            sampler="ddpm",
            steps=STEPS,
            respacing="leading",
            variance="learned",
            guidance=7.0,
            percentile=0.95,
            ceiling=1.5,
        ),
    )


def loops(network_config: IFUNetConfig, size: int) -> dict[str, Callable[[], object]]:
    """A guided loop of STEPS steps for one image, of each side."""
    import diffusers

    torch.manual_seed(0)
    network = build_network(network_config.model_copy(update={"zero_init": False})).eval()
    theirs = diffusers.UNet2DConditionModel.from_config(config_for_diffusers(network_config, size)).eval()
    theirs.load_state_dict(weights_for_diffusers(network.state_dict()))
    scheduler = dict(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts = {
        "unet": theirs,
        "scheduler": diffusers.DDPMScheduler(variance_type="learned_range", **scheduler),
        "requires_safety_checker": False,
        **absent,
    }
    embeds, empty = torch.randn(2, 1, TOKENS, WIDTH)
    given: dict[str, Any] = {"prompt_embeds": embeds, "negative_prompt_embeds": empty, "guidance_scale": 7.0}
    lowres = None
    if network_config.lowres:
        noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipe: Any = diffusers.IFSuperResolutionPipeline(image_noising_scheduler=noising, **parts)
        lowres = torch.rand(1, 3, size // 4, size // 4) * 2 - 1
        given |= {"image": lowres, "height": size, "width": size, "noise_level": 250}
    else:
        pipe = diffusers.IFPipeline(**parts)
        given |= {"height": size, "width": size}
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    text = TextEmbeddings(embeds, mask)
    stage = Stage(stage_of(network_config, size), empty_text=TextEmbeddings(empty, mask))
    return {
        "diffusers": lambda: pipe(num_inference_steps=STEPS, output_type="pt", **given),
        "fastimagen": lambda: stage.sample(network, text, [0], lowres=lowres),
    }


def measure(works: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """CPU seconds of a step of each, in turns, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append((time.process_time() - began) / STEPS)
    return {
        name: {"median_s": round(statistics.median(values[1:]), 4), "min_s": round(min(values[1:]), 4)}
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu/deepfloyd_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import diffusers

    rows = []
    for name, (network, size, steps) in STAGES.items():
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in build_network(network).parameters())
        found = measure(loops(network, size))
        theirs, ours = found["diffusers"]["median_s"], found["fastimagen"]["median_s"]
        row: dict[str, Any] = {
            "network": name,
            "size": size,
            "parameters": parameters,
            "step": found,
            "faster_per_step": round(theirs / ours, 3),
            "evaluations": {"diffusers": steps, "fastimagen, ddpm": steps, "fastimagen, dpmpp_2m": FEW_STEPS},
            "image_s": {
                "diffusers": round(theirs * steps, 2),
                "fastimagen, ddpm": round(ours * steps, 2),
                "fastimagen, dpmpp_2m": round(ours * FEW_STEPS, 2),
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    about = {"date": str(date.today()), "device": "cpu, 1 thread", "cores": os.cpu_count(), "torch": torch.__version__}
    options.out.write_text(json.dumps({**about, "diffusers": diffusers.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
