"""Images from a shard to batches on one core: ours beside webdataset with PIL; how exact the fast path is.

    python -m benchmarks.studies.decode --out benchmarks/results/cpu/decode.json

Speed: CPU milliseconds an image, the least of ROUNDS rounds that alternate between the two, both in this process with
one thread. webdataset decodes with PIL, and its images are scaled (bicubic, antialiased), cropped and made float
tensors; ours are what a training step gets, made float as well. Exactness: RMS differences of the pixels, of 255, to
full decodes that are scaled in other ways. Memory is in decode_memory.py.
The photograph comes with matplotlib, the other images are noise with the spectrum of photographs, and disks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from fastimagen.data.loader import Loader
from fastimagen.data.order import Order
from fastimagen.data.shard_index import index_shard
from fastimagen.files import write_json
from fastimagen.images import open_rgb, resize_and_crop

SIZE = 256
SOURCES = (512, 1024)
IMAGES, DISTINCT, ROUNDS = 24, 6, 5


def photograph(side: int) -> Image.Image:
    """Part of a photograph of 512x600 pixels, enlarged if need be."""
    import matplotlib

    path = Path(matplotlib.__file__).parent / "mpl-data/sample_data/grace_hopper.jpg"
    return Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box=(0, 60, 512, 572))


def synthetic(side: int, seed: int) -> Image.Image:
    """Coloured noise whose amplitudes fall with the frequency, as in photographs, and disks with sharp edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    luma, *chroma = (
        np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.1).real for _ in range(4)
    )
    pixels = np.stack([luma / luma.std() + 0.3 * part / part.std() for part in chroma], axis=-1)  # (H, W, 3)
    y, x = np.mgrid[:side, :side] / side
    for _ in range(12):
        left, top, radius = rng.random(3) * [1, 1, 0.2]
        disk = np.hypot(x - left, y - top) < radius
        pixels[disk] = 0.3 * pixels[disk] + rng.standard_normal(3)
    return Image.fromarray((45 * pixels + 120).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, images: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (extension, content) in enumerate(images):
            for suffix, data in ((extension, content), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def loader(path: Path, batch: int) -> Loader:
    shard = index_shard(path)
    order = Order([len(shard)], 0)
    return Loader([shard], None, order, size=SIZE, global_batch=batch, micro_batch=batch, threads=1, crop_seed=0)


def webdataset_images(path: Path) -> Iterator[torch.Tensor]:
    """The shard again and again."""
    import webdataset

    def prepare(sample: tuple[Image.Image, str]) -> torch.Tensor:
        image = sample[0].convert("RGB")
        side = SIZE / min(image.size)
        width, height = round(image.width * side), round(image.height * side)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div(127.5).sub(1)  # (3, H, W)

    while True:
        data = webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("jpg", "txt").map(prepare)
        yield from data


def cpu_ms(work: Callable[[], Any]) -> float:
    """CPU milliseconds for each of IMAGES images, of all threads."""
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began) / IMAGES


def speed(side: int, folder: Path) -> dict[str, Any]:
    """CPU milliseconds an image of both, and the ratio."""
    path = folder / f"{side}.tar"
    write_shard(
        path, [("jpg", jpeg(synthetic(side, seed))) for seed in range(DISTINCT - 1)] + [("jpg", jpeg(photograph(side)))]
    )
    theirs, batch = webdataset_images(path), IMAGES // 4
    rounds: list[tuple[float, float]] = []
    with closing(loader(path, batch).batches(0)) as ours:

        def own() -> None:
            for _ in range(IMAGES // batch):
                next(ours).images_for(torch.device("cpu"))
            time.sleep(1)  # costs nothing, and its thread prepares what the next round takes: as much as this one took

        for _ in range(ROUNDS + 1):
            rounds.append((cpu_ms(own), cpu_ms(lambda: torch.stack([next(theirs) for _ in range(IMAGES)]))))
    fastest = [min(values) for values in zip(*rounds[1:])]
    return {
        "jpeg": side,
        "to": SIZE,
        "fastimagen_ms": round(fastest[0], 2),
        "webdataset_pil_ms": round(fastest[1], 2),
        "ratio": round(fastest[1] / fastest[0], 2),
    }


def exactness(side: int) -> dict[str, Any]:
    """RMS differences, of 255, between what training gets and two slower ways from the full decode: bicubic and
    antialiased; and as ADM prepares its data, halves by areas as long as these are large enough, then bicubic."""
    row: dict[str, Any] = {"jpeg": side, "to": SIZE}
    for name, image in (("photograph", photograph(side)), ("synthetic", synthetic(side, 0))):
        data = jpeg(image)
        fast = resize_and_crop(open_rgb(data, at_least=SIZE), SIZE)
        full = halved = Image.open(io.BytesIO(data)).convert("RGB")
        while halved.width >= 2 * SIZE:
            halved = halved.reduce(2)
        for way, source in (("bicubic", full), ("adm", halved)):
            exact = np.asarray(source.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
            row[f"{name}_rms_{way}"] = round(float(np.sqrt(((np.asarray(fast, float) - exact) ** 2).mean())), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "command": "python -m benchmarks.studies.decode",
            "timer": f"CPU ms an image on one core, the least of {ROUNDS} rounds of {IMAGES} images",
            "speed": [speed(side, folder) for side in SOURCES],
            "exactness": [exactness(side) for side in (320, 384, *SOURCES)],
            "versions": {"pillow": PIL.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": platform.machine(),
            "date": date.today().isoformat(),
        }
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
