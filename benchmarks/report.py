"""Result files -> the tables of README.md and docs/benchmarks.md, and their plots.

    python -m benchmarks.report [--check]

Everything between `<!-- benchmarks: NAME -->` and `<!-- end of benchmarks -->` is generated. Rows that were measured
with other kernels than those in the tree are marked as stale."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from . import gpu_plan
from .harness import svg
from .harness.checkout import ROOT
from .harness.rows import RESULTS, Measured, Row, folder, is_stale, read_all

PAGES = ("README.md", "docs/benchmarks.md", "docs/networks.md")
MARKED = re.compile(r"(?P<begin><!-- benchmarks: (?P<name>\w+) -->\n).*?(?P<end><!-- end of benchmarks -->)", re.DOTALL)
NOT_MEASURED = "not measured"
REPRODUCE = {"cpu": "`make bench`", "gpu": "`make gpu-check`"}


# ---- cells


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = ["| " + " | ".join(line) + " |" for line in (head, ["---"] + ["---:"] * (len(head) - 1), *lines)]
    return "\n".join(rows)


def milliseconds(row: Row | None) -> str:
    """The median, with three digits, in a fitting unit."""
    if row is None or "ms" not in row:
        return NOT_MEASURED
    ms = row["ms"][1]
    text = f"{digits(ms / 1000)} s" if ms >= 1000 else f"{digits(ms)} ms" if ms >= 1 else f"{digits(1000 * ms)} µs"
    return text + (" (stale)" if is_stale(row) else "")


def digits(value: float) -> str:
    """Three of them at most: 0.123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(slow: Row | None, fast: Row | None) -> str:
    """How many times faster `fast` is."""
    if slow is None or fast is None or "ms" not in slow or "ms" not in fast:
        return NOT_MEASURED
    return f"{slow['ms'][1] / fast['ms'][1]:.2f}x"


def share(row: Row | None, amount: str, rate: str) -> str:
    """Of the copy bandwidth ("bytes", "gbs") or the matrix rate ("flops", "tflops") of the same run, in percent."""
    if row is None or "ms" not in row or amount not in row:
        return NOT_MEASURED
    scale = 1e9 if rate == "gbs" else 1e12
    return f"{100 * row[amount] / (row['ms'][1] / 1e3) / scale / row[rate]:.0f} %"


def per_second(row: Row | None) -> str:
    return NOT_MEASURED if row is None or "ms" not in row else digits(row["images"] / row["ms"][1] * 1e3)


def when(rows: list[Row], command: str) -> str:
    """Where and when these rows were measured, and how to reproduce them."""
    if not rows:
        return f"Not measured yet; {command} measures it."
    last = max(rows, key=lambda row: row["date"])
    versions = ", ".join(
        f"{name} {number}" for name, number in last["versions"].items() if name not in ("python", "cudnn")
    )
    threads = f", {last['threads']} thread{'s' * (last['threads'] != 1)}" if folder(last["device"]) == "cpu" else ""
    clocks = f", clocks {last['clocks']}" if last.get("clocks") else ""
    return (
        f"{last['device']}{threads}{clocks}; {versions}; {last['date']}, commit {last.get('commit', 'unknown')}; "
        f"reproduce with {command}"
    )


# ---- tables


def cpu(measured: Measured) -> str:
    """Against MinImagen on a CPU: user time first, then the total with kernel (system) time, then memory."""
    lines = []
    for row in measured.of("cpu", provider="ours"):
        if row["op"] not in ("training step", "guided sampling"):
            continue
        names = {"op": row["op"], "shape": row["shape"], "mode": row["mode"]}
        unpadded = measured.one("cpu", provider="ours, text_padding none", **names)
        minimagen = measured.one("cpu", provider="MinImagen", **names)
        providers = (row, unpadded, minimagen)
        if row["mode"] == "peak memory":
            lines.append(
                [f"peak memory of a step, {row['shape']}", *map(mebibytes, providers), memory_ratio(row, minimagen)]
            )
            continue
        user = [user_time(provider) for provider in providers]
        lines.append([f"{row['op']}, {row['shape']}", *map(milliseconds, user), times(user[2], user[0])])
        total = [*map(milliseconds, providers), times(minimagen, row)]
        lines.append(["with system time", *total])
    head = (
        "user time",
        "fastimagen, 256 tokens",
        "fastimagen, real tokens only",
        "MinImagen 0.0.9",
        "speed-up, 256 tokens",
    )
    note = when(measured.of("cpu", op="training step"), REPRODUCE["cpu"])
    return f"{table(head, lines)}\n\n{note}" if lines else note


def user_time(row: Row | None) -> Row | None:
    """The row with its user time in place of its total time; without a time if system time was not recorded."""
    if row is None or "ms" not in row or row.get("system_share") is None:
        return None
    return {**row, "ms": [ms * (1 - row["system_share"]) for ms in row["ms"]]}


