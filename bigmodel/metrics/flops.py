"""Floating-point operations (FLOPs) of a step, and the peak FLOPs per second of a device.

Pure functions of settings and counts; only the peak of a CPU is measured. Formulas (Chowdhery et al. 2022, appendix B):
a token passes each matrix once forward and twice backward, each time with 2 operations per weight; attention takes
4 * pairs of query and key * head_dim per head forward, twice that backward. Two conventions for the pairs:

    causal   pairs that the masks allow (`bigmodel.data.plan.visible_pairs`), layer by layer
    full     as in published figures: each token attends to a whole packed sequence, without documents and windows

Example: a matrix of 100 weights and 8 tokens: 2 * 100 * 8 = 1,600 operations forward, 4,800 with the backward.

HFU (hardware FLOPs utilization) counts the operations computed: also padding; attention's backward with recomputed
scores (2.5 times the forward, Dao et al. 2022); with training.activation_checkpointing = "full" a second forward of
every block (Chen et al. 2016; Korthikanti et al. 2022 name both ratios), in most models without its last product.
"selective" keeps all products and adds
nothing. A teacher's forward pass is hardware's, not the model's.

Scheduled sampling has a first pass, without a backward, through the decoder: in all three conventions. Its output
matrix computes replaced inputs only: the scheduled share of the labels without those of start tokens.
"""

import re
import time
from typing import TYPE_CHECKING, NamedTuple

from bigmodel.config.recurrent_settings import GATES
from bigmodel.config.settings import ModelSettings, Settings
from bigmodel.data.plan.attention_work import Work
from bigmodel.metrics.recorder import Flops

if TYPE_CHECKING:  # what only needs numbers, such as a plan, imports no torch
    import torch

    from bigmodel.data.load.stream import Step

# Dense FLOPs per second of bf16 products with fp32 sums: half of a data sheet's figure "with sparsity". fp16 has the
# same peak on all of these devices; fp32 runs use it too, as is usual. The names are torch's.
DEVICE_PEAK_FLOPS = {
    # NVIDIA GB300 NVL72 and HGX B300, GB200 NVL72, Blackwell architecture technical brief (HGX B200)
    "NVIDIA GB300": 2500e12,
    "NVIDIA B300": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA B200": 2250e12,
    # NVIDIA H200, H100 and H100 NVL Tensor Core GPU data sheets; a name without form factor is SXM's
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA H20": 148e12,
    # NVIDIA A100, A40, A30 and A10 Tensor Core GPU data sheets: the A100's figure is that of SXM and PCIe alike
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,  # Amazon's own, not an A10
    # NVIDIA L40S, L40 and L4 data sheets
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    # White papers: NVIDIA Ampere GA102, Ada and RTX Blackwell GPU architecture. GeForce sums in fp32 at half rate.
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA RTX 6000 Ada": 364.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    # AMD Instinct data sheets; a MI250X is two devices, each with half of its 383
    "AMD Instinct MI250X": 191.5e12,
    "AMD Instinct MI300X": 1307.4e12,
    "AMD Instinct MI325X": 1307.4e12,
    "AMD Instinct MI355X": 2500e12,
}
# Suffixes that do not change the peak. Other suffixes do: "NVL", "Ti", "D", "Laptop GPU", "MIG 1g.10gb".
SAME_CHIP = re.compile(r"([ -](SXM\d?|PCIE|PCIe|\d+GB?|HBM3e?|3e|AC|Generation|OAM|VF))*")


class Weights(NamedTuple):
    """Number of weights that multiply one token: blocks and output matrices, not the embedding."""

    of_position: int  # per token of the decoder, or of the only side
    of_source: int  # per source token: the encoder, and the decoder's key and value matrices of the source
    of_heads: int  # the part of `of_position` in output matrices
    of_experts: int = 0  # the part of `of_position` that padding does not pass: a token's chosen experts


