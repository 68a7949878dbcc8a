"""The content of the Grafana dashboards: rows of panels with their queries. Imports nothing; `tools.write_dashboards`
makes JSON of it.

In queries, RUN selects the chosen runs, NODE also the chosen nodes. Units are Grafana's: s, bytes, Bps, percentunit (a
ratio of 1 is 100%), short (a number), none (a number as it is).
"""

from typing import Literal, NamedTuple

RUN = '{job="bigmodel",run=~"$run"}'
NODE = '{job="bigmodel",run=~"$run",node=~"$node"}'
WINDOW = "[$__rate_interval]"


Kind = Literal["lines", "stacked", "number", "states", "table"]


class Query(NamedTuple):
    """A query and the legend of its series."""

    text: str
    legend: str = "{{run}}"


class Panel(NamedTuple):
    """A panel. kind "number": the last value; "states": a band per series; "table": a line per run. width: of 24."""

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8


class Dashboard(NamedTuple):
    title: str
    description: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def _number(title: str, unit: str, description: str, text: str, legend: str = "{{run}}") -> Panel:
    return Panel(title, unit, description, (Query(text, legend),), "number", 4)


def _one(title: str, unit: str, description: str, text: str, legend: str = "{{run}}", kind: Kind = "lines") -> Panel:
    return Panel(title, unit, description, (Query(text, legend),), kind)


def _metric(name: str, selector: str = RUN) -> str:
    return f"bigmodel_{name}{selector}"


def _rate(name: str, selector: str = RUN) -> str:
    return f"rate(bigmodel_{name}_total{selector}{WINDOW})"


ALERTS = 'ALERTS{alertstate="firing",job="bigmodel",run=~"$run"}'
GOODPUT = f"run:bigmodel_goodput:ratio{RUN}"
TOKENS = f"run:bigmodel_positions:rate5m{RUN}"
PROGRESS = f"max by (run) ({_metric('steps_total')}) / max by (run) ({_metric('planned_steps')})"
STEPS_LEFT = f"(max by (run) ({_metric('planned_steps')}) - max by (run) ({_metric('steps_total')}))"
TIME_LEFT = f"{STEPS_LEFT} / max by (run) (rate(bigmodel_steps_total{RUN}[30m]))"
NUM_ALERTS = f"count by (run) ({ALERTS}) or 0 * max by (run) ({_metric('steps_total')})"
MFU = Query(_metric("model_flops_utilization_ratio"), "{{run}} model, {{convention}}")
HFU = Query(_metric("hardware_flops_utilization_ratio"), "{{run}} computed")
CHECKPOINT_AGE = f"time() - max by (run) ({_metric('last_checkpoint_timestamp_seconds')})"
OF_RANK = "{{run}} rank {{rank}}"
OF_NODE = "{{run}} node {{node}} ({{host}})"

OVERVIEW = Dashboard(
    "bigmodel overview",
    "One run at a glance: how far, how fast, how well, and what is wrong.",
    (
        (
            "Now",
            (
                _number("Progress", "percentunit", "Steps done of training.steps", PROGRESS),
                _number("Time left", "s", "Steps left over the rate of the last half hour", TIME_LEFT),
                _number(
                    "Loss", "none", "Mean training loss of the last step, nats per label", _metric("training_loss_nats")
                ),
                _number("Tokens per second", "short", "Tokens trained on, padding left out, over 5 minutes", TOKENS),
                _number(
                    "Goodput", "percentunit", "Time in steps that count, of all time since the first start", GOODPUT
                ),
                _number("Alerts", "short", "Alerts that fire now: each has a section in docs/alerts.md", NUM_ALERTS),
            ),
        ),
        (
            "Speed",
            (
                _one("Tokens per second", "short", "Tokens trained on, padding left out, over 5 minutes", TOKENS),
                Panel(
                    "Use of the devices",
                    "percentunit",
                    "FLOPs of the model (MFU) and FLOPs computed (HFU) over peak",
                    (MFU, HFU),
                ),
                _one(
                    "Step, 99%",
                    "s",
                    "99 of 100 steps took less, over 5 minutes and all ranks",
                    f"run:bigmodel_step_duration_seconds:p99_5m{RUN}",
                ),
            ),
        ),
        (
            "Learning",
            (
                _one("Training loss", "none", "Mean of the last step, nats per label", _metric("training_loss_nats")),
                _one(
                    "Validation loss",
                    "none",
                    "On the validation split, nats per label",
                    _metric("validation_loss_nats"),
                ),
                _one(
                    "Gradient norm", "none", "Global norm of the last step, before clipping", _metric("gradient_norm")
                ),
            ),
        ),
        (
            "Health",
            (
                Panel(
                    "Ranks that live",
                    "short",
                    "Ranks whose process lives, and ranks of the run",
                    (
                        Query(f"sum by (run) ({_metric('rank_up')})", "{{run}} live"),
                        Query(f"max by (run) ({_metric('world_size')})", "{{run}} of"),
                    ),
                ),
                _one("Age of the checkpoint", "s", "What is lost at most if a rank dies now", CHECKPOINT_AGE),
                _one(
                    "Restarts",
                    "short",
                    "Starts after the first, by how the one before ended",
                    f"sum by (run, cause) ({_metric('restarts_total')})",
                    "{{run}} {{cause}}",
                ),
            ),
        ),
    ),
)