def families(measured: Measured) -> str:
    """A training step of the quickstart's base stage with either family of networks."""
    rows = measured.of("cpu", op="quickstart step")
    lines = [
        [row["provider"], milliseconds(row), per_second(row), f"{row['flops'] / row['images'] / 1e9:.3g}"]
        for row in rows
    ]
    head = ("base network", "step of 8 images", "images/s", "GFLOP an image")
    note = when(rows, "`python -m benchmarks.cpu --only families`")
    return f"{table(head, lines)}\n\n{note}" if lines else note


def mebibytes(row: Row | None) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} MiB" if row and "peak_bytes" in row else NOT_MEASURED


def memory_ratio(row: Row, minimagen: Row | None) -> str:
    """Peak memory as a share of MinImagen's."""
    if minimagen is None or "peak_bytes" not in minimagen:
        return NOT_MEASURED
    return f"{100 * row['peak_bytes'] / minimagen['peak_bytes']:.0f} % of MinImagen's"


def step(measured: Measured) -> str:
    """Whole training steps on GPUs."""
    parts = []
    for device in measured.gpus or [""]:
        rows = measured.of(device, op="training step")
        lines = [
            [
                row["shape"],
                row["provider"] + (" (stale)" if is_stale(row) else ""),
                str(row.get("images", "")),
                per_second(row),
                share(row, "flops", "tflops"),
                f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else NOT_MEASURED,
                against(measured, device, row),
            ]
            for row in rows
        ]
        head = ("network", "provider", "batch", "images/s", "of the matrix rate", "memory", "speed-up over MinImagen")
        parts += [table(head, lines)] if lines else []
        parts.append(when(rows, REPRODUCE["gpu"]))
    return "\n\n".join(parts)


def engine(measured: Measured) -> str:
    """Training steps through DeepSpeed's engine on GPUs."""
    parts = []
    for device in measured.gpus or [""]:
        rows = measured.of(device, op="engine step")
        lines = [
            [
                row["shape"],
                row["provider"] + (" (stale)" if is_stale(row) else ""),
                milliseconds(row),
                per_second(row),
                share(row, "flops", "tflops"),
                f"{digits(row['host_ms'])} ms" if "host_ms" in row else NOT_MEASURED,
                f"{digits(row['first_step_s'])} s" if "first_step_s" in row else NOT_MEASURED,
                f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else NOT_MEASURED,
                str(row.get("host_synchronisations", NOT_MEASURED)),
            ]
            for row in rows
        ]
        head = (
            "network and micro-batch",
            "optimizer",
            "step",
            "images/s",
            "of the matrix rate",
            "host time",
            "first step",
            "memory",
            "host synchronisations",
        )
        parts += [table(head, lines)] if lines else []
        parts.append(when(rows, REPRODUCE["gpu"]))
    return "\n\n".join(parts)


def against(measured: Measured, device: str, row: Row) -> str:
    """Images per second over MinImagen's."""
    theirs = measured.one(device, op=row["op"], shape=row["shape"], provider="MinImagen")
    if not theirs or "ms" not in theirs or "ms" not in row:
        return NOT_MEASURED
    return f"{row['images'] / row['ms'][1] / theirs['images'] * theirs['ms'][1]:.2f}x"


def breakdown(measured: Measured) -> str:
    """Where the time of a step goes."""
    parts = []
    for device in ["cpu", *measured.gpus]:
        rows = [row for row in measured.of(device, op="training step", mode="training") if "parts" in row]
        if not rows:
            continue
        lines = [
            [
                row["shape"],
                row["provider"],
                *(f"{100 * spent / sum(row['parts'].values()):.0f} %" for spent in row["parts"].values()),
            ]
            for row in rows
        ]
        parts += [
            table(("network", "provider", *rows[0]["parts"]), lines),
            when(rows, REPRODUCE["cpu" if device == "cpu" else "gpu"]),
        ]
    return "\n\n".join(parts) or when([], REPRODUCE["gpu"])


def single_op(op: str) -> Callable[[Measured], str]:
    """The table of one op: a line for a shape and mode, a column for a provider."""

    def make(measured: Measured) -> str:
        parts = []
        for device in [*measured.gpus, "cpu"] if measured.gpus else ["cpu"]:
            rows = measured.of(device, op=op)
            if not rows:
                continue
            shapes = dict.fromkeys((row["shape"], row["mode"]) for row in rows)
            providers = [
                name
                for name in dict.fromkeys(row["provider"] for row in rows)
                if any("ms" in row for row in rows if row["provider"] == name)
            ]
            rates = {"ours of copy": ("bytes", "gbs"), "ours of matrix rate": ("flops", "tflops")}
            rates = {name: rate for name, rate in rates.items() if any(rate[0] in row for row in rows)}
            lines = []
            for shape, mode in shapes:
                found = [measured.one(device, op=op, shape=shape, mode=mode, provider=name) for name in providers]
                ours = next((row for row in found if row and "ours" in row["provider"] and "ms" in row), None)
                lines.append(
                    [f"{shape}, {mode}", *map(milliseconds, found), *(share(ours, *rate) for rate in rates.values())]
                )
            head = ("", *providers, *rates)
            parts += [table(head, lines), when(rows, REPRODUCE["cpu" if device == "cpu" else "gpu"])]
        if not measured.gpus:
            parts.append(f"On a GPU: {when([], REPRODUCE['gpu'])}")
        return "\n\n".join(parts)

    return make


