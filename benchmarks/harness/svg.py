"""The report's plots, as SVG: bars of whole steps, a roofline of the kernels, ratios over time."""

from __future__ import annotations

import math

from .rows import Measured, Row, folder

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
LEFT, TOP, WIDTH, HEIGHT = 70, 40, 460, 300


def page(title: str, parts: list[str], *, width: int = 760, height: int = 400) -> str:
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
                f'font-size="12">',
                f'<rect width="{width}" height="{height}" fill="white"/>',
                f'<text x="16" y="22" font-size="15">{title}</text>',
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", color: str = "black") -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escaped}</text>'


def steps(measured: Measured) -> str | None:
    """Bars: images per second of whole training steps, relative to the fastest of each network."""
    groups: dict[str, list[Row]] = {}
    for device in [*measured.gpus, "cpu"]:
        for row in measured.of(device, op="training step", mode="training"):
            if "ms" in row:
                groups.setdefault(f"{row['shape']}; {row['device']}", []).append(row)
    parts, y = [], 34.0
    for name, rows in groups.items():
        y += 18
        parts.append(text(16, y, name))
        fastest = max(row["images"] / row["ms"][1] for row in rows)
        for index, row in enumerate(rows):
            rate = row["images"] / row["ms"][1]
            y += 18
            parts += [
                text(250, y, row["provider"], anchor="end"),
                f'<rect x="258" y="{y - 11:.1f}" width="{400 * rate / fastest:.1f}" height="14" '
                f'fill="{COLORS[index % len(COLORS)]}"/>',
                text(264 + 400 * rate / fastest, y, f"{1000 * rate:.3g}/s"),
            ]
        y += 8
    return page("Whole training steps, images per second", parts, height=int(y) + 20) if parts else None


def _log_axes(x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]):
    """Logarithmic axes: a function that places points, and what draws grid and labels."""

    def place(a: float, b: float) -> tuple[float, float]:
        across, up = (math.log(value / low) / math.log(high / low) for value, (low, high) in ((a, x), (b, y)))
        return LEFT + across * WIDTH, TOP + HEIGHT * (1 - up)

    parts = []
    for power in range(math.ceil(math.log10(x[0])), math.floor(math.log10(x[1])) + 1):
        at, _ = place(10.0**power, y[0])
        parts += [
            f'<path d="M{at:.1f} {TOP}V{TOP + HEIGHT}" stroke="#ddd"/>',
            text(at, TOP + HEIGHT + 16, f"{10.0**power:g}", anchor="middle"),
        ]
    for power in range(math.ceil(math.log10(y[0])), math.floor(math.log10(y[1])) + 1):
        _, at = place(x[0], 10.0**power)
        parts += [
            f'<path d="M{LEFT} {at:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>',
            text(LEFT - 6, at + 4, f"{10.0**power:g}", anchor="end"),
        ]
    parts += [text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, labels[0], anchor="middle"), text(16, TOP - 6, labels[1])]
    return place, parts


def roofline(measured: Measured) -> str | None:
    """Attention of the first GPU: TFLOP/s over FLOP per byte, under what copy and matrix product reach."""
    rows = [
        row
        for row in (measured.of(measured.gpus[0]) if measured.gpus else [])
        if "ms" in row and "flops" in row and "bytes" in row
    ]
    if not rows:
        return None
    points = [(row["flops"] / row["bytes"], row["flops"] / row["ms"][1] / 1e9, row["provider"]) for row in rows]
    peak, gbs = rows[-1]["tflops"], rows[-1]["gbs"]
    x = (min(p[0] for p in points) / 2, max(*(p[0] for p in points), 2000 * peak / gbs) * 2)
    y = (min(p[1] for p in points) / 2, peak * 2)
    place, parts = _log_axes(x, y, ("floating-point operations per byte", "TFLOP/s"))
    ridge = 1000 * peak / gbs
    low = max(x[0], y[0] * 1000 / gbs)
    roof = [place(low, low * gbs / 1000), place(ridge, peak), place(x[1], peak)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in roof)
    parts.append(f'<polyline points="{line}" fill="none" stroke="black"/>')
    names = list(dict.fromkeys(name for *_, name in points))
    for a, b, name in points:
        across, down = place(a, b)
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" '
            f'fill="{COLORS[names.index(name) % len(COLORS)]}" fill-opacity="0.7"/>'
        )
    parts += [
        text(LEFT + WIDTH + 12, TOP + 14 * (1 + i), name, color=COLORS[i % len(COLORS)]) for i, name in enumerate(names)
    ]
    return page(f"Attention on {rows[-1]['device']}, and its roof", parts)


def history(rows: list[Row]) -> str | None:
    """How many times faster than MinImagen our training steps were, from file to file."""
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if (
            row["op"] == "training step"
            and row["mode"] == "training"
            and "ms" in row
            and row["provider"] in ("ours", "ours, triton")
        ):
            theirs = next(
                (
                    other
                    for other in rows
                    if other["provider"] == "MinImagen"
                    and "ms" in other
                    and all(other[field] == row[field] for field in ("op", "shape", "mode", "date", "device"))
                ),
                None,
            )
            if theirs:
                label = f"{row['shape']} ({folder(row['device'])})"
                ratios.setdefault(label, {})[row["date"]] = (
                    row["images"] / row["ms"][1] / theirs["images"] * theirs["ms"][1]
                )
    if not ratios:
        return None
    dates = sorted({date for line in ratios.values() for date in line})
    most = max(ratio for line in ratios.values() for ratio in line.values()) * 1.1
    parts = []
    for level in range(int(most) + 1):
        y = TOP + HEIGHT * (1 - level / most)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>',
            text(LEFT - 6, y + 4, str(level), anchor="end"),
        ]
    for index, (label, line) in enumerate(ratios.items()):
        color = COLORS[index % len(COLORS)]
        spots = [
            (LEFT + WIDTH * (dates.index(date) + 0.5) / len(dates), TOP + HEIGHT * (1 - ratio / most))
            for date, ratio in sorted(line.items())
        ]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in spots]
        parts.append(text(LEFT + WIDTH + 8, spots[-1][1] + 4, label, color=color))
    parts += [
        text(LEFT + WIDTH * (i + 0.5) / len(dates), TOP + HEIGHT + 18, date, anchor="middle")
        for i, date in enumerate(dates)
    ]
    return page("Training step, times as fast as MinImagen", parts)
