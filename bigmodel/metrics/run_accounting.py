"""Run accounting: counts of a run and its seconds by cause, over all its starts.

In: the lines of metrics.jsonl, in order. Out: counts, seconds by cause, samples for the metrics endpoint. Guarantees:
- A pure fold, so anyone can audit it. Counts never decrease.
- Work repeated after a restart (its step is not above the highest one counted) counts once; its time is lost to
  "replay".
- Productive and lost seconds add up to the wall time from the first start to the last line, because each line holds the
  time since the previous line.

Example: steps 1 to 4 take 1 s each, the run dies, and steps 3 and 4 are repeated after a restart from step 2: 4 steps,
4 productive seconds, 2 seconds "replay", the rest "start" and "down".

    start       from the beginning of the process to its first step: imports, data, model, reading a checkpoint
    compile     torch.compile and Triton
    data        waiting for the next batch
    checkpoint  saving, while training waits
    evaluation  on the validation split and on tasks
    replay      steps, evaluations and checkpoints repeated after a restart
    hang        the part of a step above ten times the median of the last 64 steps; the whole time between the last step
                and a failure, death or order to stop, if it is longer than ten median steps or a watchdog recorded a
                hang. A save or evaluation that had begun keeps its own cause, however it ended
    skipped     steps without an update
    stopped     from an orderly end to the next start
    down        otherwise: from the last step, evaluation or save before a death or failure to the next start
    finish      after the last step, its evaluation and save
"""

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice
from operator import lt, sub
from typing import Any

CAUSES = (
    "start", "compile", "data", "checkpoint", "evaluation", "replay", "hang", "skipped", "stopped", "down", "finish",
)  # fmt: skip
HANG_FACTOR = 10  # times the median step
RECENT_STEPS = 64
MIN_RECENT = 8
MOST_CLASSES = 100  # with series of their own
LEFT_OUT = "left_out"  # skip reason of a step that a rewind leaves out
ENDINGS = ("stopped", "finished", "died", "hang", "failed")  # endings of a start: the causes of the next start
SAVE_FAILURES = ("disk_full", "permission", "io_error", "not_finite")  # reasons of failed saves
FROM_ZERO = (
    "steps",
    "target_tokens",
    "positions",
    "padding_positions",
    "documents",
    "packs_document_limited",
    "data_wait_seconds",
    "evaluations",
    "evaluation_seconds",
    "checkpoints",
    "checkpoint_written_bytes",
    "checkpoint_seconds",
    *(f"checkpoint_failures|{reason}" for reason in SAVE_FAILURES),
    *(f"steps_skipped|{reason}" for reason in ("not_finite", "spike", "left_out")),
    "spikes|loss",
    "spikes|gradient_norm",
    *(f"restarts|{ending}" for ending in ENDINGS),
)  # fmt: skip  - counters start at 0: one that appears with its first event hides that event from rate()
COUNTED = ("step", "evaluation", "tasks", "checkpoint")
Samples = dict[str, list[list[Any]]]  # metric name -> [[label values, value], ...]


