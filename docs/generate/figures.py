"""Draw the figures of the tutorial from the quickstart's model.

    python docs/generate/figures.py [--run runs/quickstart] [--out docs/tutorial]

Needs matplotlib (extra `docs`). Everything is drawn with fixed seeds: the same run gives the same figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import diagrams
import matplotlib
import numpy as np
import torch
from diagrams import BLUE, ORANGE
from einops import rearrange
from matplotlib import pyplot
from torch import Tensor
from torch.nn.functional import normalize

from fastimagen import ImagenPipeline
from fastimagen.data.shapes import caption, parse, render
from fastimagen.diffusion.schedule import make_schedule
from fastimagen.diffusion_config import ScheduleConfig
from fastimagen.images import resize, to_tensor, to_uint8
from fastimagen.networks.attention import QK_SCALE, Context, CrossAttention
from fastimagen.seeds import image_noise

ROOT = Path(__file__).resolve().parents[2]
CAPTION = "a large orange star on the left of a black background"
OPEN = "a red circle on a white background"
CPU = torch.device("cpu")
GREEN, GREY = "#009e73", "#888888"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 2,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastimagen",  # the same file from the same data
}
Row = tuple[str, Sequence[Tensor | None]]


class Model:
    """The quickstart's model, taken apart. Images and noise have a batch of 1."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.pipe = ImagenPipeline.from_pretrained(run / "model")
        self.base, self.sr = self.pipe.cascade.stages
        self.unet = self.pipe.cascade.unets["base"]
        self.text = self.pipe.encode([CAPTION])

    def noise(self, size: int, step: int = -1, seed: int = 0) -> Tensor:
        return image_noise([seed], (3, size, size), stage="figure", step=step, device=CPU)

    @torch.inference_mode()
    def estimate(self, x_t: Tensor, time: Tensor, keep: bool) -> Tensor:
        """The base network's x_0 from x_t (1, 3, H, W) at `time` (1,), with or without the caption."""
        diffusion = self.base.diffusion
        output = self.unet(
            diffusion.network_input(x_t, time),
            diffusion.schedule.network_time(time),
            text=self.text,
            keep_text=torch.tensor([keep]),
        )
        return diffusion.x0(output, x_t, time)


def drawn(text: str, size: int) -> Tensor:
    """An image (1, 3, size, size) of the shapes for a caption."""
    scene = parse(text)
    assert caption(scene) == text
    return to_tensor(render(scene, size, np.random.default_rng(0)))[None]


def strip(path: Path, rows: Sequence[Row], titles: Sequence[str] = (), *, below: Sequence[str] = ()) -> None:
    """Images (1, 3, H, W) in labelled rows, with a title above and words below every column; None leaves a gap."""
    columns = max(len(images) for _, images in rows)
    grid = {"wspace": 0.06, "hspace": 0.06}
    size = (1.2 * columns, 1.2 * len(rows))
    figure, axes = pyplot.subplots(len(rows), columns, squeeze=False, figsize=size, gridspec_kw=grid)
    for axes_row, (label, images) in zip(axes, rows):
        for axis in axes_row:
            axis.axis("off")
        for axis, image in zip(axes_row, images):
            if image is not None:
                axis.imshow(to_uint8(image.clamp(-1, 1))[0].numpy(), interpolation="nearest")
        axes_row[0].text(-0.12, 0.5, label, ha="right", va="center", transform=axes_row[0].transAxes)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    for axis, words in zip(axes[-1], below):
        axis.text(0.5, -0.08, words, ha="center", va="top", transform=axis.transAxes, fontsize=9)
    _save(figure, path)


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=110, metadata=metadata, bbox_inches="tight", pad_inches=0.06)
    pyplot.close(figure)


# ---- the figures


def overview(model: Model, out: Path) -> None:
    """From the caption to the image."""
    noises = [
        image_noise([3], (3, size, size), stage=name, step=-1, device=CPU) for name, size in (("base", 32), ("sr", 64))
    ]
    images = [model.pipe(CAPTION, seed=3, stop_at=name).images for name in ("base", "sr")]
    pixels = [[to_uint8(image.clamp(-1, 1))[0].numpy() for image in stages] for stages in (noises, images)]
    _save(diagrams.cascade(CAPTION, model.text.embeds[0].numpy(), *pixels), out / "overview.png")


def unet(model: Model, out: Path) -> None:
    """The U-Net of the base stage."""
    _save(diagrams.unet(), out / "unet.svg")


def noise(model: Model, out: Path) -> None:
    """An image with more and more noise."""
    times = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    schedule = make_schedule(ScheduleConfig())
    x_0, epsilon = drawn(CAPTION, 64), model.noise(64)
    images, below = [], []
    for time in times:
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(time))
        images.append(alpha * x_0 + sigma * epsilon)
        below.append(f"alpha {alpha:.2f}\nsigma {sigma:.2f}")
    strip(out / "noise.png", [("x_t", images)], [f"t = {float(time):.1f}" for time in times], below=below)


