"""The checkpoints of a stage: a folder each, complete once it has its final name, checked by checksums.

``checkpoints/<stage>/step-00000500/`` contains

- ``rank-00000.safetensors``, ...: what each rank owned, as fragments of the parameters (fragments.py)
- ``rank-00000.averages.safetensors``, ...: the same of the power-function averages, which remain when the others are
  removed (snapshots.py)
- ``engine.json``: shapes of the parameters, counters, loss scale
- ``state.json``: what the trainer needs to go on
- ``index.json``: size and SHA-256 of every other file
- ``validated.json``: only if validation or the preview grid of its step ended in a later start

While the ranks write, the folder is an incomplete checkpoint, ``.step-00000500.*.partial``. A damaged checkpoint is
renamed to ``damaged-step-00000500``. Nothing here needs DeepSpeed, a process group or a GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_json_object, sync, write_json, write_safetensors
from .fragments import read_parameters
from .power_average import QUANTITIES

FORMAT = "fastimagen.checkpoint.2"
EARLIER_FORMATS = ("fastimagen.checkpoint.1",)
STEP_NAME = re.compile(r"step-(\d{8})")
INDEX, ENGINE, STATE, VALIDATED = "index.json", "engine.json", "state.json", "validated.json"
AVERAGES = "averages.safetensors"


# ---- which checkpoints there are


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name))


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps; None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; None if there is none at all. Raises ValueError if all are damaged."""
    found = list(reversed(checkpoints(folder)))
    problems = {}
    for path in found:
        if (problem := damage(path)) is None:
            return path
        problems[path.name] = problem
    if problems:
        raise none_intact(folder, problems)
    return None


def none_intact(folder: Path, problems: dict[str, str]) -> ValueError:
    """The error about a stage whose checkpoints are all damaged. problems: by name."""
    reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    return ValueError(f"no checkpoint in {folder} is intact ({reasons}): restore one, or choose another --run-dir")


def best(folder: Path) -> Path | None:
    """The checkpoint with the smallest validation loss; None if none was validated at its step."""
    losses = [(loss, path) for path in checkpoints(folder) if (loss := _validation_loss(path)) is not None]
    return min(losses)[1] if losses else None


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        loss = read_state(checkpoint).get("val_loss")
    except ValueError:  # damaged: the next start or export that needs it says so
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


# ---- reading


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, stage configuration, averages since the last record, validation loss.

    "unfinished" lists what a request to stop has left to do of the validation and the preview grid of this step.
    """
    return {"unfinished": [], **read_json_object(checkpoint / STATE), **_read_validated(checkpoint)}


def write_validated(checkpoint: Path, val_loss: float | None, unfinished: Sequence[str]) -> None:
    """Record what has become of the "unfinished" parts. The files in the index stay as they are.

    val_loss: None if the validation was not among them.
    """
    known = read_state(checkpoint)["val_loss"] if val_loss is None else val_loss
    content = {"val_loss": known, "unfinished": list(unfinished)}
    write_json(checkpoint / VALIDATED, {**content, "sha256": _digest(content)})


def _read_validated(checkpoint: Path) -> dict[str, Any]:
    """What `write_validated` wrote; {} if it is missing or damaged: what is unfinished is then done again."""
    try:
        content = read_json_object(checkpoint / VALIDATED)
    except ValueError:
        return {}
    return content if content.pop("sha256", None) == _digest(content) else {}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_engine(checkpoint: Path) -> dict[str, Any]:
    """engine.json of a checkpoint."""
    return read_json_object(checkpoint / ENGINE)


def fragment_files(checkpoint: Path) -> list[Path]:
    """The files with the fragments of all ranks. Raises ValueError if the index is damaged."""
    return [checkpoint / name for name in sorted(read_index(checkpoint)) if name.endswith(".safetensors")]


def read_average(checkpoint: Path, quantity: str = "ema") -> dict[str, Tensor]:
    """An average by parameter name, fp32, on the CPU. Raises ValueError if the checkpoint is damaged.

    quantity: "ema" is that of the configured decay, power_average.QUANTITIES has the others.
    """
    return read_parameters(fragment_files(checkpoint), quantity, read_shapes(checkpoint))


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by name."""
    return {name: tuple(shape) for name, shape in read_engine(checkpoint)["parameters"].items()}


def damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with the share of a checkpoint's files that this rank checks; None if they are as written.

    Raises ValueError for a checkpoint of an earlier format.
    """
    if (checkpoint / "deepspeed").is_dir() or _format(checkpoint) in EARLIER_FORMATS:
        raise ValueError(
            f"{checkpoint} was written by an earlier fastimagen, in another format: export it with that version and "
            f"start a new run from the exported weights (train.stages.NAME.init_from), or choose another --run-dir"
        )
    try:
        index = read_index(checkpoint)
    except ValueError as error:
        return str(error)
    for name in sorted(index)[rank::world_size]:
        path, expected = checkpoint / name, index[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path} has {size} bytes instead of {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{path} is not as it was written: its SHA-256 differs"
        except OSError as error:
            return f"cannot read {path}: {error.strerror}"
    return None


def _format(checkpoint: Path) -> object:
    """What the index calls the format; None if it cannot be read."""
    try:
        return read_json_object(checkpoint / INDEX).get("format")
    except ValueError:
        return None


def read_index(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"bytes", "sha256"}}. Raises ValueError if index.json is not an index."""
    index = read_json_object(checkpoint / INDEX)
    files = index.get("files")
    if index.get("format") != FORMAT or not isinstance(files, dict) or not {ENGINE, STATE} <= files.keys():
        raise ValueError(f"{checkpoint / INDEX} is not the index of a checkpoint of the format {FORMAT}")
    if not all(isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in files.values()):
        raise ValueError(f"{checkpoint / INDEX} lacks sizes or checksums")
    return files


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing


def incomplete_name(step: int, token: str) -> str:
    """The folder of an incomplete checkpoint. token: the same on all ranks of a run, another one after a restart."""
    return f".step-{step:08d}.{token}.partial"


def write_rank(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write the fragments of a rank into the folder of an incomplete checkpoint, then report that they are on the disk.

    Raises OSError if something cannot be written.
    """
    powers = {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in QUANTITIES.values()}
    others = {name: tensor for name, tensor in tensors.items() if name not in powers}
    folder.mkdir(parents=True, exist_ok=True)
    report = {}
    for suffix, content in (("safetensors", others), (AVERAGES, powers)):
        path = folder / _rank_name(rank, suffix)
        write_safetensors(path, content, {"format": "pt"})
        report[path.name] = _entry(path)
    write_json(folder / _rank_name(rank, "json"), report)
    sync(folder)


def complete(folder: Path, world_size: int, engine: dict[str, Any], state: dict[str, Any]) -> Path:
    """Make the folder a checkpoint, when all ranks have written. Raises OSError if something cannot be written."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        report = folder / _rank_name(rank, "json")
        files |= read_json_object(report)
        report.unlink()
    for name, content in ((ENGINE, engine), (STATE, state)):
        write_json(folder / name, content)
        files[name] = _entry(folder / name)
    write_index(folder, files)
    final = folder.with_name(f"step-{state['step']:08d}")
    if final.exists():
        remove(final)
    folder.rename(final)
    sync(final.parent)
    return final


def write_index(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write index.json, last of all. Raises OSError if it cannot be written."""
    write_json(folder / INDEX, {"format": FORMAT, "files": files})
    sync(folder)


def reported(folder: Path, world_size: int) -> set[int]:
    """The ranks that have written into the folder of an incomplete checkpoint."""
    return {rank for rank in range(world_size) if (folder / _rank_name(rank, "json")).exists()}


def _rank_name(rank: int, suffix: str) -> str:
    return f"rank-{rank:05d}.{suffix}"


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


# ---- removing


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. At a kill in the middle, what is left is an incomplete checkpoint."""
    going = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def remove_incomplete(folder: Path) -> None:
    """Remove the incomplete checkpoints that interrupted saves left."""
    for incomplete in folder.glob(".step-*.partial"):
        shutil.rmtree(incomplete)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing resumes from it and it counts towards no retention."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)
