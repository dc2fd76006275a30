"""DeepSpeed keys that would have no effect here, or break what surrounds DeepSpeed: each with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LOADER = "fastimagen has its own data loader: remove it"
CHECKPOINTS = "fastimagen writes checkpoints of its own: remove it"
REMOVED = "DeepSpeed no longer has it: remove it"
OTHER_MODEL = "the U-Nets have nothing that it applies to: remove it"
EMA = "the EMA and checkpoints read the fp32 weights, whole and in memory, after every step"
PRECISION = '"bf16": {"enabled": true}, "fp16" or "torch_autocast"'

REFUSED = {
    "activation_checkpointing": "it acts on DeepSpeed's own checkpoint function, which the U-Nets do not call: remove "
    'it, and set "checkpoint_levels" in the stage\'s unet',
    "aio": "only NVMe offloading reads it, which is refused: remove it",
    "allreduce_always_fp32": 'its new name is communication_data_type: write "communication_data_type": "fp32"',
    "amp": f"DeepSpeed no longer has it: write {PRECISION}",
    "autotuning": "it needs a launcher of its own: remove it, and compare settings with --dry-run",
    "bfloat16": 'its new name is bf16: write "bf16": {"enabled": true}',
    "checkpoint": CHECKPOINTS,
    "compile": 'only engine.compile() reads it: remove it, and set "fastimagen": {"train": {"compile": "default"}}',
    "compression_training": REMOVED,
    "cpu_offload": 'write "zero_optimization": {"offload_optimizer": {"device": "cpu"}}',
    "curriculum_learning": REMOVED,
    "data_efficiency": f"curriculum and random layer dropping are made for token sequences; {LOADER}",
    "dataloader_drop_last": LOADER,
    "datastates_ckpt": CHECKPOINTS,
    "disable_allgather": "it has no effect with ZeRO: remove it",
    "eigenvalue": REMOVED,
    "elasticity": "DeepSpeed no longer has it: remove it; a checkpoint resumes on another number of processes, and "
    "train_batch_size is kept",
    "expert_parallel": OTHER_MODEL,
    "fp32_allreduce": 'its new name is communication_data_type: write "communication_data_type": "fp32"',
    "graph_harvesting": REMOVED,
    "hybrid_engine": OTHER_MODEL,
    "max_grad_norm": 'its name is gradient_clipping: write "gradient_clipping": 1.0',
    "nebula": REMOVED,
    "pipeline": OTHER_MODEL,
    "progressive_layer_drop": REMOVED,
    "quantize_training": REMOVED,
    "seq_parallel_communication_data_type": OTHER_MODEL,
    "sequence_parallel_size": OTHER_MODEL,
    "sparse_attention": REMOVED,
    "sparse_gradients": REMOVED,
    "tensor_parallel": f"{OTHER_MODEL}; ZeRO 3 shards the weights",
    "use_data_before_expert_parallelism": OTHER_MODEL,
    "vocabulary_size": OTHER_MODEL,
    "weight_quantization": OTHER_MODEL,
    "bf16.bf16_master_weights_and_grads": f"{EMA}: remove it",
    "bf16.bf16_optimizer_states": f"{EMA}: remove it",
    "fp16.auto_cast": "inputs are cast by the U-Net: remove it",
    "fp16.fp16": 'fp16.enabled decides: write "fp16": {"enabled": true}',
    "fp16.fp16_master_weights_and_grads": f"{EMA}: remove it",
    "fp16.opt_level": "it is of Apex, which DeepSpeed no longer uses: remove it",
    "optimizer.legacy_fusion": "it has no effect with ZeRO: remove it",
    "optimizer.params.max_grad_norm": 'write "gradient_clipping" at the top level',
    "zero_optimization.cpu_offload": 'its new form is "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'its new form is "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_params": 'its new form is "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'its new form is "offload_optimizer": {"pin_memory": true}',
    "zero_optimization.elastic_checkpoint": CHECKPOINTS,
    "zero_optimization.legacy_stage1": "DeepSpeed no longer reads it: remove it",
    "zero_optimization.mics_hierarchical_params_gather": REMOVED,
    "zero_optimization.mics_shard_size": REMOVED,
    "zero_optimization.offload_optimizer.super_offload": f"{EMA}: remove it",
    "zero_optimization.pipeline_loading_checkpoint": CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "only NVMe offloading reads it, which is refused: remove "
    "it",
    "zero_optimization.zenflow": f"it updates weights later than the step; {EMA}: remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": OTHER_MODEL,
    "zero_optimization.zeropp_loco_param": REMOVED,
}
"""Refused when they ask for something: when neither false, null, 0, nor a section that is switched off or empty."""

NOT_FALSE = {
    "managed_gradient_accumulation": "the training loop leaves accumulation to DeepSpeed: remove it",
    "zero_optimization.compute_grad_norm": "metrics.jsonl has the gradient norm: remove it",
}
"""Refused when false."""

DONE_BY_EXPORT = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
)
"""Only DeepSpeed's save_16bit_model reads them."""

