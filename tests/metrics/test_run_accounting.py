"""The run_accounting accounts for every count and second of a run over its starts, kills and replays."""

import json
import math
from typing import Any

import pytest

from bigmodel.metrics.run_accounting import CAUSES, RunAccounting
from bigmodel.metrics.writers import scalars

Line = dict[str, Any]


def step(number: int, lap: float = 1.0, **changes: Any) -> Line:
    line = {
        "kind": "step", "step": number, "lap": lap, "loss": 2.0, "gradient_norm": 1.0, "learning_rate": 0.1,
        "targets": 100, "positions": 100, "padding": 28, "documents": 5, "step_seconds": lap, "data_wait_seconds": 0.0,
        "compile_seconds": 0.0, "packs_document_limited": 0, "imbalance": 1.0,
        "imbalance_undealt": 1.5, "fetched_bytes": 7, "fetch_failures": 0, "flops": None,
        "skipped": False, "skip_reason": "not_finite", "parts": [], "z_loss": None, "loss_scale": None,
        "slowest_rank": None, "slowest_rank_lag_seconds": None, "norms": None,
    }  # fmt: skip
    return line | changes


class Run:
    """A run on a clock of its own: every line takes its lap. Keeps the file as `bigmodel.metrics.recorder` does."""

    def __init__(self) -> None:
        self.now, self.file = 1000.0, []
        self.run_accounting = RunAccounting()

    def add(self, line: Line) -> None:
        self.now += line.get("lap", 0.0)
        self.file.append({**line, "time": self.now})
        self.run_accounting.add(json.loads(json.dumps(self.file[-1])))

    def start(
        self, first_step: int, ending: str | None, after: float = 0.0, lap: float = 5.0, stood: float | None = None
    ) -> None:
        """`stood`: seconds from the last line to the death, where somebody saw that."""
        ended = None if stood is None else self.now + stood
        self.now += after
        carried = self.run_accounting.carry(self.now, ending, ended)
        self.file = [
            line for line in self.file if line["kind"] in ("start", "end") or line.get("step", 0) <= first_step
        ]
        self.run_accounting = RunAccounting()
        for line in self.file:
            self.run_accounting.add(line)
        facts = {"world_size": 2, "parameters": 10, "device_peak_flops": 100.0, "began": self.now}
        self.add({"kind": "start", "step": first_step, "lap": lap, "carried": carried, **facts})

    @property
    def lost(self) -> dict[str, float]:
        return {cause: seconds for cause, seconds in self.run_accounting.seconds.items() if seconds}


def test_each_second_has_one_cause_over_a_kill_and_a_stop() -> None:
    run = Run()
    run.start(0, None)
    for number in (1, 2):
        run.add(step(number, 2.0, data_wait_seconds=0.5))
    run.add({"kind": "checkpoint", "step": 2, "bytes": 10, "seconds": 3.0, "lap": 4.0})
    run.add({"kind": "evaluation", "step": 2, "nats_per_token": 2.0, "bits_per_byte": 1.0, "seconds": 6.0, "lap": 7.0})
    run.add(step(3, 2.0))
    run.add(step(4, 2.0, skipped=True))
    run.start(2, "died", after=30.0)  # of which 30 s nobody knows
    run.add(step(3, 1.5))
    run.add(step(4, 1.5))
    run.add(step(5, 20.0, compile_seconds=18.5))
    run.add({"kind": "end", "ending": "stopped", "lap": 0.25})
    run.start(5, "stopped", after=100.0, lap=1.0)
    run.add(step(6))
    assert run.lost == {
        "productive": 1.5 + 1.5 + 2.0 + 1.5 + 1.0,
        "start": 5.0 + 5.0 + 1.0,
        "data": 1.0,
        "checkpoint": 4.0,
        "evaluation": 7.0,
        "skipped": 2.0,
        "replay": 3.0,
        "down": 30.0,
        "compile": 18.5,
        "finish": 0.25,
        "stopped": 100.0,
    }
    assert run.run_accounting.wall_seconds == run.now - 1000.0 == sum(run.lost.values())
    assert run.run_accounting.counts["steps"] == 6
    assert run.run_accounting.counts["target_tokens"] == 600
    assert run.run_accounting.counts["steps_skipped|not_finite"] == 1
    assert run.run_accounting.counts["restarts|died"] == run.run_accounting.counts["restarts|stopped"] == 1


