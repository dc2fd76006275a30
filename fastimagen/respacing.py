"""Which of the T steps of a discrete noise schedule a sampler takes. Pure Python, also for config_rules.py.

A respacing is "even", "leading", the name of one of DeepFloyd IF's, or numbers: "10,10,3,2,2" cuts the T steps into
five sections, from clean to noise, and takes 10 evenly spaced steps of the first, with both of its ends, and so on.
"""

from __future__ import annotations

IF_RESPACINGS = {
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}
"""The respacings of deep-floyd/IF."""


def section_counts(respacing: str) -> list[int] | None:
    """Steps of each section, from clean to noise; None for "even" and "leading", which have no sections.

    Raises ValueError for what is no respacing.
    """
    if respacing in ("even", "leading"):
        return None
    try:
        counts = [int(count) for count in IF_RESPACINGS.get(respacing, respacing).split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        names = ", ".join(("even", "leading", *IF_RESPACINGS))
        raise ValueError(f'respacing is one of {names}, or numbers like "10,10,3,2,2", not "{respacing}"')
    return counts


def respaced(respacing: str, steps: int, timesteps: int) -> list[int]:
    """The steps in descending order: `steps` of 0 .. timesteps - 1, for every respacing but "even".

    Raises ValueError if the respacing has another number of steps, or a section has fewer steps than it should give.
    """
    counts = section_counts(respacing)
    if counts is None:  # as in diffusers: 0, k, 2 k, ...
        return [step * (timesteps // steps) for step in reversed(range(steps))]
    if sum(counts) != steps:
        raise ValueError(f'respacing "{respacing}" has {sum(counts)} steps, but "steps" is {steps}: change one of them')
    taken, start = [], 0
    for index, count in enumerate(counts):
        size = timesteps // len(counts) + (index < timesteps % len(counts))
        if count > size:
            raise ValueError(f'respacing "{respacing}" takes {count} steps of a section of {size}')
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # added up, as in deep-floyd/IF: a product rounds to another step in super40
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += size
    return taken[::-1]