class RunAccounting:
    """Add the lines in order; read `counts`, `seconds` and `samples()` at any time."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(FROM_ZERO, 0)  # metric name, "|" and each label -> total
        self.seconds = dict.fromkeys(("productive", *CAUSES), 0.0)
        self.counted = dict.fromkeys(COUNTED, 0)  # kind -> highest step in the counts
        self.began: float | None = None  # Unix time of the first process; earlier if the clock was set back since
        self.time = 0.0  # Unix time of the last line
        self.last: dict[str, Mapping[str, Any]] = {}  # kind -> last line of that kind
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._shortest = math.inf
        self._hung = False  # whether the last start hung before it failed
        self._under_way: str | None = None  # the cause in the last line, if that line is a "begin"

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line; unknown kinds are ignored."""
        kind = line["kind"]
        if kind == "begin":
            self._under_way = line["cause"]
        elif kind == "spike":  # counted even for a repeated step: a rewind ends the start before the step's own line
            for signal in line["signals"]:
                self._count("spikes", 1, signal)
        if kind not in (*COUNTED, "failed_checkpoint", "start", "end"):
            return
        again = kind in COUNTED and line["step"] <= self.counted[kind]
        if kind == "start":
            self._hung = False
            self._restore(line["carried"])
            self.seconds["start"] += line["lap"]
        elif kind == "end":
            self._end(line)
        elif kind == "failed_checkpoint":  # counted even for a repeated step: each attempt counts
            self._count("checkpoint_failures", 1, line["reason"])
            self.seconds["checkpoint"] += line["lap"]
        elif again:
            self.seconds["replay"] += line["lap"]
            if kind == "step":
                self._count_left_out(line)
        else:
            self.counted[kind] = line["step"]
            self._adders[kind](line)
        for cause, seconds in line.get("spent", {}).items():
            self.seconds[cause] += seconds
        self._under_way = None
        self.time = line["time"]
        self.last[kind] = line
        if kind == "step" and line["norms"]:
            self.last["norms"] = line

    def add_step_seconds(
        self,
        step: int,
        time: float,
        lap: float,
        waited: float,
        compiled: float,
        skipped: bool,
        spent: Mapping[str, float],
    ) -> None:
        """The part of `add` that a step's line has in `seconds`; `counts` stay. Ten times as fast as a whole line.

        waited, compiled: seconds of the lap. spent: other seconds by cause, as in the line.
        """
        if step <= self.counted["step"]:
            self.seconds["replay"] += lap
        else:
            self.counted["step"] = step
            self._spend(lap, waited, compiled, skipped)
        for cause, seconds in spent.items():
            self.seconds[cause] += seconds
        self._under_way = None
        self.time = time

    def add_steps(
        self,
        steps: Sequence[float],
        time: float,
        laps: Sequence[float],
        waited: Sequence[float],
        compiled: Sequence[float],
        spent: Mapping[str, Sequence[float]],
    ) -> dict[str, list[float]] | None:
        """`add_step_seconds` of lines in a row, none of a skipped step: the same to the last bit, in C.

        time: of the last line. spent: cause -> seconds in each line. Returns the seconds of the causes that grew, after
        each line; None, and changes nothing, if a step is repeated or may hang: add them one by one.
        """
        if steps[0] <= self.counted["step"] or not all(map(lt, steps, islice(steps, 1, None))):
            return None
        data = list(map(min, laps, waited))
        rest = list(map(sub, laps, data))
        compiling = list(map(min, rest, compiled))
        left = list(map(sub, rest, compiling))
        shortest = list(accumulate(left, min, initial=self._shortest))
        if any(one > HANG_FACTOR * least for one, least in zip(left, islice(shortest, 1, None), strict=True)):
            return None
        grown = {"productive": left, "data": data, "compile": compiling}
        if grown.keys() & spent.keys():
            return None
        after = {
            cause: list(accumulate(seconds, initial=self.seconds[cause]))[1:]
            for cause, seconds in {**grown, **spent}.items()
        }
        self.seconds |= {cause: seconds[-1] for cause, seconds in after.items()}
        self.counted["step"] = int(steps[-1])
        self._shortest = shortest[-1]
        self._durations.extend(left[-RECENT_STEPS:])
        self._under_way = None
        self.time = time
        return after

    @property
    def _adders(self) -> dict[str, Callable[[Mapping[str, Any]], None]]:
        return {
            "step": self._add_step,
            "evaluation": self._add_evaluation,
            "tasks": self._add_tasks,
            "checkpoint": self._add_checkpoint,
        }

    def carry(self, began: float, ending: str | None, ended: float | None = None) -> dict[str, Any]:
        """The state for the line of a new start; the cause of the pause since the last line follows from `ending`.

        `began`: Unix time of the new process's beginning. `ending`: of the last start, one of ENDINGS; None for the
        first start. `ended`: Unix time of that ending, if the launcher or a watchdog recorded it and not the start.
        """
        if ending is not None:
            if self.began is not None and began < self.time:  # the clock was set back: the unknown pause counts as 0
                self.began -= self.time - began
            pause = max(0.0, began - self.time)
            stood = min(max(0.0, (ended or self.time) - self.time), pause)
            if ending == "hang" or (not self._under_way and self._is_hang(stood)):
                hang = stood if ended else pause
                self._hung, pause = True, pause - hang
                self.seconds["hang"] += hang
            elif self._under_way:
                self.seconds[self._under_way] += stood
                pause -= stood
            self.seconds["stopped" if ending in ("stopped", "finished") else "down"] += pause
            cause = "hang" if self._hung else ending if ending in ENDINGS else "failed"
            self._count("restarts", 1, cause)
        if self.began is None:
            self.began = began
        keys = ("counts", "seconds", "counted", "began")
        return copy.deepcopy({key: getattr(self, key) for key in keys})

    @property
    def wall_seconds(self) -> float:
        """Wall seconds from the beginning of the first process to the last line."""
        return self.time - self.began if self.began is not None else 0.0

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization of the last step, attention counted as its masks allow it; None: unknown."""
        if not {"step", "start"} <= self.last.keys():
            return None
        shares = _utilization(self.last["step"], self.last["start"]).get("model_flops_utilization_ratio")
        return float(shares[0][1]) if shares else None

    def samples(self) -> Samples:
        """All metrics of the run: name -> [[label values, value], ...]."""
        found: Samples = {"productive_seconds": [[[], self.seconds["productive"]]]}
        found["lost_seconds"] = [[[cause], self.seconds[cause]] for cause in CAUSES]
        if self.began is not None:
            found["first_start_timestamp_seconds"] = [[[], self.began]]
        for key, value in self.counts.items():
            name, *labels = key.split("|")
            found.setdefault(name, []).append([labels, value])
        for kind, gauges in GAUGES.items():
            if kind in self.last:
                found |= gauges(self.last[kind])
        if "step" in self.last and "start" in self.last:
            found |= _utilization(self.last["step"], self.last["start"])
        return found

    def _restore(self, carried: Mapping[str, Any]) -> None:
        """The state at a start; a run of an earlier version lacks the counters and causes that came later."""
        self.counts = dict.fromkeys(FROM_ZERO, 0) | carried["counts"]
        self.seconds = dict.fromkeys(("productive", *CAUSES), 0.0) | carried["seconds"]
        self.counted, self.began = dict.fromkeys(COUNTED, 0) | carried["counted"], carried["began"]

    def _count(self, name: str, amount: float, *labels: str) -> None:
        key = "|".join((name, *(label.replace("|", "/") for label in labels)))
        self.counts[key] = self.counts.get(key, 0) + amount

    def _add_step(self, line: Mapping[str, Any]) -> None:
        self._count("steps", 1)
        for name, key in (
            ("target_tokens", "targets"),
            ("positions", "positions"),
            ("padding_positions", "padding"),
            ("documents", "documents"),
            ("packs_document_limited", "packs_document_limited"),
            ("data_wait_seconds", "data_wait_seconds"),
        ):
            self._count(name, line[key])
        for part in line["parts"]:
            self._count("source_target_tokens", part["targets"], part["objective"], part["source"])
        if line["flops"]:
            for convention in ("causal", "full"):
                self._count("model_flops", line["flops"][convention], convention)
            self._count("hardware_flops", line["flops"]["hardware"])
        for part in ("device", "host"):
            if line.get(f"{part}_joules") is not None:  # absent in lines of earlier versions
                self._count("energy_joules", line[f"{part}_joules"], part)
        if line["skipped"] and line["skip_reason"] != LEFT_OUT:
            self._count("steps_skipped", 1, line["skip_reason"])
        self._count_left_out(line)
        self._spend(line["lap"], line["data_wait_seconds"], line["compile_seconds"], line["skipped"])

    def _count_left_out(self, line: Mapping[str, Any]) -> None:
        """Count a step that a rewind leaves out, once; before the rewind it was a step like others."""
        if line["skipped"] and line["skip_reason"] == LEFT_OUT and line["step"] > self.counted.get(LEFT_OUT, 0):
            self.counted[LEFT_OUT] = line["step"]
            self._count("steps_skipped", 1, LEFT_OUT)

    def _spend(self, lap: float, waited: float, compiled: float, skipped: bool) -> None:
        left = lap
        for cause, wanted in (("data", waited), ("compile", compiled)):
            taken = min(left, wanted)
            self.seconds[cause] += taken
            left -= taken
        self._shortest = min(self._shortest, left)  # of all steps: the median, which costs 100 times as much, is longer
        hang = max(0.0, left - self._longest_step()) if left > HANG_FACTOR * self._shortest else 0.0
        self._durations.append(left)
        self.seconds["hang"] += hang
        self.seconds["skipped" if skipped else "productive"] += left - hang

    def _end(self, line: Mapping[str, Any]) -> None:
        if line["ending"] in ("stopped", "finished"):
            self.seconds["finish"] += line["lap"]
            return
        self._hung = not self._under_way and self._is_hang(line["lap"])
        self.seconds[self._under_way or ("hang" if self._hung else "down")] += line["lap"]

    def _is_hang(self, seconds: float) -> bool:
        return seconds > self._longest_step()

    def _longest_step(self) -> float:
        """Seconds above which a step hangs: ten times the median; infinite before MIN_RECENT steps."""
        return HANG_FACTOR * statistics.median(self._durations) if len(self._durations) >= MIN_RECENT else math.inf

    def _add_evaluation(self, line: Mapping[str, Any]) -> None:
        self._count("evaluations", 1)
        self._count("evaluation_seconds", line["seconds"])
        self.seconds["evaluation"] += line["lap"]

    def _add_tasks(self, line: Mapping[str, Any]) -> None:
        self._count("evaluation_seconds", line["seconds"])
        self.seconds["evaluation"] += line["lap"]

    def _add_checkpoint(self, line: Mapping[str, Any]) -> None:
        self._count("checkpoints", 1)
        self._count("checkpoint_written_bytes", line["bytes"])
        self._count("checkpoint_seconds", line["seconds"])
        self.seconds["checkpoint"] += line["lap"]


def _of_start(line: Mapping[str, Any]) -> Samples:
    names = ("world_size", "planned_steps", "parameters", "device_peak_flops")
    return {name: [[[], line[name]]] for name in names if line.get(name)}  # earlier versions: no planned_steps


def of_experts(line: Mapping[str, Any]) -> dict[str, float]:
    """The most uneven layer of a step's line; empty for a model without experts."""
    if not (loads := line.get("expert_loads")):  # absent in lines of earlier versions
        return {}
    largest = max(loads["largest"])
    return {
        "expert_load_ratio": largest,
        "expert_load_layer": loads.get("first_layer", 0) + loads["largest"].index(largest),
        "expert_load_entropy_ratio": min(loads["entropy"]),
        "router_z": loads["router_z"],
    } | ({"expert_dropped_ratio": dropped} if (dropped := loads.get("dropped_share")) is not None else {})


