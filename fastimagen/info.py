"""Facts for a bug report: versions, devices, and the backend of the fused operations."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "sentencepiece",
    "webdataset",
    "xformers",
    "safetensors",
    "numpy",
    "einops",
    "pydantic",
    "pillow",
)


def report() -> str:
    """The facts, one per line. Imports torch and nothing heavier."""
    import torch

    from . import __version__
    from .ops.dispatch import no_triton

    rows = [("fastimagen", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    # The metadata of PyTorch's own wheels lacks the build: 2.13.0 and not 2.13.0+cu130.
    rows += [(name, torch.__version__ if name == "torch" else _version(name)) for name in PACKAGES]
    rows.append(("cuda", torch.version.cuda or "none (CPU build)"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            rows.append((f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
    else:
        rows.append(("gpu", "none"))
    rows.append(("threads", str(torch.get_num_threads())))
    reason = no_triton()
    kernels = f"PyTorch reference: {reason}" if reason else "Triton for CUDA tensors, PyTorch reference for others"
    rows.append(("kernels", kernels))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(name: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
