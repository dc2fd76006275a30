"""Fills Triton's cache with the kernels of gpu_check's groups, from all cores, before anything is measured.

    python -m benchmarks.kernel_cache [--only GROUP,...] [--processes N] [--target sm_90] [--toys] [--list]

A process compiles one kernel after another, a third of a second to several seconds each, and a network needs dozens.
Here the launches of all groups are listed on meta tensors, and then as many processes as there are cores compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec

import torch
from triton.runtime import driver

from .gpu_groups import GROUPS, launches
from .harness.kernel_cache import Compilation, compilations_of, compile_all
from .harness.offline import TARGETS
from .harness.timing import first_line


def compile_fused_adam() -> str:
    """Compile DeepSpeed's FusedAdam, which its first engine would do for a minute, and say what came of it."""
    if find_spec("deepspeed") is None:
        return "not needed: deepspeed is not installed"
    from fastimagen.train.deepspeed_config import can_compile_fused_adam

    if not can_compile_fused_adam():
        return "not compiled: there is no nvcc of torch's CUDA version, and training uses torch's AdamW"
    from deepspeed.ops.op_builder import FusedAdamBuilder

    began = time.monotonic()
    try:
        FusedAdamBuilder().load()
    except Exception as error:  # of nvcc and the host's compiler; the engine's rows will say the same
        return f"cannot be compiled: {first_line(error)}"
    return f"compiled in {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_cache", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,...", help=", ".join(GROUPS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(all cores)")
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU (the one that is present)")
    parser.add_argument("--toys", action="store_true", help="the toy sizes of gpu_check --dry-run")
    parser.add_argument("--list", action="store_true", help="compile nothing, count the kernels")
    options = parser.parse_args()
    target = TARGETS[options.target] if options.target else driver.active.get_current_target()
    began = time.monotonic()
    everything: dict[str, Compilation] = {}
    for group in options.only.split(","):
        found = compilations_of(launches(group, toys=options.toys), target)
        new = found.keys() - everything.keys()
        everything |= found
        if found:
            print(f"{group:<14} {len(found):4} kernels, {len(new):4} of them new", flush=True)
    listed = time.monotonic() - began
    facts = {"kernels": len(everything), "list_s": round(listed, 1)}
    if not options.list:
        done = compile_all(list(everything.values()), target, options.processes)
        for failed in (one for one in done if one.error):
            print(f"{failed.name} does not compile: {failed.error}", flush=True)
        facts |= {
            "compiled": sum(not one.was_cached for one in done),
            "cpu_s": round(sum(one.seconds for one in done), 1),
            "wall_s": round(time.monotonic() - began - listed, 1),
            "processes": options.processes,
        }
    if "engine" in options.only.split(",") and not options.list and torch.cuda.is_available():
        print(f"FusedAdam: {compile_fused_adam()}", flush=True)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled; unset it")
    main()