OPTIMIZERS = {
    "muadam": "muAdam",
    "muadamw": "muAdamW",
    "musgd": "muSGD",
    "onebitadam": "1-bit Adam",
    "zerooneadam": "0/1 Adam",
    "onebitlamb": "1-bit LAMB",
}

ZERO_0 = (
    "zero_optimization.stage 0 is refused: without ZeRO DeepSpeed does not skip a non-finite step in fp32, reports no "
    "gradient norm and accumulates bf16 gradients in bf16; use stage 1, which costs nothing on one process"
)


def refuse(tree: dict[str, Any]) -> list[str]:
    """Remove from `tree` what is switched off, and what `fastimagen export` does; one line for each.

    Raises ValueError for keys that DeepSpeed would ignore, no longer knows or calls something else by now, and for
    those that do not work together with the EMA and checkpoints. All of them are in the one line.
    """
    problems, notices = [], []
    for path, (owner, key) in list(_paths(tree, "")):
        if path in DONE_BY_EXPORT and _asks(owner[key]):
            notices.append(f"{path}: removed (fastimagen export writes the model in 16 bits)")
            del owner[key]
        elif path in REFUSED and _asks(owner[key]):
            problems.append(f"DeepSpeed key {path} is refused: {REFUSED[path]}")
        elif path in REFUSED or path in DONE_BY_EXPORT:
            notices.append(f"{path}: removed (it is off)")
            del owner[key]
        elif path in NOT_FALSE and owner[key] is False:
            problems.append(f"DeepSpeed key {path} false is refused: {NOT_FALSE[path]}")
    zero = tree.get("zero_optimization")
    if isinstance(zero, dict):
        problems += _refused_zero(zero)
    problems += _refused_optimizer(tree.get("optimizer"))
    if problems:
        raise ValueError("; ".join(problems))
    return notices


def _asks(value: Any) -> bool:
    """Whether the value of a key asks for something: false, null, 0, "auto" and sections that are off do not."""
    if isinstance(value, dict):
        if "enabled" in value:
            return _asks(value["enabled"])
        return any(_asks(inner) for inner in value.values())
    return bool(value) and value != "auto"


def _refused_zero(zero: dict[str, Any]) -> Iterator[str]:
    if zero.get("stage") == 0 and type(zero["stage"]) is int:
        yield ZERO_0
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name)
        if not isinstance(offload, dict):
            continue
        if offload.get("device") == "nvme":
            yield f'zero_optimization.{name}.device "nvme" is refused: {EMA}; use "cpu"'
        if name == "offload_optimizer" and offload.get("ratio", 1) != 1:
            yield f"zero_optimization.{name}.ratio {offload['ratio']} is refused: {EMA}; remove it"
    offload = zero.get("offload_param")
    stage = zero.get("stage", 1)
    if isinstance(offload, dict) and offload.get("device", "none") == "cpu" and stage in (1, 2):
        yield f'zero_optimization.offload_param needs stage 3, and has no effect with stage {stage}: set "stage": 3'


def _refused_optimizer(optimizer: Any) -> Iterator[str]:
    name = optimizer.get("type") if isinstance(optimizer, dict) else None
    kind = OPTIMIZERS.get(name.lower()) if isinstance(name, str) else None
    if kind is not None and kind.startswith("mu"):
        yield f'DeepSpeed optimizer.type "{name}" is refused: it needs the base shapes of muP; use "AdamW" or "Muon"'
    elif kind is not None:
        yield f'DeepSpeed optimizer.type "{name}" is refused: DeepSpeed no longer has {kind}; use "AdamW" or "Muon"'


def _paths(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """(dotted path, (section, key)) of every key, sections before what they hold."""
    for key, value in tree.items():
        yield f"{prefix}{key}", (tree, key)
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
