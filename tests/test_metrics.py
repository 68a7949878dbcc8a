"""metrics.jsonl and the scraped page tell the same, true story, also after a restart."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bigmodel.config import UserError
from bigmodel.metrics import METRICS, Metrics, StepRecord
from bigmodel.rundir import read_json, read_json_lines

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
        data_wait_seconds=0.25 * number,
        skipped=number == 2,
    )
    for number in (1, 2, 3)
]


def page(metrics: Metrics) -> str:
    with urllib.request.urlopen(f"http://{metrics.endpoint}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample name (with the bucket's bound where there is one) -> value, without the `_created` times."""
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for family in text_string_to_metric_families(page(metrics))
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def record_all(metrics: Metrics) -> None:
    for step in STEPS:
        metrics.record_step(step)
    metrics.record_evaluation(2, nats_per_token=3.5, bits_per_byte=1.75, seconds=4.0)
    metrics.record_evaluation(3, nats_per_token=3.25, bits_per_byte=1.5, seconds=6.0)
    metrics.record_checkpoint(2, written_bytes=2_000, seconds=0.5)
    metrics.record_checkpoint(3, written_bytes=3_000, seconds=0.75)


def test_every_value_on_the_page_is_the_independent_count(tmp_path: Path) -> None:
    before = time.time()
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
        found = samples(metrics)
    moments = {
        name: found.pop(f"bigmodel_{name}")
        for name in ("last_step_timestamp_seconds", "last_checkpoint_timestamp_seconds")
    }
    assert all(before <= moment <= time.time() for moment in moments.values())
    buckets = {"0.01": 0, "0.02": 0, "0.05": 0, "0.1": 0, "0.2": 1, "0.5": 2, "1.0": 2, "2.0": 3, "5.0": 3, "10.0": 3}
    buckets |= {"20.0": 3, "50.0": 3, "100.0": 3, "+Inf": 3}  # durations 0.12, 0.48 and 1.92 s
    assert found == pytest.approx(
        {
            "bigmodel_build_info": 1,
            "bigmodel_steps_total": 3,
            "bigmodel_steps_skipped_total": 1,
            "bigmodel_target_tokens_total": 3006,
            "bigmodel_positions_total": 3036,
            "bigmodel_padding_positions_total": 36,
            "bigmodel_documents_total": 42,
            "bigmodel_data_wait_seconds_total": 1.5,
            "bigmodel_data_fetched_bytes": 0,
            "bigmodel_data_fetch_failures": 0,
            "bigmodel_attention_imbalance_ratio": 1,
            "bigmodel_attention_imbalance_undealt_ratio": 1,
            "bigmodel_step_duration_seconds_count": 3,
            "bigmodel_step_duration_seconds_sum": 2.52,
            **{f"bigmodel_step_duration_seconds_bucket{bound}": count for bound, count in buckets.items()},
            "bigmodel_training_loss_nats": 5 / 3,
            "bigmodel_gradient_norm": 3.5,
            "bigmodel_learning_rate": 3e-3,
            "bigmodel_evaluations_total": 2,
            "bigmodel_evaluation_seconds_total": 10.0,
            "bigmodel_validation_loss_nats": 3.25,
            "bigmodel_validation_compression_ratio": 0.1875,
            "bigmodel_checkpoints_total": 2,
            "bigmodel_checkpoint_written_bytes_total": 5_000,
            "bigmodel_checkpoint_seconds_total": 1.25,
            "bigmodel_last_checkpoint_step": 3,
        }
    )


