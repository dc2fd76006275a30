"""What a bug report needs: versions, devices, and what computes the fused operations."""

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
    """A table of facts, one per line. Imports torch, and nothing that is heavier."""
    import torch

    from . import __version__
    from .ops.dispatch import no_triton

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
    reason = no_triton()
    rows.append(
        ("kernels", f"plain PyTorch: {reason}" if reason else "Triton on CUDA tensors, plain PyTorch elsewhere")
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
