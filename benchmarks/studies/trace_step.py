"""What a training step on a GPU launches: kernels, bytes, FLOP and saved activations of forward and backward.

    python -m benchmarks.studies.trace_step [--networks REGEX] [--out FILE]

Nothing is computed: the U-Net and its inputs are meta tensors in bf16, and the fused ops take the path of the Triton
kernels. The launchers run, and each launch is recorded instead of done; PyTorch's own ops are recorded as CUDA runs
them. The loss and the optimizer are not part of it.

What is assumed:
* Every launch moves each of its tensors once, so an op of several passes counts each pass; L2 saves nothing.
  GroupNorm's kernels are launched for some samples at a time so that it does: this is counted apart, behind a "+".
* cuDNN's convolutions are one launch per result and channels_last; the bias is added in a launch of its own.
* The milliseconds are a lower bound: for each launch the longer of its bytes at COPY_RATE and its FLOP at MATRIX_RATE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from fastimagen.network_config import UNetConfig
from fastimagen.networks.unet import UNet
from fastimagen.text.embeddings import TextEmbeddings

from ..harness import networks
from ..harness.networks import TOKENS, Network
from ..harness.rows import RESULTS
from .aot import TARGETS, compiling_for

COPY_RATE, MATRIX_RATE = 4.3e12, 788e12  # bytes and bf16 FLOP per second, as measured on an H200
NETWORKS = (*networks.PAPER, networks.BASE64, networks.SUPER256)
AROUND_CONVOLUTIONS = (
    "bias add",
    "bias-gradient sum",
    "residual add",
    "gradient add",
    "concatenation",
    "scaling",
    "layout copy",
)
"""Kinds of elementwise passes over feature maps that stand beside the convolutions and can be fused."""

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "promote_types", "scalar_tensor"),
}
KINDS = {  # name of a PyTorch op -> kind
    "convolution": "convolution",
    "convolution_backward": "convolution",
    **dict.fromkeys(("mm", "addmm", "addmm_", "bmm", "baddbmm"), "product"),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward"), "layer norm"),
    **dict.fromkeys(("cat", "stack"), "concatenation"),
    **dict.fromkeys(("clone", "copy_", "_to_copy"), "layout copy"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero_", "fill_"), "zero fill"),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), "scaling"),
    "sum": "bias-gradient sum",
}
WRITE_ONLY = ("copy_", "zero_", "fill_")  # ops in place that do not read what they write
ATTENTION_PRODUCTS = {"forward": 2, "backward_rows": 3, "backward_keys": 4}  # of a pass, each 2 N J A D FLOP


@dataclass
class Row:
    """All launches of one kind and op in one phase of a step."""

    phase: str
    kind: str
    op: str
    launches: int = 0
    bytes: float = 0
    flops: float = 0
    ms: float = 0


@dataclass
class Trace:
    """A network's step. `activation_bytes`: what the forward pass saves for the backward pass, without parameters."""

    network: str
    batch: int
    parameters: int
    activation_bytes: int
    rows: list[Row]

    def total(self, field: str, kinds: tuple[str, ...] = (), phase: str = "") -> float:
        """The sum of a field over the rows of some kinds (default: all) and one phase (default: both)."""
        chosen = [r for r in self.rows if (not kinds or r.kind in kinds) and (not phase or r.phase == phase)]
        return sum(getattr(row, field) for row in chosen)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the elements in memory; a dimension of stride 0 is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size == 1)
    return math.prod(sizes) * tensor.element_size()


