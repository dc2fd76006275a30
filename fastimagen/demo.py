"""A web page for a model: captions in, pictures and the settings that make them again out. Needs the `demo` extra."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .diffusion.samplers import SAMPLERS
from .images import to_uint8
from .sampling.output import Output
from .sampling.pipeline import ImagenPipeline

if TYPE_CHECKING:
    import gradio as gr

EXAMPLES = (
    "a large blue star at the top of a black background",
    "a large red triangle on the right of a white background",
    "a pink circle to the left of a blue triangle on a black background",
)  # of the built-in shapes
MOST = 64  # pictures at once
LARGEST_SEED = 2**53 - MOST  # a browser's numbers are exact up to 2^53, and seeds count up
SHOW_EVERY = 0.3  # seconds between intermediate pictures
SHOWN_SIDE = 256  # pixels: what is looked at for a moment need not be sent in full
KEPT = 24 * 3600  # seconds that a picture stays on the disk while the page is served
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#gallery img {image-rendering: pixelated}
#gallery .grid-container {grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto}
#gallery .thumbnail-lg {aspect-ratio: auto; height: auto}
#gallery .thumbnail-lg img {aspect-ratio: 1}
#gallery .thumbnail-lg .caption-label {
    position: static; max-width: none; border: none; padding: 0; margin: 2px 6px 4px; font-size: 11px;
    line-height: 1.25; white-space: normal; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3}
"""


class Cancelled(Exception):
    """The visitor has gone or pressed stop, or the page is closing."""


@dataclass(frozen=True)
class Studio:
    """Where all pictures are drawn: in one thread, since CUDA graphs are recorded for every thread anew."""

    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    closing: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End the drawing under way at its next step, and wait for that."""
        self.closing.set()
        self.thread.shutdown(cancel_futures=True)


def serve(pipe: ImagenPipeline, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until interrupted or terminated; then nothing of it is left on the disk.

    Raises ValueError if the model names no text encoder, or if there is no listening at host and port.
    """
    if pipe.text_encoder is None:
        raise ValueError(f"{pipe.source} names no text encoder: the page draws pictures for captions")
    _check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="fastimagen-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        import gradio as gr

        theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no download
        studio = Studio()
        app = build(pipe, studio, Path(folder))
        _, url, _ = app.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            prevent_thread_lock=True,
        )
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            studio.close()


def _check_address(host: str, port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot listen at {host}, port {port}: {reason}; choose --host and --port") from None


def build(pipe: ImagenPipeline, studio: Studio, folder: Path) -> gr.Blocks:
    """The page. One visitor's pictures are drawn at a time, the others wait in line. Settings are written to folder."""
    import gradio as gr

    settings = pipe.cascade.settings()
    shapes = pipe.text_encoder.get("included")  # the built-in encoder knows nothing else
    with gr.Blocks(
        title=f"fastimagen: {Path(pipe.source).name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(KEPT // 24, KEPT),
    ) as app:
        gr.Markdown(f"# fastimagen\n`{pipe.source}` on {pipe.device}: {_sizes(pipe)} pixels")
        with gr.Row():
            with gr.Column(scale=2):
                captions = gr.Textbox(
                    label="Captions, one per line",
                    lines=6,
                    autofocus=True,
                    elem_id="captions",
                    value="\n".join(EXAMPLES) if shapes else "",
                    info="This model knows captions like these." if shapes else None,
                )
                with gr.Row():
                    count = gr.Slider(
                        label="Pictures each", value=4, minimum=1, maximum=16, step=1, scale=3, buttons=[]
                    )
                    seed = gr.Number(label="First seed", value=0, precision=0, minimum=0, maximum=LARGEST_SEED, scale=2)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
                negative = gr.Textbox(label="Lead away from (optional)", lines=1)
                stages = []
                for stage, chosen in settings.items():
                    with gr.Accordion(f"Stage {stage}", open=False):
                        stages += [
                            gr.Dropdown(list(SAMPLERS), value=chosen.sampler, label="Sampler"),
                            gr.Slider(
                                label="Steps", value=chosen.steps, minimum=1, maximum=max(250, chosen.steps), step=1
                            ),
                            gr.Slider(
                                label="Guidance",
                                value=chosen.guidance,
                                minimum=0,
                                maximum=max(20, chosen.guidance),
                                step=0.1,
                            ),
                        ]
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    show_label=False,
                    columns=4,
                    height=560,
                    format="png",
                    elem_id="gallery",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                )
                status = gr.Markdown("", elem_id="status")
                with gr.Accordion("Settings that make these pictures again", open=False):
                    record = gr.JSON(show_label=False)
                download = gr.DownloadButton("Download settings", interactive=False)
        drawing = start.click(
            _draw(pipe, studio, list(settings), folder),
            [captions, negative, seed, count, *stages],
            [gallery, status, record, download],
            api_name="draw",
            concurrency_limit=1,
        )
        stop.click(None, cancels=[drawing])
    return app


