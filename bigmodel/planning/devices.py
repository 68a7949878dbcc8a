"""Figures of GPUs and networks by name, with their sources, for plans. Imports nothing.

Peaks of matrix products are in `bigmodel.metrics.flops`, under `torch_name`. Rates are one way; 1 GB is 1e9 bytes,
1 GiB 2^30. Memory is the total that CUDA or HIP gives to processes, in torch's words "GPU 0 has a total capacity of":
less than the name says, and without the 0.5 to 0.9 GiB that the driver keeps of what nvidia-smi reports.

Example: H100 SXM: 79.1 GiB, 3,350 GB/s of memory, 450 GB/s to the other GPUs of its node, 700 W.
"""

from typing import NamedTuple


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


# Memory: messages of torch in public reports, such as pytorch/ao pull request 4002 (B200). nvidia-smi says 40,960 and
# 81,920 (A100), 81,559 (H100), 95,830 (NVL), 143,771 (H200), 183,359 (B200), 189,471 MiB (GB200).
# Shares achievable: S. Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS": A100 SXM 267.9 and PCIe 256.4 of 312,
# H100 SXM 794.5 of 989, B200 1,745 of 2,250, MI300X 781.9 of 1,307 TFLOP/s. Not measured there: that of the nearest.
A100, A100_PCIE, H100, B200, MI300X = 0.859, 0.822, 0.803, 0.776, 0.598
NVLINK_3, NVLINK_4, NVLINK_5, XGMI = 300.0, 450.0, 900.0, 448.0  # half of both directions; xGMI to 7 others at once
PCIE_4, PCIE_5 = 31.5, 63.0  # 16 lanes of 16 and 32 GT/s, coded 128b/130b

DEVICES = {
    "A100 40GB": Device("NVIDIA A100", 39.39, 1555, NVLINK_3, 400, A100, "NVIDIA A100 data sheet, SXM 40 GB"),
    "A100 80GB": Device("NVIDIA A100", 79.14, 2039, NVLINK_3, 400, A100, "NVIDIA A100 data sheet, SXM 80 GB"),
    "A100 PCIe 80GB": Device("NVIDIA A100", 79.14, 1935, PCIE_4, 300, A100_PCIE, "NVIDIA A100 data sheet, PCIe 80 GB"),
    "H100 SXM": Device("NVIDIA H100", 79.10, 3350, NVLINK_4, 700, H100, "NVIDIA H100 data sheet, SXM"),
    "H100 PCIe": Device("NVIDIA H100 PCIe", 79.10, 2000, PCIE_5, 350, H100, "NVIDIA H100 PCIe product brief PB-11133"),
    "H100 NVL": Device(
        "NVIDIA H100 NVL", 93.10, 3938, PCIE_5, 400, H100, "NVIDIA H100 data sheet, NVL; bridges not used"
    ),
    "H200": Device("NVIDIA H200", 139.80, 4800, NVLINK_4, 700, H100, "NVIDIA H200 data sheet, SXM"),
    "H200 NVL": Device(
        "NVIDIA H200 NVL",
        139.80,
        4800,
        PCIE_5,
        600,
        H100,
        "NVIDIA H200 data sheet, NVL; bridges not used",
    ),
    "B200": Device("NVIDIA B200", 178.35, 8000, NVLINK_5, 1000, B200, "NVIDIA HGX B200, Blackwell technical brief"),
    "GB200": Device(
        "NVIDIA GB200",
        184.31,
        8000,
        NVLINK_5,
        1200,
        B200,
        "NVIDIA GB200 NVL72, Blackwell technical brief",
    ),
    "MI300X": Device("AMD Instinct MI300X", 191.98, 5300, XGMI, 750, MI300X, "AMD Instinct MI300X data sheet"),
    "MI325X": Device("AMD Instinct MI325X", 255.98, 6000, XGMI, 1000, MI300X, "AMD Instinct MI325X data sheet"),
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
