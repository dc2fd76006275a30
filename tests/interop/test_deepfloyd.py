"""DeepFloyd IF against diffusers, with random weights: networks, sampling loops, folders both ways, mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastimagen import cli
from fastimagen.cascade import Stage
from fastimagen.config import SamplingConfig
from fastimagen.interop.deepfloyd import export_diffusers, import_diffusers
from fastimagen.interop.deepfloyd_unet import config_for_diffusers, config_of, weights_for_diffusers, weights_of
from fastimagen.networks.build import build_network
from fastimagen.networks.network import Network
from fastimagen.respacing import IF_RESPACINGS, respaced
from fastimagen.sampling.model_directory import read_model
from fastimagen.seeds import image_noise
from fastimagen.text.embeddings import TextEmbeddings
from tests.interop.deepfloyd_shapes import SHAPES, scheduler, their_unet

diffusers = pytest.importorskip("diffusers")

IF_I_XL: dict[str, Any] = {
    **SHAPES["IF-I"],
    "block_out_channels": [704, 1408, 2112, 2816],
    "cross_attention_dim": 2816,
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "addition_embed_type_num_heads": 64,
}
IF_II_L: dict[str, Any] = {
    **SHAPES["IF-II"],
    "block_out_channels": [160, 320, 640, 960, 1280],
    "layers_per_block": [2, 2, 3, 5, 5],
    "cross_attention_dim": 1280,
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "addition_embed_type_num_heads": 64,
    "time_embedding_dim": 1280,
}


def embeddings(count: int, width: int = 32) -> TextEmbeddings:
    embeds = torch.randn(count, 77, width, generator=torch.Generator().manual_seed(5))
    return TextEmbeddings(embeds, torch.ones(count, 77, dtype=torch.bool))


def ours(theirs: Any) -> Network:
    """Our network with the weights of theirs."""
    network = build_network(config_of(theirs.config)).eval()
    network.load_state_dict(weights_of(theirs.state_dict()))
    return network


# ---- networks


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_networks_equal_those_of_diffusers(shape: str) -> None:
    theirs = their_unet(SHAPES[shape])
    network, text = ours(theirs), embeddings(2)
    x, lowres, time, level = *torch.randn(2, 2, 3, 32, 48), torch.tensor([7, 813]), torch.tensor([250, 10])
    if network.config.lowres:
        given: dict[str, Tensor] = {"lowres": lowres, "lowres_time": level}
        true = theirs(torch.cat([x, lowres], 1), time, encoder_hidden_states=text.embeds, class_labels=level).sample
    else:
        given, true = {}, theirs(x, time, encoder_hidden_states=text.embeds).sample
    got = network(x, time, text=network.encode_text(text), **given)
    assert (got - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_configuration_and_weights_return_unchanged(shape: str) -> None:
    theirs = their_unet(SHAPES[shape])
    config, state = config_of(theirs.config), theirs.state_dict()
    again = diffusers.UNet2DConditionModel.from_config(config_for_diffusers(config, 32))
    assert config_of(again.config) == config
    back = weights_for_diffusers(weights_of(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    again.load_state_dict(back)


@pytest.mark.parametrize(("shape", "count"), [(IF_I_XL, 4_304_695_110), (IF_II_L, 1_243_277_190)])
def test_published_networks_have_their_number_of_parameters(shape: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = build_network(config_of({"_class_name": "UNet2DConditionModel", **shape}))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_gradients_reach_every_weight_and_activation_checkpointing_changes_nothing() -> None:
    shape = SHAPES["tiny stage I"]
    config = config_of(shape)
    x, time, text = torch.randn(1, 3, 8, 8), torch.tensor([5]), embeddings(1)
    results = []
    for levels in ((), (0, 1)):
        network = build_network(config.model_copy(update={"checkpoint_levels": levels, "zero_init": False}))
        network.load_state_dict(weights_of(their_unet(shape).state_dict()))
        network.train()(x, time, text=text).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in network.named_parameters()})
    plain, checkpointed = results
    assert all(plain[name] is not None and plain[name].abs().sum() > 0 for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


# ---- sampling


def test_respacings_are_those_of_diffusers() -> None:
    from diffusers.pipelines.deepfloyd_if import timesteps

    for name, counts in IF_RESPACINGS.items():
        steps = sum(map(int, counts.split(",")))
        assert respaced(name, steps, 1000) == getattr(timesteps, f"{name}_timesteps")
        assert respaced(counts, steps, 1000) == respaced(name, steps, 1000)
    theirs = scheduler()
    theirs.set_timesteps(100)
    assert respaced("leading", 100, 1000) == theirs.timesteps.tolist()


@pytest.mark.parametrize(("stage_2", "variance"), [(False, "fixed_small"), (True, "learned_range")])
@torch.no_grad()
def test_sampling_loops_equal_those_of_diffusers(
    stage_2: bool, variance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole guided loop from the same noise: thresholding, respacing, variance, low-resolution path."""
    source = save_pipeline(tmp_path / "theirs", "tiny stage II" if stage_2 else "tiny stage I", variance)
    cascade, weights, _ = read_model(import_diffusers([source], tmp_path / "ours", text_encoder="none"))
    (config,), seeds = cascade.stages, [3]
    text, empty = embeddings(2)[:1], embeddings(2)[1:]
    network = build_network(config.unet).eval()
    network.load_state_dict(weights[config.name])
    lowres = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sampling = SamplingConfig(**{**config.sampling.model_dump(), "respacing": "smart27", "steps": 27})
    got = Stage(config, empty_text=empty).sample(
        network, text, seeds, lowres=lowres if stage_2 else None, sampling=sampling
    )

    steps = iter(range(-1, 27))
    name = config.name

    def noise(stage: str = name, step: int | None = None) -> Tensor:
        return image_noise(
            seeds, (3, 32, 32), stage=stage, step=next(steps) if step is None else step, device=torch.device("cpu")
        )

    theirs = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
    process = diffusers.DDPMScheduler.from_pretrained(source / "scheduler")
    process.set_timesteps(timesteps=respaced("smart27", 27, 1000))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise())
    x, prompts, more, labels = noise(), torch.cat([empty.embeds, text.embeds]), [], None
    if stage_2:
        large = torch.nn.functional.interpolate(lowres, size=(32, 32), mode="bilinear", align_corners=True)
        level = torch.tensor([250])
        noisy = scheduler("fixed_small").add_noise(large, noise(f"{name}/augmentation", 0), level)
        more, labels = [torch.cat([noisy, noisy])], level.repeat(2)
    for time in process.timesteps:
        given = torch.cat([torch.cat([x, x]), *more], dim=1)
        output = theirs(given, time, encoder_hidden_states=prompts, class_labels=labels).sample
        unconditional, conditional = output.chunk(2)
        weight = config.sampling.guidance
        epsilon = unconditional[:, :3] + weight * (conditional[:, :3] - unconditional[:, :3])
        output = epsilon if variance == "fixed_small" else torch.cat([epsilon, conditional[:, 3:]], dim=1)
        x = process.step(output, time, x).prev_sample
    assert (got - x.clamp(-1, 1)).abs().max() <= 1e-4


