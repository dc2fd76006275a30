"""A web page for a model: captions in, pictures and the settings that make them again out. Needs the `demo` extra."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .images import to_uint8
from .pipeline import ImagenPipeline, Output
from .samplers import SAMPLERS

if TYPE_CHECKING:
    import gradio as gr

EXAMPLES = ("a large blue star at the top of a black background",
            "a small green cross on the left of a gray background",
            "a large yellow circle in the center of a white background",
            "a red circle to the left of a green square on a white background")  # of the built-in shapes
MOST = 64  # pictures at once
SHOW_EVERY = 0.3  # seconds between intermediate pictures
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#gallery img {image-rendering: pixelated}
#gallery .grid-wrap .caption-label {display: none}
"""


class Stopped(Exception):
    """The visitor has gone, or pressed stop."""


def serve(pipe: ImagenPipeline, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until interrupted. Raises OSError if the port is taken."""
    import gradio as gr

    app = build(pipe)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none to fetch
    _, url, _ = app.launch(server_name=host, server_port=port, share=False, show_error=True, quiet=True,
                           ssr_mode=False, footer_links=[], theme=theme, css=CSS, prevent_thread_lock=True)
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    app.block_thread()


def build(pipe: ImagenPipeline) -> gr.Blocks:
    """The page. One visitor's pictures are drawn at a time, the others wait in line."""
    import gradio as gr

    name = Path(pipe.source).name
    settings = pipe.cascade.settings()
    with gr.Blocks(title=f"fastimagen: {name}", analytics_enabled=False) as app:
        gr.Markdown(f"# fastimagen\n{pipe.source}: {_sizes(pipe)}")
        with gr.Row():
            with gr.Column(scale=2):
                captions = gr.Textbox(label="Captions, one per line", lines=3, autofocus=True, elem_id="captions")
                negative = gr.Textbox(label="Lead away from (optional)", lines=1)
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                    count = gr.Slider(label="Pictures of each", value=4, minimum=1, maximum=16, step=1)
                stages = []
                for stage, chosen in settings.items():
                    with gr.Accordion(f"Stage {stage}", open=False):
                        stages += [
                            gr.Dropdown(list(SAMPLERS), value=chosen.sampler, label="Sampler"),
                            gr.Slider(label="Steps", value=chosen.steps, minimum=1, maximum=max(250, chosen.steps),
                                      step=1),
                            gr.Slider(label="Guidance", value=chosen.guidance, minimum=0,
                                      maximum=max(20, chosen.guidance), step=0.1)]
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3):
                gallery = gr.Gallery(show_label=False, columns=4, height=480, format="png", elem_id="gallery",
                                     object_fit="contain", buttons=["download", "fullscreen"])
                status = gr.Markdown("", elem_id="status")
                with gr.Accordion("Settings that make these pictures again", open=False):
                    record = gr.JSON(show_label=False)
                download = gr.DownloadButton("Download settings", interactive=False)
        if pipe.text_encoder and pipe.text_encoder.get("included"):
            gr.Examples([[caption] for caption in EXAMPLES], inputs=[captions], label="It knows captions like these")
        drawing = start.click(_draw(pipe, list(settings)), [captions, negative, seed, count, *stages],
                              [gallery, status, record, download], api_name="draw", concurrency_limit=1)
        stop.click(None, cancels=[drawing])
    return app


def _sizes(pipe: ImagenPipeline) -> str:
    stages = [f"{stage.name} {stage.config.size}x{stage.config.size}" for stage in pipe.cascade.stages]
    return f"{' → '.join(stages)}, on {pipe.device}"


def _draw(pipe: ImagenPipeline, names: list[str]) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What the button does: (gallery, status, record, download) now and again while the pictures come to be."""
    import gradio as gr

    folder = Path(tempfile.mkdtemp(prefix="fastimagen-demo-"))

    def draw(captions: str, negative: str, seed: float, count: float, *values: Any) -> Iterator[tuple[Any, ...]]:
        lines = [line.strip() for line in (captions or "").splitlines() if line.strip()]
        if not lines:
            raise gr.Error("Write a caption first", print_exception=False)
        wanted = [line for line in lines for _ in range(int(count))]
        if len(wanted) > MOST:
            raise gr.Error(f"{len(wanted)} pictures at once are too many: at most {MOST}", print_exception=False)
        sampler, steps, guidance = (dict(zip(names, values[offset::3])) for offset in range(3))
        options = {"sampler": sampler, "steps": {name: int(step) for name, step in steps.items()}, "guidance": guidance,
                   "negative": [negative.strip()] if negative and negative.strip() else None,
                   "seeds": [int(seed) + index for index in range(len(wanted))]}
        began, shown = time.monotonic(), 0.0
        for news in _in_background(lambda callback: pipe(wanted, callback=callback, batch_size=MOST, **options)):
            if isinstance(news, ValueError):
                raise gr.Error(" ".join(str(news).split()), print_exception=False)
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Output):
                path = folder / f"settings-{time.time_ns()}.json"
                path.write_text(json.dumps(news.record(), indent=2) + "\n")
                yield (_pictures(news.images, wanted), f"{len(wanted)} in {time.monotonic() - began:.1f} s",
                       news.record(), gr.DownloadButton(value=str(path), interactive=True))
            elif time.monotonic() - shown > SHOW_EVERY:
                stage, step, x0 = news
                shown = time.monotonic()
                yield (_pictures(x0, wanted), f"{stage}: step {step + 1} of {options['steps'][stage]}", None,
                       gr.DownloadButton(interactive=False))

    return draw


def _in_background(work: Callable[[Callable[..., None]], Output]) -> Iterator[Any]:
    """work(callback) in a thread of its own: (stage, step, x0) after every step, then its result or exception.

    When the iterator is closed the work stops at its next step.
    """
    news: queue.Queue[Any] = queue.Queue()
    gone = threading.Event()

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        if gone.is_set():
            raise Stopped
        news.put((stage, step, x0))

    def run() -> None:
        try:
            news.put(work(callback))
        except Exception as error:  # for the other thread, which knows whom to tell
            news.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item = news.get()
            yield item
            if not isinstance(item, tuple):
                return
    finally:
        gone.set()
        thread.join()


def _pictures(images: Tensor, captions: list[str]) -> list[tuple[Image.Image, str]]:
    """What the gallery shows of images (B, 3, H, W) in [-1, 1]."""
    pixels = to_uint8(images.clamp(-1, 1)).cpu().numpy()  # (B, H, W, 3)
    return [(Image.fromarray(picture), caption) for picture, caption in zip(pixels, captions)]
