"""What a CPU can tell: steps and sampling against MinImagen, single ops and their host time, sampler, data loading.

    make bench
    python -m benchmarks.cpu [--out FILE] [--only GROUP,...] [--seconds S]

One thread; providers alternate in one run, and CPU seconds are counted. MinImagen 0.0.9 is measured if it is
installed (benchmarks/harness/peers.py says how); its networks have the shapes, captions and seeds of ours.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from fastimagen.cascade import Cascade
from fastimagen.presets import minimagen_test, shapes, shapes_transformer

from .cases import attention, dynamic_threshold, group_norm, host_time, sampling, step
from .harness import networks, peers
from .harness.checkout import ROOT
from .harness.measure import Bench, ProviderUnavailable
from .harness.networks import Network, captions
from .harness.rows import RESULTS, Results, environment
from .harness.timing import Work

PAIR = (networks.TEST_BASE, networks.TEST_SUPER)
TEST_PAIR = "MinImagen's test pair, 64 and 128 pixels, B2"
SETS = {TEST_PAIR: PAIR, "MinImagen's default U-Net, 64 pixels, B1": (networks.DEFAULT,)}
"""Networks of MinImagen that a CPU can train; the pair is what it trains with --TESTING."""
PROVIDERS = {
    "ours": partial(step.ours, backend="torch"),
    "ours, text_padding none": partial(step.ours, backend="torch", padding="none"),
    "MinImagen": step.minimagen,
}
QUICKSTART = (Network("quickstart base 32", shapes, "base", 32, 8), Network("quickstart sr 64", shapes, "sr", 32, 8))
FAMILIES = {
    "U-Net": Network("U-Net", shapes, "base", 32, 8),
    "pixel transformer": Network("pixel transformer", shapes_transformer, "base", 32, 8),
}
"""The base stage of the quickstart in both families."""
SAMPLING_STEPS = 25
CPU = torch.device("cpu")


def training(bench: Bench) -> None:
    """Training steps of both, which alternate."""
    for shape, chain in SETS.items():
        works: dict[str, Work] = {}
        for name, provider in PROVIDERS.items():
            with bench.missing_on_error(name, op="training step", shape=shape, dtype="float32", mode="training"):
                steps = [provider(network, network.batch, CPU) for network in chain]
                # A step pays for the state of heap and caches that another provider's step left: small ones take two.
                works[name] = Work(partial(_all, steps), partial(_all, steps, None) if shape == TEST_PAIR else _nothing)
        amount = sum(
            network.batch * networks.flops(network.stage().config.unet, network.side, "training") for network in chain
        )
        for name, times in bench.time(works, seconds=12).items():  # ten rounds of the small ones: their times scatter
            parts = step.breakdown(partial(works[name].call, None), CPU)
            bench.add(
                op="training step",
                shape=shape,
                dtype="float32",
                mode="training",
                provider=name,
                ms=times[:3],
                timer=times.timer,
                images=chain[0].batch,
                flops=amount,
                parts=parts,
                system_share=times.system_share,
            )


def _nothing() -> None:
    pass


def _all(steps: list[step.Step], _: None) -> None:
    for one in steps:
        one()


def families(bench: Bench) -> None:
    """Training steps of the quickstart's base stage with a U-Net and with a pixel transformer, which alternate."""
    names = {"op": "quickstart step", "shape": "base stage, 32 pixels, B8", "dtype": "float32"}
    works = {
        name: Work(partial(_all, [step.ours(network, network.batch, CPU, backend="torch")]))
        for name, network in FAMILIES.items()
    }
    for name, times in bench.time(works, seconds=6).items():
        network = FAMILIES[name]
        bench.add(
            **names,
            mode="training",
            provider=name,
            ms=times[:3],
            timer=times.timer,
            images=network.batch,
            flops=network.batch * networks.flops(network.stage().config.unet, network.side, "training"),
            system_share=times.system_share,
        )


def memory(bench: Bench) -> None:
    """Peak resident memory of two training steps, each provider in a process of its own."""
    for shape in SETS:
        for name in PROVIDERS:
            names = {"op": "training step", "shape": shape, "dtype": "float32", "mode": "peak memory"}
            with bench.missing_on_error(name, **names):
                child = subprocess.run(
                    [sys.executable, "-m", "benchmarks.cpu", "--memory", shape, name],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                )
                if child.returncode:
                    raise ProviderUnavailable(child.stderr.strip().splitlines()[-1])
                before, peak = map(int, child.stdout.split())
                bench.add(
                    **names,
                    provider=name,
                    peak_bytes=peak,
                    bytes_before=before,
                    note=f"{peak / 2**20:.0f} MiB, {before / 2**20:.0f} of them before the network was built",
                )


def peak_of(shape: str, name: str) -> None:
    """In a process of its own: two steps, then "before peak" in bytes on standard output."""
    before = _peak()
    if name == "MinImagen":
        peers.import_minimagen()
        before = _peak()
    steps = [PROVIDERS[name](network, network.batch, CPU) for network in SETS[shape]]
    for _ in range(2):
        _all(steps, None)
    print(before, _peak())


