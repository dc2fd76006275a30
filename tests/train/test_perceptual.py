"""Perceptual losses: their values against the formulas, the gate, the gradient, what they cost, and files that do not
fit. The networks have random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastimagen.cascade import Stage
from fastimagen.config import StageConfig, TrainConfig
from fastimagen.diffusion.draws import Draws
from fastimagen.diffusion_config import DINOConfig, LPIPSConfig, PerceptualConfig
from fastimagen.train.objective import objectives
from fastimagen.train.perceptual import (
    PerceptualObjective,
    check_perceptual,
    describe_perceptual,
    load_dino,
    load_lpips,
    resized,
)
from tests.conftest import TOY_UNET
from tests.host_synchronisations import GPU, recorded

CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
CONVOLUTIONS |= {17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
"""Channels by the index in `features` of torchvision's VGG16."""
TINY_DINO = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=7, image_size=21
)


def vgg_weights() -> dict[str, Tensor]:
    """A VGG16 whose features neither vanish nor grow; only one of the layers that LPIPS does not read."""
    torch.manual_seed(0)
    weights, channels = {"classifier.6.bias": torch.zeros(1000)}, 3
    for index, width in CONVOLUTIONS.items():
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * math.sqrt(2 / (9 * channels))
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(width)
        channels = width
    return weights


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> LPIPSConfig:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg_weights(), folder / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(linear, folder / "vgg.pth")
    return LPIPSConfig(vgg=str(folder / "vgg16.pth"), linear=str(folder / "vgg.pth"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> DINOConfig:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINO)).save_pretrained(folder)
    return DINOConfig(model=str(folder), size=21)


def images(seed: int, channels: int = 3, side: int = 16) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- the distances


def lpips_by_formula(x: Tensor, y: Tensor, vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> Tensor:
    """Zhang et al. 2018, eq. 1: features at the last convolution before each pooling."""
    mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    both = (torch.cat([x, y]) - mean) / std
    total, slices = torch.zeros(len(x)), [2, 7, 14, 21, 28]
    for index in CONVOLUTIONS:
        weight, bias = (vgg[f"features.{index}.{name}"] for name in ("weight", "bias"))
        both = F.conv2d(both, weight, bias, padding=1).relu()
        if index in slices:
            unit = both / both.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
            factor = linear[f"lin{slices.index(index)}.model.1.weight"]
            first, second = unit.chunk(2)
            total += ((first - second).square() * factor.flatten()[:, None, None]).sum(1).mean((1, 2))
            both = F.max_pool2d(both, 2) if index < slices[-1] else both
    return total


def test_lpips_is_the_formula_for_colour_and_grey(lpips: LPIPSConfig) -> None:
    distance, linear = load_lpips(lpips), torch.load(lpips.linear)
    for channels in (3, 1):
        x, y = images(0, channels), images(1, channels)
        expected = lpips_by_formula(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), vgg_weights(), linear)
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=0)
    x = images(0).requires_grad_()
    same = distance(x, x.detach())
    same.sum().backward()
    assert x.grad is not None and not same.any() and not x.grad.any()


