"""Which parameters Muon updates: weight matrices of the trunk, in every preset and in a real DeepSpeed engine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastimagen.config import StageConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.parameters import muon_parameters
from fastimagen.networks.unet import UNet
from fastimagen.presets import PRESETS
from tests.conftest import ROOT, toy_cascade

STAGES = [(name, stage) for name, preset in PRESETS.items() for stage in preset().stages]
NOT_MATRICES = ("null_tokens", "null_vector", "null_kv", "query", "qk_scales", "bias", "norm")
ON_VECTORS = (
    "time_embedding.",
    "pooled_embedding.",
    "embedding_to_film.",
    "class_embedding.",
    "add_embedding.",
    "time_emb_proj.",
)


@pytest.mark.parametrize(
    "stage", [stage for _, stage in STAGES], ids=[f"{name}-{stage.name}" for name, stage in STAGES]
)
def test_muon_updates_the_weight_matrices_of_the_trunk_only(stage: StageConfig) -> None:
    with torch.device("meta"):
        network = build_network(stage.unet)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    muon = muon_parameters(network)
    assert muon <= shapes.keys()
    assert all(len(shapes[name]) == 2 and min(shapes[name]) > 1 for name in muon)
    assert not [name for name in muon if any(part in name for part in (*NOT_MATRICES, *ON_VECTORS))]
    left_out = [name for name in shapes.keys() - muon if len(shapes[name]) >= 2]
    assert not [name for name in left_out if not any(part in name for part in (*NOT_MATRICES, *ON_VECTORS))]


ENGINE = """
import json, torch
from fastimagen.networks.parameters import muon_parameters
from fastimagen.networks.unet import UNet
from fastimagen.train.deepspeed_config import resolve_deepspeed
from fastimagen.train.engine import init_distributed, make_engine
from tests.conftest import toy_cascade

init_distributed()
unet = UNet(toy_cascade().stages[0].unet)
keys = {"train_batch_size": 4, "optimizer": {"type": "Muon", "params": {"muon_lr": 0.01, "adam_lr": 0.001}}}
config, _ = resolve_deepspeed(keys, {}, steps=1, world_size=1, cuda=False, tensorboard="", job_name="")
engine = make_engine(unet, config, muon_parameters(unet))
names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
groups = zip(engine.optimizer.optimizer.param_groups, engine.optimizer.bit16_groups)
print(json.dumps(sorted(names[id(p)] for group, parameters in groups if group["use_muon"] for p in parameters)))
"""


@pytest.mark.slow
def test_the_muon_group_of_deepspeed_has_these_parameters() -> None:
    child = subprocess.run([sys.executable, "-c", ENGINE], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert json.loads(child.stdout.splitlines()[-1]) == sorted(muon_parameters(UNet(toy_cascade().stages[0].unet)))
