"""Peak memory of one self-attention block at 64x64 on a CPU: ours, and MinImagen's own, each in its own process.

    python -m benchmarks.studies.attention_memory [--minimagen FOLDER]

FOLDER has MinImagen and einops_exts without their dependencies: pip install --no-deps --target FOLDER minimagen
einops_exts. Without it, only ours is measured. One sample of 4,096 tokens, 128 channels, 8 heads of 64, one forward and
backward pass; the figure is the rise of the process's highest resident memory above what it had before the pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

from ..harness.checkout import ROOT

OUT = ROOT / "benchmarks/results/cpu/attention_memory.json"

OURS = """
from fastimagen.networks.attention import Context, SelfAttention
from fastimagen.network_config import UNetConfig
block = SelfAttention(UNetConfig(dim=128, heads=8, head_dim=64), 128, None)
context = Context(time_tokens=torch.zeros(1, 2, 128), text_lengths=None, text_kv=())
call = lambda x: block(x, context)
"""
# Its Attention needs neither its package's imports nor resize_right: they would only add to the memory.
MINIMAGENS = """
import types
sys.path.insert(0, FOLDER)
package = types.ModuleType("minimagen")
package.__path__ = [FOLDER + "/minimagen"]
sys.modules["minimagen"] = package
sys.modules["resize_right"] = types.SimpleNamespace(resize=None)
from minimagen.layers import Attention
call = Attention(128, heads=8, dim_head=64)
"""
MEASURE = """
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
call(torch.randn(1, 16, 128, requires_grad=True)).sum().backward()
x = torch.randn(1, 4096, 128, requires_grad=True)
before = peak()
call(x).sum().backward()
print(peak() - before)
"""


def measure(block: str, folder: Path | None = None) -> int:
    """Bytes that a forward and backward pass of `block` adds to the peak of a fresh process."""
    code = f"import sys, torch\nFOLDER = {str(folder)!r}\n" + block + MEASURE
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    return int(child.stdout)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minimagen", type=Path)
    options = parser.parse_args()
    result = {
        "tokens": 4096,
        "channels": 128,
        "heads": 8,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "fastimagen_bytes": measure(OURS),
    }
    if options.minimagen:
        result["minimagen_bytes"] = measure(MINIMAGENS, options.minimagen.resolve())
        result["ratio"] = round(result["fastimagen_bytes"] / result["minimagen_bytes"], 4)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