@pytest.mark.parametrize("registers", [0, 2])
def test_dino_is_one_minus_the_cosine_of_patch_tokens(registers: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    if registers:
        settings = transformers.Dinov2WithRegistersConfig(**TINY_DINO, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(settings)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINO))
    model.save_pretrained(tmp_path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def tokens(x: Tensor) -> Tensor:
        pixels = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        return model.double().eval()(pixels.double()).last_hidden_state[:, 1 + registers :]

    x, y = images(3, side=14), images(4, side=14)
    expected = 1 - F.cosine_similarity(tokens(x), tokens(y), dim=-1).mean(1)
    distance = load_dino(DINOConfig(model=str(tmp_path), size=14))
    torch.testing.assert_close(distance(x, y), expected.float(), rtol=1e-4, atol=1e-6)
    assert not distance(x, x).gt(1e-6).any() and expected.min() > 1e-3


@pytest.mark.parametrize("size", [9, 16, 28])
def test_resizing_is_bicubic_with_antialiasing(size: int) -> None:
    x = images(5)
    expected = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(resized(x, size), expected, rtol=1e-5, atol=1e-5)


# ---- the objective


class Constant(nn.Module):
    """A network that always gives the same output, whatever it should be."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), 0.2, device=device))

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        return self.value.expand_as(x)


def stage_with(perceptual: dict[str, Any], prediction: str = "x0", size: int = 16) -> Stage:
    schedule = {"name": "flow" if prediction == "flow" else "cosine"}
    objective = {"prediction": prediction, "perceptual": perceptual}
    unet = {**TOY_UNET, "text_dim": None}
    tree = {"name": "base", "size": size, "unet": unet, "schedule": schedule, "objective": objective}
    return Stage(StageConfig.model_validate({**tree, "sampling": {"guidance": 1.0}}))


def draws(*times: float) -> Draws:
    uniform = torch.tensor(times, dtype=torch.float64)
    return Draws(
        uniform, uniform, uniform, torch.randn(len(times), 3, 16, 16, generator=torch.Generator().manual_seed(6)), None
    )


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "edm", "flow"])
def test_what_is_added_is_the_distance_of_the_estimate_below_the_gate(prediction: str) -> None:
    """For every prediction: 1 + |x0 - image| as a distance, which is not zero for equal images either."""
    stage = stage_with({"dino": {"model": "unused"}}, prediction)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return 1 + (x - y).abs().mean((1, 2, 3))

    objective = PerceptualObjective(stage, [(0.5, distance), (2.0, distance)], max_noise=1.0)
    network, x, given = Constant(), images(7), draws(0.3, 0.9)
    added = objective.training_loss(network, x, None, given) - stage.training_loss(network, x, None, given)
    time = stage.diffusion.training_times(given.time)
    x_t = stage.diffusion.add_noise(x, given.noise, time)
    expected = 2.5 * distance(stage.diffusion.x0(torch.full_like(x, 0.2), x_t, time), x)
    expected[1] = 0  # sigma / alpha is above 1 from the middle of both schedules on
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_comes_through_the_gate_and_a_finite_one_below_it(lpips: LPIPSConfig, dino: DINOConfig) -> None:
    stage = stage_with({"lpips": lpips.model_dump(), "dino": dino.model_dump(), "max_noise": 1.0})
    objective = objectives(stage, TrainConfig(), 1, torch.device("cpu"), torch.float32)(1)
    plain, x = objectives(stage_without(stage), TrainConfig(), 1, torch.device("cpu"), torch.float32)(1), images(8)
    gradients = []
    for times in ((0.6, 0.99), (0.1, 0.3)):
        for loss in (plain, objective):
            network = Constant()
            loss.training_loss(network, x, None, draws(*times)).sum().backward()
            assert network.value.grad is not None and network.value.grad.isfinite()
            gradients.append(network.value.grad.item())
    above_plain, above, below_plain, below = gradients
    assert above == above_plain and abs(below - below_plain) > 1e-4
    assert torch.equal(objective.noise_levels(draws(0.2, 0.7)), stage.noise_levels(draws(0.2, 0.7)))


def stage_without(stage: Stage) -> Stage:
    """The same stage without perceptual losses."""
    objective = stage.config.objective.model_copy(update={"perceptual": None})
    return Stage(stage.config.model_copy(update={"objective": objective}))


def test_a_step_with_perceptual_losses_does_not_synchronise(dino: DINOConfig) -> None:
    from fastimagen.train.perceptual import LPIPS, new_dino

    stage = stage_with({"dino": dino.model_dump()})
    with GPU:
        distances = [(0.1, LPIPS()), (0.01, new_dino(dino))]
        x, uniform = torch.empty(3, 3, 16, 16), torch.empty(3, dtype=torch.float64)
    objective = PerceptualObjective(stage, list(distances), 2.0)
    given = Draws(uniform, uniform, uniform, torch.empty_like(x), None)
    with recorded() as found:
        objective.training_loss(Constant(GPU), x, None, given).mean().backward()
    assert found == []


def test_the_dry_run_says_what_it_costs(lpips: LPIPSConfig, dino: DINOConfig) -> None:
    stage = stage_with({"lpips": lpips.model_dump()}).config
    line = describe_perceptual(stage)
    side, channels, flops = 16, 3, []
    for index, width in CONVOLUTIONS.items():
        side //= 2 if index in (5, 10, 17, 24) else 1
        flops.append(2 * 9 * channels * width * side**2)
        channels = width
    # the image, its estimate, and the gradient of the estimate; LPIPS' own products are under a thousandth
    assert float(line.split(" TFLOP")[0].split()[-1]) == pytest.approx(3 * sum(flops) / 1e12, rel=2e-3)
    assert "14.72 M parameters" in line and "LPIPS act up to noise level 2;" in line
    both = describe_perceptual(stage_with({"lpips": lpips.model_dump(), "dino": dino.model_dump()}).config)
    assert "LPIPS and DINO" in both and "DINO" not in line


# ---- what does not fit


def test_safetensors_are_read_like_pth_files(lpips: LPIPSConfig, tmp_path: Path) -> None:
    path = tmp_path / "linear.safetensors"
    save_file(torch.load(lpips.linear), path)
    own, other = (load_lpips(config).linear for config in (lpips, lpips.model_copy(update={"linear": str(path)})))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def without_a_layer(path: Path) -> None:
    weights = torch.load(path)
    torch.save({key: weight for key, weight in weights.items() if "lin4" not in key}, path)


def narrow(path: Path) -> None:
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, 64, 1, 1) for i in range(5)}, path)


LINEAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot read weights"),
    "cut": (cut, "cannot read weights"),
    "no state dict": (lambda path: torch.save([1], path), "must hold a state dict"),
    "keys": (without_a_layer, "missing lin4.model.1.weight"),
    "shapes": (narrow, "lin1.model.1.weight has shape (1, 64, 1, 1), expected (1, 128, 1, 1)"),
}


@pytest.mark.parametrize("damage", LINEAR)
def test_files_of_lpips_that_do_not_fit_are_one_line(damage: str, lpips: LPIPSConfig, tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    path.write_bytes(Path(lpips.linear).read_bytes())
    change, complaint = LINEAR[damage]
    change(path)
    with pytest.raises(ValueError, match=r"^objective.perceptual.lpips.linear: ") as error:
        check_perceptual(PerceptualConfig(lpips=lpips.model_copy(update={"linear": str(path)})))
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def set_in_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MODEL: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), "cannot read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "cut": (lambda folder: cut(folder / "model.safetensors"), "header"),
    "another kind": (lambda folder: set_in_config(folder, model_type="bert"), 'the model_type is "bert"'),
    "another width": (lambda folder: set_in_config(folder, hidden_size=32), "has shape (16,), expected (32,)"),
    "too deep": (lambda folder: set_in_config(folder, num_hidden_layers=3), "missing encoder.layer"),
    "too shallow": (
        lambda folder: set_in_config(folder, num_hidden_layers=1, out_features=["stage1"], out_indices=[1]),
        "unexpected encoder.layer",
    ),
    "patches": (lambda folder: set_in_config(folder, patch_size=4), "size 21 must be a multiple of 4"),
}


@pytest.mark.parametrize("damage", MODEL)
def test_folders_of_dino_that_do_not_fit_are_one_line(damage: str, dino: DINOConfig, tmp_path: Path) -> None:
    for path in Path(dino.model).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change, complaint = MODEL[damage]
    change(tmp_path)
    config = dino.model_copy(update={"model": str(tmp_path)})
    for check in (lambda: check_perceptual(PerceptualConfig(dino=config)), lambda: load_dino(config)):
        with pytest.raises(ValueError, match=r"^objective.perceptual.dino") as error:
            check()
        assert complaint in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("perceptual", "size", "complaint"),
    [
        ({}, 16, 'give "lpips" or "dino"'),
        ({"lpips": {"vgg": "a", "linear": "b"}}, 8, "trains on 8 pixels"),
        ({"lpips": {"vgg": "a"}}, 16, "linear"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(perceptual: Any, size: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        stage_with(perceptual, size=size)
