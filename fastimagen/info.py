"""What a bug report needs: versions, devices, and what computes the fused operations."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "sentencepiece", "webdataset", "xformers", "safetensors",
            "numpy", "einops", "pydantic", "pillow")


def report() -> str:
    """A table of facts, one per line. Imports torch, and nothing that is heavier."""
    import torch

    from . import __version__

    rows = [("fastimagen", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows.append(("cuda", torch.version.cuda or "none (CPU build)"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            rows.append((f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
    else:
        rows.append(("gpu", "none"))
    rows.append(("threads", str(torch.get_num_threads())))
    rows.append(("kernels", _kernels()))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    return "torch (no Triton kernels installed)" if find_spec("fastimagen_kernels") is None else "torch"