@torch.no_grad()
def test_training_shows_the_low_resolution_image_that_sampling_shows(tmp_path: Path) -> None:
    """At the same noise level and with the same noise. Public training code gives IF's second stage its own noisy input
    in that place."""
    source = save_pipeline(tmp_path / "theirs", "tiny stage II", "learned_range")
    (config,) = read_model(import_diffusers([source], tmp_path / "ours", text_encoder="none"))[0].stages
    stage, network, seen = Stage(config, empty_text=embeddings(1)), build_network(config.unet), []
    network.register_forward_pre_hook(lambda module, x, given: seen.append(given), with_kwargs=True)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    stage.sample(
        network,
        embeddings(1),
        [4],
        lowres=stage.shrink(images),
        sampling=config.sampling.model_copy(update={"steps": 1, "guidance": 1.0, "augmentation_level": 0.6}),
    )
    noise = image_noise([4], (3, 32, 32), stage=f"{config.name}/augmentation", step=0, device=torch.device("cpu"))
    draws = dataclasses.replace(stage.draw(0, [4], images), level=torch.tensor([0.6]).double(), lowres_noise=noise)
    loss = stage.training_loss(network, images, embeddings(1), draws)
    assert loss.shape == (1,) and loss.isfinite().all()
    sampled, trained = seen
    torch.testing.assert_close(trained["lowres"], sampled["lowres"])
    assert trained["lowres_time"].item() == sampled["lowres_time"].item() == 600
    at_rest = stage.lowres_condition(stage.shrink(images), torch.zeros((), dtype=torch.float64), 0 * images)["lowres"]
    assert (at_rest - images).abs().max() < 1.5  # the image itself, blurred


