"""Imported MinImagen weights reproduce its outputs, and its training directories convert to working models.

The golden files hold random weights, inputs and outputs of MinImagen 0.0.9's own U-Net: a base U-Net, an Efficient
super-resolution U-Net, and a regular super-resolution U-Net of grey images with other arguments (half precision).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from fastimagen.interop.minimagen import import_minimagen
from fastimagen.interop.minimagen_unet import minimagen_config, unet_from_minimagen
from fastimagen.networks.unet import UNet
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import ROOT

GOLDEN = ("unet_base", "unet_super", "unet_regular_super")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(weights, constructor arguments, inputs and outputs) of a golden file."""
    with safe_open(str(ROOT / f"tests/fixtures/{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        kwargs = json.loads(file.metadata()["unet_kwargs"])
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    return weights, kwargs, {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}


@torch.inference_mode()
def outputs(unet: UNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that a golden file holds: with captions, without, and with guidance weight 3."""
    text = TextEmbeddings(tensors["text_embeds"], tensors["text_mask"])
    lowres = (
        {"lowres": tensors["lowres_cond_img"], "lowres_time": tensors["lowres_noise_times"]}
        if "lowres_cond_img" in tensors
        else {}
    )
    keep = torch.ones(len(text), dtype=torch.bool)
    cond, null = (unet(tensors["x"], tensors["time"], text=text, keep_text=kept, **lowres) for kept in (keep, ~keep))
    return {"out_cond": cond, "out_null": null, "out_scale_3": null + 3 * (cond - null)}


def assert_golden(unet: UNet, tensors: dict[str, Tensor]) -> None:
    for name, output in outputs(unet, tensors).items():
        error = (output - tensors[name]).abs().max() / tensors[name].abs().max()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


# ---- U-Nets


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_equal_those_of_minimagen(name: str) -> None:
    weights, kwargs, tensors = golden(name)
    assert_golden(unet_from_minimagen(weights, kwargs), tensors)


@pytest.mark.parametrize(
    "argument, value, field, expected",
    [
        ("dim", 16, "dim", 16),
        ("dim_mults", [1, 3], "dim_mults", (1, 3)),
        ("channels", 1, "channels", 1),
        ("channels_out", 3, "channels", 3),
        ("cond_dim", 24, "cond_dim", 24),
        ("text_embed_dim", 768, "text_dim", 768),
        ("num_resnet_blocks", 2, "num_blocks", 2),
        ("num_resnet_blocks", [1, 2, 3], "num_blocks", (1, 2, 3)),
        ("layer_attns", False, "self_attention", False),
        ("layer_attns", [False, True, True], "self_attention", (False, True, True)),
        ("layer_cross_attns", False, "cross_attention", False),
        ("layer_cross_attns", [True, False, True], "cross_attention", (True, False, True)),
        ("attn_heads", 3, "heads", 3),
        ("lowres_cond", True, "lowres", True),
        ("memory_efficient", True, "downsample_first", True),
        ("attend_at_middle", True, "middle_attention", True),
    ],
)
def test_constructor_argument_sets_its_field(argument: str, value: Any, field: str, expected: Any) -> None:
    assert getattr(minimagen_config({argument: value}), field) == expected


def test_missing_arguments_take_the_defaults_of_minimagen() -> None:
    config = minimagen_config({})
    assert (config.dim, config.dim_mults, config.text_dim, config.heads) == (128, (1, 2, 4), 512, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == 45_486_211  # counted in MinImagen


def test_cross_attention_always_has_eight_heads() -> None:
    assert minimagen_config({"attn_heads": 2}).cross_heads == 8


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"dims": 8}, "not arguments of MinImagen's Unet: dims"),
        ({"channels_out": 6}, r"channels_out must equal channels \(3\), got 6"),
        ({"dim_mults": [2, 4]}, r"dim_mults must begin with 1 unless memory_efficient is set, got \[2, 4\]"),
        ({"layer_attns": [True]}, "self_attention has 1 entries but dim_mults has 3 levels"),
        ({"dim": 12}, "12 channels cannot be split into groups = 8"),
    ],
)
def test_arguments_that_minimagen_cannot_run_are_an_error(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minimagen_config(kwargs)


def test_dim_mults_of_efficient_unets_may_begin_with_any_number() -> None:
    assert minimagen_config({"dim_mults": [2, 4, 4], "memory_efficient": True}).dim_mults == (2, 4, 4)


def test_error_lists_all_weights_that_do_not_fit() -> None:
    weights, kwargs, _ = golden("unet_base")
    weights["final_conv.bias"] = torch.zeros(5)
    weights["something.else"] = weights.pop("mid_block1.block1.project.bias")
    weights["mid_attn.fn.fn.norm.beta"] = torch.ones(16)
    with pytest.raises(ValueError) as caught:
        unet_from_minimagen(weights, kwargs)
    message = str(caught.value)
    assert "final_conv.bias: shape (5,)" in message and "unexpected something.else" in message
    assert "no weight for middle1.conv1.bias" in message and "mid_attn.fn.fn.norm.beta: a LayerNorm offset" in message
    assert "\n" not in message


def test_defect_11_wrong_arguments_never_replace_weights(caplog: pytest.LogCaptureFixture) -> None:
    """MinImagen rebuilds a U-Net, with random weights, if its arguments differ from those of Imagen."""
    weights, kwargs, tensors = golden("unet_super")
    del kwargs["lowres_cond"]  # as in the file that MinImagen saves
    kwargs["text_embed_dim"] = 512
    unet = unet_from_minimagen(weights, kwargs, label="unet_1")
    assert torch.equal(unet.text.project.weight, weights["text_to_cond.weight"])
    assert_golden(unet, tensors)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "unet_1: lowres_cond is True in the weights but False in the arguments: using the weights",
        "unet_1: text_embed_dim is 32 in the weights but 512 in the arguments: using the weights",
    ]


# ---- training directories


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training directory with the base and the Efficient U-Net of the golden files as best weights."""
    return write_training(
        tmp_path / "training_20220816_165729",
        ["unet_base", "unet_super"],
        {"image_sizes": [16, 32], "text_encoder_name": "t5_small", "timesteps": 25},
    )


def write_training(folder: Path, unets: list[str], imagen: dict[str, Any], **command: str) -> Path:
    stamp = folder.name.removeprefix("training_")
    for name in ("parameters", "state_dicts", "tmp"):
        (folder / name).mkdir(parents=True)
    for index, name in enumerate(unets):
        weights, kwargs, _ = golden(name)
        kwargs |= {"lowres_cond": False, "channels_out": None}
        write_json(folder / f"parameters/unet_{index}_params_{stamp}.json", kwargs)
        torch.save(weights, folder / f"state_dicts/unet_{index}_state_{stamp}.pth")
    write_json(folder / f"parameters/imagen_params_{stamp}.json", imagen)
    command = {
        "PARAMETERS": "None",
        "MAX_NUM_WORDS": "32",
        "IMG_SIDE_LEN": str(imagen["image_sizes"][-1]),
        "T5_NAME": imagen["text_encoder_name"],
        "TIMESTEPS": "25",
    } | command
    lines = "".join(f"--{key}={value}\n" for key, value in command.items())
    (folder / f"parameters/training_parameters_{stamp}.txt").write_text(lines)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def change(folder: Path, pattern: str, **entries: Any) -> None:
    path = only(folder / "parameters", pattern)
    write_json(path, json.loads(path.read_text()) | entries)


def test_converted_training_directory_samples(training: Path, tmp_path: Path) -> None:
    model = import_minimagen(training, tmp_path / "model")
    pipe = ImagenPipeline.from_pretrained(model)
    assert list(pipe.cascade.unets) == ["base16", "sr32"]
    for name, stage in zip(("unet_base", "unet_super"), pipe.cascade.unets):
        assert_golden(pipe.cascade.unets[stage], golden(name)[2])
    text = TextEmbeddings(torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))
    out = pipe(text=text, captions=["one", "two"], steps=4)
    assert out.images.shape == (2, 3, 32, 32) and out.images.isfinite().all()
    card = (model / "README.md").read_text()
    assert "unet_1_state_20220816_165729.pth" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"], front["license"]) == (
        "fastimagen",
        "text-to-image",
        "unknown",
    )
    assert "--embeddings" in card and "--captions" not in card  # its 32 wide embeddings are those of no T5


def test_converted_stages_train_and_sample_like_minimagen(tmp_path: Path) -> None:
    training = write_training(
        tmp_path / "training_1",
        ["unet_base", "unet_super"],
        {
            "image_sizes": [16, 32],
            "text_encoder_name": "t5_small",
            "timesteps": 100,
            "cond_drop_prob": 0.15,
            "loss_type": "huber",
            "lowres_sample_noise_level": 0.3,
            "dynamic_thresholding_percentile": 0.8,
        },
    )
    base, sr = ImagenPipeline.from_pretrained(import_minimagen(training, tmp_path / "m")).cascade.config.stages
    for stage in (base, sr):
        assert (stage.schedule.name, stage.schedule.timesteps) == ("linear", 100)
        assert stage.objective.model_dump(include={"prediction", "loss", "weighting", "caption_dropout"}) == {
            "prediction": "epsilon",
            "loss": "huber",
            "weighting": "none",
            "caption_dropout": 0.15,
        }
        assert stage.sampling.model_dump() == {
            "sampler": "ddpm",
            "steps": 100,
            "respacing": "even",
            "variance": "small",
            "guidance": 3.0,
            "guidance_range": None,
            "threshold": "dynamic",
            "percentile": 0.8,
            "ceiling": None,
            "tile": None,
            "augmentation_level": None,
        }
    assert base.augmentation is None
    assert sr.augmentation.schedule == sr.schedule and sr.augmentation.sample_level == 0.3


def test_missing_arguments_of_imagen_take_its_defaults(training: Path, tmp_path: Path) -> None:
    write_json(only(training, "parameters/imagen_*.json"), {"image_sizes": [16, 32]})  # T5_NAME is in the .txt
    _, sr = ImagenPipeline.from_pretrained(import_minimagen(training, tmp_path / "m")).cascade.config.stages
    assert sr.schedule.timesteps == sr.sampling.steps == 1000
    assert (sr.objective.loss, sr.objective.caption_dropout) == ("l2", 0.1)
    assert (sr.sampling.percentile, sr.augmentation.sample_level) == (0.9, 0.2)


def test_model_names_the_text_encoder_if_its_width_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for encoder, expected in (
        ("t5_small", "t5_small"),
        ("t5_base", None),
    ):  # the weights take width 512, which is t5_small's
        training = write_training(
            tmp_path / f"training_{encoder}",
            ["unet_regular_super"],
            {"image_sizes": [16], "text_encoder_name": encoder, "channels": 1},
        )
        index = json.loads((import_minimagen(training, tmp_path / encoder) / "model_index.json").read_text())
        assert (index["text_encoder"] and index["text_encoder"]["name"]) == expected
    assert "width 512, but those of t5_base have width 768" in caplog.text


def test_missing_best_weights_use_the_latest_with_a_warning(
    training: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only(training, "state_dicts/unet_1*").rename(training / "tmp/unet_1_tmp.pth")
    import_minimagen(training, tmp_path / "model")
    assert "unet_1 has no best weights" in caplog.text and "tmp/unet_1_tmp.pth" in caplog.text


def test_harmless_contradictions_are_logged(training: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    change(training, "imagen_*", timesteps=50, only_train_unet_number=1)
    import_minimagen(training, tmp_path / "model")
    assert "timesteps is 50" in caplog.text and "TIMESTEPS is 25" in caplog.text
    assert "only_train_unet_number is 1: the other U-Nets may be untrained" in caplog.text


def error_of_import(training: Path, tmp_path: Path) -> str:
    """The message, of one line, of an import that fails; it must write nothing."""
    with pytest.raises(ValueError) as caught:
        import_minimagen(training, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defect_19_several_files_for_one_unet_are_an_error(training: Path, tmp_path: Path) -> None:
    best = only(training, "state_dicts/unet_0*")
    best.with_name("unet_0_state_0.131.pth").write_bytes(best.read_bytes())
    message = error_of_import(training, tmp_path)
    assert "several files for unet_0_*.pth: unet_0_state_0.131.pth, unet_0_state_20220816_165729.pth" in message


def test_error_lists_unknown_and_missing_keys(training: Path, tmp_path: Path) -> None:
    path = only(training, "parameters/imagen_*")
    write_json(path, {"image_size": [16, 32], "timestep": 25})
    assert error_of_import(training, tmp_path).endswith("unknown image_size; unknown timestep; missing image_sizes")
    write_json(path, {"image_sizes": [16, 32]})
    change(training, "unet_1*", dimension=8)
    assert "unet_1 (" in error_of_import(training, tmp_path) and "Unet: dimension" in error_of_import(
        training, tmp_path
    )


def test_error_lists_weights_of_wrong_shape(training: Path, tmp_path: Path) -> None:
    change(training, "unet_0*", attn_heads=3)
    message = error_of_import(training, tmp_path)
    assert message.startswith("unet_0 (unet_0_params_20220816_165729.json, unet_0_state_20220816_165729.pth): ")
    assert "mid_attn.fn.fn.to_q.weight: shape (128, 16) does not fit middle_attention.to_q.weight (192, 16)" in message
    change(training, "unet_0*", dim=16)
    assert error_of_import(training, tmp_path).endswith("and 174 more")


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"image_sizes": 32}, "image_sizes must be a list of 2 sizes, one per U-Net, got 32"),  # defect 10
        ({"image_sizes": [32]}, "image_sizes must be a list of 2 sizes"),
        ({"image_sizes": [16, 30]}, "size 30 is not a multiple of 8"),
        ({"image_sizes": [32, 16]}, "stage sizes must ascend"),
        ({"timesteps": [25, 25]}, "timesteps"),  # defect 10
        ({"timesteps": 20}, "ends in pure noise"),  # defect 4
        ({"timesteps": 19}, "at least 20 timesteps"),
        ({"loss_type": "l3"}, "loss"),
        ({"dynamic_thresholding_percentile": 9}, "percentile"),
        ({"text_encoder_name": "t5_base"}, "names text encoder t5_base, training_parameters t5_small"),
    ],
)
def test_invalid_arguments_of_imagen_are_an_error(
    training: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    change(training, "imagen_*", **entries)
    assert message in error_of_import(training, tmp_path)


def test_unknown_text_encoder_is_an_error(tmp_path: Path) -> None:
    training = write_training(
        tmp_path / "training_1", ["unet_base"], {"image_sizes": [16], "text_encoder_name": "bert"}
    )
    assert "text_encoder_name must be one of t5_small" in error_of_import(training, tmp_path)


def test_incomplete_training_directory_is_an_error(training: Path, tmp_path: Path) -> None:
    assert "is not a MinImagen training directory" in error_of_import(tmp_path / "nowhere", tmp_path)
    only(training, "parameters/unet_1*").unlink()
    assert "weights of unet_1, but no parameters/unet_1_params_*.json" in error_of_import(training, tmp_path)
    only(training, "state_dicts/unet_0*").rename(training / "tmp/unet_1_tmp.pth")
    only(training, "state_dicts/unet_1*").unlink()
    (training / "tmp/unet_1_tmp.pth").unlink()
    assert "holds no weights of unet_0" in error_of_import(training, tmp_path)
    only(training, "parameters/unet_0*").unlink()
    assert "must hold unet_0_params_*.json" in error_of_import(training, tmp_path)


def test_error_names_a_damaged_file(training: Path, tmp_path: Path) -> None:
    weights, parameters = only(training, "state_dicts/unet_1*"), only(training, "parameters/unet_0*")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"cannot read weights {weights}" in error_of_import(training, tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}}, weights)
    assert "must hold a state dict" in error_of_import(training, tmp_path)
    torch.save({"epoch": Path("pickled")}, weights)  # arbitrary objects are not unpickled
    assert f"cannot read weights {weights}" in error_of_import(training, tmp_path)
    parameters.write_text("{")
    assert f"{parameters} is not JSON" in error_of_import(training, tmp_path)


def test_output_folder_that_is_not_empty_is_an_error(training: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        import_minimagen(training, tmp_path / "full")