def schedule(model: Model, out: Path) -> None:
    """log-SNR of four schedules over time."""
    times = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    figure, axis = pyplot.subplots(figsize=(5.2, 3), layout="constrained")
    curves = [
        ("linear, 1000 steps", ScheduleConfig(name="linear", timesteps=1000), GREY),
        ("cosine", ScheduleConfig(), BLUE),
        ("cosine, shift 4", ScheduleConfig(shift=4.0), ORANGE),
        ("flow", ScheduleConfig(name="flow"), GREEN),
    ]
    for name, config, color in curves:
        item = make_schedule(config)
        alpha, sigma = item.alpha_sigma(item.training_times(times))
        axis.plot(times, 2 * torch.log(alpha / sigma), color=color, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="time t", ylabel="log-SNR", ylim=(-16, 16))
    axis.text(1, 0.3, "as much noise as image", ha="right", fontsize=9)
    axis.legend()
    _save(figure, out / "schedule.svg")


def denoiser(model: Model, out: Path) -> None:
    """What the trained base network makes of a noisy image, with and without the caption."""
    x_0, epsilon = drawn(CAPTION, 32), model.noise(32)
    schedule = model.base.diffusion.schedule
    noisy, with_caption, without, titles = [], [], [], []
    for time in torch.tensor([[0.1], [0.3], [0.5], [0.7], [0.9], [1.0]], dtype=torch.float64):
        x_t = model.base.diffusion.add_noise(x_0, epsilon, time)
        noisy.append(x_t)
        with_caption.append(model.estimate(x_t, time, True))
        without.append(model.estimate(x_t, time, False))
        sigma = float(schedule.alpha_sigma(time)[1])
        titles.append(f"t = {float(time):.1f}\nsigma {sigma:.2f}")
    rows: list[Row] = [("x_t", noisy), ("estimate,\nno caption", without), ("estimate,\ncaption", with_caption)]
    strip(out / "denoiser.png", rows, titles)


def words(model: Model, out: Path) -> None:
    """One seed, and captions that differ in one word."""
    captions = [
        CAPTION,
        CAPTION.replace("orange", "blue").replace("an ", "a "),
        CAPTION.replace("star", "triangle"),
        CAPTION.replace("on the left", "on the right"),
        CAPTION.replace("large", "small"),
        CAPTION.replace("black", "white"),
    ]
    images = model.pipe(captions, seeds=[3] * len(captions)).images
    titles = ["the caption", "... blue ...", "... triangle ...", "... right ...", "... small ...", "... white ..."]
    strip(out / "words.png", [("", images.split(1))], titles)


def attention(model: Model, out: Path) -> None:
    """Where in the image each word is read: the last cross-attention of the base stage, in nearly pure noise."""
    time = torch.tensor([0.9], dtype=torch.float64)
    x_t = model.base.diffusion.add_noise(drawn(CAPTION, 32), model.noise(32), time)
    layer, inputs = model.unet.ups[-1].blocks[0].cross_attention, []
    hook = layer.register_forward_pre_hook(lambda module, arguments: inputs.extend(arguments))
    estimate = model.estimate(x_t, time, True)
    hook.remove()
    weights = attention_weights(layer, *inputs)  # (N, L)
    side = round(weights.shape[0] ** 0.5)
    maps = (weights / weights.max() * 2 - 1).T.reshape(-1, 1, 1, side, side).expand(-1, -1, 3, -1, -1)
    shown = [index for index, word in enumerate(CAPTION.split()) if len(word) > 3]  # a word is one token here
    titles = ["estimate", *(CAPTION.split()[index] for index in shown)]
    strip(out / "attention.png", [("", [estimate, *(maps[index] for index in shown)])], titles)


@torch.inference_mode()
def attention_weights(layer: CrossAttention, x: Tensor, context: Context) -> Tensor:
    """(N, L): how much each image token attends to each text token, the mean over all heads."""
    q = rearrange(layer.to_q(layer.norm(x)), "1 n (heads d) -> heads n d", heads=layer.heads)
    text, _ = context.text_kv[layer.slot]  # (1, L, A, D)
    times, _ = layer.project_text(context.time_tokens)  # (1, R, A, D)
    null = layer.null_kv[0].expand(1, 1, layer.heads, -1)  # (1, 1, A, D)
    k = rearrange(torch.cat([text, times, null], dim=1), "1 keys heads d -> heads keys d")
    q_scale, k_scale = layer.qk_scales
    logits = QK_SCALE * (normalize(q, dim=-1) * q_scale) @ (normalize(k, dim=-1) * k_scale).mT  # (A, N, keys)
    return logits.softmax(dim=-1).mean(dim=0)[:, : text.shape[1]]  # (N, L)


