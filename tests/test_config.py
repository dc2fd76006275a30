"""ds.json: every mistake is an error of one line that names the key; overrides; descriptions of all fields."""

from __future__ import annotations

import ast
import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastimagen import config as config_module
from fastimagen import data_config, diffusion_config, network_config
from fastimagen.config import (
    AugmentationConfig,
    CascadeChanges,
    CascadeConfig,
    FastimagenConfig,
    ScheduleConfig,
    StageConfig,
)
from fastimagen.config_file import config_from_dict, load_config
from fastimagen.network_config import IFUNetConfig, UNetConfig
from fastimagen.section import Section
from tests.conftest import ROOT, TOY_STAGES, TOY_UNET


def tree(**settings: Any) -> dict[str, Any]:
    return {"train_batch_size": 4, "fastimagen": {"cascade": {"stages": copy.deepcopy(TOY_STAGES)}, **settings}}


def put(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`content` with `value` at a dotted path; numbers in it are indices of lists."""
    *parents, leaf = path.split(".")
    node: Any = content
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[leaf] = value
    return content


def error_of(content: dict[str, Any]) -> str:
    """The message, of one line, of the error for a configuration."""
    with pytest.raises(ValueError) as caught:
        config_from_dict(content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- mistakes


@pytest.mark.parametrize(
    "path, nearest",
    [
        ("fastimagen.trian", "train"),
        ("fastimagen.train.step", "steps"),
        ("fastimagen.train.ema.decy", "decay"),
        ("fastimagen.data.shard", "shards"),
        ("fastimagen.data.shapes.sizes", "size"),
        ("fastimagen.text.encodr", "encoder"),
        ("fastimagen.cascade.stage", "stages"),
        ("fastimagen.cascade.stages.0.crops", "crop"),
        ("fastimagen.cascade.stages.1.unet.dim_mult", "dim_mults"),
        ("fastimagen.cascade.stages.1.augmentation.sample_levels", "sample_level"),
        ("fastimagen.cascade.stages.1.augmentation.schedule.timestep", "timesteps"),
        ("fastimagen.train.stages.sr.init_form", "init_from"),
        ("fastimagen.train.stages.sr.ema.warm_up", "warmup"),
    ],
)
def test_error_for_an_unknown_key_names_the_nearest_valid_key(path: str, nearest: str) -> None:
    assert error_of(put(tree(), path, 1)) == f'unknown key {path}; did you mean "{nearest}"?'


def test_error_for_an_unknown_key_lists_valid_keys_if_none_is_near() -> None:
    assert (
        error_of(put(tree(), "fastimagen.train.ema.qqq", 1))
        == "unknown key fastimagen.train.ema.qqq; valid keys: decay, warmup"
    )


def test_kinds_of_networks_are_told_apart_by_kind() -> None:
    small = {"kind": "if", "dims": [32], "attention": [True], "text_dim": 64, "head_dim": 32}
    content = put(tree(), "fastimagen.cascade.stages.0.unet", {**small})
    first, second = config_from_dict(content).fastimagen.cascade.stages
    assert isinstance(first.unet, IFUNetConfig) and isinstance(second.unet, UNetConfig)  # without kind: a U-Net
    unet = "fastimagen.cascade.stages.0.unet"
    assert error_of(put(content, f"{unet}.dim", 3)) == f'unknown key {unet}.dim; did you mean "dims"?'
    assert error_of(put(tree(), f"{unet}.dims", [3])) == f'unknown key {unet}.dims; did you mean "dim"?'
    assert error_of(put(tree(), f"{unet}.kind", "ifs")) == f'{unet}: kind must be "unet", "pixel_transformer" or "if"'
    assert (
        error_of(put(tree(), unet, {**small, "dims": [40]})) == f"{unet}: 40 channels cannot be split into groups = 32"
    )


def test_misspelled_section_name_is_an_error() -> None:
    assert error_of({"fast_imagen": {}}) == 'unknown key "fast_imagen"; did you mean "fastimagen"?'


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("fastimagen.train.steps", 0, "fastimagen.train.steps: Input should be greater than or equal to 1 (given: 0)"),
        ("fastimagen.train.steps", "many", "(given: 'many')"),
        ("fastimagen.cascade.stages.0.size", None, "fastimagen.cascade.stages.0.size: "),
        ("fastimagen.cascade", 3, "fastimagen.cascade: "),
        ("fastimagen.cascade.stages.0.name", "a b", "fastimagen.cascade.stages.0.name: "),
        (
            "fastimagen.cascade.stages.0.sampling.sampler",
            "euler",
            "'ddpm', 'ddim', 'dpmpp_2m' or 'heun' (given: 'euler')",
        ),
        ("fastimagen.cascade.stages.0.unet.cond_dim", 0, "cond_dim: Input should be greater than or equal to 1"),
        (
            "fastimagen.cascade.stages.0.unet.num_blocks",
            "x",
            "stages.0.unet.num_blocks: Input should be a valid integer",
        ),
        ("fastimagen.data.shards", 5, "fastimagen.data.shards: Input should be a valid string (given: 5)"),
        ("fastimagen.train.stages.sr.deepspeed", {"fastimagen": {}}, "train.stages.sr.deepspeed takes DeepSpeed keys"),
    ],
)
def test_error_for_an_invalid_value_names_key_and_value(path: str, value: Any, message: str) -> None:
    assert message in error_of(put(tree(), path, value))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim_mults=()), "dim_mults must hold at least one positive number"),
        (dict(dim_mults=(1, 0)), "dim_mults must hold at least one positive number"),
        (dict(num_blocks=(1, 2, 3)), "num_blocks has 3 entries but dim_mults has 2 levels"),
        (dict(num_blocks=-1), "num_blocks must not be negative"),
        (dict(num_blocks=(1, -1)), "num_blocks must not be negative"),
        (dict(dim=12, groups=8), "a level of 12 channels cannot be split into groups = 8"),
        (dict(stem_kernels=(3, 4)), "stem_kernels must be odd"),
        (dict(stem_kernels=(-1,)), "stem_kernels must be odd"),
        (dict(stem_kernels=()), "stem_kernels must be odd"),
        (dict(text_dim=None, text_in_self_attention=True), "need text_dim"),
        (dict(text_dim=None, text_padding="null"), "need text_dim"),
        (dict(checkpoint_levels=(0, 2)), "checkpoint_levels must be levels from 0 to 1"),
        (dict(full_resolution="extra_block"), 'full_resolution "extra_block" needs "downsample_first": true'),
    ],
)
def test_contradictory_unet_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**TOY_UNET, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="linear"), "the linear schedule is discrete"),
        (dict(name="cosine", timesteps=1000), "the cosine schedule is continuous"),
        (dict(name="linear", timesteps=100, shift=2.0), '"shift" is only for the cosine schedule'),
        (dict(logsnr_range=(5.0, -5.0)), "logsnr_range must ascend"),
    ],
)
def test_contradictory_schedule_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"0.size": 9}, 'stage "base": size 9 is not a multiple of 2, the total stride'),  # defect 10
        ({"1.crop": 6}, 'stage "sr": crop 6 is not a multiple of 4, the total stride'),
        ({"1.crop": 32}, 'stage "sr": crop 32 is larger than size 16'),
        ({"1.augmentation": None}, 'stage "sr" has a low-resolution input: set "augmentation"'),
        ({"0.augmentation": {}}, 'stage "base" has no low-resolution input: remove "augmentation"'),
        ({"1.unet.positional_encoding": True}, 'stage "sr" trains on crops, which a positional encoding'),
        ({"1.augmentation": {"train_range": [0.5, 0.1]}}, "train_range must ascend within"),
        ({"1.name": "base"}, "stage names must differ"),
        ({"0.size": 16}, "stage sizes must ascend"),
        ({"1.unet.lowres": False, "1.augmentation": None}, 'stage "sr" is not the first: its unet needs "lowres"'),
        ({"1.unet.text_dim": 32}, r"text_dim differs: \[32, 64\]"),
    ],
)
def test_contradictory_cascade_is_an_error(changes: dict[str, Any], message: str) -> None:
    content = tree()
    for path, value in changes.items():
        put(content, f"fastimagen.cascade.stages.{path}", value)
    with pytest.raises(ValueError, match=message):
        config_from_dict(content)


def test_sizes_must_be_multiples_of_the_total_stride() -> None:
    unet = UNetConfig(
        **{
            **TOY_UNET,
            "dim_mults": (1, 1, 1, 1, 1),
            "self_attention": False,
            "cross_attention": False,
            "lowres": True,
            "downsample_first": True,
        }
    )
    assert StageConfig(name="sr", size=1024, crop=256, unet=unet, augmentation=AugmentationConfig()).unet.stride == 32
    with pytest.raises(ValueError, match="crop 240 is not a multiple of 32"):
        StageConfig(name="sr", size=1024, crop=240, unet=unet, augmentation=AugmentationConfig())


def test_error_for_an_unknown_stage_lists_the_stages() -> None:
    cascade = CascadeConfig.model_validate({"stages": TOY_STAGES})
    assert cascade.below("sr").name == "base" and cascade.below("base") is None
    with pytest.raises(ValueError, match='no stage "srr"; the cascade has base, sr'):
        cascade.stage("srr")


# ---- files and overrides


def test_other_top_level_keys_are_passed_to_deepspeed() -> None:
    config = config_from_dict({**tree(), "anything": {"of": "DeepSpeed"}})
    assert config.deepspeed == {"train_batch_size": 4, "anything": {"of": "DeepSpeed"}}


def test_resolved_configuration_is_the_same_when_read_again(tmp_path: Path) -> None:
    config = load_config(ROOT / "ds.json")
    (tmp_path / "resolved.json").write_text(config.to_json())
    assert load_config(tmp_path / "resolved.json") == config
    assert FastimagenConfig() == config_from_dict({}).fastimagen


def test_overrides_set_keys_of_both_parts_of_the_file(write_config) -> None:
    path = write_config(tree())
    config = load_config(
        path,
        [
            "fastimagen.train.steps=10",
            "train_batch_size=64",
            "bf16.enabled=true",
            "fastimagen.train.run=runs/x=y",
            "fastimagen.train.stages.sr.steps=7",
            "fastimagen.data.validation=null",
            'fastimagen.data.shards=["a.tar", "b.tar"]',
        ],
    )
    assert config.deepspeed == {"train_batch_size": 64, "bf16": {"enabled": True}}
    train, data = config.fastimagen.train, config.fastimagen.data
    assert (train.steps, train.run, train.stages["sr"].steps) == (10, "runs/x=y", 7)
    assert data.validation is None and data.shards == ("a.tar", "b.tar")
    assert json.loads(path.read_text()) == tree()  # the file is unchanged


@pytest.mark.parametrize("stage", ["1", "sr"])
def test_override_reaches_into_the_list_of_stages(write_config, stage: str) -> None:
    config = load_config(write_config(tree()), [f"fastimagen.cascade.stages.{stage}.sampling.steps=77"])
    assert [stage.sampling.steps for stage in config.fastimagen.cascade.stages][1] == 77


@pytest.mark.parametrize("cascade", ["paper", {"preset": "paper"}, None])
def test_override_changes_a_preset(write_config, cascade: Any) -> None:
    content = tree()
    content["fastimagen"] = {"cascade": cascade} if cascade else {}
    config = load_config(write_config(content), ["fastimagen.cascade.stages.sr.crop=64"])
    preset = "paper" if cascade else "shapes"  # the default
    assert config.fastimagen.cascade == CascadeChanges(preset=preset, stages={"sr": {"crop": 64}})


@pytest.mark.parametrize(
    "cascade, message",
    [
        ({"preset": "paper", "model": "m"}, 'fastimagen.cascade: give one of "preset" and "model"'),
        ({"stages": {"base": {}}}, 'fastimagen.cascade: give one of "preset" and "model"'),
        ({"preset": "paper", "stages": {"base": 3}}, "fastimagen.cascade.stages.base: "),
        ({"presets": "paper"}, "unknown key fastimagen.cascade.presets; did you mean"),
    ],
)
def test_cascade_of_no_known_form_is_an_error(write_config, cascade: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write_config({"fastimagen": {"cascade": cascade}}))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "override, message",
    [
        ("fastimagen.train.steps", "--set takes KEY=VALUE, got 'fastimagen.train.steps'"),
        ("=3", "--set takes KEY=VALUE"),
        ("train_batch_size.a=3", "train_batch_size is not a section"),
        ("fastimagen.cascade.stages.0=3", "fastimagen.cascade.stages.0: "),
        ("fastimagen.cascade.stages.2.size=3", "there is no element 2; the list has 0, 1, base, sr"),
        ("fastimagen.cascade.stages.top.size=3", "there is no element top; the list has 0, 1, base, sr"),
        ("fastimagen.train.step=3", 'unknown key fastimagen.train.step; did you mean "steps"?'),
    ],
)
def test_invalid_override_is_an_error(write_config, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write_config(tree()), [override])
    assert message in str(caught.value)


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*missing.json: No such file"):
        load_config(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(ValueError, match=r"broken.json is not JSON: line"):
        load_config(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_config(tmp_path / "list.json")


def test_configuration_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        UNetConfig().dim = 3


# ---- documentation


def fields() -> Iterator[tuple[str, bool]]:
    """Every field of every section, and whether a docstring follows it."""
    for module in (config_module, data_config, diffusion_config, network_config):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.ClassDef) and issubclass(getattr(module, node.name), Section):
                for statement, after in zip(node.body, [*node.body[1:], None]):
                    if isinstance(statement, ast.AnnAssign):
                        described = (
                            isinstance(after, ast.Expr)
                            and isinstance(after.value, ast.Constant)
                            and isinstance(after.value.value, str)
                        )
                        yield f"{node.name}.{statement.target.id}", described


def test_every_field_has_a_docstring() -> None:
    found = dict(fields())
    sections = [
        value
        for module in (config_module, data_config, diffusion_config, network_config)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    ]
    own = {f"{section.__name__}.{name}" for section in sections for name in inspect.get_annotations(section)}
    assert found.keys() == own
    assert [name for name, described in found.items() if not described] == []