# ---- folders


def save_pipeline(folder: Path, shape: str, variance: str = "learned_range", **saving: Any) -> Path:
    """What diffusers saves of a pipeline without text encoder."""
    process = scheduler(variance)
    parts = {
        "unet": their_unet(SHAPES[shape]),
        "scheduler": process,
        **dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")),
    }
    kind = diffusers.IFPipeline
    if SHAPES[shape]["in_channels"] == 6:
        kind = diffusers.IFSuperResolutionPipeline
        parts["image_noising_scheduler"] = scheduler("fixed_small")
    kind(**parts, requires_safety_checker=False).save_pretrained(folder, **saving)
    return folder


def test_both_stages_become_a_cascade_and_return_bit_by_bit(tmp_path: Path) -> None:
    first = save_pipeline(tmp_path / "1", "tiny stage I", max_shard_size="1MB")  # several files
    second = save_pipeline(tmp_path / "2", "tiny stage II", variant="fp16")
    config = second / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 128}))
    arguments = ["import-diffusers", str(first), str(second), "--out", str(tmp_path / "model"), "--text-encoder", "t5"]
    cli.main(arguments)
    cascade, _, index = read_model(tmp_path / "model")
    assert [(stage.name, stage.size) for stage in cascade.stages] == [("base32", 32), ("sr128", 128)]
    assert index["text_encoder"] == {
        "name": "t5",
        "revision": None,
        "max_length": 77,
        "encoding": "if",
        "included": False,
    }
    lines = export_diffusers(tmp_path / "model", tmp_path / "back")
    assert len(lines) == 2
    for source, stage, kind in (
        (first, "base32", diffusers.IFPipeline),
        (second, "sr128", diffusers.IFSuperResolutionPipeline),
    ):
        pipeline = kind.from_pretrained(tmp_path / "back" / stage)
        true = diffusers.UNet2DConditionModel.from_pretrained(
            source / "unet", variant="fp16" if source == second else None
        )
        state, expected = pipeline.unet.state_dict(), true.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
        assert pipeline.scheduler.config.variance_type == "learned_range"
        assert pipeline.scheduler.config.sample_max_value == 1.5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("saved") / "IF", "tiny stage I")


def edit(path: str, **changes: Any) -> Any:
    """A change of a JSON file of the folder; None removes a key."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / path).read_text()) | changes
        (folder / path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return apply


def cut(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit("model_index.json", _class_name="StableDiffusionPipeline"),
            "is a StableDiffusionPipeline: only IFPipeline",
        ),
        (edit("model_index.json", _class_name="IFSuperResolutionPipeline"), "but its U-Net is that of a IFPipeline"),
        (edit("unet/config.json", act_fnn="gelu"), 'unknown key "act_fnn"; did you mean "act_fn"?'),
        (edit("unet/config.json", act_fn="silu"), "act_fn is 'silu', but U-Nets of DeepFloyd IF have 'gelu'"),
        (edit("unet/config.json", dropout=0.1), "dropout is 0.1, but U-Nets of DeepFloyd IF have 0.0"),
        (edit("unet/config.json", _class_name="UNet2DModel"), "_class_name is UNet2DModel, not UNet2DConditionModel"),
        (edit("unet/config.json", block_out_channels=...), "block_out_channels missing"),
        (edit("unet/config.json", encoder_hid_dim=64), "weights and configuration do not match: add_embedding.norm1"),
        (edit("scheduler/scheduler_config.json", beta_schedule="linear"), "beta_schedule is 'linear'"),
        (
            edit("scheduler/scheduler_config.json", thresholds=1),
            'unknown key "thresholds"; did you mean "thresholding"?',
        ),
        (lambda folder: (folder / "model_index.json").unlink(), "it has no model_index.json"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").unlink(), "cannot read"),
        (lambda folder: shutil.rmtree(folder / "unet"), "cannot read"),
        (
            lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "has no diffusion_pytorch_model",
        ),
        (cut, "cannot read"),
    ],
)
def test_a_folder_that_is_not_ifs_is_an_error_of_one_line(
    damage: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "IF")
    damage(folder)
    with pytest.raises(ValueError) as caught:
        import_diffusers([folder], tmp_path / "out", text_encoder="t5")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_text_encoder_must_be_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name yours with --text-encoder"):
        import_diffusers([saved], tmp_path / "out")
