"""The size of the images of a request: one that the model was trained on, or another that its networks can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cascade import Cascade
from ..config_rules import check_tile, sizes_of_stages
from ..sizes import ImageSize
from .request import SamplingRequest

Sizes = Mapping[str, Sequence[ImageSize]]
"""The sizes that each stage was trained on, the one to sample by default first."""


def choose_sizes(cascade: Cascade, trained: Sizes, request: SamplingRequest) -> dict[str, ImageSize]:
    """The size of the images of each stage that runs, the last of which has that of the request.

    Without one in the request it is the first that the model was trained on and that has the aspect ratio of the
    request's init image or low-resolution image; if there is none, the first of all. Raises ValueError for a size
    that a stage cannot have, and for given images of another aspect ratio.
    """
    running = cascade.running(request.start_at, request.stop_at, request.lowres)
    last, known = running[-1].config, trained[running[-1].name]
    init_image = None if request.init_image is None else request.init_image.image
    given = request.lowres if init_image is None else init_image
    if request.size is not None:
        size = ImageSize.parse(request.size)
    else:
        fitting = [] if given is None else [size for size in known if size.same_shape(*given.shape[-2:])]
        size = (fitting or known)[0]
    settings = cascade.settings(**request.settings)
    for what, images in (("lowres image", request.lowres), ("init image", init_image)):
        if images is not None and not size.same_shape(*images.shape[-2:]):
            raise ValueError(
                f"the {what} is {ImageSize(*images.shape[-2:])}, but images of {size} are to be sampled: crop it to "
                f"that aspect ratio, or give another size"
            )
    sizes = sizes_of_stages([stage.config for stage in running], size, of=last.size, key=f"size {size}")
    for stage in running:
        check_tile(stage.config, sizes[stage.name], settings[stage.name].tile)
    return sizes


def size_warnings(cascade: Cascade, trained: Sizes, request: SamplingRequest) -> list[str]:
    """A line each if the stages were trained on images, or low-resolution images, of other sizes."""
    running = cascade.running(request.start_at, request.stop_at, request.lowres)
    first, last = running[0], running[-1]
    size, known = choose_sizes(cascade, trained, request)[last.name], trained[last.name]
    warnings = []
    if size not in known:
        warnings.append(f"stage {last.name} was trained on {', '.join(map(str, known))}: images of {size} may be worse")
    if request.lowres is not None and first.lowres_size is not None:
        width, expected = request.lowres.shape[-1], size.width * first.lowres_size / last.config.size
        if width != expected:
            warnings.append(
                f"the low-resolution image is {width} pixels wide, stage {first.name} was trained on {expected:g}"
            )
    return warnings
