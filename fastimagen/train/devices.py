"""What GPUs can do at most, by their data sheets: to say how much of it a run uses, and to plan a run without one."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Precision = Literal["bf16", "fp16", "fp32"]


class Device(NamedTuple):
    """A GPU. Rates are dense, without the data sheets' factor 2 for sparse matrices.

    half: bf16 or fp16 with fp32 sums, TFLOP/s. tf32: fp32 inputs on tensor cores, which PyTorch uses for convolutions
    in fp32. memory: what a process can allocate, GiB. memory_rate: GB/s. link: GB/s that a GPU sends to the others of
    its node, one direction; 0 is PCIe.
    """

    name: str
    half: float
    tf32: float
    memory: float
    memory_rate: float
    link: float

    def peak(self, precision: Precision) -> float:
        """The largest number of floating-point operations per second."""
        return (self.tf32 if precision == "fp32" else self.half) * 1e12


DEVICES = {
    # NVIDIA A100 data sheet, 2021
    "a100": Device("A100 80 GB SXM", 312, 156, 79.1, 2039, 300),
    "a100-pcie": Device("A100 80 GB PCIe", 312, 156, 79.1, 1935, 0),
    "a100-40gb": Device("A100 40 GB", 312, 156, 39.4, 1555, 300),
    # NVIDIA H100 data sheet, 2023
    "h100": Device("H100 SXM", 989, 494, 79.1, 3350, 450),
    "h100-nvl": Device("H100 NVL", 835, 417, 93.0, 3900, 300),
    "h100-pcie": Device("H100 PCIe", 756, 378, 79.1, 2000, 0),
    # NVIDIA H200 data sheet, 2024
    "h200": Device("H200 SXM", 989, 494, 139.8, 4800, 450),
    "h200-nvl": Device("H200 NVL", 835, 417, 139.8, 4800, 450),
    # NVIDIA HGX B200, an eighth of the board's values
    "b200": Device("B200", 2250, 1125, 178.3, 7700, 900),
    # NVIDIA L4 and L40S data sheets, 2023
    "l4": Device("L4", 121, 60, 22.0, 300, 0),
    "l40s": Device("L40S", 362, 183, 44.4, 864, 0),
    # NVIDIA Ada (2022) and Ampere GA102 (2020) architecture white papers; half with fp32 sums
    "4090": Device("RTX 4090", 165.2, 82.6, 23.5, 1008, 0),
    "3090": Device("RTX 3090", 71, 35.6, 23.6, 936, 0),
}
"""By the name for --gpu."""

_NAMES = (  # in the names that CUDA reports; the first that matches
    (r"A100.*40GB", "a100-40gb"),
    (r"A100.*PCIE|A100 80GB PCIe", "a100-pcie"),
    (r"A100", "a100"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100 NVL", "h100-nvl"),
    (r"H100", "h100"),
    (r"H200 NVL", "h200-nvl"),
    (r"H200", "h200"),
    (r"B200", "b200"),
    (r"L4", "l4"),
    (r"L40S", "l40s"),
    (r"RTX 4090", "4090"),
    (r"RTX 3090", "3090"),
)


def device_by_cuda_name(name: str) -> Device | None:
    """The device that torch.cuda.get_device_name calls `name`, such as "NVIDIA H100 80GB HBM3"; None if not listed.

    Parts of a GPU (MIG), laptops' and other variants with less than the full chip are not listed.
    """
    for pattern, key in _NAMES:
        if re.search(rf"\b(?:{pattern})(?!\w)", name) and not re.search(r"MIG|Laptop|4090 D|3090 Ti", name):
            return DEVICES[key]
    return None
