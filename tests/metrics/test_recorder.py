"""metrics.jsonl and the scraped page tell the same, true story, also after a restart and after the death of ranks."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bigmodel import __version__
from bigmodel.config.data_settings import DataSettings
from bigmodel.config.settings import MetricsSettings, TrainingSettings
from bigmodel.evaluation.class_scores import labels_found
from bigmodel.metrics.exporter import bucket_names, families
from bigmodel.metrics.metric_table import METRICS, NODE, SERVING, STEP_BUCKETS_SECONDS, full_name, reference
from bigmodel.metrics.recorder import ExpertLoads, Flops, LossGroup, Metrics, StepRecord, how_it_ended
from bigmodel.metrics.run_accounting import CAUSES, ENDINGS, SAVE_FAILURES
from bigmodel.run_directory import read_json_lines, record_event

SCORES = labels_found(("a", "b"), np.array([0, 1, 1]), np.array([0, 1, 0])).numbers()

REPOSITORY = Path(__file__).parents[2]
STEPS = [
    StepRecord(
        step=number,
        loss=5.0 / number,
        gradient_norm=0.5 + number,
        learning_rate=1e-3 * number,
        targets=1000 + number,
        positions=1010 + number,
        padding=14 - number,
        documents=7 * number,
        step_seconds=0.03 * 4**number,
        data_wait_seconds=0.01 * number,
        compile_seconds=0.02,
        packs_document_limited=number,
        imbalance=1.25,
        imbalance_undealt=1.5,
        fetched_bytes=10 * number,
        fetch_failures=1,
        flops=Flops(causal=3e6 * number, full=4e6 * number, hardware=5e6 * number),
        skipped=number == 2,
        parts=(LossGroup("causal", "news", 5.0, 2 * number), LossGroup("causal", "letters", 3.0, 1)),
        z_loss=6.5,
        distillation_loss=0.75,
        pruned_share=0.25,
        largest_attention_score=12.5,
        clipped_heads=3,
        unweighted_loss=2.5,
        loss_scale=1024.0,
        sampled_share=0.25,
        expert_loads=ExpertLoads((1.5, 2.0), (0.75, 0.875), 4.0, 3, dropped=(5, 0), dropped_share=0.125),
        device_joules=100.0 * number,
        host_joules=2.6,
        slowest_rank=1,
        slowest_rank_lag_seconds=0.125,
        lag_ms=(0.0, 125.0),
        norms={"attention": {"weight_norm": 3.0, "update_norm": 0.25, "l1_norm": 7.0, "zero_ratio": 0.5}},
    )
    for number in (1, 2, 3)
]


PHASES = {"forward": 0.5, "backward": 1.0, "optimizer": 0.25, "data": 0.125}


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def page(endpoint: str) -> str:
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=30) as answer:
        return answer.read().decode()


def samples(endpoint: str) -> dict[str, float]:
    """Sample name with its label values in the order of their names -> value. A page may be a tenth of a second old."""
    time.sleep(0.11)
    return {
        "|".join((sample.name.removeprefix("bigmodel_"), *(value for _, value in sorted(sample.labels.items())))): (
            sample.value
        )
        for family in text_string_to_metric_families(page(endpoint))
        for sample in family.samples
    }


OF_CLASSES = {  # of SCORES
    **{f"validation_f1_ratio|{name}": 2 / 3 for name in ("macro", "micro", "weighted")},
    **{f"validation_class_f1_ratio|{name}": 2 / 3 for name in "ab"},
    **{f"validation_{what}_ratio|macro": 0.75 for what in ("precision", "recall")},
    "validation_precision_ratio|weighted": 2.5 / 3,
    "validation_recall_ratio|weighted": 2 / 3,
    "validation_balanced_accuracy_ratio": 0.75,
    "validation_class_documents|a": 1,
    "validation_class_documents|b": 2,
    "validation_class_precision_ratio|a": 0.5,
    "validation_class_precision_ratio|b": 1.0,
    "validation_class_recall_ratio|a": 1.0,
    "validation_class_recall_ratio|b": 0.5,
}


def record_all(metrics: Metrics) -> None:
    for step in STEPS:
        metrics.record_step(step, PHASES)
    metrics.record_evaluation(2, nats_per_token=3.5, bits_per_byte=1.75, seconds=4.0)
    parts = [{"objective": "causal", "source": "news", "nats": 6.5, "targets": 2}]
    more = {"accuracy": 0.25, "calibration_error": 0.125, "parts": parts}
    metrics.record_evaluation(3, nats_per_token=3.25, bits_per_byte=1.5, seconds=6.0, scores=SCORES, **more)
    metrics.record_tasks(3, {"arc": {"acc": 0.5}}, seconds=0.0)
    metrics.record_checkpoint(2, written_bytes=2_000, seconds=0.5)
    metrics.record_failed_checkpoint(2, "io_error")
    metrics.record_checkpoint(3, written_bytes=3_000, seconds=0.75)


FACTS = {"planned_steps": 400, "parameters": 123, "device_peak_flops": 1e9}
EXPECTED = {
    f"build_info|{__version__}": 1,
    "world_size": 1,
    "delayed_lines_total": 0,
    "parameters": 123,
    "planned_steps": 400,
    "device_peak_flops": 1e9,
    "steps_total": 3,
    "steps_skipped_total|not_finite": 1,
    "steps_skipped_total|spike": 0,
    "steps_skipped_total|left_out": 0,
    "target_tokens_total": 3006,
    "source_target_tokens_total|causal|news": 12,
    "source_target_tokens_total|causal|letters": 3,
    "positions_total": 3036,
    "padding_positions_total": 36,
    "documents_total": 42,
    "packs_document_limited_total": 6,
    "model_flops_total|causal": 18e6,
    "model_flops_total|full": 24e6,
    "hardware_flops_total": 30e6,
    "tokens_per_second": 1013 / 1.92,
    "model_flops_utilization_ratio|causal": 9e6 / 1.92e9,
    "model_flops_utilization_ratio|full": 12e6 / 1.92e9,
    "hardware_flops_utilization_ratio": 15e6 / 1.92e9,
    "packing_efficiency_ratio": 1013 / 1024,
    "attention_imbalance_ratio": 1.25,
    "attention_imbalance_undealt_ratio": 1.5,
    "data_fetched_bytes_total": 30,
    "data_fetch_failures_total": 1,
    "productive_seconds_total": 0.12 + 1.92 - 0.04 - 0.04,
    "lost_seconds_total|data": 0.06,
    "lost_seconds_total|compile": 0.06,
    "lost_seconds_total|skipped": 0.48 - 0.02 - 0.02,
    **{f"lost_seconds_total|{cause}": 0 for cause in ("replay", "hang", "stopped", "down", "finish")},
    **{f"restarts_total|{ending}": 0 for ending in ENDINGS},
    "data_wait_seconds_total": 0.06,
    "training_loss_nats": 5 / 3,
    "source_training_loss_nats|causal|news": 5 / 6,
    "source_training_loss_nats|causal|letters": 3,
    "z_loss": 6.5,
    "distillation_loss_nats": 0.75,
    "pruned_ratio": 0.25,
    "largest_attention_score": 12.5,
    "training_unweighted_loss_nats": 2.5,
    "gradient_norm": 3.5,
    "learning_rate": 3e-3,
    "loss_scale": 1024,
    "sampled_input_ratio": 0.25,
    "expert_load_ratio": 2.0,
    "expert_load_layer": 4,
    "expert_load_entropy_ratio": 0.75,
    "expert_dropped_ratio": 0.125,
    "router_z": 4.0,
    "energy_joules_total|device": 600,
    "energy_joules_total|host": 3 * 2.6,
    "energy_joules_per_token": 302.6 / 1013,
    "weight_norm|attention": 3,
    "update_norm|attention": 0.25,
    "l1_norm|attention": 7,
    "zero_ratio|attention": 0.5,
    "spikes_total|loss": 0,
    "spikes_total|gradient_norm": 0,
    "evaluations_total": 2,
    "evaluation_seconds_total": 10,
    "validation_loss_nats": 3.25,
    "validation_compression_ratio": 0.1875,
    "source_validation_loss_nats|causal|news": 3.25,
    "validation_accuracy_ratio": 0.25,
    "validation_calibration_error_ratio": 0.125,
    "task_score|acc|arc": 0.5,
    "checkpoints_total": 2,
    **{f"checkpoint_failures_total|{reason}": int(reason == "io_error") for reason in SAVE_FAILURES},
    "checkpoint_written_bytes_total": 5_000,
    "checkpoint_seconds_total": 1.25,
    "last_checkpoint_step": 3,
    "last_checkpoint_bytes": 3_000,
    "last_checkpoint_duration_seconds": 0.75,
    "slowest_rank": 1,
    "slowest_rank_lag_seconds": 0.125,
    "rank_up|0": 1,
    "rank_hangs|0": 0,
    "rank_step|0": 3,
    "step_duration_seconds_count|0": 3,
    "step_duration_seconds_sum|0": 2.52,
    **{f"step_duration_seconds_bucket|{bound}|0": 0 for bound in ("0.01", "0.02", "0.05", "0.1")},
    "step_duration_seconds_bucket|0.2|0": 1,  # steps of 0.12, 0.48 and 1.92 s
    "step_duration_seconds_bucket|0.5|0": 2,
    "step_duration_seconds_bucket|1.0|0": 2,
    **{
        f"step_duration_seconds_bucket|{bound}|0": 3
        for bound in ("2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "+Inf")
    },
    "phase_seconds_total|forward|0": 1.5,
    "phase_seconds_total|backward|0": 3,
    "phase_seconds_total|optimizer|0": 0.75,
    "phase_seconds_total|data|0": 0.375,
    "rank_busy_seconds_total|0": 5.25,
    **{f"phase_duration_seconds_count|{phase}": 3 for phase in PHASES},
    **{f"phase_duration_seconds_sum|{phase}": 3 * seconds for phase, seconds in PHASES.items()},
    **{
        f"phase_duration_seconds_bucket|{bound}|{phase}": 3 * (seconds <= float(bound))
        for phase, seconds in PHASES.items()
        for bound in bucket_names(STEP_BUCKETS_SECONDS)
    },
}
MOMENTS = ("last_step_timestamp_seconds", "last_checkpoint_timestamp_seconds", "rank_heartbeat_timestamp_seconds|0")


def test_every_value_on_the_page_is_the_independent_count(tmp_path: Path) -> None:
    before = time.time()
    with Metrics(tmp_path, facts=FACTS) as metrics:
        record_all(metrics)
        found = samples(metrics.endpoint)
    assert all(before <= found.pop(moment) <= time.time() for moment in MOMENTS)
    for cause in (
        "start",
        "evaluation",
        "checkpoint",
    ):  # laps of this process: tests/metrics/test_run_accounting.py has literals
        assert 0 <= found.pop(f"lost_seconds_total|{cause}") < time.time() - psutil.Process().create_time() + 1
    began = psutil.Process().create_time()  # rounded to a second
    assert found.pop("first_start_timestamp_seconds") == pytest.approx(began, abs=1.5)
    for mode in [key for key in found if key.startswith("node_cpu_seconds_total|")]:
        assert 0 <= found.pop(mode) <= getattr(psutil.cpu_times(), mode.rpartition("|")[2])
    assert found.pop("process_resident_bytes|0") == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert found.pop("node_memory_total_bytes") == psutil.virtual_memory().total
    assert found.pop("node_memory_available_bytes") == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert found.pop("disk_total_bytes") == shutil.disk_usage(tmp_path).total
    assert found.pop("disk_free_bytes") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    for device, count in psutil.net_io_counters(pernic=True).items():
        if device != "lo":
            assert 0 <= found.pop(f"network_received_bytes_total|{device}") <= count.bytes_recv
            assert 0 <= found.pop(f"network_transmitted_bytes_total|{device}") <= count.bytes_sent
    assert found == pytest.approx(EXPECTED | OF_CLASSES)


def test_the_page_covers_the_table_but_for_gpus_and_every_name_is_lawful(tmp_path: Path) -> None:
    with Metrics(tmp_path, facts=FACTS) as metrics:
        record_all(metrics)
        text = page(metrics.endpoint)
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {metric.name for metric in METRICS} - {name.removeprefix("bigmodel_") for name in families} == {
        *(f"device_memory_{name}" for name in ("allocated_bytes", "reserved_bytes", "peak_bytes", "retries")),
        *(f"device_{name}" for name in ("temperature_celsius", "power_watts", "throttled", "ecc_errors", "xid_errors")),
    }
    bounded = {
        "version", "reason", "objective", "source", "convention", "cause", "layers", "signal", "rank", "phase", "kind",
        "device", "task", "metric", "class", "average", "mode", "part",
    }  # fmt: skip
    for metric in METRICS:
        assert not metric.name.endswith("_total"), f"{metric.name}: the library adds _total to counters"
        assert set(metric.labels) <= bounded, f"{metric.name}: labels must be bounded"
        assert families.get(f"bigmodel_{metric.name}", metric.kind) == metric.kind
    promtool = shutil.which("promtool")
    if promtool:  # the parser above has read the page in any case; promtool also lints the names
        lint = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_histograms_of_phases_are_added_up_over_the_node_s_ranks() -> None:
    one, two = ([1, *[0] * 13], 0.005), ([0, 2, *[0] * 12], 0.03)
    found = {"phase_duration_seconds": [[["data"], one], [["data"], two], [["forward"], two]]}
    (family,) = families(found)
    counts = {(s.labels["phase"], s.labels.get("le", s.name[-3:])): s.value for s in family.samples}
    assert (counts["data", "0.01"], counts["data", "0.02"], counts["data", "+Inf"], counts["data", "sum"]) == (
        1, 3, 3, pytest.approx(0.035),
    )  # fmt: skip
    assert (counts["forward", "0.01"], counts["forward", "+Inf"]) == (0, 2)


def test_a_resumed_run_counts_replayed_steps_once_and_loses_no_second(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
        whole = samples(metrics.endpoint)
    with Metrics(tmp_path, first_step=2, start="again") as metrics:
        resumed = samples(metrics.endpoint)
        assert [(line["kind"], line.get("step")) for line in read_json_lines(tmp_path / "metrics.jsonl")] == [
            ("start", 0),
            ("step", 1),
            ("step", 2),
            ("evaluation", 2),
            ("checkpoint", 2),
            ("failed_checkpoint", 2),
            ("end", None),
            ("start", 2),
        ]
        metrics.record_step(STEPS[2])
        metrics.record_evaluation(3, nats_per_token=3.25, bits_per_byte=1.5, seconds=6.0, scores=SCORES)
        metrics.record_checkpoint(3, written_bytes=3_000, seconds=0.75)
        again = samples(metrics.endpoint)
        metrics.record_step(replace(STEPS[2], step=4))
        further = samples(metrics.endpoint)
    counters = [name for name in whole if "_total" in name and not name.startswith(("lost", "restarts", "network"))]
    counters = [name for name in counters if not name.startswith(("phase", "rank_busy", "data_fetch", "node_cpu"))]
    assert len(counters) > 20
    for name in counters:
        assert whole[name] == resumed[name] == again[name], name
    laps = [line["lap"] for line in read_json_lines(tmp_path / "metrics.jsonl")][9:11]  # of evaluation and checkpoint
    assert again["lost_seconds_total|replay"] == pytest.approx(1.92 + sum(laps), abs=0.01)
    assert again["restarts_total|finished"] == 1
    assert further["steps_total"] == 4
    assert further["target_tokens_total"] == 3006 + 1003


def test_a_peak_that_is_measured_is_the_largest_of_all_starts(tmp_path: Path) -> None:
    """Else MFU jumps at a restart, for the machine was busy while it was measured. Another device's does not count."""
    told = [(2e9, True), (1e9, True), (3e9, True), (1e9, False), (2e9, True)]
    for peak, is_measured in told:
        with Metrics(tmp_path, facts=FACTS | {"device_peak_flops": peak, "peak_is_measured": is_measured}):
            pass
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [line["device_peak_flops"] for line in lines if line["kind"] == "start"] == [2e9, 2e9, 3e9, 1e9, 3e9]