def sampler(measured: Measured) -> str:
    """A step of the sampler, guided, and its U-Net."""
    parts = []
    for device in [*measured.gpus, "cpu"]:
        lines = []
        rows = measured.of(device, op="sampling")
        for row in rows:
            unet = measured.one(device, op="unet", shape=row["shape"], provider=row["provider"])
            lines.append(
                [
                    row["shape"],
                    row["provider"],
                    milliseconds(row),
                    milliseconds(unet),
                    row.get("note", ""),
                    image_time(row),
                ]
            )
        if lines:
            parts += [
                table(("stage", "provider", "step", "U-Net", "outside of the U-Net", "one image"), lines),
                when(rows, REPRODUCE["cpu" if device == "cpu" else "gpu"]),
            ]
    if not measured.gpus:
        parts.append(f"On a GPU: {when([], REPRODUCE['gpu'])}")
    return "\n\n".join(parts)


def image_time(row: Row) -> str:
    """Time of one image in as many steps as the stage is sampled with."""
    if "ms" not in row or "steps" not in row:
        return NOT_MEASURED
    return f"{digits(row['ms'][1] * row['steps'] / row['images'] / 1000)} s in {row['steps']}"


def data(measured: Measured) -> str:
    """Images and captions per second on the way to the network."""
    rows = [row for op in ("data loading", "text embedding") for row in measured.of("cpu", op=op)]
    lines = [[row["op"], row["shape"], per_second(row)] for row in rows]
    return f"{table(('', 'of', 'per second and core'), lines)}\n\n{when(rows, REPRODUCE['cpu'])}"


def network_sizes(_: Measured) -> str:
    """Parameters and FLOPs of the stages of presets."""
    found = json.loads((RESULTS / "networks.json").read_text())
    lines = [
        [
            f"`{row['preset']}`, {row['stage']}",
            f"`{row['kind']}`",
            f"{row['size']}" if row["size"] == row["trains_on"] else f"{row['size']}, crops of {row['trains_on']}",
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['forward'] / 1e12:.3g}",
            f"{1e6 * row['forward'] / row['trains_on'] ** 2 / 1e12:.3g}",
        ]
        for row in found["rows"]
    ]
    head = ("preset, stage", "kind", "pixels", "parameters", "TFLOP an image or crop", "TFLOP a megapixel")
    return (
        f"{table(head, lines)}\n\nForward pass; {found['about']['date']}, reproduce with `{found['about']['command']}`"
    )


TABLES: dict[str, Callable[[Measured], str]] = {
    "cpu": cpu,
    "families": families,
    "engine": engine,
    "step": step,
    "breakdown": breakdown,
    "sampler": sampler,
    "data": data,
    "attention": single_op("attention"),
    "group_norm": single_op("group_norm"),
    "threshold": single_op("threshold"),
    "sampler_step": single_op("sampler step"),
    "host_time": single_op("host time"),
    "network_sizes": network_sizes,
    "gpu_plan": lambda measured: gpu_plan.page(),
}


# ---- pages and plots


def fill(page: str, measured: Measured) -> str:
    """The page with its marked sections regenerated. Raises ValueError for an unknown table."""

    def section(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f'no table "{match["name"]}"; there are {", ".join(TABLES)}')
        return f"{match['begin']}\n{TABLES[match['name']](measured)}\n\n{match['end']}"

    return MARKED.sub(section, page)


def plots(rows: list[Row]) -> dict[str, str]:
    """Path -> SVG of all plots that have data: whole steps, history, and the roofline of a GPU."""
    measured = Measured(rows)
    found = {
        "docs/benchmarks_step.svg": svg.steps(measured),
        "docs/benchmarks_history.svg": svg.history(rows),
        "docs/benchmarks_roofline.svg": svg.roofline(measured),
    }
    return {path: text for path, text in found.items() if text}


def generated(root: Path = ROOT) -> dict[Path, str]:
    """All generated files: path -> content."""
    rows = read_all(root / "benchmarks/results")
    measured = Measured(rows)
    pages = {root / name: fill((root / name).read_text(), measured) for name in PAGES}
    return pages | {root / path: text for path, text in plots(rows).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with an error if a file is out of date"
    )
    check = parser.parse_args().check
    old = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if check:
        sys.exit(f"out of date: {', '.join(path.name for path in old)}" if old else 0)
    for path in old:
        path.write_text(generated()[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