def _of_step(line: Mapping[str, Any]) -> Samples:
    named = ("gradient_norm", "learning_rate", "z_loss", "loss_scale", "slowest_rank", "slowest_rank_lag_seconds")
    gauges = (
        {name: line[name] for name in named}
        | of_experts(line)
        | {
            "distillation_loss_nats": line.get("distillation_loss"),  # absent in lines of earlier versions
            "largest_attention_score": line.get("largest_attention_score"),  # absent in lines of earlier versions
            "pruned_ratio": line.get("pruned_share"),
            "sampled_input_ratio": line.get("sampled_share"),  # absent in lines of earlier versions
            "energy_joules_per_token": joules_per_token(line),
            "training_loss_nats": line["loss"],
            "training_unweighted_loss_nats": line.get("unweighted_loss"),  # absent in lines of earlier versions
            "last_step_timestamp_seconds": line["time"],
            "tokens_per_second": line["positions"] / line["step_seconds"] if line["step_seconds"] else None,
            "packing_efficiency_ratio": line["positions"] / (line["positions"] + line["padding"]),
            "attention_imbalance_ratio": line["imbalance"],
            "attention_imbalance_undealt_ratio": line["imbalance_undealt"],
            "data_fetched_bytes": line["fetched_bytes"],
            "data_fetch_failures": line["fetch_failures"],
        }
    )
    samples: Samples = {name: [[[], value]] for name, value in gauges.items() if value is not None}
    if line["parts"]:
        samples["source_training_loss_nats"] = _losses(line["parts"])
    return samples