def test_counts_never_step_back_and_replayed_work_is_counted_once() -> None:
    run = Run()
    run.start(0, None)
    seen = []
    for first_step, last_step in ((0, 7), (4, 6), (2, 9)):  # killed at 7 and, before it was there again, at 6
        if first_step:
            run.start(first_step, "died")
        for number in range(first_step + 1, last_step + 1):
            run.add(step(number))
            run.add({"kind": "checkpoint", "step": number, "bytes": 3, "seconds": 0.5, "lap": 0.5})
            seen.append(run.run_accounting.counts["target_tokens"])
            assert math.isclose(sum(run.lost.values()), run.run_accounting.wall_seconds)
    assert seen == sorted(seen)
    assert seen[-1] == 900
    assert run.run_accounting.counts["checkpoint_written_bytes"] == 27
    assert run.lost["productive"] == 9.0
    assert run.lost["replay"] == (2 + 5) * 1.5
    assert [line["step"] for line in run.file if line["kind"] == "step"] == list(range(1, 10))


def test_a_run_killed_before_its_first_checkpoint_replays_from_zero() -> None:
    run = Run()
    run.start(0, None)
    run.add(step(1))
    run.start(0, "died", after=2.0)
    run.add(step(1))
    run.add(step(2))
    assert run.run_accounting.counts["steps"] == 2
    assert (run.lost["productive"], run.lost["replay"], run.lost["down"]) == (2.0, 1.0, 2.0)


def test_the_part_of_a_step_above_ten_usual_ones_is_a_hang() -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 8):
        run.add(step(number, 40.0 if number == 5 else 1.0))  # too few before it to know what is usual
    assert "hang" not in run.lost
    for number in range(8, 20):
        run.add(step(number, 40.0 if number == 12 else 1.0))
    assert run.lost["hang"] == 30.0
    run.start(19, "hang", after=60.0)
    assert run.lost["hang"] == 90.0
    assert run.run_accounting.counts["restarts|hang"] == 1


def test_a_collective_that_waits_for_its_time_limit_is_a_hang_and_then_down_time() -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 10):
        run.add(step(number))
    run.add({"kind": "end", "ending": "failed", "lap": 600.0})
    run.start(8, "failed", after=5.0)
    run.add(step(9))
    assert run.lost == {"start": 10.0, "productive": 9.0, "hang": 600.0, "down": 5.0, "replay": 1.0}
    assert run.run_accounting.wall_seconds == sum(run.lost.values())
    assert (run.run_accounting.counts["restarts|hang"], run.run_accounting.counts["restarts|failed"]) == (1, 0)
    run.add({"kind": "end", "ending": "failed", "lap": 2.0})
    run.start(9, "failed")  # this time it did not hang
    assert (run.lost["hang"], run.lost["down"]) == (600.0, 7.0)
    assert (run.run_accounting.counts["restarts|hang"], run.run_accounting.counts["restarts|failed"]) == (1, 1)


@pytest.mark.parametrize("set_by", [-3600.0, -1.0, 3600.0])
def test_a_clock_that_is_set_between_two_starts_does_not_part_the_books_from_the_wall(set_by: float) -> None:
    """Set forward, the jump is a pause like any other; set back, there was none."""
    run = Run()
    run.start(0, None)
    for number in range(1, 11):
        run.add(step(number))
    run.start(10, "died", after=set_by)
    run.add(step(11))
    assert run.lost == {"start": 10.0, "productive": 11.0} | ({"down": set_by} if set_by > 0 else {})
    assert sum(run.lost.values()) == pytest.approx(run.run_accounting.wall_seconds)
    run.start(11, "died", after=2.0)
    assert sum(run.lost.values()) == pytest.approx(run.run_accounting.wall_seconds)


@pytest.mark.parametrize("cause", ["evaluation", "checkpoint"])
@pytest.mark.parametrize("ending", ["failed", "died"])
def test_a_save_or_evaluation_that_ends_badly_is_no_hang(cause: str, ending: str) -> None:
    """However long it took: what the last line says has begun keeps its own cause, also where nobody could tell."""
    run = Run()
    run.start(0, None)
    for number in range(1, 21):
        run.add(step(number))
    run.add({"kind": "begin", "cause": cause, "step": 20, "lap": 0.0})
    if ending == "failed":
        run.add({"kind": "end", "ending": "failed", "lap": 300.0})
        run.start(20, "failed", after=10.0)
    else:
        run.start(20, "died", after=310.0, stood=300.0)
    assert run.lost == {"start": 10.0, "productive": 20.0, cause: 300.0, "down": 10.0}
    assert run.run_accounting.counts["restarts|hang"] == 0
    assert sum(run.lost.values()) == run.run_accounting.wall_seconds