def test_fresh_starts_from_nothing_and_a_torn_line_is_mended(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # what kill -9 in the middle of a write leaves
    with Metrics(tmp_path, first_step=3, start="second") as metrics:
        metrics.record_step(replace(STEPS[0], step=4))
        assert samples(metrics.endpoint)["steps_total"] == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    with Metrics(tmp_path, start="third", fresh=True) as metrics:
        assert samples(metrics.endpoint)["steps_total"] == 0
        assert [line["kind"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == ["start"]


def test_a_step_line_holds_the_whole_record(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.record_step(STEPS[0], {"forward": 0.25})
    line = next(line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "step")
    assert line.pop("kind") == "step"
    assert line.pop("phases") == {"forward": 0.25}
    assert abs(line.pop("time") - time.time()) < 60
    assert line.pop("lap") == STEPS[0].step_seconds
    assert line.pop("spent") == {}
    assert 1e7 < line.pop("memory")["resident_bytes"] < 1e11
    line["flops"], line["parts"] = Flops(**line["flops"]), tuple(LossGroup(**part) for part in line["parts"])
    line |= {name: tuple(line[name]) for name in ("lag_ms", "lag_ranks")}
    told = line["expert_loads"]
    line["expert_loads"] = ExpertLoads(
        **{name: tuple(one) if isinstance(one, list) else one for name, one in told.items()}
    )
    assert StepRecord(**line) == STEPS[0]


def test_laps_leave_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object) -> tuple[None, None]:
        time.sleep(0.2)  # a long file is read at the start: that is the start's time, and only once
        return None, None

    monkeypatch.setattr("bigmodel.metrics.recorder.how_it_ended", slow)
    began = time.time()
    with Metrics(tmp_path) as metrics:
        opened = time.time()
        for number in (1, 2):
            time.sleep(0.1)
            metrics.record_step(replace(STEPS[0], step=number, step_seconds=metrics.lap()))
            time.sleep(0.1)
            metrics.record_checkpoint(number, written_bytes=1, seconds=0.01)
        time.sleep(0.1)
        metrics.spent("checkpoint")
        time.sleep(0.1)
    lines = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [line["kind"] for line in lines] == ["start", "step", "checkpoint", "step", "checkpoint", "end"]
    assert lines[0]["began"] == pytest.approx(psutil.Process().create_time(), abs=1.5)  # psutil rounds to a second
    assert began + 0.2 <= lines[0]["began"] + lines[0]["lap"] + 0.01
    assert lines[0]["began"] + lines[0]["lap"] <= opened + 0.01
    assert all(line["lap"] >= 0.1 for line in lines[1:])
    assert lines[-1]["spent"]["checkpoint"] >= 0.1
    total = sum(line["lap"] for line in lines) + lines[-1]["spent"]["checkpoint"]
    assert total == pytest.approx(lines[-1]["time"] - lines[0]["began"], abs=0.02)


def test_a_clock_that_is_set_back_during_a_run_costs_no_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.record_step(replace(STEPS[0], step=1, step_seconds=metrics.lap()))
        real = time.time
        monkeypatch.setattr("time.time", lambda: real() - 3600.0)
        time.sleep(0.1)
        metrics.record_step(replace(STEPS[0], step=2, step_seconds=metrics.lap()))
    lines = list(read_json_lines(tmp_path / "metrics.jsonl"))
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert times[2] - times[1] == pytest.approx(lines[2]["lap"], abs=1e-3)


def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.record_step(replace(STEPS[0], loss=math.nan, skipped=True))
        found = samples(metrics.endpoint)
        assert math.isnan(found["training_loss_nats"])
        assert found["steps_skipped_total|not_finite"] == 1


def test_how_the_last_start_ended_is_its_own_word_a_supervisors_or_death(tmp_path: Path) -> None:
    start, end = {"kind": "start", "time": 1.0}, {"kind": "end", "ending": "stopped"}
    assert how_it_ended(tmp_path, []) == (None, None)
    assert how_it_ended(tmp_path, [start, end]) == ("stopped", None)
    assert how_it_ended(tmp_path, [start, end, start]) == ("died", None)
    record_event(tmp_path, "launch_ended", cause="failed", since=7.0)
    assert how_it_ended(tmp_path, [start, end, start]) == ("died", 7.0)
    before = time.time()
    record_event(tmp_path, "launch_ended", cause="hang")
    ending, ended = how_it_ended(tmp_path, [start, end, start])
    assert ending == "hang"
    assert ended is not None
    assert before <= ended <= time.time()
    clock_was_set_back = [start, end, {"kind": "start", "time": time.time() + 3600}]
    assert how_it_ended(tmp_path, clock_was_set_back)[0] == "hang"
    record_event(tmp_path, "launch")
    assert how_it_ended(tmp_path, [start, end, start])[0] == "hang", "this launch's own start asks"
    record_event(tmp_path, "launch")
    assert how_it_ended(tmp_path, [start, end, start]) == ("died", None), "it ended the launch before the last"
    record_event(tmp_path, "launch_ended", cause="hang")
    record_event(tmp_path, "start")
    assert how_it_ended(tmp_path, [start, end, start]) == ("died", None), "that of an earlier start"


def test_a_full_disk_at_the_end_ends_no_run_and_does_not_hide_what_ended_it(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for ending in ("failed", "finished"):
        (tmp_path / ending).mkdir()
        metrics = Metrics(tmp_path / ending)
        (tmp_path / ending / "metrics.jsonl").unlink()
        (tmp_path / ending / "metrics.jsonl").symlink_to("/dev/full")
        metrics.close(ending)
        metrics.close()
        assert "No space left on device; lines lost at its end: 1\n" in capfd.readouterr().err
        assert not (tmp_path / ending / "metrics_endpoint").exists()


# ---- other writers ------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_same_numbers_and_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = MetricsSettings(writers=["tensorboard"])
    with Metrics(tmp_path, settings) as metrics:
        record_all(metrics)
    with Metrics(tmp_path, settings, first_step=2, start="again") as metrics:
        metrics.record_step(replace(STEPS[2], loss=9.0))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in found.Scalars("training/loss")] == [(1, 5.0), (2, 2.5), (3, 9.0)]
    assert [point.value for point in found.Scalars("training_loss/causal/news")][:2] == [2.5, 1.25]
    assert found.Scalars("weight_norm/attention")[0].value == 3.0
    assert [(point.step, point.value) for point in found.Scalars("validation/bits_per_byte")] == [(2, 1.75)]


def test_wandb_writes_offline_into_the_run_directory(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (optional, not in the development set)")
    settings = MetricsSettings(writers=["wandb"], project="tongues", group="small", team="linguists")
    with Metrics(tmp_path, settings) as metrics:
        record_all(metrics)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    words = (b"training/loss", b"validation/bits_per_byte", b"training_loss/causal/news")
    words += (b"tongues", b"small", b"linguists")
    until(lambda: all(word in file.read_bytes() for word in words), "wandb's own process to write")


def test_csv_has_a_table_per_quantity_and_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    settings = MetricsSettings(writers=["csv"])
    with Metrics(tmp_path, settings) as metrics:
        record_all(metrics)
    table = tmp_path / "csv" / "training_loss.csv"
    assert table.read_text() == "step,training/loss\n1,5.0\n2,2.5\n3,1.6666666666666667\n"
    with table.open("a") as file:
        file.write("4,1.")  # a row that a kill cut off
    with Metrics(tmp_path, settings, first_step=2, start="again") as metrics:
        metrics.record_step(replace(STEPS[2], loss=9.0))
    assert table.read_text() == "step,training/loss\n1,5.0\n2,2.5\n3,9.0\n"
    assert (tmp_path / "csv" / "validation_bits_per_byte.csv").read_text() == "step,validation/bits_per_byte\n2,1.75\n"


def test_comet_writes_an_offline_archive_into_the_run_directory(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml", reason="comet_ml is not installed (optional, not in the development set)")
    settings = MetricsSettings(writers=["comet"], project="tongues", team="linguists")
    with Metrics(tmp_path, settings) as metrics:
        record_all(metrics)
    (file,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        about, told = (archive.read(name).decode() for name in ("experiment.json", "messages.json"))
    experiment = json.loads(about)
    assert (experiment["project_name"], experiment["workspace"]) == ("tongues", "linguists")
    metrics_told = [json.loads(line)["payload"]["metric"] for line in told.splitlines() if '"metric_msg"' in line]
    losses = [(one["step"], one["metricValue"]) for one in metrics_told if one["metricName"] == "training/loss"]
    assert losses == [(1, 5.0), (2, 2.5), (3, 5.0 / 3)]


# ---- what a team copies -----------------------------------------------------------------------------------------


def test_the_reference_is_current() -> None:
    file = REPOSITORY / "configs" / "prometheus" / "METRICS.md"
    assert file.read_text() == reference(), "run: bigmodel show metrics > configs/prometheus/METRICS.md"
    assert all(f"| `{full_name(metric)}` |" in reference() for metric in (*METRICS, *SERVING))
    assert len(NODE) + len(CAUSES) > 10


def test_the_configuration_the_rules_and_the_alerts_do_what_they_say() -> None:
    import yaml

    folder = REPOSITORY / "configs" / "prometheus"
    (scrape,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert discovery["files"] == ["../../runs/*.prometheus.json"]
    rules = (folder / "rules.yml").read_text()
    names = set(re.findall(r"(?<![\w:])bigmodel_[a-z0-9_]+", rules))
    known = {full_name(metric) for metric in METRICS}
    known |= {full_name(m) + end for m in METRICS if m.kind == "histogram" for end in ("_bucket", "_sum", "_count")}
    assert len(names) > 15
    assert names <= known, f"{names - known} stand in rules.yml but are not exported"
    alerts = [rule["alert"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"] if "alert" in rule]
    (stalled,) = [
        rule
        for group in yaml.safe_load(rules)["groups"]
        for rule in group["rules"]
        if rule.get("alert") == "BigmodelStalled"
    ]
    assert stalled["for"] == "1m"
    assert stalled["expr"].endswith(" > 5 * 60")
    fires = 5 * 60 + 60 + 60  # the last term: intervals of scrapes and rules
    assert fires < min(TrainingSettings().collective_timeout_seconds, DataSettings().stall_seconds)
    tested = yaml.safe_load((folder / "rules_test.yml").read_text())["tests"]
    fired = {c["alertname"] for test in tested for c in test.get("alert_rule_test", ()) if c["exp_alerts"]}
    assert fired == set(alerts)
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (Debian: prometheus): the rules were not run")
    for command in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
    ):
        done = subprocess.run([promtool, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
