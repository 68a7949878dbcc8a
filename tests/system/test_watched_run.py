"""A real Prometheus watches a real run of four ranks that the launcher starts, kills of it, and its restart.

One run serves all claims, for starting one is what costs: the page against the data and the wall clock, discovery,
scrapes that do not disturb, profiles while it runs, the death of ranks, totals and time over the restart.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bigmodel.checks.audit import audit
from bigmodel.config.settings import load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_endpoint import exporters
from tests.metrics.test_recorder import samples, until
from tests.support.alert_rules import RULES
from tests.support.prometheus import PROMETHEUS, Prometheus
from tests.support.tiny_run import write_run

MEASURED = "\n[metrics]\nnorms_every_steps = 10\nattention_scores = true\n"
GPU_ONLY = re.compile(r"bigmodel_device_(?!peak_flops)")
REPOSITORY = Path(__file__).parents[2]
STEPS = 60


class Watched:
    """The run's folder, its launcher and the Prometheus that watches it."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.run_file = write_run(folder, shards, balance="loss")
        text = self.run_file.read_text().replace("every_steps = 4", "every_steps = 20")
        self.run_file.write_text(
            text.replace("at_end = false", "at_end = false\nevery_steps = 15\npacks = 1") + MEASURED
        )
        self.prometheus = Prometheus(folder, RULES)
        self.ask = self.prometheus.ask

    def launch(self, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "launcher", "local", str(self.run_file), "--ranks", "4", "--restarts", "0"]
        for override in (f"training.steps={STEPS}", *overrides):
            command += ["--set", override]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def endpoint(self) -> str:
        try:
            return (self.run / "metrics_endpoint").read_text().strip()
        except FileNotFoundError:
            return ""

    @property
    def step(self) -> int:
        return max(
            (line["step"] for line in read_json_lines(self.run / "metrics.jsonl") if line["kind"] == "step"), default=0
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Watched]:
    if not PROMETHEUS:
        pytest.skip("prometheus is not installed (Debian: prometheus): no run was watched")
    watched = Watched(tmp_path_factory.mktemp("watched"), shards)
    try:
        yield watched
    finally:
        watched.prometheus.stop()


def planned(run_file: Path, steps: int) -> dict[str, int]:
    """Counts of the first steps, from the data alone."""
    settings = load_settings(run_file)
    order = Order.of_run(ShardStore.of_run(settings.data, "train"), settings)
    packs = [pack for _ in range(steps) for pack in order.next_step()]
    positions = sum(chunk.length for pack in packs for chunk in pack)
    pairs = sum(chunk.length * (chunk.length + 1) // 2 for pack in packs for chunk in pack)
    places = steps * 4 * settings.data.sequence_length
    return {
        "bigmodel_target_tokens_total": positions,
        "bigmodel_positions_total": positions,
        "bigmodel_padding_positions_total": places - positions,
        "bigmodel_documents_total": sum(map(len, packs)),
        "bigmodel_steps_total": steps,
        # 2 layers, 32 channels, 4 heads of 8 and 2 of keys, 2 of 4 experts of 24 and a router, an untied head:
        # forward and backward
        'bigmodel_model_flops_total{convention="causal"}': 12 * 2 * 32 * pairs
        + 6 * (2 * (32 * 8 * 12 + 2 * 3 * 32 * 24 + 4 * 32) + 300 * 32) * positions,
    }


def test_prometheus_follows_a_run_over_kill_and_restart(watched: Watched) -> None:
    began = time.time()
    first = watched.launch("training.steps=100000", "training.hang_seconds=60")  # a rank stands still: profile_it
    try:
        until(lambda: watched.step >= 25, "25 steps", 200)
        up = watched.ask("bigmodel_rank_up")
        until(lambda: len(watched.ask("bigmodel_rank_up == 1")) == 4, f"all ranks in Prometheus, not {up}", 30)
        (series,) = watched.ask('up{job="bigmodel"}')
        for word in ("|bigmodel|", "|0|", "|0-3|", "|run"):
            assert word in series
        ask_for_all_panels(watched)
        scrape_hard(watched)
        profile_it(watched, first)
        endpoint = watched.endpoint
        before = samples(endpoint)
        for phase in ("forward", "backward", "communication", "optimizer", "checkpoint", "evaluation", "data"):
            assert all(before[f"phase_seconds_total|{phase}|{rank}"] > 0 for rank in range(4)), phase
        victim = next(p for p in psutil.Process(first.pid).children() if p.environ().get("RANK") == "0")
        os.kill(first.pid, signal.SIGSTOP)  # so that the launcher does not end the others at once
        victim.kill()
        until(lambda: samples(endpoint).get("rank_up|0") == 0, "the death of rank 0 on its own node's page")
        assert samples(endpoint)["steps_total"] >= before["steps_total"]
        death = 'last_over_time(bigmodel_rank_up{rank="0"}[1m]) == 0'  # the others follow it within a second
        until(lambda: len(watched.ask(death)) == 1, "the death in Prometheus")
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 1
    until(lambda: not exporters(endpoint), "the exporter to end", 5)
    assert not list(watched.folder.glob("*.prometheus.json"))
    killed_at = watched.step
    assert killed_at >= 25

    second = watched.launch(f"training.steps={killed_at + 60}")
    try:
        until(lambda: watched.endpoint or second.poll() is not None, "the page of the second start", 200)
        assert second.poll() is None, second.communicate()[0]
        assert watched.endpoint == endpoint
        resumed = samples(watched.endpoint)
        assert resumed["steps_total"] >= before["steps_total"]  # no step back, so no reset for Prometheus
        assert resumed["restarts_total|died"] == 1
        query = 'last_over_time(bigmodel_restarts_total{cause="died"}[1m]) == 1'  # the run may be over when we ask
        until(lambda: len(watched.ask(query)) == 1, "it in Prometheus", 60)
        words = second.communicate(timeout=200)[0]
    finally:
        second.kill()
    assert second.returncode == 0, words
    ended = time.time()

    ledger = RunAccounting()
    for line in read_json_lines(watched.run / "metrics.jsonl"):
        ledger.add(line)
    found = {**ledger.counts, "model_flops": ledger.counts["model_flops|causal"]}
    for name, count in planned(watched.run_file, killed_at + 60).items():
        key = name.removeprefix("bigmodel_").partition("{")[0].removesuffix("_total")
        assert found[key] == count, name
    assert ledger.seconds["replay"] > 0
    assert ledger.seconds["evaluation"] >= ledger.counts["evaluation_seconds"] > 0
    assert ledger.seconds["hang"] > 0  # rank 2 stood still for 6 s: what is above ten steps
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_seconds, rel=0.01)
    assert ledger.wall_seconds <= ended - began
    assert ledger.began - began == pytest.approx(0, abs=10)  # the launcher's own start
    assert [finding for finding in audit(watched.run) if not finding.holds] == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(watched.run_file) in (p.info["cmdline"] or ())]
    history = watched.ask("resets(bigmodel_steps_total[10m])")
    assert list(history.values()) == [0.0], "one series over both starts"
    ask_for_all_panels_after_the_restart(watched)


