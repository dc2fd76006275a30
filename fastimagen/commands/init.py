"""`fastimagen init`: looks at images and machine, and writes a configuration, its reasons and the next commands."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..config import SamplingConfig, StageConfig, StageTrainConfig, TrainConfig
from ..config_file import config_from_dict
from ..data.packing.rows import is_table
from ..data.survey import Survey, survey
from ..data_config import DataConfig, TextConfig
from ..diffusion_config import AugmentationConfig, ObjectiveConfig, ScheduleConfig
from ..files import atomic_file
from ..network_config import UNetConfig
from ..section import Section
from ..train.proposal import Machine, Proposal, propose
from ..train.stage_setup import plan

NOTES = """# {name}

Written by `fastimagen init` for {count} images with captions ({source}), on {machine}.

## Next commands

```bash
{commands}
```

Rerun a command to resume it. Without a network, download the text encoder elsewhere (`hf download {hub_name}`), copy
the cache of the Hugging Face hub (`~/.cache/huggingface`, or where `HF_HOME` points) and set `HF_HUB_OFFLINE=1`.

## Why it is as it is

| key | value and reason |
| --- | --- |
{rows}

All other keys have their defaults. `--set KEY=VALUE` overrides a key for one command.

## What the keys mean
{meanings}"""

SECTIONS: dict[str, type[Section]] = {
    "fastimagen.cascade.stages": StageConfig,
    "unet": UNetConfig,
    "schedule": ScheduleConfig,
    "objective": ObjectiveConfig,
    "augmentation": AugmentationConfig,
    "sampling": SamplingConfig,
    "fastimagen.data": DataConfig,
    "fastimagen.text": TextConfig,
    "fastimagen.train": TrainConfig,
    "fastimagen.train.stages": StageTrainConfig,
}
"""Whose keys the notes describe; those of a stage's sections by their last name."""


def init(options: argparse.Namespace) -> None:
    """Write OUT and, beside it, OUT.md. Raises ValueError if one of them exists, and as `survey` and `propose` do."""
    config, notes = options.out, options.out.with_suffix(".md")
    for path in (config, notes):
        if path.exists():
            raise ValueError(f"{path} exists: choose another file with --out, or remove it first")
    found, machine = survey(options.source), Machine.here()
    shards = options.source if found.packed else f"data/{config.stem}"
    proposal = propose(found, machine, shards=shards, run=f"runs/{config.stem}", size=options.size)
    plan(config_from_dict(proposal.content))  # as the dry run does
    commands = next_commands(options, found, machine, shards)
    with atomic_file(config) as temporary:
        temporary.write_text(_readable(proposal.content) + "\n", encoding="utf-8")
    with atomic_file(notes) as temporary:
        temporary.write_text(_notes(options, found, machine, proposal, commands), encoding="utf-8")
    print(f"{config}: a configuration for {found.count} images; {notes} says why it is as it is\n")
    for key, reason in proposal.reasons:
        print(f"  {key}: {reason}")
    print("\nNext:\n")
    for command in commands:
        print(f"  {command}")


def next_commands(options: argparse.Namespace, found: Survey, machine: Machine, shards: str) -> list[str]:
    """From images to a sampled image."""
    config, name = str(options.out), options.out.stem
    kind = "table" if is_table(Path(options.source)) else "folder"
    pack = ["fastimagen", "shards", kind, str(options.source), "--out", shards]
    launch = ["deepspeed", "--module", "fastimagen", "train"] if machine.gpus else ["fastimagen", "train"]
    commands = [
        *([] if found.packed else [pack]),
        ["fastimagen", "embed", "--config", config],
        ["fastimagen", "train", "--config", config, "--dry-run"],
        [*launch, "--config", config],
        ["fastimagen", "export", "--run", f"runs/{name}", "--out", f"{name}_model"],
        ["fastimagen", "sample", "--model", f"{name}_model", "--captions", found.caption, "--count", "4"],
    ]
    return [shlex.join(command) for command in commands]


def _notes(
    options: argparse.Namespace, found: Survey, machine: Machine, proposal: Proposal, commands: list[str]
) -> str:
    from ..text.t5 import T5_NAMES

    encoder = proposal.content["fastimagen"]["text"]["encoder"]
    return NOTES.format(
        name=options.out.name,
        count=found.count,
        source=options.source,
        machine=_described(machine),
        commands="\n".join(commands),
        hub_name=T5_NAMES[encoder][0],
        rows="\n".join(f"| `{key}` | {reason} |" for key, reason in proposal.reasons),
        meanings="".join(_meanings(name, section) for name, section in SECTIONS.items()),
    )


def _described(machine: Machine) -> str:
    if not machine.gpus:
        return "a machine without GPU"
    return f"{machine.gpus} x {machine.name} with {machine.gib:.0f} GiB"


def _meanings(name: str, section: type[Section]) -> str:
    """A list of the keys of a section."""
    lines = [f"* `{key}`: {' '.join((field.description or '').split())}" for key, field in section.model_fields.items()]
    return "\n".join(["", f"### {name}", "", *lines, ""])


def _readable(content: dict[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line."""
    text = json.dumps(content, indent=2)
    return re.sub(
        r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
