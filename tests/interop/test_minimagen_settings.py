"""A parameters folder of MinImagen without weights becomes a configuration that trains the same cascade."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastimagen.cli import main
from fastimagen.config import TextConfig
from fastimagen.config_file import load_config
from fastimagen.presets import minimagen_base_test, minimagen_super_test
from fastimagen.train.stage_setup import plan

BASE = {
    "dim": 8, "dim_mults": [1, 2], "num_resnet_blocks": 1, "layer_attns": False, "layer_cross_attns": False,
    "attend_at_middle": False, "lowres_cond": False, "memory_efficient": False, "text_embed_dim": 512, "channels": 3,
}  # fmt: skip
SUPER = BASE | {"num_resnet_blocks": [1, 2], "memory_efficient": True}
IMAGEN = {"image_sizes": [64, 128], "timesteps": 25, "cond_drop_prob": 0.15, "text_encoder_name": "t5_small"}
COMMAND = "--BATCH_SIZE=4\n--EPOCHS=7\n--TRAIN_VALID_FRAC=0.8\n--VALID_NUM=None\n--CHCKPT_NUM=50\n--OPTIM_LR=0.001\n"
COMMAND += "--MAX_NUM_WORDS=32\n"


def write_parameters(folder: Path, imagen: dict[str, Any] = IMAGEN, command: str = COMMAND) -> Path:
    folder.mkdir(parents=True)
    for name, content in (("unet_0_params_1", BASE), ("unet_1_params_1", SUPER), ("imagen_params_1", imagen)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    if command:
        (folder / "training_parameters_1.txt").write_text(command)
    return folder


def test_the_configuration_trains_the_same_cascade(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parameters(tmp_path / "training_1/parameters")
    out = tmp_path / "mine.json"
    with caplog.at_level(logging.WARNING):
        assert main(["import-minimagen", str(tmp_path / "training_1"), "--out", str(out)]) == 0
    assert "unet_1: lowres_cond is False in unet_1_params_1.json: taken as True, which" in caplog.text
    config = load_config(out)
    stages = plan(config)[0].stages
    assert [stage.size for stage in stages] == [64, 128]
    assert stages[0].unet == minimagen_base_test()
    assert stages[1].unet == minimagen_super_test()
    assert {stage.schedule.timesteps for stage in stages} == {25}
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert config.deepspeed["optimizer"] == {"type": "Adam", "params": {"lr": 0.001}}
    ours = config.fastimagen
    assert (ours.train.epochs, ours.train.checkpoint_every, ours.train.validation_samples) == (7, 50, "all")
    assert ours.data.validation.share == 0.2 and ours.text == TextConfig(encoder="t5_small", max_length=32)


def test_the_folder_parameters_alone_is_enough(tmp_path: Path) -> None:
    folder = write_parameters(tmp_path / "parameters", IMAGEN | {"cond_drop_prob": 0.0}, command="")
    assert main(["import-minimagen", str(folder), "--out", str(tmp_path / "mine.json")]) == 0
    stages = plan(load_config(tmp_path / "mine.json"))[0].stages
    assert {stage.sampling.guidance for stage in stages} == {1.0}  # never trained without captions


@pytest.mark.parametrize(
    ("imagen", "command", "message"),
    [
        (IMAGEN | {"image_sizes": [64]}, "", "image_sizes must be a list of 2 sizes"),
        (IMAGEN | {"text_encoder_name": "t6"}, "", "text_encoder_name must be one of t5_small"),
        (IMAGEN, "--EPOCHS=many\n", "could not convert string to float"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    tmp_path: Path, capsys: Any, imagen: dict[str, Any], command: str, message: str
) -> None:
    folder = write_parameters(tmp_path / "parameters", imagen, command)
    assert main(["import-minimagen", str(folder), "--out", str(tmp_path / "mine.json")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "mine.json").exists()


def test_a_training_directory_without_weights_names_the_command(tmp_path: Path, capsys: Any) -> None:
    write_parameters(tmp_path / "training_1/parameters")
    assert main(["import-minimagen", str(tmp_path / "training_1"), "--out", str(tmp_path / "model")]) == 1
    assert "fastimagen import-minimagen" in capsys.readouterr().err
