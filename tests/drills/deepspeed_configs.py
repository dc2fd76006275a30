"""What becomes of published DeepSpeed configurations and of single keys: the dry run, then three steps on the CPU.

    python -m tests.drills.deepspeed_configs [--out tests/drills/deepspeed_configs.md] [--only REGEX]

Every case must be accepted or refused in one line, by the dry run as by training, without a traceback and without a
hang. Nothing may be silent: what the case sets is in DeepSpeed's configuration, or a line names its key. About five
minutes; each case has a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/ds_configs"
MAX_SECONDS = 120

BASE: dict[str, Any] = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
}
CPU = {"device": "cpu"}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **params}}}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


SINGLE: list[dict[str, Any]] = [  # each over BASE
    {},
    zero(0),
    zero(2),
    zero(3),
    zero(4),
    zero(2, offload_optimizer=CPU),
    zero(3, offload_optimizer=CPU, offload_param=CPU),
    zero(2, offload_param=CPU),
    zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
    zero(3, offload_param={"device": "nvme", "nvme_path": "/tmp"}),
    zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    zero(2, cpu_offload=True),
    zero(2, overlap_com=True),
    zero(2, reduce_bucket_size="big"),
    zero(2, contiguous_gradients=False),
    zero(2, reduce_scatter=False),
    zero(2, round_robin_gradients=True),
    zero(1, parameter_alignment=True),
    zero(3, sub_group_size=100),
    zero(3, stage3_param_persistence_threshold=0),
    zero(3, stage3_gather_16bit_weights_on_model_save=True),
    zero(3, zero_quantized_weights=True),
    zero(3, zero_hpz_partition_size=1),
    zero(1, elastic_checkpoint=True),
    zero(2, ignore_unused_parameters=False),
    zero(1, compute_grad_norm=False),
    zero(2, zenflow={"topk_ratio": 0.1}),
    zero(1, mics_shard_size=2),
    optimizer("Adam", lr=1e-3),
    optimizer("adamw", lr=1e-3),
    optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3),
    {**optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3), **zero(2)},
    {**optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3), **zero(3)},
    {**optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3), **zero(2, offload_optimizer=CPU)},
    {**optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3), **zero(3, offload_optimizer=CPU)},
    {**optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3), **zero(3, reduce_scatter=True)},
    {**optimizer("Muon", muon_lr=1e-3), "gradient_clipping": 1.0},
    optimizer("AdmaW", lr=1e-3),
    optimizer("SGD", lr=1e-3),
    {**optimizer("SGD", lr=1e-3, momentum=0.9), "zero_allow_untested_optimizer": True},
    {**optimizer("RMSprop", lr=1e-3), "zero_allow_untested_optimizer": True},
    {**optimizer("LBFGS", lr=1e-3), "zero_allow_untested_optimizer": True},
    optimizer("Adagrad", lr=1e-3),
    optimizer("Lion", lr=1e-4),
    optimizer("Lamb", lr=1e-3),
    optimizer("OneBitAdam", lr=1e-3),
    optimizer("MuAdam", lr=1e-3),
    adam(lrr=1e-3),
    adam(lr="1e-3"),
    adam(lr="auto", betas="auto", eps="auto", weight_decay="auto"),
    adam(lr=-1),
    adam(betas=[0.9]),
    adam(max_grad_norm=1.0),
    adam(torch_adam=True, foreach=False, amsgrad=True),
    {"optimizer": None},
    scheduler("WarmupLR", warmup_num_steps=2),
    scheduler("WarmupLR", warmup_steps=2),
    scheduler("WarmupLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto"),
    scheduler("WarmupDecayLR", total_num_steps="auto", warmup_num_steps="auto"),
    scheduler("WarmupCosineLR", total_num_steps=3, warmup_num_steps=1),
    scheduler("WarmupCosineLR"),
    scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=2),
    scheduler("LRRangeTest", lr_range_test_min_lr=1e-4),
    scheduler("CosineAnnealing", T_max=3),
    {"gradient_cliping": 1.0},
    {"gradient_clipping": "auto"},
    {"gradient_clipping": "1.0"},
    {"gradient_acumulation_steps": 2},
    {"train_micro_batch_size": 2},
    {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"},
    {"train_batch_size": None, "gradient_accumulation_steps": 2},
    {"train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 3},
    {"bf16": {"enabled": True}},
    {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}},
    {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
    {"fp16": {"enabled": True, "loss_scale": 0}},
    {"fp16": {"enabled": True, "fp16": True}},
    {"bfloat16": {"enabled": True}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    {"amp": {"enabled": True}},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"data_types": {"grad_accum_dtype": "fp32"}},
    {"data_types": {"grad_accum_dtype": "fp23"}},
    {"communication_data_type": "fp32"},
    {"communication_data_type": "float"},
    {"prescale_gradients": True},
    {"gradient_predivide_factor": 2.0},
    {"gradient_allreduce_op": "sum"},
    {"wandb": {"enabled": True, "project": "p"}},
    {"tensorboard": {"enabled": True}},
    {"csv_monitor": {"enabled": True, "output_path": "csv"}},
    {"comms_logger": {"enabled": True, "verbose": False}},
    {"flops_profiler": {"enabled": True, "profile_step": 2}},
    {"wall_clock_breakdown": True, "memory_breakdown": True},
    {"steps_per_print": 1, "dump_state": True},
    {"disable_allgather": True},
    {"log_level": "warning"},
    {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}},
    {"activation_checkpointing": {"partition_activations": False}},
    {"autotuning": {"enabled": True}},
    {"aio": {"block_size": 1048576, "thread_count": 1}},
    {"checkpoint": {"tag_validation": "Warn", "use_node_local_storage": True}},
    {"compile": {"deepcompile": True}},
    {"elasticity": {"enabled": True, "max_train_batch_size": 64}},
    {"curriculum_learning": {"enabled": True}},
    {"compression_training": {"weight_quantization": {}}},
    {"sparse_attention": {"mode": "fixed"}},
    {"sparse_gradients": True},
    {"pipeline": {"stages": 2}},
    {"tensor_parallel": {"autotp_size": 2}},
    {"hybrid_engine": {"enabled": True}},
    {"dataloader_drop_last": True},
    {"timers": {"throughput": {"enabled": False}}},
]


def cases() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, DeepSpeed's keys, whether it is a published file)."""
    for path in sorted(FIXTURES.glob("*.json")):
        yield path.name, json.loads(path.read_text()), True
    for changes in SINGLE:
        tree = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
        yield json.dumps(changes), tree, False


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def unsaid(given: dict[str, Any], output: str) -> list[str]:
    """The keys of an accepted case that are not in DeepSpeed's configuration, and that no line names."""
    line = next(line for line in output.splitlines() if line.startswith("base: DeepSpeed {"))
    resolved = flat(json.loads(line.partition(": DeepSpeed ")[2]))
    changed = [path for path, value in flat(given).items() if resolved.get(path) != value]
    notices = [notice for notice in output.splitlines() if notice.startswith("base: ") and notice != line]
    return [path for path in changed if not any(f"{part}:" in notice for notice in notices for part in parts(path))]