def test_what_came_back_is_under_way_no_more() -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 21):
        run.add(step(number))
    run.add({"kind": "begin", "cause": "checkpoint", "step": 20, "lap": 0.0})
    run.add({"kind": "checkpoint", "step": 20, "bytes": 1, "seconds": 2.0, "lap": 2.0})
    run.add({"kind": "end", "ending": "failed", "lap": 300.0})
    assert (run.lost["checkpoint"], run.lost["hang"]) == (2.0, 300.0)


@pytest.mark.parametrize(
    ("stood", "hang", "cause"),
    [(None, 0.0, "died"), (9.0, 0.0, "died"), (60.0, 60.0, "hang"), (1e9, 100.0, "hang"), (-50.0, 0.0, "died")],
    ids=["nobody saw it", "at once", "after a hang", "a clock ahead", "a clock behind"],
)
def test_a_death_long_after_the_last_step_ended_a_hang(stood: float | None, hang: float, cause: str) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 10):
        run.add(step(number))
    run.start(9, "died", after=100.0, stood=stood)
    assert run.lost.get("hang", 0.0) == hang
    assert run.lost.get("down", 0.0) == 100.0 - hang
    assert run.run_accounting.counts[f"restarts|{cause}"] == 1
    assert run.run_accounting.wall_seconds == sum(run.lost.values())


def test_failed_saves_are_counted_by_reason_each_time_also_after_a_restart() -> None:
    run = Run()
    run.start(0, None)
    run.add(step(1))
    run.add({"kind": "failed_checkpoint", "step": 1, "reason": "disk_full", "lap": 2.0})
    run.start(0, "died")
    run.add(step(1))
    run.add({"kind": "failed_checkpoint", "step": 1, "reason": "disk_full", "lap": 2.0})
    run.add({"kind": "failed_checkpoint", "step": 1, "reason": "io_error", "lap": 2.0})
    found = {labels[0]: count for labels, count in run.run_accounting.samples()["checkpoint_failures"]}
    assert found == {"disk_full": 2, "permission": 0, "io_error": 1, "not_finite": 0}
    assert run.lost["checkpoint"] == 6.0
    assert run.run_accounting.wall_seconds == sum(run.lost.values())


def test_spikes_count_as_often_as_they_are_noted_also_in_steps_that_are_dropped() -> None:
    run = Run()
    run.start(0, None)
    run.add(step(1))
    run.add({"kind": "spike", "step": 2, "signals": ["loss", "gradient_norm"]})  # the step of a rewind has no line
    run.start(1, "failed")
    run.add({"kind": "spike", "step": 2, "signals": ["loss"]})
    run.add(step(2))
    counts = {labels[0]: count for labels, count in run.run_accounting.samples()["spikes"]}
    assert counts == {"loss": 2, "gradient_norm": 1}
    assert run.run_accounting.wall_seconds == sum(run.run_accounting.seconds.values())


def test_time_told_with_a_later_line_is_spent_on_its_cause() -> None:
    run = Run()
    run.start(0, None)
    run.now += 3.0
    run.add(step(1, 2.0, spent={"checkpoint": 3.0}))
    run.now += 4.0
    run.add(step(1, 2.0, spent={"checkpoint": 4.0}))  # done again: only its own lap is
    assert run.lost == {"start": 5.0, "checkpoint": 7.0, "productive": 2.0, "replay": 2.0}
    assert run.run_accounting.wall_seconds == sum(run.lost.values())


def test_an_unknown_line_and_an_unknown_ending_do_no_harm() -> None:
    run = Run()
    run.start(0, None)
    run.add({"kind": "remark", "lap": 0.0})
    run.start(0, "eaten by a dog", after=1.0)
    assert run.run_accounting.counts["restarts|failed"] == 1
    assert run.lost["down"] == 1.0