def _peak() -> int:
    """The most memory that was ever resident; unlike getrusage's, without the parent's before the start."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def guided(bench: Bench) -> None:
    """The test pair samples two images with guidance 3 and ancestral sampling, with the same number of steps."""
    works: dict[str, Work] = {}
    names = {
        "op": "guided sampling",
        "shape": f"{TEST_PAIR}, {SAMPLING_STEPS} steps",
        "dtype": "float32",
        "mode": "sampling",
    }
    text = captions(2, 512, CPU)
    for name, padding in (("ours", "null"), ("ours, text_padding none", "none")):
        with bench.missing_on_error(name, **names):
            cascade = _cascade(padding)
            works[name] = Work(partial(_sample_ours, cascade, text))
    with bench.missing_on_error("MinImagen", **names):
        arguments = [{**network.peer, "text_embed_dim": 512} for network in PAIR]
        imagen = peers.minimagen(arguments, [network.side for network in PAIR], timesteps=SAMPLING_STEPS)
        captions_given = {"text_embeds": text.embeds, "text_masks": text.mask}
        works["MinImagen"] = Work(lambda _: imagen.sample(**captions_given, cond_scale=3.0))
    for name, times in bench.time(works).items():
        bench.add(
            **names,
            provider=name,
            ms=times[:3],
            timer=times.timer,
            images=2,
            system_share=times.system_share,
        )


def _cascade(padding: str) -> Cascade:
    config = minimagen_test()
    stages = tuple(network.stage(padding).config for network in PAIR)
    return Cascade(config.model_copy(update={"stages": stages})).eval()


def _sample_ours(cascade: Cascade, text: object, _: None) -> torch.Tensor:
    return cascade.sample(text, [0, 1], settings=cascade.settings(steps=SAMPLING_STEPS, guidance=3.0))


def single_ops(bench: Bench) -> None:
    """Attention, GroupNorm and thresholding at sizes of small networks."""
    bench.run(dynamic_threshold.cases(CPU, shapes=((16, 64), (4, 256), (1, 1024))))
    bench.run(group_norm.cases(CPU, shapes=((2, 128, 64), (8, 256, 16))))
    bench.run(attention.cases(CPU, sides=(16,), batches=(2,)))


def data(bench: Bench) -> None:
    """Images and embedded captions per second of one core, from shards of the built-in shapes."""
    names = {"op": "data loading", "shape": "shapes 64x64, 256 samples", "dtype": "float32", "mode": "loading"}
    with bench.missing_on_error("ours", **names), tempfile.TemporaryDirectory() as folder:
        from fastimagen.config import FastimagenConfig
        from fastimagen.data.embedding import embed_all
        from fastimagen.data.prepare import prepare_shapes
        from fastimagen.data.source import open_split
        from fastimagen.text.t5 import T5Encoder

        config = FastimagenConfig.model_validate(
            {
                "data": {
                    "shards": f"{folder}/train",
                    "validation": f"{folder}/val",
                    "threads": 1,
                    "shapes": {"count": 256, "size": 64},
                },
                "text": {"encoder": f"{folder}/text_encoder"},
            }
        )
        prepare_shapes(config, say=lambda _: None)
        embed_all(config, say=lambda _: None)
        loader = open_split(config.data.training[0], config, with_text=True).loader(
            config, size=64, crop=None, global_batch=64, rank=0, world_size=1, micro_batch=64, seed=0, crop_seed=0
        )
        with closing(loader.batches(0)) as batches:  # one for all repetitions: what it read ahead is used in the next
            times = bench.time({"ours": Work(lambda _: [next(batches) for _ in range(4)])})["ours"]
        bench.add(**names, provider="ours", ms=times[:3], timer=times.timer, images=256)
        encoder, lines = T5Encoder(f"{folder}/text_encoder"), (ROOT / "launch/captions.txt").read_text().splitlines()
        times = bench.time({"ours": Work(lambda _: encoder.encode(lines))})["ours"]
        names = {"op": "text embedding", "shape": "built-in T5, captions of shapes", "dtype": "float32"}
        bench.add(**names, mode="embedding", provider="ours", ms=times[:3], timer=times.timer, images=len(lines))


GROUPS: dict[str, Callable[[Bench], None]] = {
    "training": training,
    "families": families,
    "memory": memory,
    "guided": guided,
    "data": data,
    "ops": single_ops,
    "host_time": host_time.run,
    "sampling": lambda bench: [sampling.run(bench, QUICKSTART, ("torch",), batch=batch) for batch in (8, 1)],
}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, metavar="FILE", help="by default benchmarks/results/cpu/<date>.json")
    options.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,...", help=", ".join(GROUPS))
    options.add_argument("--seconds", type=float, default=570, help="after so many no further measurement begins (570)")
    options.add_argument("--memory", nargs=2, metavar=("NETWORKS", "PROVIDER"), help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    if given.memory:
        peak_of(*given.memory)
        return
    if unknown := sorted(set(given.only.split(",")) - set(GROUPS)):
        options.error(f"no group {unknown[0]}; there are {', '.join(GROUPS)}")
    shared = environment()
    out = given.out or RESULTS / "cpu" / f"{shared['date']}.json"
    bench = Bench(CPU, Results(out, shared), deadline=time.monotonic() + given.seconds, seconds=0.5)
    for name in given.only.split(","):
        print(f"== {name}" if bench.in_time() else f"no time for {name}", flush=True)
        if bench.in_time():
            GROUPS[name](bench)


if __name__ == "__main__":
    main()