def queries_of_panels() -> set[str]:
    """Every query of every dashboard, but for those of GPUs, of energy (tests/system/test_monitor.py) and, where there
    is none, of a network."""
    files = sorted((REPOSITORY / "configs/grafana").glob("*.json"))
    panels = [panel for file in files for panel in json.loads(file.read_text())["panels"] if panel["type"] != "row"]
    queries = {target["expr"] for panel in panels for target in panel["targets"]}
    assert len(files) == 7
    assert len(queries) > 70
    has_network = len(psutil.net_io_counters(pernic=True)) > 1
    without = [query for query in queries if GPU_ONLY.search(query)]
    assert len(without) == 9
    without += [query for query in queries if "_energy_" in query or "_expert_dropped_" in query]  # no capacity here
    without += [query for query in queries if "_network_" in query and not has_network]
    filled = {"$run": ".+", "$node": ".+", "$__rate_interval": "10s"}
    found = set[str]()
    for query in queries - set(without):
        for variable, value in filled.items():
            query = query.replace(variable, value)
        assert "$" not in query
        found.add(query)
    return found


def ask_for_all_panels(watched: Watched) -> None:
    """All queries give data, within the time in which rates and recorded rules come to be."""
    empty = queries_of_panels()

    def all_answered() -> bool:
        empty.difference_update([query for query in empty if watched.ask(query)])
        return not empty

    deadline = time.monotonic() + 60
    while not all_answered():
        assert time.monotonic() < deadline, f"no data: {sorted(empty)}"
        time.sleep(0.5)


def ask_for_all_panels_after_the_restart(watched: Watched) -> None:
    """At the last moment of the second start, which is over by now."""
    (last,) = watched.ask("max(max_over_time(timestamp(bigmodel_steps_total)[5m:500ms]))").values()
    assert [query for query in sorted(queries_of_panels()) if not watched.ask(query, last)] == []


def scrape_hard(watched: Watched) -> None:
    """100 scrapes a second for three seconds: all answered, and the exporter takes less than half a core."""
    endpoint = watched.endpoint
    (exporter,) = (psutil.Process(pid) for pid in exporters(endpoint))
    before, step = sum(exporter.cpu_times()[:2]), watched.step
    answered = []
    began = time.monotonic()

    def scrape(number: int) -> None:
        time.sleep(max(0.0, began + number / 100 - time.monotonic()))
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=30) as answer:
            answered.append(answer.status)

    def worker(first: int) -> None:
        for number in range(first, 300, 8):
            scrape(number)

    threads = [threading.Thread(target=worker, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - began
    assert answered == [200] * 300
    assert watched.step > step
    assert sum(exporter.cpu_times()[:2]) - before < 0.5 * wall


def profile_it(watched: Watched, launcher: subprocess.Popen) -> None:
    """Traces and memory of chosen ranks, and the stacks of a run that hangs, while the run goes on."""

    def profile(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "bigmodel", "profile", str(watched.run), *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    paths = profile("trace", "--ranks", "1,3", "--steps", "2").split()
    assert [Path(path).name for path in paths] == ["rank-1.trace.json.gz", "rank-3.trace.json.gz"]
    names = {event.get("name") for event in json.loads(gzip.decompress(Path(paths[0]).read_bytes()))["traceEvents"]}
    assert {"aten::mm", "aten::_softmax"} & names
    (memory,) = profile("memory", "--ranks", "0", "--steps", "1").split()
    assert "Self CPU Mem" in Path(memory).read_text()
    stopped = next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "2")
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(1.0)  # the others wait for it in a collective
    try:
        words = profile("stacks", "--ranks", "all", "--seconds", "5", code=2)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert "rank 2 gave no stacks within 5 s" in words
    assert words.startswith("rank")
    assert "loop.py" in words
    assert not list((watched.run / "profile").rglob("rank-*.error.txt"))
    step = watched.step
    until(lambda: watched.step > step, "the run to go on", 60)