def loss(model: Model, out: Path) -> None:
    """Training and validation loss of both stages."""
    records = [json.loads(line) for line in (model.run / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(7.4, 2.8), layout="constrained", width_ratios=[5, 3])
    for axis, stage in zip(axes, ("base", "sr")):
        for key, label, style in (
            ("loss", "training, with noisy weights", GREY),
            ("val_loss", "validation, with EMA", BLUE),
        ):
            points = [(record["step"], record[key]) for record in records if record["stage"] == stage and key in record]
            axis.plot(*zip(*points), color=style, label=label, marker="o" if key == "val_loss" else None)
        axis.set(title=f'stage "{stage}"', xlabel="step", yscale="log")
    axes[0].set_ylabel("loss")
    axes[0].legend()
    _save(figure, out / "loss.svg")


def sampling(model: Model, out: Path) -> None:
    """The states of the sampler and the estimates of the final image, along the steps of the base stage."""
    seen: list[tuple[Tensor, Tensor]] = []
    model.pipe(OPEN, seed=2, guidance=1.0, stop_at="base", callback=lambda stage, step, x, x0: seen.append((x, x0)))
    steps = [0, 3, 5, 7, 9, 11, 14, 17, 19]
    states, estimates = ([seen[step][kind] for step in steps] for kind in (0, 1))
    rows: list[Row] = [("x_t after\nthe step", states), ("estimate\nof x_0", estimates)]
    strip(out / "sampling.png", rows, [f"step {step + 1}" for step in steps])


def guidance(model: Model, out: Path) -> None:
    """Growing guidance weights, with the same seed in every row."""
    captions = {
        "orange star": CAPTION,
        "pink circle": "a small pink circle on the right of a white background",
        "green triangle": "a large green triangle at the top of a gray background",
    }
    weights = [0.0, 1.0, 2.0, 3.0, 5.0, 10.0]
    rows: list[Row] = []
    for label, text in captions.items():
        images = [model.pipe(text, seed=1, guidance={"base": weight}).images for weight in weights]
        rows.append((label, images))
    strip(out / "guidance.png", rows, [f"weight {weight:g}" for weight in weights])


def thresholding(model: Model, out: Path) -> None:
    """Images at a large guidance weight with each kind of thresholding, and the range of the estimate along the way."""
    captions = [
        CAPTION,
        "a small red square in the center of a white background",
        "a large green triangle at the top of a gray background",
        OPEN,
    ]
    rows = []
    for threshold in ("none", "static", "dynamic"):
        images = model.pipe(captions, seeds=[1] * 4, threshold=threshold, guidance=5.0, stop_at="base").images
        rows.append((threshold, images.split(1)))
    strip(out / "thresholding.png", rows)

    figure, axis = pyplot.subplots(figsize=(5.2, 3), layout="constrained")
    for weight, color in ((1.0, GREEN), (2.0, BLUE), (8.0, ORANGE)):
        extreme: list[float] = []

        def note(stage: str, step: int, x: Tensor, x0: Tensor, into: list[float] = extreme) -> None:
            into.append(float(x0.abs().quantile(0.995)))

        model.pipe(CAPTION, seed=1, guidance={"base": weight}, threshold="none", stop_at="base", callback=note)
        axis.plot(range(1, len(extreme) + 1), extreme, color=color, label=f"guidance weight {weight:g}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="99.5th percentile of |x_0|", xticks=[1, 5, 10, 15, 20])
    axis.legend()
    _save(figure, out / "range.svg")


def augmentation(model: Model, out: Path) -> None:
    """What the super-resolution stage gets and gives at several augmentation levels."""
    small = model.pipe(CAPTION, seed=3, stop_at="base").images
    levels = [0.0, 0.15, 0.3, 0.5]
    inputs: list[Tensor | None] = [small]
    outputs: list[Tensor | None] = [resize(small, 64)]
    for level in levels:
        inputs.append(model.sr.lowres_condition(small, torch.tensor([level]), model.noise(64))["lowres"])
        settings = {"start_at": "sr", "lowres": small, "augmentation_level": level}
        outputs.append(model.pipe(CAPTION, seed=3, **settings).images)
    titles = ["base image", *(f"level {level:g}" for level in levels)]
    strip(out / "augmentation.png", [("input", inputs), ("output", outputs)], titles)


FIGURES: dict[str, Callable[[Model, Path], None]] = {
    draw.__name__: draw
    for draw in (
        overview,
        noise,
        schedule,
        unet,
        denoiser,
        words,
        attention,
        loss,
        sampling,
        guidance,
        thresholding,
        augmentation,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="run directory of the quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tutorial", help="folder of the figures")
    parser.add_argument("--only", choices=FIGURES, help="draw one of them")
    options = parser.parse_args()
    matplotlib.use("Agg")  # needs no display
    model = Model(options.run)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            if options.only in (None, name):
                draw(model, options.out)
                print(name)


if __name__ == "__main__":
    main()
