"""Memory of a process of a training run, by what needs it. The formulas follow DeepSpeed 0.19.8.

docs/benchmarks.md compares them with measured peaks. P is the number of trained parameters, N the number of processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .activations import Peaks
from .deepspeed_optimizer import offload_device
from .power_average import TRACKED

MOMENTS = {"adam": 2, "adamw": 2, "lamb": 2, "adagrad": 1, "lion": 1, "sgd": 0}
"""Numbers that an optimizer keeps for each weight; 2 for others."""
MUON_MOMENTS = 1
"""Of the matrices that Muon updates; of the other weights it keeps Adam's. In memory DeepSpeed has a second copy."""
AVERAGES = 1 + len(TRACKED)
"""Averages of each weight: that of the configured decay, and the power-function averages."""
BUCKET_SIZE, MAX_LIVE, PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size, stage3_max_live_parameters and stage3_prefetch_bucket_size, numbers of
gradients or weights."""


class Memory(NamedTuple):
    """Bytes of one process.

    ema: all averages of the weights. buffers: of DeepSpeed, which stay. backward: activations and gradients of a
    forward and backward pass. step: gradients and temporary tensors of the optimizer's step; either one or the other
    exists. host: offloaded from the GPU: master weights, moments, averages and fp32 gradients, which the GPU then does
    not have.
    """

    weights: int
    master: int
    moments: int
    ema: int
    buffers: int
    backward: int
    step: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The most that is allocated on the device at once."""
        states = 0 if self.host else self.master + self.moments + self.ema
        return self.weights + states + self.buffers + max(self.backward, self.step)


def moments_per_weight(deepspeed: dict[str, Any], parameters: int, muon_parameters: int) -> float:
    """Numbers that the optimizer keeps for each weight, on average."""
    name, params = deepspeed["optimizer"]["type"].lower(), deepspeed["optimizer"].get("params", {})
    if name == "muon":
        return MOMENTS["adam"] + (MUON_MOMENTS - MOMENTS["adam"]) * muon_parameters / parameters
    if name == "sgd" and params.get("momentum"):
        return 1
    return MOMENTS.get(name, 2)


def weight_bytes(deepspeed: dict[str, Any]) -> int:
    """Bytes of a weight in the network: 2 in bf16 and fp16, else 4."""
    return 2 if any(deepspeed.get(name, {}).get("enabled") for name in ("bf16", "fp16")) else 4


def accumulates_apart(deepspeed: dict[str, Any]) -> bool:
    """Whether DeepSpeed's BF16_Optimizer runs, which keeps the fp32 sum of all gradients on every process."""
    zero = deepspeed["zero_optimization"]
    is_fp32 = deepspeed.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
    return zero["stage"] == 1 and weight_bytes(deepspeed) == 2 and is_fp32 and offload_device(deepspeed) == "none"


def process_memory(
    deepspeed: dict[str, Any],
    parameters: int,
    muon_parameters: int,
    peaks: Peaks,
    *,
    processes: int,
    gpu: bool,
    frozen: int = 0,
) -> Memory:
    """What one of the processes needs.

    deepspeed: the resolved configuration. parameters: those that are trained; frozen: the others. peaks: of one
    micro-batch, in the dtype of the weights.
    """
    zero, width = deepspeed["zero_optimization"], weight_bytes(deepspeed)
    stage, share = zero["stage"], -(-parameters // processes)
    is_muon = deepspeed["optimizer"]["type"].lower() == "muon"
    kept_moments = MOMENTS["adam"] if is_muon else moments_per_weight(deepspeed, parameters, muon_parameters)
    weights, master, moments = width * (parameters + frozen), 4 * share, round(4 * share * kept_moments)
    ema = 4 * AVERAGES * share
    buffers, gradients = 0, width * parameters
    bucket = width * zero.get("reduce_bucket_size", BUCKET_SIZE)
    if not gpu:  # memory that is allocated and never written is not taken from the system
        bucket = min(bucket, gradients)
    overlaps = processes > 1 and zero.get("overlap_comm", stage == 3)
    in_buckets = bucket * (2 if gpu and overlaps else 1)
    if (stage > 1 or overlaps) and bucket < gradients:  # reduced, and freed, while the backward pass goes on
        backward = min(peaks.activations + bucket, peaks.with_gradients) + in_buckets
    else:
        backward = max(peaks.with_gradients, gradients + in_buckets)
    step = width * share + 4 * share  # the reduced gradients, and the same in fp32
    if is_muon:
        backward += 4 * -(-muon_parameters // processes)  # the updates, where the gradients were
    if accumulates_apart(deepspeed):
        backward, step = peaks.with_gradients + 4 * parameters, 4 * parameters
    elif deepspeed["gradient_accumulation_steps"] > 1:
        backward += width * share  # the sum of the micro-batches before
    if stage == 3:
        live = zero.get("stage3_max_live_parameters", MAX_LIVE)
        whole = min(parameters + frozen, live) if processes > 1 else 0
        arriving = min(whole, zero.get("stage3_prefetch_bucket_size", PREFETCH))
        weights = width * (share + -(-frozen // processes) + whole + arriving)
        buffers += width * share + bucket  # the partition of the gradients, and the bucket
    if offload_device(deepspeed) == "none":
        host = 0
    elif gpu:
        host, step = master + moments + ema + 8 * share, 0
    else:
        host, step, buffers = 0, step - 4 * share, buffers + 8 * share  # gradients in fp32, twice
    if not gpu:
        step += 4 * share  # torch's multi-tensor Adam; the fused ones of a GPU have no temporary tensors
    return Memory(weights, master, moments, ema, buffers, backward, step, host)