def tensors_in(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Records PyTorch's ops and the launches of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.rows: dict[tuple[str, str, str], Row] = {}

    def add(self, kind: str, op: str, moved: float, flops: float = 0, launches: int = 1) -> None:
        row = self.rows.setdefault((self.phase, kind, op), Row(self.phase, kind, op))
        row.launches += launches
        row.bytes += moved
        row.flops += flops
        row.ms += 1000 * max(moved / COPY_RATE, flops / MATRIX_RATE)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastimagen":
            return self._fused(func, args, kwargs)
        name = func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if name == "convolution":
            return self._convolution(func, args, out)
        if name == "convolution_backward":
            return self._convolution_backward(func, args, out)
        is_view = not name.endswith("_") and any(result.alias_info is not None for result in func._schema.returns)
        if is_view or name in FREE:
            return out
        read = [] if name in WRITE_ONLY else tensors_in(args, kwargs)
        if name == "copy_":
            read = tensors_in(args[1:])
        count = flop_registry.get(torch.ops.aten.addmm if name == "addmm_" else func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if name == "addmm" and args[0].dim() == 2:
            self.add("other", "addend of addmm", 2 * bytes_of(out))
        moved = sum(map(bytes_of, [*read, *tensors_in(out)]))
        self.add(self._kind(name, args), name, moved, flops, 2 if name == "native_layer_norm_backward" else 1)
        return out

    def _kind(self, name: str, args: tuple) -> str:
        is_map = any(tensor.dim() >= 3 for tensor in tensors_in(args[:1]))
        if name in ("add", "add_") and is_map:
            return "residual add" if self.phase == "forward" else "gradient add"
        kind = KINDS.get(name, "other")
        if kind in ("scaling", "layout copy", "concatenation") and not is_map:
            return "other"
        return kind

    def _fused(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run the launchers behind one of our operators instead of its fake."""
        implementation = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
        with self:
            return implementation(*args, **kwargs)

    def _convolution(self, func: Any, args: tuple, out: Tensor) -> Tensor:
        x, weight, bias = args[:3]
        out = _channels_last(out)
        self._relayout("convolution input", x)
        flops = flop_registry[func.overloadpacket](*args, out_val=out)
        self.add("convolution", "convolution", sum(map(bytes_of, (x, weight, out))), flops)
        if bias is not None:
            self.add("bias add", "convolution bias", 2 * bytes_of(out))
        return out

    def _convolution_backward(self, func: Any, args: tuple, out: tuple) -> tuple:
        dy, x, weight = args[:3]
        for_x, for_weight, for_bias = args[-1]
        dx, dweight = (None if grad is None else _channels_last(grad) for grad in out[:2])
        self._relayout("convolution dy", dy)
        self._relayout("convolution input", x)
        results = for_x + for_weight
        moved = results * sum(map(bytes_of, (dy, x, weight)))
        flops = flop_registry[func.overloadpacket](*args, out_val=out)
        self.add("convolution", "convolution_backward", moved, flops, results)
        if for_bias:
            self.add("bias-gradient sum", "convolution bias", bytes_of(dy))
        return dx, dweight, out[2]

    def _relayout(self, op: str, x: Tensor) -> None:
        if not x.is_contiguous(memory_format=torch.channels_last):
            self.add("layout copy", op, 2 * bytes_of(x))

    def launch(self, kernel: JITFunction, arguments: tuple, options: dict[str, Any]) -> None:
        """Record a launch of a Triton kernel."""
        given = dict(zip(kernel.arg_names, arguments)) | options
        name = kernel.__name__
        if given.get("first_sample"):  # the tensors as a whole were counted with the first samples
            self.add("launches by sample", name, 0)
            return
        flops = 0
        for key, products in ATTENTION_PRODUCTS.items():
            if name == f"attention_{key}_kernel":
                keys = sum(given[source][0].shape[1] for source in ("k", "context_k") if given[source] is not None)
                flops = 2 * products * given["q"][0].numel() * keys
        kind = "residual add" if name == "add_residual_kernel" else name.partition("_")[0] + " kernels"
        self.add(kind, name, sum(map(bytes_of, tensors_in(given))), flops)


def _channels_last(x: Tensor) -> Tensor:
    """As cuDNN writes it."""
    return torch.empty_like(x, memory_format=torch.channels_last) if x.dim() == 4 else x


@contextmanager
def on_the_kernels_path(recorder: Recorder) -> Iterator[None]:
    """Inside, our ops on meta tensors go through the launchers, and a launch is recorded instead of done."""

    import torch._dynamo  # PyTorch may import it inside, and it would keep the changed function

    def run(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        recorder.launch(kernel, arguments, options)

    answers = {"use_triton": True, "in_kernels": True, "traced": False}

    changed: list[tuple[Any, str, Callable]] = [(torch, "is_autocast_enabled", torch.is_autocast_enabled)]
    for module in [module for name, module in sys.modules.items() if name.startswith("fastimagen.")]:
        changed += [(module, name, vars(module)[name]) for name in answers if name in vars(module)]
    with compiling_for(TARGETS["sm_90"]):  # for its stub of Triton's driver; nothing is compiled
        before = JITFunction.run
        try:
            for owner, name, _ in changed:
                answer = answers.get(name, False)  # autocast does not know meta tensors
                setattr(owner, name, lambda *unused, answer=answer, **ignored: answer)
            JITFunction.run = run
            yield
        finally:
            JITFunction.run = before
            for owner, name, value in changed:
                setattr(owner, name, value)


def trace(network: Network, batch: int | None = None) -> Trace:
    """The trace of a training step of `network`, at its own batch by default."""
    config, batch = network.stage().config.unet, batch or network.batch
    with torch.device("meta"):
        unet = UNet(config).to(torch.bfloat16)
        given, x = inputs(config, batch, network.side)
    recorder = Recorder()
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # kept alive, so that no other gets its address
        return tensor

    with on_the_kernels_path(recorder):
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), recorder:
            loss = (unet(x, **given).float() - x).square().flatten(1).mean(1).mean()
        recorder.phase = "backward"
        with recorder:
            loss.backward()
    return Trace(
        network.name,
        batch,
        sum(parameter.numel() for parameter in unet.parameters()),
        sum(storage.nbytes() for address, storage in saved.items() if address not in own),
        list(recorder.rows.values()),
    )


def inputs(config: UNetConfig, batch: int, side: int) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a U-Net besides the images, and the images (B, C, side, side)."""
    x, time = torch.empty(batch, config.channels, side, side), torch.empty(batch)
    given: dict[str, Any] = {"time": time}
    if config.text_dim:
        embeds = torch.empty(batch, TOKENS, config.text_dim, dtype=torch.bfloat16)  # (B, L, E)
        text = TextEmbeddings._derive(embeds, torch.empty(batch, TOKENS, dtype=torch.bool))  # a meta mask has no values
        given |= {"text": text, "keep_text": torch.empty(batch, dtype=torch.bool)}
    if config.lowres:
        given |= {"lowres": x, "lowres_time": time}
    return given, x


# ---- output


def summary(found: Trace) -> str:
    """The line of a network in the table of docs/benchmarks.md."""
    convolutions = found.total("flops", ("convolution",)) / found.total("flops")
    around = found.total("bytes", AROUND_CONVOLUTIONS)
    by_sample = found.total("launches", ("launches by sample",))
    return (
        f"| {found.network} B{found.batch} | {found.total('flops') / 1e12:.1f} T | {convolutions:.1%} | "
        f"{found.total('launches') - by_sample:,.0f} + {by_sample:,.0f} | "
        f"{found.total('launches', ('zero fill',)):,.0f} | {around / 1e9:.1f} GB | "
        f"{found.total('bytes') / 1e9:.0f} GB | {found.activation_bytes / 2**30:.1f} GiB | "
        f"{1000 * found.total('flops') / MATRIX_RATE:.0f} ms | {found.total('ms'):.0f} ms |"
    )


HEADER = """\
| network | FLOP | in convolutions | launches | zero fills | bytes around convolutions | bytes | saved activations | \
FLOP at the matrix rate | sum of launches |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def comparison(before: Trace, now: Trace) -> str:
    """The line of a network in docs/benchmarks.md."""
    by_sample = now.total("launches", ("launches by sample",))
    around, moved = ([t.total("bytes", kinds) / 1e9 for t in (before, now)] for kinds in (AROUND_CONVOLUTIONS, ()))
    return (
        f"| {now.network} B{now.batch} | {before.total('launches'):,} | {now.total('launches') - by_sample:,} + "
        f"{by_sample:,} | {around[0]:.1f} | {around[1]:.1f} | {moved[0]:.0f} | {moved[1]:.0f} | "
        f"{before.total('ms'):.0f} ms | {now.total('ms'):.0f} ms |"
    )


def details(found: Trace) -> str:
    """One line for every kind and phase, by time."""
    lines = []
    for phase, kind in {(row.phase, row.kind) for row in found.rows}:
        launches, moved, flops, ms = (
            found.total(field, (kind,), phase) for field in ("launches", "bytes", "flops", "ms")
        )
        line = (
            f"{phase:9}{kind:20}{launches:6,.0f} launches {moved / 1e9:7.1f} GB {flops / 1e12:7.2f} TFLOP {ms:7.2f} ms"
        )
        lines.append((-ms, line))
    return "\n".join(line for _, line in sorted(lines))


def write(path: Path, traces: list[Trace]) -> None:
    entries = []
    for found in traces:
        facts = asdict(found)
        rows = ",\n  ".join(json.dumps(row) for row in facts.pop("rows"))
        entries.append(f'{json.dumps(facts)[:-1]}, "rows": [\n  {rows}\n]}}')
    rates = json.dumps({"copy_rate": COPY_RATE, "matrix_rate": MATRIX_RATE, "torch": torch.__version__})
    body = ",\n".join(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"assumed": {rates}, "networks": [\n{body}\n]}}\n')


def read(path: Path) -> list[Trace]:
    """What `write` wrote."""
    entries = json.loads(path.read_text())["networks"]
    return [Trace(**{**entry, "rows": [Row(**row) for row in entry["rows"]]}) for entry in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", default="", help="only networks whose names match this regular expression")
    parser.add_argument("--out", type=Path, default=RESULTS / "trace/after.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: launches are interpreted and cannot be recorded; unset it")
    traces = [trace(network) for network in NETWORKS if re.search(options.networks, network.name)]
    if not traces:
        names = ", ".join(network.name for network in NETWORKS)
        parser.error(f'--networks "{options.networks}" matches none of {names}')
    for found in traces:
        print(f"{found.network} B{found.batch}, {found.parameters / 1e6:.0f} M parameters\n{details(found)}\n")
    print("\n".join([HEADER, *map(summary, traces)]))
    write(options.out, traces)
    before = {found.network: found for found in read(RESULTS / "trace/before.json")}
    print(
        "\n".join(
            ["\nagainst before.json, for docs/benchmarks.md", *(comparison(before[t.network], t) for t in traces)]
        )
    )


if __name__ == "__main__":
    main()