def matrix_weights(settings: ModelSettings, vocabulary: int) -> Weights:
    """Each multi-token prediction module adds one block and one more pass of the output matrix."""
    layers, width, head_width = (
        settings.num_layers + settings.num_mtp_modules,
        settings.hidden_size,
        settings.resolved_head_dim,
    )
    # A classification head reads one state of a document: less than 0.1%, not counted.
    of_heads = 0 if settings.classification else (1 + settings.num_mtp_modules) * vocabulary * width
    of_position = layers * _block_weights(settings) + of_heads
    if settings.is_recurrent:
        return recurrent_weights(settings, of_heads)
    if settings.experts:
        experts, one = settings.experts, 3 * width * settings.expert_width
        of_experts = settings.num_expert_layers * experts.per_token * one
        beside = experts.shared * one + experts.count * width - 3 * width * settings.intermediate_size
        of_position += of_experts + settings.num_expert_layers * beside
        return Weights(of_position, 0, of_heads, of_experts)
    if settings.kind != "encoder_decoder":
        return Weights(of_position, 0, of_heads)
    encoder = settings.encoder
    if settings.source_attention == "cross":  # query and output matrix of cross-attention
        of_position += layers * 2 * width * settings.num_heads * head_width
    keys_and_values = layers * 2 * encoder.hidden_size * settings.num_kv_heads * head_width
    return Weights(of_position, encoder.num_layers * _block_weights(encoder) + keys_and_values, of_heads)


def recurrent_weights(settings: ModelSettings, of_heads: int) -> Weights:
    """Of recurrent layers: every gate reads input and state. With a source also two matrices of the attention."""
    width = settings.hidden_size
    layers = settings.num_layers * GATES[settings.cell] * 2 * width**2
    if not settings.has_source:
        return Weights(layers + of_heads, 0, of_heads)
    return Weights(layers + 3 * width**2 + of_heads, layers, of_heads)


def _block_weights(settings: ModelSettings) -> int:
    attention = settings.hidden_size * settings.resolved_head_dim * (2 * settings.num_heads + 2 * settings.num_kv_heads)
    return attention + (3 if settings.gated else 2) * settings.hidden_size * settings.intermediate_size


def flops(
    settings: ModelSettings,
    vocabulary: int,
    work: Work,
    sizes: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    recomputed: bool = False,
    passes: float = 3,
) -> Flops:
    """Operations of forward and backward.

    sizes: tokens of a packed sequence on the decoder's and the source side; padding: padding tokens computed on each
    side; recomputed: the backward runs the blocks' forward again; passes: of a token through a weight, fewer than 3
    where weights are frozen.
    """
    weights, (pack, source_pack) = matrix_weights(settings, vocabulary), sizes
    linear = 2 * (weights.of_position * work.positions + weights.of_source * work.source_positions)
    empty = 2 * ((weights.of_position - weights.of_experts) * padding[0] + weights.of_source * padding[1])
    visible = attention_flops(settings, work.pairs, work.source_pairs, work.cross_pairs)
    positions, sources, layers = work.positions, work.source_positions, settings.num_layers + settings.num_mtp_modules
    of_sources = settings.encoder.num_layers * sources * source_pack
    crossing = positions * source_pack * (1 if settings.is_recurrent else layers)
    every = attention_flops(settings, layers * positions * pack, of_sources, crossing)
    hardware = passes * (linear + empty) + 3.5 * visible
    if recomputed:
        hardware += linear + empty - 2 * weights.of_heads * (positions + padding[0]) + visible
        hardware -= _last_products(settings, positions + padding[0], sources + padding[1])
    return Flops(causal=passes * linear + 3 * visible, full=passes * linear + 3 * every, hardware=hardware)


def _last_products(settings: ModelSettings, positions: int, sources: int) -> int:
    """Operations of the last product of every block, forward: where nothing after it is read by the backward, the
    recomputation ends before it."""
    if settings.is_recurrent or settings.norm_placement != "pre" or settings.dropout or settings.stochastic_depth:
        return 0
    layers = settings.num_layers + settings.num_mtp_modules - settings.num_expert_layers
    found = 2 * positions * layers * _down_weights(settings)
    if settings.experts:  # the experts' outputs are read: by the gradients of their weights
        of_shared = settings.experts.shared * settings.expert_width * settings.hidden_size
        found += 2 * positions * settings.num_expert_layers * of_shared
    if settings.kind == "encoder_decoder":
        found += 2 * sources * settings.encoder.num_layers * _down_weights(settings.encoder)
    return found


def _down_weights(settings: ModelSettings) -> int:
    return settings.intermediate_size * settings.hidden_size


def attention_flops(settings: ModelSettings, pairs: int, source_pairs: int, cross_pairs: int) -> int:
    """Forward operations of scores and their products with the values: 4 per pair and channel. Pairs: of all layers."""
    if settings.is_recurrent:
        return 4 * settings.hidden_size * cross_pairs
    forward = 4 * settings.num_heads * settings.resolved_head_dim * (pairs + cross_pairs)
    if settings.kind == "encoder_decoder":
        encoder = settings.encoder
        forward += 4 * encoder.num_heads * encoder.resolved_head_dim * source_pairs
    return forward