def parts(path: str) -> list[str]:
    """A dotted path and its sections: a notice may name the section that holds the key."""
    steps = path.split(".")
    return [".".join(steps[:count]) for count in range(1, len(steps) + 1)]


def child(action: Callable[[], None], log: Path) -> None:
    """Run `action` with its output in `log`, and leave with 0, with 1 for an error of one line, or with 2."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 0
    try:
        action()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", flush=True)
        status = 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 2
    sys.stdout.flush()
    os._exit(status)


def run(action: Callable[[], None], log: Path) -> tuple[str, str]:
    """(accepted, refused, TRACEBACK or HANG; what to say about it), of an action in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(action, log))
    process.start()
    process.join(MAX_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "HANG", f"after {MAX_SECONDS} s"
    output = log.read_text(errors="replace")
    errors = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
    if process.exitcode == 0:
        return "accepted", ""
    if process.exitcode == 1 and len(errors) == 1 and output.rstrip().endswith(errors[0]):
        return "refused", errors[0]
    return "TRACEBACK", output.rstrip().rpartition("\n")[2]


def try_case(deepspeed: dict[str, Any], ours: dict[str, Any], folder: Path) -> dict[str, str]:
    """The row of a case."""
    from fastimagen.config_file import config_from_dict
    from fastimagen.train.trainer import Trainer

    config = config_from_dict({**copy.deepcopy(deepspeed), "fastimagen": ours})
    os.chdir(folder)

    def dry_run() -> None:
        print(Trainer(config, folder / "run").describe())

    def train() -> None:
        Trainer(config, folder / "run").fit()

    planned, line = run(dry_run, folder / "dry_run.log")
    trained, training_line = run(train, folder / "train.log")
    silent = unsaid(deepspeed, (folder / "dry_run.log").read_text()) if planned == "accepted" else []
    agrees = (planned, line) == (trained, training_line)
    if trained == "accepted" and (folder / "run/metrics.jsonl").read_text().count('"loss"') != 3:
        trained = "NOT THREE STEPS"
    return {
        "dry run": planned,
        "training": trained,
        "problem": "; ".join(["differs"] * (not agrees) + [f"silent: {', '.join(silent)}"] * bool(silent)),
        "line": line or training_line,
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """The result file."""
    import deepspeed
    import torch

    good = [row for row in rows if row["dry run"] in ("accepted", "refused") and not row["problem"]]
    accepted = sum(row["training"] == "accepted" for row in good)
    lines = [
        "# DeepSpeed configurations through the dry run and three steps",
        "",
        f"`python -m tests.drills.deepspeed_configs`, {time.strftime('%Y-%m-%d')}, DeepSpeed {deepspeed.__version__}, "
        f"PyTorch {torch.__version__}, CPU, one process.",
        "",
        f"{len(rows)} cases: {accepted} accepted, {len(good) - accepted} refused in one line, "
        f"{sum('TRACEBACK' in row.values() for row in rows)} tracebacks, "
        f"{sum('HANG' in row.values() for row in rows)} hangs, "
        f"{sum('silent' in row['problem'] for row in rows)} silent, "
        f"{sum('differs' in row['problem'] for row in rows)} where dry run and training differ. The first column of a "
        "single key is what it changes in",
        "",
        f"    {json.dumps(BASE)}",
        "",
        "| case | dry run | training | line |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        said = f"**{row['problem']}** {row['line']}" if row["problem"] else row["line"]
        case = row["case"] if row["case"].endswith(".json") else f"`{row['case']}`"
        lines.append(f"| {case} | {row['dry run']} | {row['training']} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/drills/deepspeed_configs.md")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    out = options.out.resolve()
    import deepspeed  # noqa: F401  # once, before the fork of each case

    from fastimagen.config import FastimagenConfig
    from fastimagen.data.embedding import embed_all
    from fastimagen.data.prepare import prepare_shapes
    from tests.conftest import TOY_STAGES, toy_tree

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = toy_tree(folder / "shapes")["fastimagen"]
        ours["cascade"] = {"stages": TOY_STAGES[:1]}
        ours["train"] = {"steps": 3, "log_every": 1, "sample_every": 99}
        prepared = FastimagenConfig.model_validate(ours)
        prepare_shapes(prepared, say=print)
        embed_all(prepared, say=print)
        for number, (case, deepspeed_keys, _) in enumerate(cases()):
            if not re.search(options.only, case):
                continue
            own = folder / f"case{number}"
            own.mkdir()
            row = {"case": case, **try_case(deepspeed_keys, ours, own)}
            rows.append(row)
            print(f"{row['dry run']:9} {row['training']:9} {case}  {row['problem']}  {row['line']}", flush=True)
            if row["training"] in ("TRACEBACK", "HANG"):
                print((own / "train.log").read_text()[-1500:])
    out.write_text(markdown(rows))
    return any(row["problem"] or row["dry run"] not in ("accepted", "refused") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