RANKS = Dashboard(
    "bigmodel ranks",
    "Which rank is slow, stopped or dead, and in which phase.",
    (
        (
            "Alive",
            (
                _one(
                    "Lives",
                    "none",
                    "1 while the rank's process lives, else 0",
                    _metric("rank_up", NODE),
                    OF_RANK,
                    "states",
                ),
                _one(
                    "Hangs",
                    "none",
                    "1 while the process is stopped or the watch for hanging ranks names it",
                    _metric("rank_hangs", NODE),
                    OF_RANK,
                    "states",
                ),
                _one(
                    "Sign of life, age",
                    "s",
                    "Seconds since the rank last wrote its record: after steps, saves, evaluations",
                    f"time() - {_metric('rank_heartbeat_timestamp_seconds', NODE)}",
                    OF_RANK,
                ),
            ),
        ),
        (
            "Speed",
            (
                _one(
                    "Busy",
                    "percentunit",
                    "Share of the time in forward, backward and optimizer: a slow rank stands above the others",
                    _rate("rank_busy_seconds", NODE),
                    OF_RANK,
                ),
                _one(
                    "Lag of the slowest",
                    "s",
                    "How much longer the slowest rank worked in a step than the rank in the middle",
                    _metric("slowest_rank_lag_seconds"),
                ),
                _one(
                    "The slowest", "none", "Number of the rank that worked longest in a step", _metric("slowest_rank")
                ),
                _one(
                    "Phases",
                    "percentunit",
                    "Share of the time of the chosen ranks in each phase, mean over them",
                    f"avg by (run, phase) ({_rate('phase_seconds', NODE)})",
                    "{{run}} {{phase}}",
                    "stacked",
                ),
                _one(
                    "Waiting for others",
                    "percentunit",
                    "Share of each rank's time in communication and exchange: low where a rank is slow",
                    "sum without(phase)(rate(bigmodel_phase_seconds_total"
                    f'{{job="bigmodel",run=~"$run",node=~"$node",phase=~"communication|exchange"}}{WINDOW}))',
                    OF_RANK,
                ),
                _one("Step", "none", "The last step that each rank has ended", _metric("rank_step", NODE), OF_RANK),
            ),
        ),
        (
            "Memory",
            (
                _one(
                    "Process",
                    "bytes",
                    "Resident memory of each rank's process",
                    _metric("process_resident_bytes", NODE),
                    OF_RANK,
                ),
                Panel(
                    "GPU",
                    "bytes",
                    "GPU memory in tensors, its highest, and what torch's allocator holds",
                    (
                        Query(_metric("device_memory_allocated_bytes", NODE), OF_RANK + " in tensors"),
                        Query(_metric("device_memory_peak_bytes", NODE), OF_RANK + " highest"),
                        Query(_metric("device_memory_reserved_bytes", NODE), OF_RANK + " held"),
                    ),
                ),
                _one(
                    "GPU, retries",
                    "short",
                    "Allocations for which torch had to empty its cache: memory is short or in pieces",
                    _metric("device_memory_retries_total", NODE),
                    OF_RANK,
                ),
            ),
        ),
        (
            "GPU",
            (
                _one(
                    "Temperature",
                    "celsius",
                    "Temperature of each rank's GPU",
                    _metric("device_temperature_celsius", NODE),
                    OF_RANK,
                ),
                _one("Power", "watt", "Power that each rank's GPU draws", _metric("device_power_watts", NODE), OF_RANK),
                _one(
                    "Slowed down",
                    "none",
                    "1 while the GPU is slowed down for a reason",
                    _metric("device_throttled", NODE),
                    OF_RANK + " {{reason}}",
                    "states",
                ),
                Panel(
                    "Errors",
                    "short",
                    "Memory errors since the GPU's reset, and critical XID errors since the start",
                    (
                        Query(_metric("device_ecc_errors_total", NODE), OF_RANK + " {{kind}}"),
                        Query(_metric("device_xid_errors_total", NODE), OF_RANK + " XID"),
                    ),
                ),
            ),
        ),
    ),
)

