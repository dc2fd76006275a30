"""Sampling that starts from images: img2img, inpainting, one stage alone; and negative captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastimagen.cli import main
from fastimagen.config import ScheduleConfig
from fastimagen.diffusion.inpainting import InitImage, sample_from_image
from fastimagen.diffusion.samplers import SAMPLERS
from fastimagen.diffusion.schedule import Cosine, make_schedule
from fastimagen.images import save_image
from fastimagen.sampling.output import Output
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import write_toy_encoder, write_toy_model

CAPTIONS = ["a red circle on a white background", "a small blue star on the left of a gray background"]
SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> ImagenPipeline:
    folder = tmp_path_factory.mktemp("editing")
    return ImagenPipeline.from_pretrained(write_toy_model(folder / "model", write_toy_encoder(folder / "encoder")))


@pytest.fixture(scope="module")
def text(pipe: ImagenPipeline) -> TextEmbeddings:
    return pipe.encode(CAPTIONS)


def image(size: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def left_half(size: int, batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    mask[..., : size // 2] = True
    return mask


# ---- img2img


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_full_strength_is_sampling_from_pure_noise(sampler: str, pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    plain = pipe(text=text, sampler=sampler, steps=4).images
    assert torch.equal(
        pipe(text=text, sampler=sampler, steps=4, init_image=InitImage(image(16), strength=1.0)).images, plain
    )


def test_less_strength_stays_closer_to_the_image(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    start = image(8)
    far = [
        (
            pipe(
                text=text, steps=50, stop_at="base", guidance=1.0, init_image=InitImage(start, strength=strength)
            ).images
            - start
        )
        .square()
        .mean()
        .item()
        for strength in (0.02, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2] or far[0] < 0.5 * far[2]


def test_sampling_starts_at_the_noise_level_of_the_strength() -> None:
    """Without noise, and with a denoiser that ignores the image, the first input is alpha times the image."""
    seen: list[tuple[float, Tensor]] = []

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        seen.append((time.item(), x))
        return torch.zeros_like(x)

    times, init_image = SCHEDULE.sampling_times(10), InitImage(image(4, batch=1), strength=0.3)
    sample_from_image(
        SAMPLERS["ddim"], denoise, init_image, times, schedule=SCHEDULE, noise=lambda step: torch.zeros(1, 3, 4, 4)
    )
    alpha, _ = SCHEDULE.alpha_sigma(times[7])
    assert [time for time, _ in seen] == times[7:10].tolist()
    torch.testing.assert_close(seen[0][1], init_image.image * alpha.item(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_by_default_the_image_shows_whatever_the_noise_schedule(shift: float) -> None:
    """The first input has noise at most twice as strong as the image, and about as strong as that."""
    schedule, seen = Cosine(shift), []

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return x

    sample_from_image(
        SAMPLERS["ddim"],
        denoise,
        InitImage(image(4, batch=1)),
        schedule.sampling_times(50),
        schedule=schedule,
        noise=lambda step: torch.zeros(1, 3, 4, 4),
    )
    alpha, sigma = schedule.alpha_sigma(seen[0])
    assert 1.7 < (sigma / alpha).item() <= 2.0
    assert InitImage(image(16), left_half(16)).strength == 1.0  # nothing of what the mask covers


# ---- inpainting


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_known_region_is_kept_exactly(sampler: str, pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    init_image = InitImage(image(16), left_half(16), num_resamples=2, jump_length=2)
    images = pipe(text=text, sampler=sampler, steps=4, init_image=init_image).images
    assert torch.equal(images[..., 8:], init_image.image[..., 8:])
    assert not torch.isclose(images[..., :8], init_image.image[..., :8]).any(dim=1).all()


def test_resampling_makes_the_sampled_region_agree_with_the_known_one() -> None:
    """Gaussian pixels with correlation 0.9: conditional mean and variance of the sampled pixel, given the known ones.

    The denoiser is exact; only resampling brings the values of the known pixels into the sampled one.
    """
    batch, correlation = 4000, 0.9
    covariance = torch.full((4, 4), correlation * 0.04).fill_diagonal_(0.04).double()
    known = torch.tensor([0.3, 0.2, 0.25])

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = (value.item() for value in SCHEDULE.alpha_sigma(time))
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4).double())
        return (x.flatten(1).double() @ gain.T).float().unflatten(1, (1, 2, 2))

    weights = covariance[0, 1:] @ torch.linalg.inv(covariance[1:, 1:])
    mean, variance = (weights @ known.double()).item(), (covariance[0, 0] - weights @ covariance[1:, 0]).item()
    image = torch.cat([torch.zeros(1), known]).view(1, 1, 2, 2).expand(batch, -1, -1, -1)
    mask = torch.zeros(batch, 1, 2, 2, dtype=torch.bool)
    mask[:, :, 0, 0] = True

    def sampled_pixel(num_resamples: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        init_image = InitImage(image, mask, num_resamples=num_resamples, jump_length=3)
        return sample_from_image(
            SAMPLERS["ddpm"],
            denoise,
            init_image,
            SCHEDULE.sampling_times(30),
            schedule=SCHEDULE,
            noise=lambda step: torch.randn(batch, 1, 2, 2, generator=generator),
        )[:, 0, 0, 0]

    once, often = sampled_pixel(1), sampled_pixel(10)
    assert abs(often.mean() - mean) < 0.1 * mean
    assert abs(often.mean() - mean) <= abs(once.mean() - mean) + 0.003
    assert 0.6 * variance < often.var() < 1.5 * variance


def test_a_pixel_of_a_smaller_stage_is_known_if_all_its_pixels_are_known() -> None:
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 5] = True
    small = InitImage(image(8, batch=1), mask).at(4, torch.device("cpu"))
    assert small.mask.nonzero().tolist() == [[0, 0, 1, 2]] and small.image.shape == (1, 3, 4, 4)


# ---- single stages


def test_stages_run_one_by_one_give_the_images_of_the_cascade(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    base = pipe(text=text, stop_at="base")
    assert base.images.shape == (2, 3, 8, 8) and list(base.record["stages"]) == ["base"]
    enlarged = pipe(text=text, lowres=base.images, start_at="sr")
    assert torch.equal(enlarged.images, pipe(text=text).images)
    assert list(enlarged.record["stages"]) == ["sr"]


def test_one_low_resolution_image_is_used_for_all_captions(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    one = image(8, batch=1)
    both = pipe(text=text, lowres=one, start_at="sr").images
    assert torch.equal(both, pipe(text=text, lowres=one.expand(2, -1, -1, -1), start_at="sr").images)


# ---- negative captions


def test_the_caption_as_its_own_negative_caption_has_no_effect(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    torch.testing.assert_close(
        pipe(text=text, negative=text, guidance=7.0).images, pipe(text=text, guidance=1.0).images, rtol=0, atol=1e-4
    )


def test_a_negative_caption_changes_the_image(pipe: ImagenPipeline) -> None:
    plain, guided = (pipe(CAPTIONS, guidance=3.0, negative=negative) for negative in (None, ["a green cross"]))
    assert not torch.allclose(plain.images, guided.images, atol=1e-3)
    assert guided.record["negative"] == ["a green cross"]


# ---- batches


def test_images_do_not_depend_on_the_batch_size(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    def sample(batch_size: int) -> Output:
        return pipe(
            text=text,
            negative=text[[1, 0]],
            init_image=InitImage(image(16), left_half(16), strength=0.5),
            batch_size=batch_size,
            steps=4,
            guidance=2.0,
            sampler="ddpm",
        )

    torch.testing.assert_close(sample(1).images, sample(2).images, rtol=0, atol=1 / 255)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image=torch.zeros(3, 8, 6)), r"must be floating point \(B, C, H, W\)"),
        (dict(image=torch.full((1, 3, 8, 8), 1.5)), r"must lie in \[-1, 1\]"),
        (dict(image=torch.full((1, 3, 8, 8), torch.nan)), r"must lie in \[-1, 1\]"),
        (dict(strength=0.0), r"strength must lie in \(0, 1\], got 0.0"),
        (dict(strength=1.1), r"strength must lie in \(0, 1\], got 1.1"),
        (dict(mask=left_half(16, 1)), "the inpainting mask of an image"),
        (dict(mask=torch.zeros(1, 1, 8, 8)), "must be bool"),
        (dict(mask=torch.zeros(1, 1, 8, 8, dtype=torch.bool)), "is empty"),
        (dict(num_resamples=0), r"num_resamples \(--resamples\) and jump_length must be at least 1"),
    ],
)
def test_wrong_init_images_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitImage(**{"image": torch.zeros(1, 3, 8, 8), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(start_at="top"), 'start_at is the unknown stage "top"; the cascade has base, sr'),
        (dict(stop_at="top"), 'stop_at is the unknown stage "top"'),
        (dict(start_at="sr", stop_at="base", lowres=image(8)), "start_at sr comes after stop_at base"),
        (dict(start_at="sr"), r"stage sr enlarges an image: give it with lowres \(--lowres\)"),
        (dict(lowres=image(8)), "stage base starts from noise and takes no lowres"),
        (dict(lowres=image(8, batch=3), start_at="sr"), "3 lowres images for 2 images"),
        (dict(lowres=image(8) * 3, start_at="sr"), r"lowres must lie in \[-1, 1\]"),
        (dict(init_image=InitImage(image(8, batch=3))), "3 init images for 2 images"),
        (dict(negative=["blue"], guidance=1.0), "negative captions need classifier-free guidance"),
        (dict(negative=["a", "b", "c"]), "3 negative captions for 2 images"),
        (dict(negative=[3]), "negative captions must be a list"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: dict, message: str, pipe: ImagenPipeline, text: TextEmbeddings
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(text=text, **arguments)


# ---- on the command line


def test_inpainting_on_the_command_line(
    pipe: ImagenPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init_image, mask = image(16, batch=1), left_half(16, 1)
    save_image(init_image[0], tmp_path / "init_image.png")
    save_image(mask[0].float().expand(3, -1, -1) * 2 - 1, tmp_path / "mask.png")
    out = tmp_path / "out"
    assert (
        main(
            [
                "sample",
                "--model",
                pipe.source,
                "--captions",
                CAPTIONS[0],
                "--image",
                str(tmp_path / "init_image.png"),
                "--mask",
                str(tmp_path / "mask.png"),
                "--negative",
                "a cross",
                "--guidance",
                "2",
                "--steps",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    record = json.loads((out / "samples.json").read_text())
    assert record["init_image"] == {"mask": True, "strength": 1.0, "num_resamples": 5, "jump_length": 5}
    assert record["negative"] == ["a cross"]
    save_image(image(8, batch=1)[0], tmp_path / "small.png")
    for arguments, message in [
        (["--image", "small.png", "--mask", "mask.png"], "must have the same size"),
        (["--mask", "mask.png"], "--mask, --strength and --resamples need --image"),
        (["--image", "none.png"], "cannot read image"),
    ]:
        paths = [str(tmp_path / word) if word.endswith(".png") else word for word in arguments]
        assert main(["sample", "--model", pipe.source, "--captions", "x", "--out", str(tmp_path / "no"), *paths]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()