def _sizes(pipe: ImagenPipeline) -> str:
    return " → ".join(f"{stage.name} {stage.config.size}x{stage.config.size}" for stage in pipe.cascade.stages)


def _draw(
    pipe: ImagenPipeline, studio: Studio, names: list[str], folder: Path
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What the button does: (gallery, status, record, download) now and again while the pictures come to be."""
    import gradio as gr

    def draw(captions: str, negative: str, seed: int | None, count: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        lines = [line.strip() for line in (captions or "").splitlines() if line.strip()]
        wanted = [line for line in lines for _ in range(int(count))]
        if not lines:
            raise gr.Error("Write a caption first", print_exception=False)
        if seed is None:
            raise gr.Error("Give a seed: any whole number from 0 on", print_exception=False)
        if len(wanted) > MOST:
            raise gr.Error(f"{len(wanted)} pictures at once are too many: at most {MOST}", print_exception=False)
        sampler, steps, guidance = (dict(zip(names, values[offset::3])) for offset in range(3))
        options = {
            "sampler": sampler,
            "steps": {name: int(step) for name, step in steps.items()},
            "guidance": guidance,
            "negative": [negative.strip()] if negative and negative.strip() else None,
            "seeds": [int(seed) + index for index in range(len(wanted))],
        }
        began = time.monotonic()
        try:
            for news in in_background(studio, pipe, wanted, **options):
                if isinstance(news, Output):
                    path = folder / f"settings-{time.time_ns()}.json"
                    path.write_text(json.dumps(news.record(), indent=2) + "\n")
                    yield (
                        _gallery(to_uint8(news.images), wanted, int(count)),
                        "\n\n".join(
                            [
                                f"{len(wanted)} pictures in {time.monotonic() - began:.1f} s",
                                *(f"Mind: {escape(line)}" for line in news.unread),
                            ]
                        ),
                        news.record(),
                        gr.DownloadButton(value=str(path), interactive=True),
                    )
                else:
                    stage, step, pixels = news
                    yield (
                        _gallery(pixels, wanted, int(count), side=SHOWN_SIDE),
                        f"Stage {stage}: step {step + 1} of {options['steps'][stage]}",
                        None,
                        gr.DownloadButton(interactive=False),
                    )
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise gr.Error("The GPU's memory does not suffice: draw fewer pictures at once", print_exception=False)

    return draw


def in_background(
    studio: Studio, pipe: Callable[..., Output], captions: list[str], **options: Any
) -> Iterator[tuple[str, int, Tensor] | Output]:
    """(stage, step, pixels (B, H, W, 3) uint8) at times while the studio draws, then the result. Raises as `pipe` does.

    When the iterator or the studio is closed the work stops at its next step.
    """
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gone = threading.Event()
    shown = -SHOW_EVERY

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        nonlocal shown
        if gone.is_set() or studio.closing.is_set():
            raise Cancelled
        if news.empty() and time.monotonic() - shown >= SHOW_EVERY:  # no heap of pictures before a slow reader
            shown = time.monotonic()
            news.put((stage, step, to_uint8(x0).cpu()))

    def job() -> None:
        try:
            news.put(pipe(captions, callback=callback, batch_size=MOST, **options))
        except Exception as error:  # for the other thread, which knows whom to tell
            news.put(error)

    studio.thread.submit(job)
    try:
        while isinstance(item := news.get(), tuple):
            yield item
        if isinstance(item, Exception) and not isinstance(item, Cancelled):
            raise item
        if not isinstance(item, Cancelled):
            yield item
    finally:
        gone.set()


def _gallery(pixels: Tensor, captions: list[str], count: int, side: int | None = None) -> gr.Gallery:
    """Pictures (B, H, W, 3) uint8, no larger than side, each caption's in a row of their own where that fits."""
    import gradio as gr

    pictures = [Image.fromarray(picture) for picture in pixels.numpy()]
    for picture in pictures if side else ():
        picture.thumbnail((side, side))
    return gr.Gallery(list(zip(pictures, captions)), columns=count if 3 <= count <= 6 else 4)