DATA = Dashboard(
    "bigmodel data",
    "What the run is trained on, how well it is packed, and whether it waits for it.",
    (
        (
            "Waiting",
            (
                _one(
                    "Waiting for data",
                    "percentunit",
                    "Share of rank 0's time without its next batch",
                    _rate("data_wait_seconds"),
                ),
                _one(
                    "Fetched",
                    "Bps",
                    "Bytes per second that rank 0 fetches from data.remote",
                    _rate("data_fetched_bytes"),
                ),
                _one(
                    "Transfers tried again", "short", "By rank 0, since its start", _metric("data_fetch_failures_total")
                ),
            ),
        ),
        (
            "Mix",
            (
                _one(
                    "Labels per second",
                    "short",
                    "By objective and source",
                    f"sum by (run, objective, source) ({_rate('source_target_tokens')})",
                    "{{run}} {{objective}} {{source}}",
                    "stacked",
                ),
                _one(
                    "Share of the mix",
                    "percentunit",
                    "Share of all labels since the first start, by objective and source",
                    f"sum by (run, objective, source) ({_metric('source_target_tokens_total')}) "
                    f"/ on (run) group_left () sum by (run) ({_metric('source_target_tokens_total')})",
                    "{{run}} {{objective}} {{source}}",
                    "stacked",
                ),
                _one(
                    "Documents per second",
                    "short",
                    "Documents, or chunks of long ones",
                    f"sum by (run) ({_rate('documents')})",
                ),
            ),
        ),
        (
            "Packing",
            (
                _one(
                    "Packing",
                    "percentunit",
                    "Share of positions that hold a token, over 5 minutes",
                    f"run:bigmodel_packing_efficiency:ratio5m{RUN}",
                ),
                _one(
                    "Full by number of documents",
                    "short",
                    "Packed sequences with room left that were full by data.max_documents",
                    _metric("packs_document_limited_total"),
                ),
                Panel(
                    "Balance of attention",
                    "none",
                    "Attention work of rank 0's node over that of a perfect share: 1 is even",
                    (
                        Query(_metric("attention_imbalance_ratio"), "{{run}}"),
                        Query(_metric("attention_imbalance_undealt_ratio"), "{{run}} in canonical order"),
                    ),
                ),
            ),
        ),
    ),
)

LEARNING = Dashboard(
    "bigmodel learning",
    "Losses, norms, skipped steps and validation.",
    (
        (
            "Training",
            (
                _one("Loss", "none", "Mean of the last step, nats per label", _metric("training_loss_nats")),
                _one(
                    "Loss by source",
                    "none",
                    "Mean of the last step by objective and source, nats per label",
                    _metric("source_training_loss_nats"),
                    "{{run}} {{objective}} {{source}}",
                ),
                _one(
                    "Gradient norm", "none", "Global norm of the last step, before clipping", _metric("gradient_norm")
                ),
                _one("Learning rate", "none", "Of the last step", _metric("learning_rate")),
                _one(
                    "Squared log of the partition",
                    "none",
                    "Mean of logsumexp(logits)^2: grows where logits drift",
                    _metric("z_loss"),
                ),
                _one(
                    "Largest attention score",
                    "none",
                    "Of the last step over layers, heads and documents, before bias and cap; with "
                    "metrics.attention_scores or optimizer.qk_clip",
                    _metric("largest_attention_score"),
                ),
                Panel(
                    "Skipped steps, spikes",
                    "short",
                    "Steps without an update by reason, and spikes by signal, since the first start",
                    (
                        Query(_metric("steps_skipped_total"), "{{run}} skipped: {{reason}}"),
                        Query(_metric("spikes_total"), "{{run}} spikes: {{signal}}"),
                    ),
                ),
            ),
        ),
        (
            "Experts",
            (
                _one(
                    "Largest load of an expert",
                    "none",
                    "Over the mean load of its layer, in the most uneven layer of the last step: 1 is even",
                    _metric("expert_load_ratio"),
                ),
                _one(
                    "Evenness of the experts' loads",
                    "percentunit",
                    "Entropy of the loads over that of even loads, in the most uneven layer of the last step",
                    _metric("expert_load_entropy_ratio"),
                ),
                _one(
                    "Dropped choices of experts",
                    "percentunit",
                    "Of the last step's, over all layers; only with model.experts.capacity_factor",
                    _metric("expert_dropped_ratio"),
                ),
                _one(
                    "Squared log of the routers' partition",
                    "none",
                    "Mean of logsumexp(logits)^2 over layers: grows where the routers' logits drift",
                    _metric("router_z"),
                ),
            ),
        ),
        (
            "Weights",
            (
                _one(
                    "Weights",
                    "none",
                    "L2 norm of the weights, by kind of layer",
                    _metric("weight_norm"),
                    "{{run}} {{layers}}",
                ),
                _one(
                    "Update",
                    "none",
                    "L2 norm of the last measured update, by kind of layer",
                    _metric("update_norm"),
                    "{{run}} {{layers}}",
                ),
                _one(
                    "Update over weights",
                    "percentunit",
                    "How much an update changes the weights, by kind of layer: about 0.1% is usual",
                    f"{_metric('update_norm')} / {_metric('weight_norm')}",
                    "{{run}} {{layers}}",
                ),
            ),
        ),
        (
            "Validation",
            (
                _one("Validation loss", "none", "Nats per label", _metric("validation_loss_nats")),
                _one(
                    "Validation loss by source",
                    "none",
                    "By objective and source, nats per label",
                    _metric("source_validation_loss_nats"),
                    "{{run}} {{objective}} {{source}}",
                ),
                _one(
                    "Accuracy",
                    "percentunit",
                    "Share of labels that are the model's likeliest token",
                    _metric("validation_accuracy_ratio"),
                ),
            ),
        ),
    ),
)