def test_a_resumed_run_counts_replayed_steps_once(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
        whole = samples(metrics)
    with Metrics(tmp_path, first_step=2) as metrics:
        resumed = samples(metrics)
        assert resumed["bigmodel_steps_total"] == 2
        assert resumed["bigmodel_target_tokens_total"] == 1001 + 1002
        assert resumed["bigmodel_evaluations_total"] == 1
        assert resumed["bigmodel_checkpoint_written_bytes_total"] == 2_000
        assert [(line["kind"], line["step"]) for line in read_json_lines(tmp_path / "metrics.jsonl")] == [
            ("step", 1),
            ("step", 2),
            ("evaluation", 2),
            ("checkpoint", 2),
        ]
        metrics.record_step(STEPS[2])
        metrics.record_evaluation(3, nats_per_token=3.25, bits_per_byte=1.5, seconds=6.0)
        metrics.record_checkpoint(3, written_bytes=3_000, seconds=0.75)
        again = samples(metrics)
    timeless = [name for name in whole if "timestamp" not in name]
    assert {name: again[name] for name in timeless} == pytest.approx({name: whole[name] for name in timeless})


def test_a_new_run_starts_from_nothing_and_a_torn_line_is_mended(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # what kill -9 in the middle of a write leaves
    with Metrics(tmp_path, first_step=3) as metrics:
        metrics.record_step(StepRecord(**{**{n: getattr(STEPS[0], n) for n in StepRecord.__slots__}, "step": 4}))
        assert samples(metrics)["bigmodel_steps_total"] == 4
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 4
    with Metrics(tmp_path) as metrics:
        assert samples(metrics)["bigmodel_steps_total"] == 0
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_step_line_holds_the_whole_record(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.record_step(STEPS[0])
    (line,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert line.pop("kind") == "step"
    assert abs(line.pop("time") - time.time()) < 60
    assert StepRecord(**{**line, "parts": tuple(line["parts"])}) == STEPS[0]


def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        broken = {n: getattr(STEPS[0], n) for n in StepRecord.__slots__} | {"loss": math.nan, "skipped": True}
        metrics.record_step(StepRecord(**broken))
        assert math.isnan(samples(metrics)["bigmodel_training_loss_nats"])
        assert samples(metrics)["bigmodel_steps_skipped_total"] == 1


def test_the_address_is_published_while_the_run_lives(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    with Metrics(run) as metrics:
        assert (run / "metrics_endpoint").read_text() == metrics.endpoint + "\n"
        assert read_json(tmp_path / "tiny.prometheus.json") == [
            {"targets": [metrics.endpoint], "labels": {"job": "bigmodel", "run": "tiny", "rank": "0"}}
        ]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["tiny", "tiny/metrics.jsonl"]
    with pytest.raises(urllib.error.URLError, match="refused"):
        page(metrics)


def test_a_taken_port_is_named_with_the_remedy_and_nothing_is_lost(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"metrics.port = {port}.*in use.*--set metrics.port=0"):
            Metrics(tmp_path, port=port)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
    with pytest.raises(UserError, match=r"metrics.host = 'no-such-host.invalid'"):
        Metrics(tmp_path, host="no-such-host.invalid")


def test_an_endpoint_on_every_address_is_advertised_by_host_name(tmp_path: Path) -> None:
    with Metrics(tmp_path, host="0.0.0.0") as metrics:
        assert metrics.endpoint.rpartition(":")[0] == socket.gethostname()


def test_names_follow_the_conventions_of_prometheus(tmp_path: Path) -> None:
    for metric in METRICS:
        assert not metric.name.endswith("_total"), f"{metric.name}: the library adds _total to counters"
        assert metric.help.strip(), metric.name
        assert set(metric.labels) <= {"version"}, f"{metric.name}: labels must be bounded"
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
        text = page(metrics)
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    for metric in METRICS:
        assert families[f"bigmodel_{metric.name}"] == metric.kind
    promtool = shutil.which("promtool")
    if promtool:  # the parser above has read the page in any case; promtool also lints the names
        lint = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_the_scrape_configuration_finds_the_run_directories() -> None:
    import yaml

    file = Path(__file__).parents[1] / "configs" / "prometheus" / "prometheus.yml"
    (scrape,) = yaml.safe_load(file.read_text())["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert discovery["files"] == ["../../runs/*.prometheus.json"]
    promtool = shutil.which("promtool")
    if promtool:
        subprocess.run([promtool, "check", "config", str(file)], check=True, capture_output=True)
