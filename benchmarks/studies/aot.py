"""Compile the kernels without a GPU: registers, spills, shared memory and matrix instructions of each, per target.

    python -m benchmarks.studies.aot [--kernels attention,group_norm] [--targets sm_90,gfx942]
                                     [--labels REGEX] [--out FILE]

Every file with launchers has a function `shipped`, which yields labelled calls of them on meta tensors. A stub replaces
Triton's driver, and a launch compiles the kernel instead of running it. So each kernel is compiled exactly as a GPU
would run it, with the tiles and the argument specialization of that call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from ..harness.checkout import ROOT
from ..harness.offline import TARGETS, compiling_for

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = {
    "mma": r"\bHMMA|\bQMMA",
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUT\w*MMA",
    "cp.async": r"\bLDGSTS",
    "fma": r"\bFFMA",
    "exp2": r"\bMUFU\.EX2",
}
WAITS = {"shfl": r"\bSHFL", "bar": r"\bBAR"}
AMD_INSTRUCTIONS = {"mfma": r"\bv_mfma", "fma": r"\bv_(?:pk_)?fma", "exp2": r"\bv_exp_f32"}


def compile_all(file: str, name: str, labels: str) -> Iterator[dict[str, Any]]:
    """One row for every kernel that the calls in `shipped` of kernels/`file`.py compile for the target `name`."""
    seen: set[str] = set()
    with compiling_for(TARGETS[name]) as launches:
        for label, call in shipped(file):
            if not re.search(labels, label):
                continue
            launches.clear()
            call()
            for function, compiled in launches:
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    yield {"file": file, "label": label, "target": name} | describe(function, compiled)


def shipped(file: str) -> Iterator[tuple[str, Callable[[], object]]]:
    return importlib.import_module(f"fastimagen_kernels.{file}").shipped()


def describe(function: JITFunction, compiled: Any) -> dict[str, Any]:
    metadata = compiled.metadata
    constants = {
        function.arg_names[path[0]]: value
        for path, value in compiled.src.constants.items()
        if isinstance(value, (int, float, str)) and function.params[path[0]].is_constexpr
    }
    usage = amd_usage(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else nvidia_usage(compiled.asm["cubin"])
    return {
        "kernel": function.__name__,
        "constants": constants,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "shared_bytes": metadata.shared,
    } | usage


def nvidia_usage(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "instructions": count(INSTRUCTIONS, code),
        "loops": loops(code),
    }


def loops(code: str) -> list[dict[str, int]]:
    """Instructions of each innermost loop in nvdisasm's `code`, in its order, with those that wait for other threads.

    A loop is a label, and a later branch to it.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: list[tuple[int, int]] = []
    for text in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", text):
            instructions.append(instruction[1])
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if branch and labels.get(branch[1], len(instructions)) < len(instructions) - 1:
                found.append((labels[branch[1]], len(instructions)))
    inner = [(a, b) for a, b in found if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)]
    bodies = ["\n".join(instructions[first:last]) for first, last in inner]
    return [{"instructions": body.count("\n") + 1} | count(WAITS, body) for body in bodies]


def amd_usage(code: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "instructions": count(AMD_INSTRUCTIONS, code),
    }


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def count(patterns: dict[str, str], code: str) -> dict[str, int]:
    found = Counter({name: len(re.findall(pattern, code)) for name, pattern in patterns.items()})
    return {name: number for name, number in found.items() if number}


def kernel_files() -> list[str]:
    """The files in kernels/ that have launchers, by name."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if "def shipped(" in path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default="", help="file names in kernels/ (default: all with launchers)")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--labels", default="", help="only labels that match this regular expression")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/aot.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled; unset it")
    files = options.kernels.split(",") if options.kernels else kernel_files()
    targets = options.targets.split(",")
    rows = []
    for file in files:
        for target in targets:
            for row in compile_all(file, target, options.labels):
                rows.append(row)
                print(line(row), flush=True)
    write(options.out, rows, {(file, target) for file in files for target in targets})


def write(path: Path, rows: list[dict[str, Any]], made: set[tuple[str, str]]) -> None:
    """Write the rows, and keep those in `path` of other kernels and targets."""
    if path.exists():
        before = json.loads(path.read_text())["rows"]
        rows = [row for row in before if (row["file"], row["target"]) not in made] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=order))
    versions = json.dumps({"triton": triton.__version__, "torch": torch.__version__})
    path.write_text(f'{{"versions": {versions}, "rows": [\n{lines}\n]}}\n')


def order(row: dict[str, Any]) -> tuple[str, int]:
    return row["file"], list(TARGETS).index(row["target"])


def line(row: dict[str, Any]) -> str:
    found = " ".join(f"{name}:{number}" for name, number in row["instructions"].items())
    return (
        f"{row['target']:7}{row['kernel']:42}{row['label']:36} {row['num_warps']:2} warps "
        f"{row['registers']:3} registers {row['spills']:4} spills {row['shared_bytes']:6} B shared  {found}"
    )


if __name__ == "__main__":
    main()
