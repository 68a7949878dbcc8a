"""Accounting: parameters and floating-point operations of a step, and what a device could do at most.

Pure functions of settings and counts, but for the peak of a CPU, which is measured. Formulas (Chowdhery et al. 2022,
appendix B): a position passes each matrix once forward and twice backward, 2 operations a weight each time; attention
takes 4 * visible pairs * head width forward for each head, twice that backward. Two conventions of the pairs:

    causal   what the mask lets through: n (n + 1) / 2 for a document of n positions
    full     as published figures count: every position sees as many as a pack has, whatever the documents

HFU counts what is computed: positions of padding too, attention's backward that makes its scores again (2.5 times the
forward, Dao et al. 2022), and whole blocks run again where activations are recomputed.
"""

import time

import torch

from bigmodel.config import ModelSettings, Settings
from bigmodel.data.stream import Step
from bigmodel.metrics import Flops

# FLOPs per second without sparsity, bf16 with fp32 sums, as published; the longest name that fits counts.
DEVICE_PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA B100": 1750e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 155e12,
    "NVIDIA RTX 6000 Ada": 364e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209e12,
    "AMD Instinct MI250X": 383e12,
    "AMD Instinct MI300X": 1307e12,
    "AMD Instinct MI325X": 1307e12,
}


def matrix_weights(settings: ModelSettings, vocabulary: int) -> int:
    """Weights that every position is multiplied with: the layers' matrices and the output head, not the embedding."""
    head_width = settings.head_width
    attention = settings.width * head_width * (2 * settings.heads + 2 * settings.key_value_heads)
    return (
        settings.layers * (attention + 3 * settings.width * settings.feed_forward_width) + vocabulary * settings.width
    )


def num_parameters(settings: ModelSettings, vocabulary: int) -> int:
    """Trained parameters: matrices, embedding (once if tied) and norms."""
    norms = (2 * settings.layers + 1) * settings.width + 2 * settings.layers * settings.head_width * settings.qk_norm
    embedding = 0 if settings.tied_embeddings else vocabulary * settings.width
    return matrix_weights(settings, vocabulary) + embedding + norms


def flops(
    settings: ModelSettings,
    vocabulary: int,
    pack_tokens: int,
    positions: int,
    padding: int,
    pairs: int,
    blocks_recomputed: float = 0.0,
) -> Flops:
    """Operations of forward and backward.

    positions: that held a token; padding: that held none. pairs: (query, key) pairs that the mask lets through.
    blocks_recomputed: share of the layers whose forward is run again in the backward.
    """
    weights = matrix_weights(settings, vocabulary)
    pair = 4 * settings.layers * settings.heads * settings.head_width  # forward
    in_blocks = 2 * (weights - vocabulary * settings.width) * (positions + padding) + pair * pairs
    return Flops(
        causal=3 * (2 * weights * positions + pair * pairs),
        full=3 * (2 * weights * positions + pair * positions * pack_tokens),
        hardware=6 * weights * (positions + padding) + 3.5 * pair * pairs + blocks_recomputed * in_blocks,
    )


def step_flops(settings: Settings, vocabulary: int, step: Step) -> Flops:
    """Operations of one step over all ranks."""
    return flops(
        settings.model, vocabulary, settings.data.pack_tokens, step.num_positions, step.num_padding, step.num_pairs
    )


def device_peak_flops(device: torch.device) -> float | None:
    """FLOPs per second of one device at most; None for a GPU that the table does not know. A CPU is measured."""
    if device.type != "cuda":
        return measure_peak_flops()
    return known_peak_flops(torch.cuda.get_device_name(device))


def known_peak_flops(name: str) -> float | None:
    """From the table, by the longest name that this one begins with: "NVIDIA H100 80GB HBM3" is an "NVIDIA H100"."""
    fitting = [known for known in DEVICE_PEAK_FLOPS if name == known or name.startswith((f"{known} ", f"{known}-"))]
    return DEVICE_PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def measure_peak_flops(size: int = 512, repeats: int = 5) -> float:
    """The best of a few fp32 matrix products on this process's threads: a tenth of a second."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
