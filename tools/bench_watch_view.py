"""CPU seconds of `bigmodel watch` in a terminal, on a long run that goes on.

    python -m tools.bench_watch_view [--steps 100000] [--seconds 60] [--rounds 10] [--against CHECKOUT]
                                                                            writes benchmarks/bench_watch_view.json

The run directory has lines as the recorder writes them, 1.1 kB each; a step is added every half second. The view runs
in a pseudo-terminal of 80 x 24. CPU seconds are the process's own, from its start, by the kernel; those up to its first
frame (imports, the whole file) stand beside those after it. Before that, in rounds, median, least and most: the reading
alone, steps in a row at once and line by line in turn; the view up to its first frame, in turn with that of CHECKOUT.
"""

import argparse
import fcntl
import json
import os
import pty
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bigmodel.checks.scratch import scratch_folder
from bigmodel.inspect.growing_file import GrowingFile
from bigmodel.inspect.watched_run import Numbers
from bigmodel.metrics.recorder import Flops, LossGroup, StepRecord
from bigmodel.run_directory import record_event, write_json
from tools.measure import ROOT, Record

ALL_SIX = ("data", "forward", "backward", "communication", "optimizer")
FIRST_FRAME_SECONDS = 300.0  # of wall time, on a busy machine
TICK = os.sysconf("SC_CLK_TCK")


def line_of(step: int, began: float) -> str:
    """A line of metrics.jsonl as `Metrics.record_step` writes it."""
    record = StepRecord(
        step=step,
        loss=2.0 + 8.0 / step**0.3,
        gradient_norm=0.9876543210123 + 1.0 / step,
        learning_rate=0.0003,
        targets=1024,
        positions=1024,
        padding=0,
        documents=4,
        step_seconds=0.05983345800086681,
        data_wait_seconds=4.0162000004784204e-05,
        flops=Flops(5035524096, 6845104128, 5136580608.0),
        parts=(LossGroup("causal", "code", 7058.854736328125, 1024),),
        z_loss=48.24014472961426,
        slowest_rank=1,
        slowest_rank_lag_seconds=0.014601105003748671,
    )
    line = {"kind": "step", "time": began + 0.06 * step, **asdict(record), "lap": record.step_seconds}
    line["flops"] = record.flops._asdict() if record.flops else None
    line["phases"] = dict.fromkeys(ALL_SIX, 0.012345)
    return json.dumps({**line, "spent": {"checkpoint": 0.0008001819987839554}}) + "\n"


def make_run(directory: Path, steps: int) -> float:
    """Write the run's files; returns the Unix time of its beginning."""
    began = time.time() - 0.06 * steps
    carried: dict[str, object] = {"counts": {}, "counted": {}, "began": began}
    carried["seconds"] = dict.fromkeys(
        ("productive", "start", "compile", "data", "checkpoint", "evaluation", "replay", "hang", "skipped", "stopped",
         "down", "finish"), 0.0,
    )  # fmt: skip
    start = {"kind": "start", "time": began, "step": 0, "began": began, "lap": 0.0, "world_size": 2}
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps(start | {"device_peak_flops": 1e12, "carried": carried}) + "\n")
        file.writelines(line_of(step, began) for step in range(1, steps + 1))
    settings = {"training": {"steps": 2 * steps}, "checkpoint": {"every_steps": 1000}}
    write_json(directory / "settings.json", settings)
    record_event(directory, "start", step=0, world_size=2)
    return began


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--against", type=Path, help="another checkout of this project, measured in turn")
    options = parser.parse_args()
    record = Record(ROOT / "benchmarks", "bench_watch_view", "cpu")
    with scratch_folder() as folder:
        directory = folder / "run"
        directory.mkdir()
        began = make_run(directory, options.steps)
        size = (directory / "metrics.jsonl").stat().st_size
        case = {"case": f"{options.steps} steps, {size / 1e6:.0f} MB"}
        contenders: dict[str, Callable[[], float]] = {
            "reading, at once": lambda: reading(directory, True),
            "reading, line by line": lambda: reading(directory, False),
            "first frame": lambda: watched(directory, options.steps, began, 0.0, ROOT)[0],
        }
        if options.against:
            before = options.against.resolve()
            contenders["first frame, before"] = lambda: watched(directory, options.steps, began, 0.0, before)[0]
        rounds = [[call() for call in contenders.values()] for _ in range(options.rounds)]
        for contender, found in zip(contenders, zip(*rounds, strict=True), strict=True):
            numbers = {"cpu_seconds": round(statistics.median(found), 3), "rounds": options.rounds}
            record.add(
                {**case, "contender": contender, **numbers, "least": round(min(found), 3), "most": round(max(found), 3)}
            )
        first, total = watched(directory, options.steps, began, options.seconds, ROOT)
    for contender, seconds in (("start, first frame", first), ("after it", total - first), ("together", total)):
        percent = {"wall_seconds": options.seconds, "percent": round(100 * seconds / options.seconds, 2)}
        record.add({**case, "contender": contender, "cpu_seconds": round(seconds, 3), **percent})
    record.show(["case", "contender", "cpu_seconds", "least", "most", "wall_seconds", "percent"])


def reading(directory: Path, at_once: bool) -> float:
    """CPU seconds of reading the run's lines once, without imports."""
    file, numbers = GrowingFile(directory / "metrics.jsonl"), Numbers()
    began = time.process_time()
    file.has_more()
    if at_once:
        for block in file.blocks():
            numbers.add_block(block)
    else:
        for line in file.lines():
            numbers.add(line)
    return time.process_time() - began


def watched(directory: Path, steps: int, began: float, seconds: float, checkout: Path) -> tuple[float, float]:
    """CPU seconds up to the first frame, and of the whole time: up to `seconds` behind the first frame."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "bigmodel", "watch", str(directory)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.set_blocking(ours, False)
        until, first, added, last = time.monotonic() + FIRST_FRAME_SECONDS, 0.0, 0, 0.0
        while time.monotonic() < until:
            if seconds and time.monotonic() - last > 0.5:
                last, added = time.monotonic(), added + 1
                with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(line_of(steps + added, began))
            try:
                shown = os.read(ours, 1 << 16)
            except BlockingIOError:
                shown = b""
            if b"q quit" in shown and not first:
                first, until = cpu_seconds(process.pid), time.monotonic() + seconds
            time.sleep(0.05)
        total = cpu_seconds(process.pid)
        os.write(ours, b"q")
        assert process.wait(30) == 0, "the view did not end with 0"
    assert first, "no frame was shown"
    return first, total


if __name__ == "__main__":
    main()