def test_samples_hold_parts_norms_and_utilization() -> None:
    run = Run()
    run.start(0, None)
    parts = [
        {"objective": "causal", "source": "news", "nats": 120.0, "targets": 40},
        {"objective": "causal", "source": "a|b", "nats": 60.0, "targets": 60},
        {"objective": "prefix", "source": "news", "nats": 0.0, "targets": 0},
    ]
    norms = {"attention": {"weight_norm": 3.0, "update_norm": 0.5}}
    flops = {"causal": 80.0, "full": 120.0, "hardware": 100.0}
    run.add(step(1, 2.0, parts=parts, norms=norms, flops=flops, z_loss=4.0, slowest_rank=1))
    run.add(step(2, 2.0, parts=parts, flops=flops))
    samples = run.run_accounting.samples()
    assert samples["source_training_loss_nats"] == [[["causal", "news"], 3.0], [["causal", "a|b"], 1.0]]
    assert samples["source_target_tokens"] == [
        [["causal", "news"], 80], [["causal", "a/b"], 120], [["prefix", "news"], 0],
    ]  # fmt: skip
    assert samples["weight_norm"] == [[["attention"], 3.0]]  # of the last step at which it was measured
    assert samples["update_norm"] == [[["attention"], 0.5]]
    assert samples["model_flops"] == [[["causal"], 160.0], [["full"], 240.0]]
    assert samples["hardware_flops"] == [[[], 200.0]]
    assert samples["model_flops_utilization_ratio"] == [[["causal"], 0.2], [["full"], 0.3]]  # 2 devices of 100, 2 s
    assert samples["hardware_flops_utilization_ratio"] == [[[], 0.25]]
    assert samples["tokens_per_second"] == [[[], 50.0]]
    assert samples["packing_efficiency_ratio"] == [[[], 100 / 128]]
    assert "z_loss" not in samples  # step 2 has none
    assert "slowest_rank" not in samples
    assert [labels[0] for labels, _ in samples["lost_seconds"]] == list(CAUSES)


@pytest.mark.parametrize("torn", [0, 3])
def test_a_ledger_from_the_file_equals_the_one_that_was_kept(torn: int) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 20):
        run.add(step(number))
    run.start(12 - torn, "died", after=4.0)
    for number in range(13 - torn, 25):
        run.add(step(number))
    again = RunAccounting()
    for line in run.file:
        again.add(line)
    assert (again.counts, again.seconds, again.samples()) == (
        run.run_accounting.counts,
        run.run_accounting.seconds,
        run.run_accounting.samples(),
    )


def test_bits_per_byte_that_are_not_known_are_given_to_nobody() -> None:
    line = {"kind": "evaluation", "step": 2, "nats_per_token": 2.0, "bits_per_byte": None, "seconds": 6.0, "lap": 7.0}
    run = Run()
    run.start(0, None)
    run.add(line)
    samples = run.run_accounting.samples()
    assert samples["validation_loss_nats"] == [[[], 2.0]]
    assert "validation_compression_ratio" not in samples
    assert dict(scalars(line)) == {"validation/nats_per_token": 2.0}


def test_parts_of_an_evaluation_and_scores_of_tasks_are_metrics_and_their_time_is_evaluation() -> None:
    parts = [{"objective": "causal", "source": "news", "nats": 6.0, "targets": 3}]
    measured = {
        "nats_per_token": 2.0,
        "bits_per_byte": 1.0,
        "accuracy": 0.25,
        "calibration_error": 0.125,
        "parts": parts,
    }
    evaluation = {"kind": "evaluation", "step": 2, **measured, "seconds": 6.0, "lap": 7.0}
    tasks = {"kind": "tasks", "step": 2, "scores": {"arc": {"acc": 0.5, "acc_norm": 0.75}}, "seconds": 3.0, "lap": 4.0}
    run = Run()
    run.start(0, None)
    run.add(evaluation)
    run.add(tasks)
    samples = run.run_accounting.samples()
    assert samples["source_validation_loss_nats"] == [[["causal", "news"], 2.0]]
    assert samples["validation_accuracy_ratio"] == [[[], 0.25]]
    assert samples["validation_calibration_error_ratio"] == [[[], 0.125]]
    assert samples["task_score"] == [[["arc", "acc"], 0.5], [["arc", "acc_norm"], 0.75]]
    assert samples["evaluation_seconds"] == [[[], 9.0]]
    assert run.run_accounting.seconds["evaluation"] == 11.0
    run.add(tasks)  # repeated after a restart
    assert run.run_accounting.counts["evaluation_seconds"] == 9.0
    assert run.run_accounting.seconds["replay"] == 4.0
    assert dict(scalars(tasks)) == {"tasks/arc/acc": 0.5, "tasks/arc/acc_norm": 0.75}
    assert dict(scalars(evaluation))["validation_loss/causal/news"] == 2.0