GOODPUT_DASHBOARD = Dashboard(
    "bigmodel goodput",
    "Where the time went since the first start, and what saves cost.",
    (
        (
            "Time",
            (
                _one("Goodput", "percentunit", "Time in steps that count, of all time since the first start", GOODPUT),
                _one(
                    "Time lost, now",
                    "percentunit",
                    "Share of the last hour lost to each cause",
                    f"run:bigmodel_lost_seconds:rate1h{RUN}",
                    "{{run}} {{cause}}",
                    "stacked",
                ),
                _one(
                    "Time lost, in all",
                    "s",
                    "Since the first start, by cause",
                    f"sum by (run, cause) ({_metric('lost_seconds_total')})",
                    "{{run}} {{cause}}",
                    "stacked",
                ),
                _one(
                    "Productive time",
                    "s",
                    "In steps that count, since the first start",
                    _metric("productive_seconds_total"),
                ),
                _one(
                    "Restarts",
                    "short",
                    "Starts after the first, by how the one before ended",
                    f"sum by (run, cause) ({_metric('restarts_total')})",
                    "{{run}} {{cause}}",
                ),
                _one(
                    "Evaluations",
                    "s",
                    "Time in evaluations, since the first start",
                    _metric("evaluation_seconds_total"),
                ),
            ),
        ),
        (
            "Checkpoints",
            (
                _one("Age of the checkpoint", "s", "What is lost at most if a rank dies now", CHECKPOINT_AGE),
                _one(
                    "Time of a save", "s", "That the last checkpoint took", _metric("last_checkpoint_duration_seconds")
                ),
                _one("Size", "bytes", "Of the last checkpoint", _metric("last_checkpoint_bytes")),
                _one("Saved", "short", "Checkpoints since the first start", _metric("checkpoints_total")),
                _one(
                    "Not saved",
                    "short",
                    "Checkpoints that could not be saved, by reason",
                    _metric("checkpoint_failures_total"),
                    "{{run}} {{reason}}",
                ),
                _one(
                    "Lines that wait",
                    "short",
                    "Lines of metrics.jsonl that could not be written when they came",
                    _metric("delayed_lines_total"),
                ),
            ),
        ),
        (
            "Energy",
            (
                _one(
                    "Energy of a token",
                    "joule",
                    "Of the last step by its tokens: GPUs and processors, as far as all of them have a counter",
                    _metric("energy_joules_per_token"),
                ),
                _one(
                    "Power",
                    "watt",
                    "In counted steps: of all GPUs (device) and of all nodes' processors (host)",
                    _rate("energy_joules"),
                    "{{run}} {{part}}",
                    "stacked",
                ),
                _one(
                    "Energy, in all",
                    "joule",
                    "In counted steps, since the first start",
                    _metric("energy_joules_total"),
                    "{{run}} {{part}}",
                    "stacked",
                ),
            ),
        ),
    ),
)

