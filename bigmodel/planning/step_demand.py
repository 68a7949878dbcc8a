"""What a rank computes, moves and sends in one step: counts, without a clock. Imports no torch.

In: a context (settings, effective DeepSpeed JSON, vocabulary, ranks, manifest). Out: `Demand`. FLOPs are those that the
run will count (`bigmodel.metrics.flops`), bytes of collectives those of `bigmodel.planning.communication`; bytes of
norms, residuals, rotary positions and activations are counted below, each tensor read and written once.

Without sequence parallelism a rank has micro_batches * packs packed sequences; with it that share of their tokens.
"""

import itertools
from typing import TYPE_CHECKING, NamedTuple

from bigmodel.config.recurrent_settings import GATES
from bigmodel.config.settings import ModelSettings, Settings, TrainingSettings, num_micro_batches
from bigmodel.data.plan.attention_work import Work
from bigmodel.metrics.flops import attention_flops, flops, matrix_weights
from bigmodel.planning.communication import Collective, collectives
from bigmodel.planning.pack_work import PackWork, pack_work
from bigmodel.planning.parameters import Parameter, parameters_of
from bigmodel.planning.state_memory import WIDE, bytes_of, is_offloaded, moment_bytes

if TYPE_CHECKING:
    from bigmodel.planning.context import Context

LOGIT_BYTES = 14  # a logit is written and twice read in fp32, its gradient written in 16 bits
MOVED_AGAIN = 2  # the backward of an element-wise operation reads and writes twice as much as its forward
BACKWARD_OF_ATTENTION = 2.5  # of its forward: scores are computed again (Dao et al. 2022)


class Demand(NamedTuple):
    """Of one rank and step unless the name says otherwise."""

    tokens: int  # of all ranks, on both sides
    packs: int  # of all ranks
    micro_batches: int
    blocks: int
    matrix_flops: float
    attention_flops: float
    recomputed_matrix_flops: float
    recomputed_attention_flops: float
    element_bytes: float
    optimizer_bytes: float
    pcie_bytes: float  # to and from the host, with the optimizer in its memory
    host_bytes: float  # moved there by the update
    sequence_bytes: float  # sent between ranks that share packed sequences
    expert_rows_bytes: float  # sent to the ranks of experts and back, at even loads
    tensor_bytes: float  # gathered and added up by tensor-parallel ranks
    collectives: tuple[Collective, ...]
    model_flops: tuple[float, float, float]  # of all ranks: causal, full, hardware
    checkpoint_bytes: int  # of all ranks
    ranks: int
    pack_work: PackWork


