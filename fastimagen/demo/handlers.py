"""What the page's buttons do. Each handler returns the new values of the page's outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..images import from_pixels
from ..sampling.output import Output
from ..sampling.pipeline import ImagenPipeline
from .drawing import Visits, Worker, sample_in_background
from .inputs import page_request
from .results import Result, Results

if TYPE_CHECKING:
    import gradio as gr

PREVIEW_SIZE = 256  # pixels


@dataclass(frozen=True)
class Handlers:
    """The handlers of one page. visitor: Gradio's request, whose session_hash stays the same until a reload."""

    pipe: ImagenPipeline
    worker: Worker
    visits: Visits
    results: Results

    def begin(self, visitor: Any) -> str:
        """Draw was pressed: the status line, while others are served."""
        self.visits.begin(visitor.session_hash)
        return "Waiting for the model"

    def stop(self, visitor: Any) -> None:
        """Stop was pressed."""
        self.visits.stop(visitor.session_hash)

    def leave(self, visitor: Any) -> None:
        """The page was closed or reloaded."""
        self.visits.end(visitor.session_hash)

    def draw(
        self,
        visitor: Any,
        captions: str,
        negative: str,
        seed: int | None,
        count: int,
        image: str | None,
        mask: str | None,
        strength: float,
        resamples: int,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield (gallery, status, record, download, key of the result): previews first, then the images.

        After Stop the last preview stays. Raises ValueError that tells the visitor what to change.
        """
        import gradio as gr

        began = time.monotonic()
        stop = self.visits.signal(visitor.session_hash)
        stages = list(self.pipe.cascade.unets)
        start = image, mask, strength, resamples
        request = page_request(stages, captions, negative, seed, int(count), start, values)
        settings = self.pipe.cascade.settings(**request.settings)
        status = "Stopped before the first step"
        for item in sample_in_background(self.worker, self.pipe.sample, request, stop):
            if isinstance(item, Output):
                key = self.results.add(item, _summary(item, time.monotonic() - began))
                result = self.results.get(key)
                assert result is not None  # just stored
                yield *show(result, int(count)), key
                return
            stage, step, pixels = item
            status = f"Stage {stage}: step {step + 1} of {settings[stage].steps}"
            yield preview(pixels, request.labels, int(count)), status, None, no_download(), gr.skip()
            status = f"Stopped at stage {stage}, step {step + 1} of {settings[stage].steps}"
        yield gr.skip(), status, None, no_download(), gr.skip()

    def restore(self, key: Any) -> tuple[Any, ...]:
        """The outputs after a reload: the last finished images of this browser, if the server still has them."""
        import gradio as gr

        result = self.results.get(key)
        return (gr.skip(), gr.skip(), gr.skip(), gr.skip()) if result is None else show(result)


def show(result: Result, count: int = 4) -> tuple[Any, ...]:
    """(gallery, status, record, download) of finished images. count: images of a caption."""
    import gradio as gr

    gallery = gr.Gallery(result.images, columns=columns(count))
    return gallery, result.status, result.record, gr.DownloadButton(value=str(result.settings), interactive=True)


def preview(pixels: Tensor, captions: list[str], count: int) -> gr.Gallery:
    """Images (B, H, W, C) uint8 at a small size."""
    import gradio as gr

    images = [from_pixels(image) for image in pixels.numpy()]
    for image in images:
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return gr.Gallery(list(zip(images, captions)), columns=columns(count))


def columns(count: int) -> int:
    """Columns of the gallery: the images of a caption in one row if they fit."""
    return count if 3 <= count <= 6 else 4


def no_download() -> gr.DownloadButton:
    """The download button while there is nothing to download."""
    import gradio as gr

    return gr.DownloadButton(interactive=False)


def _summary(output: Output, seconds: float) -> str:
    lines = [f"{len(output.images)} images in {seconds:.1f} s"]
    return "\n\n".join(lines + [f"Warning: {escape(warning)}" for warning in output.warnings])