FLEET = Dashboard(
    "bigmodel fleet",
    "All runs side by side: which needs a look.",
    (
        (
            "Runs",
            (
                Panel(
                    "Runs",
                    "short",
                    "Runs that live: steps, share of all steps, loss, tokens per second, goodput, restarts, alerts",
                    (
                        Query(f"max by (run) ({_metric('steps_total')})", "steps"),
                        Query(PROGRESS, "progress"),
                        Query(f"max by (run) ({_metric('training_loss_nats')})", "loss"),
                        Query(f"max by (run) ({TOKENS})", "tokens/s"),
                        Query(f"max by (run) ({GOODPUT})", "goodput"),
                        Query(f"sum by (run) ({_metric('restarts_total')})", "restarts"),
                        Query(NUM_ALERTS, "alerts"),
                    ),
                    "table",
                    24,
                ),
            ),
        ),
        (
            "Compared",
            (
                _one("Progress", "percentunit", "Steps done of training.steps", PROGRESS),
                _one(
                    "Loss", "none", "Mean training loss of the last step, nats per label", _metric("training_loss_nats")
                ),
                _one("Tokens per second", "short", "Tokens trained on, padding left out, over 5 minutes", TOKENS),
                Panel(
                    "Use of the devices",
                    "percentunit",
                    "FLOPs of the model over the peak of all devices (MFU), last step",
                    (MFU,),
                ),
                _one("Goodput", "percentunit", "Time in steps that count, of all time since the first start", GOODPUT),
                _one("Ranks", "short", "Ranks whose process lives", f"sum by (run) ({_metric('rank_up')})"),
                _one("Alerts", "short", "Alerts that fire", NUM_ALERTS, "{{run}}", "stacked"),
                _one(
                    "Without a step",
                    "s",
                    "Seconds since the last step ended",
                    f"time() - max by (run) ({_metric('last_step_timestamp_seconds')})",
                ),
                _one("Age of the checkpoint", "s", "What is lost at most if a rank dies now", CHECKPOINT_AGE),
            ),
        ),
    ),
)

NODES = Dashboard(
    "bigmodel nodes",
    "The machines, as the run's own exporters see them; no node_exporter is needed.",
    (
        (
            "Alive",
            (
                _one(
                    "Answers",
                    "none",
                    "1 if the node's exporter answered the last scrape, else 0",
                    f"up{NODE}",
                    OF_NODE,
                    "states",
                ),
                _one(
                    "Ranks that live",
                    "short",
                    "Ranks whose process lives",
                    f"sum by (run, node, host) ({_metric('rank_up', NODE)})",
                    OF_NODE,
                ),
                _one(
                    "Busy",
                    "percentunit",
                    "Share of the time in forward, backward and optimizer, mean over the node's ranks",
                    f"avg by (run, node, host) ({_rate('rank_busy_seconds', NODE)})",
                    OF_NODE,
                ),
            ),
        ),
        (
            "Processors and memory",
            (
                _one(
                    "Processors",
                    "short",
                    "Cores in use, by mode, all processes of the node",
                    f"sum by (run, node, host, mode) ({_rate('node_cpu_seconds', NODE)})",
                    OF_NODE + " {{mode}}",
                    "stacked",
                ),
                _one(
                    "Memory in use",
                    "percentunit",
                    "Share of the node's memory that is not free and cannot be freed",
                    f"1 - {_metric('node_memory_available_bytes', NODE)} / {_metric('node_memory_total_bytes', NODE)}",
                    OF_NODE,
                ),
                _one(
                    "Memory of the ranks",
                    "bytes",
                    "Resident memory of the node's ranks",
                    f"sum by (run, node, host) ({_metric('process_resident_bytes', NODE)})",
                    OF_NODE,
                ),
            ),
        ),
        (
            "Disk and network",
            (
                _one(
                    "Disk, free",
                    "bytes",
                    "Room left on the file system of the run directory",
                    _metric("disk_free_bytes", NODE),
                    OF_NODE,
                ),
                _one(
                    "Disk, in use",
                    "percentunit",
                    "Share of the file system of the run directory",
                    f"1 - {_metric('disk_free_bytes', NODE)} / {_metric('disk_total_bytes', NODE)}",
                    OF_NODE,
                ),
                Panel(
                    "Network",
                    "Bps",
                    "Bytes per second, by network device; InfiniBand too",
                    (
                        Query(_rate("network_received_bytes", NODE), OF_NODE + " {{device}} received"),
                        Query(_rate("network_transmitted_bytes", NODE), OF_NODE + " {{device}} sent"),
                    ),
                ),
            ),
        ),
    ),
)

DASHBOARDS = {
    "overview": OVERVIEW,
    "ranks": RANKS,
    "data": DATA,
    "learning": LEARNING,
    "goodput": GOODPUT_DASHBOARD,
    "fleet": FLEET,
    "nodes": NODES,
}
