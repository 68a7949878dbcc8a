"""Seconds of a step before it runs: what a rank computes, moves and sends, over what the hardware gives.

In: a context and, if a run was measured, a calibration. Out: `StepTime`, and a part of the plan. Imports no torch.

    products     FLOPs / (peak * achievable share * RATES.products), recomputation included
    attention    FLOPs / (peak * RATES.attention)
    elements     bytes of norms, residuals, activations, logits / (memory rate * RATES.memory)
    optimizer    bytes of sums and update / (memory rate * RATES.memory); offloaded: also over PCIe
    collectives  bytes that a rank sends in a ring / (ring rate * RATES.link)

A ring over n ranks sends (n - 1) / n of a gathered tensor, twice that of a summed one (Patarasuk & Yuan 2009); over
nodes its rate is that of all adapters of a node together. Collectives are not hidden behind computation: DeepSpeed's
overlap_comm is off by default here, and published steps of FSDP, which overlaps, fit best so. Not in the model: latency
of collectives, waiting for the slowest rank and for data, what ZeRO++'s quantization saves, and what `not_counted`
names, with a row.

The default rates meet 14 rows of llm-foundry's published table within 8%, and predict 20 other rows within 13%
(`tools.bench_plan`, benchmarks/bench_plan.json); there with the attention rate of its kernel, Triton's of 2023.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from bigmodel.config.deepspeed_json import device_of
from bigmodel.planning.hardware import GB, TERA, Hardware, hardware_of
from bigmodel.planning.part import Part, Row
from bigmodel.planning.state_memory import is_offloaded
from bigmodel.planning.step_demand import BACKWARD_OF_ATTENTION, MOVED_AGAIN, Demand, ramp_of, step_demand
from bigmodel.sizes import amount, byte_size, short_duration

if TYPE_CHECKING:
    from bigmodel.planning.context import Context

# An offloaded update in the host's memory: an eighth of the 614 GB/s of a DGX H100's 16 channels of DDR5-4800, of which
# an update by torch reaches about a quarter: assumed.
HOST_RATE = 614e9 / 8 / 4
PCIE_RATE = 25e9  # bytes per second and GPU to the host: 16 lanes of PCIe 4, measured rates are about 80% of 31.5


class Rates(NamedTuple):
    """Shares of the hardware's figures that a run reaches, and what it takes besides. `measured`: the runs they were
    fitted to; none: the defaults."""

    products: float = 0.95
    attention: float = 0.30  # FlashAttention-2, heads of 128 channels, causal, forward and backward on a H100
    memory: float = 0.30  # operations that nothing fuses
    link: float = 0.8  # all-reduce of 8 A100: 235 of 300 GB/s (S. Bekman, ml-engineering, network)
    slowdown: float = 1.0  # of products and attention
    bytes_slowdown: float = 1.0  # of elements and optimizer
    seconds_per_block: float = 0.0  # in a micro-batch
    seconds_per_step: float = 0.0
    peak_flops: float = 0.0  # of the measured device, where the cluster file names none; for MFU
    measured: tuple[str, ...] = ()


class StepTime(NamedTuple):
    """`phases`: seconds of a step, they add up to `seconds`. Tokens are of both sides, without padding."""

    seconds: float
    phases: dict[str, float]
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu_causal: float
    mfu_full: float
    hfu: float
    sent_bytes: dict[str, int]  # by collective, of one rank
    run_tokens: int
    run_seconds: float  # all steps and evaluations; without saves and failures
    evaluation_seconds: float  # of these
    demand: Demand
    hardware: Hardware
    rates: Rates


def step_time(context: "Context", calibration: Rates | None = None) -> StepTime:
    """Of a step after the batch ramp; the run with its ramp."""
    cluster = context.cluster
    hardware = hardware_of(cluster.hardware, cluster.nodes, context.ranks // cluster.nodes)
    rates = calibration or Rates()
    segments = [(steps, step_demand(context, packs)) for steps, packs in ramp_of(context.settings.training)]
    of_segments = [seconds_by_phase(context, demand, hardware, rates) for _, demand in segments]
    (_, demand), phases = segments[-1], of_segments[-1]
    seconds = sum(phases.values())
    peak = (rates.peak_flops or hardware.peak_flops) * context.ranks * seconds
    causal, full, of_hardware = (count / peak for count in demand.model_flops)
    training = sum(steps * sum(one.values()) for (steps, _), one in zip(segments, of_segments, strict=True))
    evaluation = _evaluation_seconds(context, demand, phases)
    return StepTime(
        seconds=seconds,
        phases=phases,
        tokens=demand.tokens,
        tokens_per_second=demand.tokens / seconds,
        tokens_per_second_per_gpu=demand.tokens / seconds / context.ranks,
        mfu_causal=causal,
        mfu_full=full,
        hfu=of_hardware,
        sent_bytes={f"{one.name} {one.purpose}": one.sent(context.ranks) for one in demand.collectives}
        | ({"all_to_all expert parallel": int(demand.expert_rows_bytes)} if demand.expert_rows_bytes else {})
        | ({"all_to_all tensor parallel": int(demand.tensor_bytes)} if demand.tensor_bytes else {}),
        run_tokens=sum(steps * demand.tokens for steps, demand in segments),
        run_seconds=training + evaluation,
        evaluation_seconds=evaluation,
        demand=demand,
        hardware=hardware,
        rates=rates,
    )


def seconds_by_phase(context: "Context", demand: Demand, hardware: Hardware, rates: Rates) -> dict[str, float]:
    """Of a step, by name; only what is not 0."""
    fixed = rates.seconds_per_step + rates.seconds_per_block * demand.blocks * demand.micro_batches
    computed, sent = computed_seconds(demand, hardware, rates), sent_seconds(context, demand, hardware, rates)
    phases = computed | sent | {"fixed": fixed}
    return {name: seconds for name, seconds in phases.items() if seconds > 0}


def computed_seconds(demand: Demand, hardware: Hardware, rates: Rates) -> dict[str, float]:
    """Of a step, by name."""
    products = rates.slowdown / (hardware.peak_flops * hardware.achievable * rates.products)
    attention = rates.slowdown / (hardware.peak_flops * rates.attention)
    memory = rates.bytes_slowdown / (hardware.memory_rate * rates.memory)
    return {
        "products": demand.matrix_flops * products,
        "attention": demand.attention_flops * attention,
        "recomputation": demand.recomputed_matrix_flops * products + demand.recomputed_attention_flops * attention,
        "elements": demand.element_bytes * memory,
        "optimizer": demand.optimizer_bytes * memory + demand.pcie_bytes / PCIE_RATE + demand.host_bytes / HOST_RATE,
    }


def sent_seconds(context: "Context", demand: Demand, hardware: Hardware, rates: Rates) -> dict[str, float]:
    """Of collectives, by operation and purpose."""
    found = {}
    for one in demand.collectives:
        inside = one.are_neighbours and one.among <= hardware.gpus_per_node
        rate = (hardware.node_rate if inside else hardware.ring_rate) * rates.link
        found[f"{one.name} {one.purpose}"] = one.sent(demand.ranks) / rate
    training = context.settings.training
    of_sequence = "all_gather" if training.sequence_parallel_method == "all_gather" else "all_to_all"
    for name, size, sent in (
        (f"{of_sequence} sequence parallel", training.sequence_parallel_ranks, demand.sequence_bytes),
        ("all_to_all expert parallel", training.expert_parallel_ranks, demand.expert_rows_bytes),
        ("all_to_all tensor parallel", training.tensor_parallel_ranks, demand.tensor_bytes),
    ):
        if sent:
            inside = size <= hardware.gpus_per_node
            links = hardware.node_rate if inside else min(hardware.node_rate, hardware.link_rate)
            found[name] = sent / (links * rates.link)
    return found


def _evaluation_seconds(context: "Context", demand: Demand, phases: dict[str, float]) -> float:
    """Forward passes of `evaluation.sequences`, during the run; 0 where all are used and the data are not prepared."""
    evaluation, training = context.settings.evaluation, context.settings.training
    times = training.steps // evaluation.every_steps if evaluation.every_steps else 1
    sequences = evaluation.sequences
    if not sequences and context.manifest:
        pack = context.settings.data.sequence_length + context.settings.data.source_sequence_length
        sequences = context.manifest.total("validation", "tokens") // pack
    forward = phases.get("products", 0.0) / 3 + phases.get("attention", 0.0) / (1 + BACKWARD_OF_ATTENTION)
    forward += phases.get("elements", 0.0) / (1 + MOVED_AGAIN) + phases.get("all_gather weights", 0.0) / 2
    return times * sequences / demand.packs * forward


def time_part(context: "Context", found: StepTime) -> Part:
    """Rows: the step, its phases, what each rank sends, the assumptions."""
    demand, rates = found.demand, found.rates
    of_device = f"; of the measured device's {_whole(rates.peak_flops / TERA)} TFLOP/s" if rates.peak_flops else ""
    rows = [
        Row("a step", short_duration(found.seconds), f"{demand.packs:,} packed sequences, {found.tokens:,} tokens"),
        Row(
            "tokens per second",
            f"{found.tokens_per_second:,.0f}",
            f"{found.tokens_per_second_per_gpu:,.0f} on each of {context.ranks:,} GPUs",
        ),
        Row("MFU", f"{found.mfu_causal:.1%}", f"attention counted over the pairs that the masks allow{of_device}"),
        Row("MFU as published", f"{found.mfu_full:.1%}", "as if each packed sequence were one sequence without a mask"),
    ]
    for name, seconds in sorted(found.phases.items(), key=lambda one: -one[1]):
        sent = found.sent_bytes.get(name)
        note = f"{seconds / found.seconds:.1%}" + (f"; a rank sends {byte_size(sent)}" if sent else "")
        rows.append(Row(f"  {name.replace('_', '-')}", short_duration(seconds), note))
    assumed = assumptions(context, found)
    numbers: dict[str, Any] = {
        "step_seconds": found.seconds,
        "phases_seconds": found.phases,
        "tokens_per_step": found.tokens,
        "tokens_per_second": found.tokens_per_second,
        "mfu_causal_ratio": found.mfu_causal,
        "mfu_full_ratio": found.mfu_full,
        "hfu_ratio": found.hfu,
        "flops": dict(zip(("causal", "full", "hardware"), demand.model_flops, strict=True)),
        "sent_bytes": found.sent_bytes,
        "micro_batches": demand.micro_batches,
        "peak_flops_per_second": rates.peak_flops or found.hardware.peak_flops,
        "rates": rates._asdict(),
        "assumptions": [f"{row.name}: {row.value} ({row.note})" for row in assumed],
    }
    return Part("time", rows + assumed, numbers)


def assumptions(context: "Context", found: StepTime) -> list[Row]:
    """What the figures rest on, each with its origin."""
    rates, hardware, of_pack = found.rates, found.hardware, found.demand.pack_work
    where = "of the prepared data" if of_pack.is_measured else "assumed, lognormal: the data are not prepared"
    rows = [
        *hardware.rows,
        Row("mean document", f"{of_pack.mean_document:,.0f} tokens", f"chunks of long ones counted; {where}"),
        *_rate_rows(hardware, rates),
    ]
    if found.demand.collectives:
        rate = hardware.ring_rate * rates.link / GB
        rows.append(Row("collectives", f"{rate:,.0f} GB/s sent by a rank", f"{rates.link:.0%} of the slowest link"))
        rows.append(Row("hidden behind computation", "nothing", "overlap_comm is not counted on"))
    if missing := not_counted(context):
        rows.append(Row("not counted", "makes a step longer", ", ".join(missing)))
    return rows


def _rate_rows(hardware: Hardware, rates: Rates) -> list[Row]:
    """What a GPU reaches; calibrated: what the measured runs reached, and the fixed seconds fitted to them."""
    if not rates.measured:
        of_products = of_attention = of_memory = ""
    else:
        runs = f"measured by {', '.join(rates.measured)}"
        of_products = of_attention = f"{runs}: {rates.slowdown:.3g} times as long as "
        of_memory = f"{runs}: {rates.bytes_slowdown:.3g} times as long as "
    products = hardware.peak_flops * hardware.achievable * rates.products / rates.slowdown
    attention = hardware.peak_flops * rates.attention / rates.slowdown
    memory = hardware.memory_rate * rates.memory / rates.bytes_slowdown
    share = f"{hardware.achievable:.0%} achievable x {rates.products:.0%}"
    rows = [
        Row("matrix products", f"{_whole(products / TERA)} TFLOP/s", of_products + share),
        Row("attention", f"{_whole(attention / TERA)} TFLOP/s", f"{of_attention}{rates.attention:.0%} of peak"),
        Row("memory", f"{_whole(memory / GB)} GB/s", f"{of_memory}{rates.memory:.0%} of its bandwidth"),
    ]
    if rates.measured:
        block = f"{short_duration(rates.seconds_per_block)} a block and micro-batch"
        rows.append(Row("beside these", f"{short_duration(rates.seconds_per_step)} a step", f"{block}; measured"))
        rows.append(Row("not measured", "figures of the GPU", "memory, links and power are those above"))
    return rows


def _whole(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else amount(number)


def not_counted(context: "Context") -> list[str]:
    """What these settings do in a step and the model leaves out."""
    settings, zero = context.settings, context.effective["zero_optimization"]
    causes = {
        "recurrent layers go token by token": settings.model.is_recurrent,
        "the teacher": settings.distillation.teacher is not None,
        "the first pass of scheduled sampling": settings.training.scheduled_sampling is not None,
        "state in files": device_of(zero.get("offload_optimizer")) == "nvme",
        "gathers of offloaded weights": is_offloaded(zero, "offload_param"),
    }
    return [name for name, is_there in causes.items() if is_there]