def joules_per_token(line: Mapping[str, Any]) -> float | None:
    """Of a step's line, GPUs and processors together as far as they are known; None: nothing is."""
    known = [line[name] for name in ("device_joules", "host_joules") if line.get(name) is not None]
    return sum(known) / line["positions"] if known and line["positions"] else None


def _losses(parts: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [[[part["objective"], part["source"]], part["nats"] / part["targets"]] for part in parts if part["targets"]]


def _of_norms(line: Mapping[str, Any]) -> Samples:
    return {
        name: [[[layers], norms[name]] for layers, norms in line["norms"].items() if name in norms]
        for name in ("weight_norm", "update_norm", "l1_norm", "zero_ratio")
    }


def _utilization(step: Mapping[str, Any], start: Mapping[str, Any]) -> Samples:
    """FLOPs per second of wall time over the peak of all devices."""
    if not (step["flops"] and start["device_peak_flops"] and step["step_seconds"]):
        return {}
    most = start["device_peak_flops"] * start["world_size"] * step["step_seconds"]
    return {
        "model_flops_utilization_ratio": [[[name], step["flops"][name] / most] for name in ("causal", "full")],
        "hardware_flops_utilization_ratio": [[[], step["flops"]["hardware"] / most]],
    }


def _of_evaluation(line: Mapping[str, Any]) -> Samples:
    samples: Samples = {"validation_loss_nats": [[[], line["nats_per_token"]]]}
    for name in ("accuracy", "calibration_error"):
        if name in line:
            samples[f"validation_{name}_ratio"] = [[[], line[name]]]
    if line.get("parts"):
        samples["source_validation_loss_nats"] = _losses(line["parts"])
    if line["bits_per_byte"] is not None:
        samples["validation_compression_ratio"] = [[[], line["bits_per_byte"] / 8]]  # Prometheus' unit is bytes
    return samples | (_of_classes(line["scores"]) if "scores" in line else {})


def _of_classes(scores: Mapping[str, Any]) -> Samples:
    """Of the first `MOST_CLASSES` classes each; lines of earlier versions have fewer scores."""
    by_class = dict(list(scores["by_class"].items())[:MOST_CLASSES])
    samples: Samples = {
        "validation_f1_ratio": [[[name], scores[f"{name}_f1"]] for name in ("macro", "micro", "weighted")],
        **{
            f"validation_class_{what}_ratio": [[[name], numbers[what]] for name, numbers in by_class.items()]
            for what in ("precision", "recall", "f1")
        },
    }
    if "balanced_accuracy" in scores:
        samples["validation_balanced_accuracy_ratio"] = [[[], scores["balanced_accuracy"]]]
        samples["validation_class_documents"] = [[[name], one["documents"]] for name, one in by_class.items()]
        for what in ("precision", "recall"):
            samples[f"validation_{what}_ratio"] = [[[of], scores[f"{of}_{what}"]] for of in ("macro", "weighted")]
    return samples


def _of_tasks(line: Mapping[str, Any]) -> Samples:
    return {
        "task_score": [[[task, metric], value] for task, of in line["scores"].items() for metric, value in of.items()]
    }


def _of_checkpoint(line: Mapping[str, Any]) -> Samples:
    return {
        "last_checkpoint_timestamp_seconds": [[[], line["time"]]],
        "last_checkpoint_step": [[[], line["step"]]],
        "last_checkpoint_bytes": [[[], line["bytes"]]],
        "last_checkpoint_duration_seconds": [[[], line["seconds"]]],
    }


GAUGES = {
    "start": _of_start,
    "step": _of_step,
    "norms": _of_norms,
    "evaluation": _of_evaluation,
    "tasks": _of_tasks,
    "checkpoint": _of_checkpoint,
}
