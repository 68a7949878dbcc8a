"""Bytes that a rank exchanges with the others in a step, by ZeRO stage. Imports no torch.

In: the parameters, settings, effective DeepSpeed JSON, number of ranks. Out: by collective, the bytes of its payload
(the whole tensor) and of what one rank sends in a ring. Guarantee: the payloads are those that DeepSpeed 0.19.8 hands
to torch.distributed, counted on gloo, by a test.

    stage 0    sum of gradients, once a step
    stage 1    the same; then the new weights are gathered
    stage 2    sum of gradients in every micro-batch; then the new weights are gathered
    stage 3    in every micro-batch weights are gathered, in the backward once more where the forward let go of them,
               and gradients are summed and scattered; what stays whole for its size is gathered once a step; with
               hpZ all gathers of a step but the first are among its neighbouring ranks, from the second copy that the
               first leaves and the update invalidates

Ranks that share experts sum and gather these only among the ranks that hold the same ones. The rows that they exchange
are in `bigmodel.planning.step_demand`.

DeepSpeed sums the buckets of stages 1 and 2 by all-reduce, not by reduce-scatter (`use_multi_rank_bucket_allreduce`, on
by default). Sums are in `communication_data_type`, fp32 here; weights in the run's precision. Norms, losses and other
numbers are a few bytes and not counted. A ring of n ranks sends (n - 1) / n of a gathered or scattered tensor, twice
that of a summed one (Patarasuk & Yuan 2009).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bigmodel.config.settings import Settings
from bigmodel.planning.parameters import Parameter, held_of, shared_of
from bigmodel.planning.state_memory import LOW, WIDE, bytes_of

# DeepSpeed's defaults of stage3_param_persistence_threshold, stage3_max_live_parameters and stage3_max_reuse_distance.
PERSISTENCE, LIVE, REUSE = 1e5, 1e9, 1e9


class Collective(NamedTuple):
    """Of one step."""

    name: str  # all_reduce, all_gather, reduce_scatter
    purpose: str
    payload: int
    among: int = 0  # ranks; 0: all
    are_neighbours: bool = False  # the ranks of `among`

    def sent(self, ranks: int) -> int:
        """Bytes that one rank sends in a ring."""
        ranks = self.among or ranks
        times = 2 if self.name == "all_reduce" else 1
        return times * self.payload * (ranks - 1) // ranks


def collectives(
    parameters: Sequence[Parameter], settings: Settings, effective: dict[str, Any], ranks: int, micro_batches: int
) -> list[Collective]:
    """Exchanges of a step of `micro_batches` micro-batches on each of `ranks` ranks, without sequence parallelism."""
    if ranks == 1:
        return []
    training, shared = settings.training, {one.name for one in shared_of(parameters, settings)}
    held = held_of(parameters, settings)
    among = ranks // (training.expert_parallel_ranks * training.tensor_parallel_ranks)
    found = _of_stage([one for one in held if one.name not in shared], settings, effective, ranks, micro_batches)
    if among > 1:  # else no other rank holds what is shared
        whose = " of matrices" if training.tensor_parallel_ranks > 1 else " of experts"
        of_shared = _of_stage([one for one in held if one.name in shared], settings, effective, among, micro_batches)
        found += [one._replace(purpose=one.purpose + whose, among=among) for one in of_shared]
    return [one for one in found if one.payload]


def _of_stage(
    parameters: Sequence[Parameter], settings: Settings, effective: dict[str, Any], ranks: int, micro_batches: int
) -> list[Collective]:
    """Exchanges of what all of these ranks hold."""
    zero, low = effective["zero_optimization"], bytes_of(settings.training.precision)
    summed = WIDE if effective.get("communication_data_type", "fp32") == "fp32" else LOW
    trained = sum(one.numel for one in parameters if one.is_trained)
    if zero["stage"] < 3:
        sums = Collective("all_reduce", "gradients", summed * trained * (micro_batches if zero["stage"] == 2 else 1))
        return [sums, Collective("all_gather", "new weights", low * trained)] if zero["stage"] else [sums]
    persists = float(zero.get("stage3_param_persistence_threshold", PERSISTENCE))
    parted = sum(one.numel for one in parameters if one.numel >= persists)
    whole = sum(one.numel for one in parameters if one.numel < persists)
    again = _gathered_again(parameters, zero, parted, settings.training.activation_checkpointing != "none")
    gathered, size = (parted + again) * micro_batches, min(zero.get("zero_hpz_partition_size", 1), ranks)
    inside = gathered - parted if size > 1 else 0
    return [
        Collective("all_gather", "weights", low * (gathered - inside + whole)),
        Collective("all_gather", "weights again", low * inside, size, are_neighbours=True),
        Collective("reduce_scatter", "gradients", summed * trained * micro_batches),
    ]


def _gathered_again(parameters: Sequence[Parameter], zero: dict[str, Any], parted: int, recomputes: bool) -> int:
    """Elements that the backward of a micro-batch gathers once more. The forward lets go of what is used again only
    after `stage3_max_reuse_distance` elements, there and back, unless all fits `stage3_max_live_parameters`. A block
    that is computed again is gathered for that, and stays for its backward if the distance allows a block, there and
    back; its last product does in any case, because the recomputation ends inside it."""
    reuse = float(zero.get("stage3_max_reuse_distance", REUSE))
    if parted <= float(zero.get("stage3_max_live_parameters", LIVE)):
        return 0
    again = max(0, parted - int(reuse / 2))
    blocks: dict[str, int] = {}
    for one in parameters:
        stack, is_block, rest = one.name.partition("blocks.")
        if is_block:
            name = f"{stack}{rest.partition('.')[0]}"
            blocks[name] = blocks.get(name, 0) + one.numel
    if not recomputes or not blocks or reuse >= 2 * max(blocks.values()):
        return again
    last = sum(one.numel for one in parameters if one.name.endswith("feed_forward.down.weight"))
    return again + sum(blocks.values()) - last
