"""The table of metrics: names, kinds, help and labels. The metrics endpoint, METRICS.md and the tests use it.

Rules of Prometheus: one prefix, base units (seconds, bytes, nats), plain counters, ratios from 0 to 1, no label with
unbounded values. Run, node and job are labels of the scraped target (service discovery); rank is a label of metrics
per rank. Imports nothing.
"""

from typing import Literal, NamedTuple

PREFIX = "bigmodel_"
STEP_BUCKETS_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKEN_BUCKETS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


class Metric(NamedTuple):
    """A row of the table; its exported name is `bigmodel_` + `name`, plus `_total` for counters."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = STEP_BUCKETS_SECONDS  # of a histogram


# Metrics of the run, served by rank 0's node. Counters continue over restarts and never decrease: a step repeated after
# a restart is not counted again; its time is lost to "replay".
RUN = (
    Metric("build_info", "gauge", "Always 1; the label is the version of bigmodel that runs", ("version",)),
    Metric("world_size", "gauge", "Ranks of the run"),
    Metric("planned_steps", "gauge", "training.steps: the number of steps after which the run is over"),
    Metric("parameters", "gauge", "Trained parameters, tied ones once"),
    Metric("first_start_timestamp_seconds", "gauge", "Unix time at which the first start of the run began"),
    Metric("steps", "counter", "Steps done, those with a skipped update included"),
    Metric("steps_skipped", "counter", "Steps whose update was left out, by reason", ("reason",)),
    Metric("target_tokens", "counter", "Tokens predicted in training"),
    Metric(
        "source_target_tokens", "counter", "Tokens predicted in training, by objective and source of the data",
        ("objective", "source"),
    ),
    Metric("positions", "counter", "Positions trained on that held a token"),
    Metric("padding_positions", "counter", "Positions computed that held no token"),
    Metric("documents", "counter", "Documents, or chunks of long ones, trained on"),
    Metric("packs_document_limited", "counter", "Packs with room left that were full by data.max_documents"),
    Metric(
        "model_flops", "counter", "Floating-point operations the model needs: attention counted over visible pairs "
        "(convention causal) or as if each pack were one sequence without a mask (full)", ("convention",),
    ),
    Metric("hardware_flops", "counter", "Operations computed: padding and recomputation included, causal attention"),
    Metric("tokens_per_second", "gauge", "Positions that held a token, per second of the last step"),
    Metric(
        "model_flops_utilization_ratio", "gauge", "MFU of the last step: model FLOPs per second over the peak of all "
        "devices", ("convention",),
    ),
    Metric("hardware_flops_utilization_ratio", "gauge", "HFU of the last step: FLOPs computed per second over peak"),
    Metric(
        "device_peak_flops", "gauge", "FLOPs per second of one device at most (bf16): from a table, on a CPU measured; "
        "absent, and with it MFU and HFU, for a device that the table does not know",
    ),
    Metric(
        "energy_joules", "counter", "Energy in counted steps, of all GPUs (device, NVML) and of all nodes' processors "
        "(host, RAPL); absent where not all can be read", ("part",),
    ),
    Metric("energy_joules_per_token", "gauge", "Energy of the last step by its tokens, of the parts that are known"),
    Metric("packing_efficiency_ratio", "gauge", "Share of the last step's positions that held a token"),
    Metric("attention_imbalance_ratio", "gauge", "Attention time of rank 0's node over that of a perfect share"),
    Metric("attention_imbalance_undealt_ratio", "gauge", "The same, were packs left in their canonical order"),
    Metric("data_fetched_bytes", "counter", "Bytes that rank 0 fetched from data.remote since it started"),
    Metric("data_fetch_failures", "counter", "Transfers that rank 0 tried again since it started"),
    Metric("productive_seconds", "counter", "Wall time in steps that count, without what is lost to a cause"),
    Metric("lost_seconds", "counter", "Wall time lost; with productive_seconds it is the wall time", ("cause",)),
    Metric("restarts", "counter", "Starts after the first, by how the one before ended", ("cause",)),
    Metric("data_wait_seconds", "counter", "Time in which rank 0 waited for its next batch"),
    Metric("last_step_timestamp_seconds", "gauge", "Unix time at which the last step ended; old means stalled"),
    Metric("training_loss_nats", "gauge", "Mean training loss of the last step, nats per target token"),
    Metric(
        "training_unweighted_loss_nats", "gauge", "Mean training loss of the last step without class weights and focal "
        "factor, nats per document; absent where there are none",
    ),
    Metric(
        "source_training_loss_nats", "gauge", "Mean training loss of the last step by objective and source, nats per "
        "target token", ("objective", "source"),
    ),
    Metric("z_loss", "gauge", "Mean of logsumexp(logits)^2 over the last step's targets"),
    Metric(
        "distillation_loss_nats", "gauge", "Mean divergence from the teacher over the last step's targets, times "
        "distillation.temperature squared",
    ),
    Metric(
        "sampled_input_ratio", "gauge", "Share of the last step's decoder inputs that were replaced by the model's own "
        "predictions, as scheduled",
    ),
    Metric(
        "expert_load_ratio", "gauge", "Largest load of an expert in the last step over the mean load of its layer, in "
        "the most uneven layer; 1 is even",
    ),
    Metric("expert_load_layer", "gauge", "The layer of that load, N of blocks.N"),
    Metric(
        "expert_load_entropy_ratio", "gauge", "Entropy of the loads of experts in the last step over that of even "
        "loads, in the layer where it is lowest; 1 is even, 0 is one expert for all tokens",
    ),
    Metric(
        "expert_dropped_ratio", "gauge", "Share of the last step's choices of experts that were dropped, over all "
        "layers; with model.experts.capacity_factor",
    ),
    Metric("router_z", "gauge", "Mean of the routers' logsumexp(logits)^2 over the last step's targets and layers"),
    Metric("gradient_norm", "gauge", "Global gradient norm of the last step, before clipping"),
    Metric(
        "largest_attention_score", "gauge", "Largest attention score of the last step over all layers, heads and "
        "documents, before bias, cap and softmax; with metrics.attention_scores or optimizer.qk_clip",
    ),
    Metric("learning_rate", "gauge", "Learning rate of the last step"),
    Metric("loss_scale", "gauge", "Loss scale of fp16 in the last step"),
    Metric("weight_norm", "gauge", "L2 norm of the weights of a kind of layer, at the last measured step", ("layers",)),
    Metric("update_norm", "gauge", "L2 norm of the last measured update, by kind of layer", ("layers",)),
    Metric("pruned_ratio", "gauge", "Share of zeros in the matrices of [pruning], when it last pruned"),
    Metric(
        "l1_norm", "gauge", "With an L1 penalty: sum of the magnitudes of the weights of a kind of layer, at the last "
        "measured step; times optimizer.l1_penalty it is the penalty", ("layers",),
    ),
    Metric(
        "zero_ratio", "gauge", "With an L1 penalty: share of zeros in the weights of a kind of layer, at the last "
        "measured step", ("layers",),
    ),
    Metric(
        "spikes", "counter", "Spikes by training.spikes: one for each signal of each event `spike`, repeated steps "
        "included", ("signal",),
    ),
    Metric("evaluations", "counter", "Evaluations on the validation split"),
    Metric("evaluation_seconds", "counter", "Time spent in evaluations, on tasks too"),
    Metric("validation_loss_nats", "gauge", "Validation loss, nats per target token"),
    Metric(
        "source_validation_loss_nats", "gauge", "Validation loss by objective and source, nats per target token",
        ("objective", "source"),
    ),
    Metric(
        "validation_accuracy_ratio", "gauge", "Share of validation targets that are the model's likeliest token; with "
        "classes of the documents whose class was predicted",
    ),
    Metric(
        "validation_calibration_error_ratio", "gauge", "Expected calibration error of the likeliest token, 15 bins",
    ),
    Metric("task_score", "gauge", "Score of lm_eval's tasks", ("task", "metric")),
    Metric("validation_compression_ratio", "gauge", "Validation loss as coded bytes per byte of text; times 8: bits"),
    Metric("validation_f1_ratio", "gauge", "F1 over all classes: macro, micro or weighted average", ("average",)),
    Metric("validation_precision_ratio", "gauge", "Precision over all classes: macro or weighted mean", ("average",)),
    Metric("validation_recall_ratio", "gauge", "Recall over all classes: macro or weighted mean", ("average",)),
    Metric("validation_balanced_accuracy_ratio", "gauge", "Mean recall of the classes with validation documents"),
    Metric("validation_class_precision_ratio", "gauge", "Validation precision of a class; of 100 at most", ("class",)),
    Metric("validation_class_recall_ratio", "gauge", "Validation recall of a class; of 100 at most", ("class",)),
    Metric("validation_class_f1_ratio", "gauge", "Validation F1 of a class; of 100 at most", ("class",)),
    Metric("validation_class_documents", "gauge", "Validation documents of a class; of 100 at most", ("class",)),
    Metric("checkpoints", "counter", "Checkpoints saved"),
    Metric(
        "checkpoint_failures", "counter", "Checkpoints that could not be saved: disk_full, permission, io_error or "
        "not_finite",
        ("reason",),
    ),
    Metric("checkpoint_written_bytes", "counter", "Bytes written in checkpoints"),
    Metric("checkpoint_seconds", "counter", "Time spent saving checkpoints"),
    Metric("last_checkpoint_timestamp_seconds", "gauge", "Unix time at which the last checkpoint was complete"),
    Metric("last_checkpoint_step", "gauge", "Step of the last checkpoint"),
    Metric("last_checkpoint_bytes", "gauge", "Size of the last checkpoint"),
    Metric("last_checkpoint_duration_seconds", "gauge", "Time that the last checkpoint took"),
    Metric(
        "delayed_lines", "counter", "Lines of metrics.jsonl that could not be written when they came, as on a full "
        "disk, since the start",
    ),
    Metric("slowest_rank", "gauge", "The rank that worked longest in the last step but one, waiting left out"),
    Metric("slowest_rank_lag_seconds", "gauge", "How much longer it worked than the rank in the middle"),
)  # fmt: skip

# Metrics of each rank, served by its node. Counters count from the rank's start.
RANK = (
    Metric("rank_up", "gauge", "1 while the rank's process lives, else 0", ("rank",)),
    Metric(
        "rank_hangs", "gauge", "1 while the rank's process is stopped (SIGSTOP, a debugger) or the watch for hanging "
        "ranks names it, else 0", ("rank",),
    ),
    Metric("rank_heartbeat_timestamp_seconds", "gauge", "Unix time of the rank's last sign of life", ("rank",)),
    Metric("rank_step", "gauge", "The last step that the rank ended", ("rank",)),
    Metric("step_duration_seconds", "histogram", "Wall time of a step, waiting for data included", ("rank",)),
    Metric(
        "phase_seconds", "counter", "Where the rank's time went; exchange: rows on their way between "
        "ranks that share experts; on a GPU forward, backward, communication, exchange and optimizer are the device's "
        "own time", ("rank", "phase"),
    ),
    Metric("rank_busy_seconds", "counter", "Forward, backward and optimizer, waiting left out", ("rank",)),
    Metric("process_resident_bytes", "gauge", "Memory of the rank's process", ("rank",)),
    Metric("device_memory_allocated_bytes", "gauge", "GPU memory in tensors", ("rank",)),
    Metric("device_memory_reserved_bytes", "gauge", "GPU memory held by torch's allocator", ("rank",)),
    Metric("device_memory_peak_bytes", "gauge", "Highest GPU memory in tensors since the start", ("rank",)),
    Metric("device_memory_retries", "counter", "Allocations for which torch had to empty its cache", ("rank",)),
    Metric("device_temperature_celsius", "gauge", "Temperature of the rank's GPU", ("rank",)),
    Metric("device_power_watts", "gauge", "Power that the rank's GPU draws", ("rank",)),
    Metric("device_throttled", "gauge", "1 while the rank's GPU is slowed down for it, else 0", ("rank", "reason")),
    Metric("device_ecc_errors", "counter", "Memory errors of the rank's GPU since its reset", ("rank", "kind")),
    Metric("device_xid_errors", "counter", "Critical XID errors of the rank's GPU since the start", ("rank",)),
)  # fmt: skip

# Metrics of each node, served by the node. Seconds by phase are counters per rank: they show which rank is slow, and
# why. The histogram of phases is per node: per rank it would add a hundred series for each rank, and quantiles of a
# phase are of interest for the run, not for a rank. Step durations have a histogram per rank.
NODE = (
    Metric("phase_duration_seconds", "histogram", "A step's time in a phase, over the node's ranks", ("phase",)),
    Metric("node_cpu_seconds", "counter", "Time of the node's processors since boot, by mode", ("mode",)),
    Metric("node_memory_total_bytes", "gauge", "Memory of the node"),
    Metric("node_memory_available_bytes", "gauge", "Memory of the node that is free or can be freed"),
    Metric("disk_total_bytes", "gauge", "Size of the file system that holds the run directory"),
    Metric("disk_free_bytes", "gauge", "Room left on the file system that holds the run directory"),
    Metric("network_received_bytes", "counter", "Bytes received since boot, by network device", ("device",)),
    Metric("network_transmitted_bytes", "counter", "Bytes sent since boot, by network device", ("device",)),
)  # fmt: skip

METRICS = (*RUN, *RANK, *NODE)

# Metrics of `bigmodel serve`, a process of its own: no rank, no run.
SERVING = (
    Metric(
        "serving_requests", "counter", "Requests answered, by HTTP status; 499: the client went away before the end",
        ("endpoint", "status"),
    ),
    Metric("serving_prompt_tokens", "counter", "Tokens of prompts that began to run; of sources for encoder-decoders"),
    Metric("serving_generated_tokens", "counter", "Tokens generated, end tokens included"),
    Metric("serving_running_sequences", "gauge", "Sequences that generate now; a request with n = 4 has four"),
    Metric("serving_waiting_sequences", "gauge", "Sequences in the queue"),
    Metric("serving_cache_positions", "gauge", "Positions of the key-value cache that running sequences hold"),
    Metric("serving_cache_capacity_positions", "gauge", "Positions that all sequences together may hold"),
    Metric(
        "serving_first_token_seconds", "histogram", "From the arrival of a request to its first token", (),
        TOKEN_BUCKETS_SECONDS,
    ),
    Metric(
        "serving_token_seconds", "histogram", "From one token of a sequence to the next", (), TOKEN_BUCKETS_SECONDS,
    ),
)  # fmt: skip


def reference() -> str:
    """The table in Markdown: configs/prometheus/METRICS.md."""
    parts = [
        "# Metrics\n\nMade from `bigmodel/metrics/metric_table.py` by `bigmodel show metrics`; "
        "a test keeps it current.\n"
        "The target's labels are `run`, `node`, `host`, `ranks` and, under SLURM, `slurm_job_id`.\n"
    ]
    for title, metrics in (
        ("Metrics of the run (node 0; counters continue over restarts)", RUN),
        ("Metrics of each rank (counters since its start)", RANK),
        ("Metrics of each node", NODE),
        ("Metrics of `bigmodel serve` (counters since its start)", SERVING),
    ):
        parts.append(f"\n## {title}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n")
        parts += [f"| `{full_name(m)}` | {m.kind} | {', '.join(m.labels)} | {m.help} |\n" for m in metrics]
    return "".join(parts)


def full_name(metric: Metric) -> str:
    return PREFIX + metric.name + ("_total" if metric.kind == "counter" else "")