def step_flops(
    settings: Settings, vocabulary: int, step: "Step", passes: float = 3, teacher: ModelSettings | None = None
) -> Flops:
    """Operations of one step over all ranks; passes: as for `flops`."""
    sizes = (settings.data.sequence_length, settings.data.source_sequence_length)
    packs = (step.num_tokens + step.num_padding) // sum(sizes)
    padding = (packs * sizes[0] - step.work.positions, packs * sizes[1] - step.work.source_positions)
    recomputed = settings.training.activation_checkpointing == "full"
    found = flops(settings.model, vocabulary, step.work, sizes, padding, recomputed, passes)
    if teacher is not None:
        more = forward_flops(teacher, vocabulary, step.work, padding, settings.model)
        found = found._replace(hardware=found.hardware + more)
    sampling = settings.training.scheduled_sampling
    share = sampling.share_at(step.number) if sampling else 0.0
    if not share:
        return found
    replaced = share * max(0, step.num_labels - settings.data.target_ahead * step.num_documents)
    first = first_pass_flops(settings.model, vocabulary, step.work, sizes, padding, replaced)
    return Flops(*(one + more for one, more in zip(found, first, strict=True)))


def forward_flops(
    settings: ModelSettings, vocabulary: int, work: Work, padding: tuple[int, int], counted: ModelSettings
) -> float:
    """Operations of a forward pass, for a model on the batches of another one, `counted`, whose pairs `work` has: they
    are scaled by the numbers of layers, as if the windows were the same."""
    weights, layers = matrix_weights(settings, vocabulary), settings.num_layers / counted.num_layers
    sources = settings.encoder.num_layers / counted.encoder.num_layers
    linear = weights.of_position * (work.positions + padding[0]) - weights.of_experts * padding[0]
    linear += weights.of_source * (work.source_positions + padding[1])
    pairs = round(work.pairs * layers), round(work.source_pairs * sources), round(work.cross_pairs * layers)
    return 2 * linear + attention_flops(settings, *pairs)


def first_pass_flops(
    settings: ModelSettings,
    vocabulary: int,
    work: Work,
    sizes: tuple[int, int],
    padding: tuple[int, int],
    replaced: float,
) -> Flops:
    """Operations of scheduled sampling's first pass: the decoder's blocks forward, without MTP modules and encoder, and
    the output matrix for `replaced` rows."""
    layers, all_layers = settings.num_layers, settings.num_layers + settings.num_mtp_modules
    weights = matrix_weights(settings.model_copy(update={"num_mtp_modules": 0}), vocabulary)
    of_blocks = weights.of_position - weights.of_heads
    of_source = weights.of_source
    if settings.kind == "encoder_decoder":
        of_source -= settings.encoder.num_layers * _block_weights(settings.encoder)
    head = 2 * weights.of_heads * replaced
    linear = 2 * (of_blocks * work.positions + of_source * work.source_positions) + head
    empty = 2 * (of_blocks * padding[0] + of_source * padding[1])
    pairs, cross_pairs = (count * layers // all_layers for count in (work.pairs, work.cross_pairs))
    visible = attention_flops(settings, pairs, 0, cross_pairs)
    every = attention_flops(settings, layers * work.positions * sizes[0], 0, layers * work.positions * sizes[1])
    return Flops(causal=linear + visible, full=linear + every, hardware=linear + empty + visible)


def device_peak_flops(device: "torch.device") -> float | None:
    """Peak FLOPs per second of one device; None for a GPU that is not in the table. A CPU is measured."""
    if device.type != "cuda":
        return measure_peak_flops()
    import torch

    return known_peak_flops(torch.cuda.get_device_name(device))


def known_peak_flops(name: str) -> float | None:
    """The peak by torch's name of a device; the longest match counts: "NVIDIA H100 80GB HBM3" is "NVIDIA H100"."""
    fitting = [
        known for known in DEVICE_PEAK_FLOPS if name.startswith(known) and SAME_CHIP.fullmatch(name.removeprefix(known))
    ]
    return DEVICE_PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def measure_peak_flops(size: int = 512, repeats: int = 5) -> float:
    """The best of a few fp32 matrix products on this process's threads; takes a tenth of a second."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