def step_demand(context: "Context", packs: int = 0, of_pack: PackWork | None = None) -> Demand:
    """`packs`: of the step; 0: those of the last step, after a ramp. `of_pack`: None: see `pack_work`."""
    settings, effective, ranks = context.settings, context.effective, context.ranks
    packs = packs or ramp_of(settings.training)[-1][1]
    parameters = parameters_of(settings, context.vocabulary)
    passes = passes_per_weight(parameters, settings.model)
    of_pack = of_pack or pack_work(settings, context.manifest)
    work = Work(*(count * packs for count in of_pack.work))
    sizes = (settings.data.sequence_length, settings.data.source_sequence_length)
    counted = flops(settings.model, context.vocabulary, work, sizes, passes=passes)
    visible = attention_flops(settings.model, work.pairs, work.source_pairs, work.cross_pairs)
    again = 0.0
    if settings.training.activation_checkpointing == "full":
        full = flops(settings.model, context.vocabulary, work, sizes, recomputed=True, passes=passes)
        again = full.hardware - counted.hardware
    shards = settings.training.ranks_per_sequence
    micro_batches = num_micro_batches(packs, ranks // shards, effective["train_micro_batch_size_per_gpu"])
    weights = matrix_weights(settings.model, context.vocabulary)
    linear = passes * 2 * (weights.of_position * work.positions + weights.of_source * work.source_positions)
    moved, over_pcie, in_host = _optimizer_bytes(context, parameters, micro_batches)
    return Demand(
        tokens=work.positions + work.source_positions,
        packs=packs,
        micro_batches=micro_batches,
        blocks=num_blocks(settings.model),
        matrix_flops=linear / ranks,
        attention_flops=(1 + BACKWARD_OF_ATTENTION) * visible / ranks,
        recomputed_matrix_flops=max(0.0, again - visible) / ranks if again else 0.0,
        recomputed_attention_flops=visible / ranks if again else 0.0,
        element_bytes=_element_bytes(context, work) / ranks,
        optimizer_bytes=moved,
        pcie_bytes=over_pcie,
        host_bytes=in_host,
        sequence_bytes=_sequence_bytes(context, work) / ranks,
        expert_rows_bytes=_expert_rows_bytes(context.settings, work) / ranks,
        tensor_bytes=_tensor_bytes(settings, work) / ranks,
        collectives=tuple(collectives(parameters, settings, effective, ranks, micro_batches)),
        model_flops=(counted.causal, counted.full, counted.hardware + again),
        checkpoint_bytes=checkpoint_bytes(context, parameters),
        ranks=ranks,
        pack_work=of_pack,
    )


def ramp_of(training: TrainingSettings) -> list[tuple[int, int]]:
    """(steps, packed sequences of a step over all ranks), in order; without a ramp one pair."""
    ramp = [(0, training.global_batch_size), *training.batch_ramp, (training.steps, 0)]  # steps counted from 0
    pairs = [(min(after, training.steps) - first, packs) for (first, packs), (after, _) in itertools.pairwise(ramp)]
    return [(steps, packs) for steps, packs in pairs if steps > 0]


def num_blocks(model: ModelSettings) -> int:
    """Of both stacks, MTP modules included."""
    encoder = model.encoder.num_layers if model.kind == "encoder_decoder" else 0
    return model.num_layers * (2 if model.is_recurrent and model.has_source else 1) + model.num_mtp_modules + encoder


def passes_per_weight(parameters: list[Parameter], model: ModelSettings) -> float:
    """Passes of a token through a matrix, forward and backward: no gradient of a frozen one is computed. Adapters count
    as passes through theirs, of experts as many as a token passes, a tied embedding as the output matrix."""
    tied, experts = model.tied_embeddings, model.experts
    active = experts.per_token / experts.count if experts else 1.0
    matrices = [one for one in parameters if one.role == "matrix" or (tied and one.name == "embedding.weight")]
    if all(one.is_trained for one in matrices):
        return 3.0
    passed = [(one, one.numel * (active if one.is_of_experts else 1)) for one in matrices]
    own = sum(numel for one, numel in passed if ".lora." not in one.name)
    return sum(numel * (2 + one.is_trained) for one, numel in passed) / own


def checkpoint_bytes(context: "Context", parameters: list[Parameter]) -> int:
    """fp32: all weights, the optimizer's states, the average."""
    settings = context.settings
    trained = sum(one.numel for one in parameters if one.is_trained)
    average = WIDE * trained if settings.training.ema_decay else 0
    return sum(WIDE * one.numel for one in parameters) + moment_bytes(parameters, settings.optimizer, 1) + average


def _optimizer_bytes(context: "Context", parameters: list[Parameter], micro_batches: int) -> tuple[float, float, float]:
    """Moved in a GPU's memory, over PCIe, and in the host's memory: sums of gradients in each micro-batch; in the
    update gradients, masters and moments are read, masters, moments and weights written."""
    settings, zero = context.settings, context.effective["zero_optimization"]
    low, trained = bytes_of(settings.training.precision), sum(one.numel for one in parameters if one.is_trained)
    shards = context.ranks if zero["stage"] else 1
    sums = (low + 2 * WIDE) * (trained if zero["stage"] < 2 else trained / shards) * micro_batches
    moments = moment_bytes(parameters, settings.optimizer, shards)
    update = (WIDE + 2 * WIDE + low) * trained / shards + 2 * moments
    if is_offloaded(zero, "offload_optimizer"):
        return sums, (WIDE + low) * trained / shards, update
    return sums + update, 0.0, 0.0


def _element_bytes(context: "Context", work: Work) -> float:
    """Over all ranks: blocks forward and backward, once more where they are recomputed, and logits."""
    settings = context.settings
    model, low = settings.model, bytes_of(settings.training.precision)
    again = settings.training.activation_checkpointing != "none"
    layers = model.num_layers + model.num_mtp_modules
    sparse = model.num_expert_layers
    moved = work.positions * ((layers - sparse) * _width_moved(model) + sparse * _width_moved(model, has_experts=True))
    if model.has_source:
        encoder = model if model.is_recurrent else model.encoder
        moved += work.source_positions * encoder.num_layers * _width_moved(encoder)
    heads = 0 if model.classification else 1 + model.num_mtp_modules
    return low * moved * (1 + MOVED_AGAIN + again) + LOGIT_BYTES * heads * work.positions * context.vocabulary


def _width_moved(model: ModelSettings, has_experts: bool = False) -> int:
    """Numbers read and written for a token in a block's forward, beside its products and attention. Experts: its state
    is copied to their rows, and their outputs are read again."""
    width = model.hidden_size
    if model.is_recurrent:
        return 3 * GATES[model.cell] * width
    queries, keys = (heads * model.resolved_head_dim for heads in (model.num_heads, model.num_kv_heads))
    sublayers = 3 if model.kind == "encoder_decoder" and model.source_attention == "cross" else 2
    norms = sublayers * (2 if model.norm_placement == "sandwich" else 1)
    rotated = 2 * (queries + keys) if model.position_embedding == "rotary" else 0
    normed = 2 * (queries + keys) if model.qk_norm else 0
    inner = (3 if model.gated else 2) * model.intermediate_size
    if has_experts and model.experts:
        chosen = model.experts.per_token
        inner = 3 * (chosen + model.experts.shared) * model.expert_width + 2 * chosen * width
    return 2 * norms * width + 3 * sublayers * width + rotated + normed + inner


def _expert_rows_bytes(settings: Settings, work: Work) -> float:
    """Over all ranks: a row of each token and expert, there and back, forward and backward, once more where anything is
    recomputed."""
    model, size = settings.model, settings.training.expert_parallel_ranks
    if model.experts is None or size == 1:
        return 0.0
    passes = 2 if settings.training.activation_checkpointing == "none" else 3
    row = bytes_of(settings.training.precision) * model.hidden_size
    layers = model.num_expert_layers
    return 2 * passes * row * model.experts.per_token * work.positions * layers * (size - 1) / size


def _tensor_bytes(settings: Settings, work: Work) -> float:
    """Over all ranks: each block gathers the states twice and adds them up twice, forward and backward; in the backward
    it gathers them again, or does all of the forward where anything is recomputed; embedding and head once each way
    (Korthikanti et al. 2022)."""
    size = settings.training.tensor_parallel_ranks
    times = 8 + (2 if settings.training.activation_checkpointing == "none" else 4)
    states = bytes_of(settings.training.precision) * settings.model.hidden_size * work.positions
    return states * (size - 1) * (times * num_blocks(settings.model) + 4)


def _sequence_bytes(context: "Context", work: Work) -> float:
    """Over all ranks. Ulysses: queries, keys, values and the output of each block, forward and backward, once more
    where everything is recomputed (Jacobs et al. 2023). Gathered keys: keys and values of each block to all other
    ranks, once more where anything is recomputed; their gradients, in fp32, back."""
    settings = context.settings
    model, shards = settings.model, settings.training.sequence_parallel_ranks
    if shards == 1:
        return 0.0
    again, low = settings.training.activation_checkpointing, bytes_of(settings.training.precision)
    if settings.training.sequence_parallel_method == "all_gather":
        numbers = 2 * model.num_kv_heads * model.resolved_head_dim * work.positions * num_blocks(model)
        return numbers * (shards - 1) * (low * (1 if again == "none" else 2) + WIDE)
    width = 2 * (model.num_heads + model.num_kv_heads) * model.resolved_head_dim
    times = 3 if again == "full" else 2
    tokens = work.positions + work.source_positions
    sent = low * width * tokens * num_blocks(model) / (2 if model.has_source else 1)
    return times * sent * (shards - 1) / shards
