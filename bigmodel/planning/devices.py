"""Figures of GPUs and networks by name, with their sources, for plans. Imports nothing.

Peaks of matrix products are in `bigmodel.metrics.flops`, under `torch_name`. Rates are one way; 1 GB is 1e9 bytes,
1 GiB 2^30. Memory is what nvidia-smi or amd-smi reports as the total: a few GiB less than the name says.

Example: H100 SXM: 79.6 GiB, 3,350 GB/s of memory, 450 GB/s to the other GPUs of its node, 700 W.
"""

from typing import NamedTuple

MIB_PER_GIB = 1024


class Device(NamedTuple):
    """`achievable`: largest measured share of the peak, of any bf16 matrix product.

    node_gigabytes_per_second: to the other GPUs of its node. watts: thermal design power (TDP).
    """

    torch_name: str
    memory_gib: float
    memory_gigabytes_per_second: float
    node_gigabytes_per_second: float
    watts: float
    achievable: float
    source: str


class Network(NamedTuple):
    """Between nodes: gigabytes per second of one GPU, one way, in the usual node of 8."""

    gigabytes_per_second: float
    source: str


# Shares achievable: S. Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS": A100 SXM 267.9 and PCIe 256.4 of 312,
# H100 SXM 794.5 of 989, B200 1,745 of 2,250, MI300X 781.9 of 1,307 TFLOP/s. Not measured there: that of the nearest.
A100, A100_PCIE, H100, B200, MI300X = 0.859, 0.822, 0.803, 0.776, 0.598
NVLINK_3, NVLINK_4, NVLINK_5, XGMI = 300.0, 450.0, 900.0, 448.0  # half of both directions; xGMI to 7 others at once
PCIE_4, PCIE_5 = 31.5, 63.0  # 16 lanes of 16 and 32 GT/s, coded 128b/130b

DEVICES = {
    "A100 40GB": Device(
        "NVIDIA A100", 40960 / MIB_PER_GIB, 1555, NVLINK_3, 400, A100, "NVIDIA A100 data sheet, SXM 40 GB"
    ),
    "A100 80GB": Device(
        "NVIDIA A100", 81920 / MIB_PER_GIB, 2039, NVLINK_3, 400, A100, "NVIDIA A100 data sheet, SXM 80 GB"
    ),
    "A100 PCIe 80GB": Device(
        "NVIDIA A100", 81920 / MIB_PER_GIB, 1935, PCIE_4, 300, A100_PCIE, "NVIDIA A100 data sheet, PCIe 80 GB"
    ),
    "H100 SXM": Device("NVIDIA H100", 81559 / MIB_PER_GIB, 3350, NVLINK_4, 700, H100, "NVIDIA H100 data sheet, SXM"),
    "H100 PCIe": Device(
        "NVIDIA H100 PCIe", 81559 / MIB_PER_GIB, 2000, PCIE_5, 350, H100, "NVIDIA H100 PCIe product brief PB-11133"
    ),
    "H100 NVL": Device(
        "NVIDIA H100 NVL", 95830 / MIB_PER_GIB, 3938, PCIE_5, 400, H100, "NVIDIA H100 data sheet, NVL; bridges not used"
    ),
    "H200": Device("NVIDIA H200", 143771 / MIB_PER_GIB, 4800, NVLINK_4, 700, H100, "NVIDIA H200 data sheet, SXM"),
    "H200 NVL": Device(
        "NVIDIA H200 NVL",
        143771 / MIB_PER_GIB,
        4800,
        PCIE_5,
        600,
        H100,
        "NVIDIA H200 data sheet, NVL; bridges not used",
    ),
    "B200": Device(
        "NVIDIA B200", 183359 / MIB_PER_GIB, 8000, NVLINK_5, 1000, B200, "NVIDIA HGX B200, Blackwell technical brief"
    ),
    "GB200": Device(
        "NVIDIA GB200",
        189471 / MIB_PER_GIB,
        8000,
        NVLINK_5,
        1200,
        B200,
        "NVIDIA GB200 NVL72, Blackwell technical brief",
    ),
    "MI300X": Device("AMD Instinct MI300X", 192, 5300, XGMI, 750, MI300X, "AMD Instinct MI300X data sheet"),
    "MI325X": Device("AMD Instinct MI325X", 256, 6000, XGMI, 1000, MI300X, "AMD Instinct MI325X data sheet"),
}

NETWORKS = {
    "InfiniBand XDR": Network(100, "800 Gb/s, an adapter per GPU"),
    "InfiniBand NDR": Network(50, "400 Gb/s, an adapter per GPU: NVIDIA DGX H100"),
    "InfiniBand HDR": Network(25, "200 Gb/s, an adapter per GPU: NVIDIA DGX A100"),
    "RoCE 400": Network(50, "400 Gb/s, an adapter per GPU: Llama 3, arXiv 2407.21783, section 3.3"),
    "RoCE 200": Network(25, "200 Gb/s, an adapter per GPU: Oracle BM.GPU4.8, 1,600 Gb/s"),
    "EFA p4d": Network(6.25, "400 Gb/s for 8 GPUs: Amazon EC2 p4d"),
    "EFA p5": Network(50, "3,200 Gb/s for 8 GPUs: Amazon EC2 p5, p5en"),
    "Ethernet 100": Network(1.5625, "one adapter of 100 Gb/s for 8 GPUs"),
}
