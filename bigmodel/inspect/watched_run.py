"""What `bigmodel watch` knows of a run: a fold over the files of its directory, which it only reads.

In: metrics.jsonl, events.jsonl and settings.json while they grow. Out: the newest values, the loss curve in a bounded
number of points, the seconds by cause. Guarantees: the seconds are those of `RunAccounting`; a line that is damaged or
of an unknown kind is left out. Cost: benchmarks/README.md, "The view in the terminal".
"""

import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.config.user_error import UserError
from bigmodel.inspect.growing_file import GrowingFile
from bigmodel.inspect.step_lines import runs_of_lines
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json

MOST_POINTS = 256  # of the loss curve
RECENT_STEPS = 50  # of the rate
NUM_EVENTS = 50
STATUS_SECONDS = 5.0  # between two calls of `status`: it may ask SLURM
RUN_FILES = ("metrics.jsonl", "events.jsonl", "launch.json", "settings.json", "lock", "logs", "checkpoints")
NEVER = "not started yet"

Status = Callable[[Path], Mapping[str, Any]]


def without_others(names: Sequence[Path]) -> list[Path]:
    """Without what a pattern such as runs/* finds beside the runs: discovery files, folders of something else. All
    names, if no run is among them, so that the error names one."""
    return [one for one in names if not one.exists() or one.suffix == ".toml" or _may_be_run(one)] or list(names)


def _may_be_run(directory: Path) -> bool:
    """An empty directory is one of a run that has not started."""
    names = os.listdir(directory) if directory.is_dir() else [""]
    return not names or any(name in RUN_FILES for name in names)


# The beginning of a step's line as `Metrics.record_step` writes it: json.loads takes 20 times as long. Another line,
# as of an earlier version, is read by json.
STEP_LINE = re.compile(
    rb'^\{"kind": "step", "time": ([^,]+), "step": (\d+), "loss": ([^,]+), "gradient_norm": [^,]+, '
    rb'"learning_rate": [^,]+, "targets": \d+, "positions": (\d+), "padding": \d+, "documents": \d+, '
    rb'"step_seconds": ([^,]+), "data_wait_seconds": ([^,]+), "compile_seconds": ([^,]+), '
)
STEP_LINES = re.compile(STEP_LINE.pattern + rb'[^\n]*"spent": \{([^}\n]*)\}\}$', re.MULTILINE)
SKIPPED = b'"skipped": true'
SPENT = b'"spent": {'
ONE_SPENT = re.compile(rb'"spent": \{"(\w+)": ([^,}]+)\}\}')


class LossCurve:
    """Mean losses of equal numbers of consecutive steps, at most `MOST_POINTS`. Losses that are not finite are left
    out."""

    def __init__(self) -> None:
        self.first_step = 0
        self._size = 1  # steps of a point
        self._points: list[list[float]] = []  # last step, sum of losses, number of losses

    def add(self, step: float, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if not self._points:
            self.first_step = int(step)
        if self._points and self._points[-1][2] < self._size:
            last = self._points[-1]
            last[0], last[1], last[2] = step, last[1] + loss, last[2] + 1
            return
        if len(self._points) == MOST_POINTS:
            self._size *= 2
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [[two[0], one[1] + two[1], one[2] + two[2]] for one, two in pairs]
        self._points.append([step, loss, 1])

    @property
    def points(self) -> list[tuple[int, float]]:
        """(step, mean loss)."""
        return [(int(step), total / count) for step, total, count in self._points]


@dataclass
class Numbers:
    """What follows from metrics.jsonl."""

    accounting: RunAccounting = field(default_factory=RunAccounting)
    curve: LossCurve = field(default_factory=LossCurve)
    newest: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind -> newest line
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))  # tokens, seconds
    begun: tuple[float, float] | None = None  # step and time of the first step of this start
    best_evaluation: float = math.inf
    under_way: dict[str, Any] | None = None  # a "begin" line: an evaluation or save that has not ended

    def add_block(self, block: bytes) -> None:
        """Add whole lines of metrics.jsonl."""
        if self._add_steps(block):
            return
        for are_steps, lines in runs_of_lines(block):
            if not (are_steps and self._add_steps(b"\n".join([*lines, b""]))):
                for line in lines:
                    self.add(line)

    def _add_steps(self, text: bytes) -> bool:
        """Add whole lines, all of them steps, without a loop over lines of text. False, and nothing is added: they need
        a closer look. The curve and the rates are the same in both ways, the seconds to the last bit."""
        found = STEP_LINES.findall(text)
        if not found or len(found) != text.count(b"\n") or SKIPPED in text:
            return False
        moments, *numbers, spent = zip(*found, strict=True)
        try:
            first, last = float(moments[0]), float(moments[-1])
            steps, losses, positions, seconds, waited, compiled = (list(map(float, one)) for one in numbers)
            if self.accounting.add_steps(steps, last, seconds, waited, compiled, _spent_in(spent)) is None:
                return False
        except (ValueError, KeyError):
            return False
        for step, loss in zip(steps, losses, strict=True):
            self.curve.add(step, loss)
        self.recent.extend(zip(positions[-RECENT_STEPS:], seconds[-RECENT_STEPS:], strict=True))
        self.begun = self.begun or (steps[0], first)
        self.under_way, self._step_line = None, text[text.rfind(b"\n", 0, -1) + 1 : -1]
        return True

    def add(self, line: bytes) -> None:
        """Add a line of metrics.jsonl; one that is damaged changes nothing."""
        try:
            if found := STEP_LINE.match(line):
                moment, step, loss, positions, seconds, waited, compiled = map(float, found.groups())
                spent = _spent(line)
                self._see_step(int(step), moment, loss, positions, seconds)
                skipped = SKIPPED in line
                self.accounting.add_step_seconds(int(step), moment, seconds, waited, compiled, skipped, spent)
                self._step_line = line
            else:
                self._add_value(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    _step_line = b""

    def newest_step(self) -> dict[str, Any]:
        """The newest step's line; {}: none."""
        try:
            return dict(json.loads(self._step_line)) if self._step_line else {}
        except ValueError:
            return {}

    def _add_value(self, value: dict[str, Any]) -> None:
        kind = value["kind"]
        if kind == "step":
            numbers = (float(value[name]) for name in ("step", "time", "loss", "positions", "step_seconds"))
            self._see_step(*numbers)
            self._step_line = json.dumps(value).encode()
        self.accounting.add(value)
        self.newest[kind] = value
        self.under_way = value if kind == "begin" else None
        if kind == "start":
            self.begun = None
            self.recent.clear()
        elif kind == "evaluation":
            self.best_evaluation = min(self.best_evaluation, value["nats_per_token"])

    def _see_step(self, step: float, moment: float, loss: float, tokens: float, seconds: float) -> None:
        self.curve.add(step, loss)
        self.recent.append((tokens, seconds))
        self.begun = self.begun or (step, moment)
        self.under_way = None

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; 0: none."""
        seconds = sum(seconds for _, seconds in self.recent)
        return sum(tokens for tokens, _ in self.recent) / seconds if seconds else 0.0

    def utilization(self, step: Mapping[str, Any]) -> float | None:
        """Model FLOPs utilization over the last steps, attention counted as its masks allow it; None: unknown."""
        start = self.newest.get("start", {})
        peak = (start.get("device_peak_flops") or 0.0) * start.get("world_size", 0)
        if not (peak and step.get("flops") and step.get("positions")):
            return None
        return float(step["flops"]["causal"]) / step["positions"] * self.tokens_per_second / peak

    def seconds_per_step(self, step: Mapping[str, Any]) -> float | None:
        """Wall seconds per step since the first one of this start, evaluations and saves included; None: unknown."""
        if not self.begun or step.get("step", 0) <= self.begun[0]:
            return None
        return float((step["time"] - self.begun[1]) / (step["step"] - self.begun[0]))


def _spent(line: bytes) -> dict[str, float]:
    """The last field of a step's line: seconds by cause."""
    begin = line.rfind(SPENT)
    found = ONE_SPENT.match(line, begin) if begin > 0 else None
    if found:
        return {found[1].decode(): float(found[2])}
    return dict(json.loads(line[begin + len(SPENT) - 1 : -1])) if begin > 0 else {}


def _spent_in(texts: Sequence[bytes]) -> dict[str, list[float]]:
    """cause -> seconds in each line, from `"checkpoint": 0.5, "data": 0.1`."""
    spent: dict[str, list[float]] = {}
    for place, text in enumerate(texts):
        for one in text.split(b", ") if text else ():
            name, _, seconds = one.partition(b": ")
            cause = name[1:-1].decode()
            if cause not in spent:
                spent[cause] = [0.0] * len(texts)
            spent[cause][place] = float(seconds)
    return spent


class WatchedRun:
    """A run directory; `poll` reads what is new. The directory need not exist yet."""

    def __init__(self, directory: Path, status: Status) -> None:
        """status: of the launcher, as plain values. Raises `UserError` if the directory is of something else."""
        self.directory = directory
        if directory.is_dir() and not _may_be_run(directory):
            raise UserError(f"{directory}: not a run directory: it has none of {', '.join(RUN_FILES)}")
        self.numbers = Numbers()
        self.step: dict[str, Any] = {}  # the newest step's line
        self.events: deque[dict[str, Any]] = deque(maxlen=NUM_EVENTS)
        self.settings: dict[str, Any] = {}
        self.status: Mapping[str, Any] = {"state": NEVER}
        self._status, self._asked = status, -math.inf
        self._metrics = GrowingFile(directory / "metrics.jsonl")
        self._event_file = GrowingFile(directory / "events.jsonl")
        self._settings_time = 0.0

    def poll(self) -> None:
        """Read what is new."""
        has_more = self._metrics.has_more()
        if self._metrics.was_replaced:  # by each start, which drops the lines of steps to be repeated
            self.numbers, self.step = Numbers(), {}
        if has_more:
            for block in self._metrics.blocks():
                self.numbers.add_block(block)
            self.step = self.numbers.newest_step()
        has_events = self._event_file.has_more()
        if self._event_file.was_replaced:
            self.events.clear()
        if has_events:
            self._read_events()
        self._read_settings()
        if has_events or time.monotonic() - self._asked >= STATUS_SECONDS:
            self._ask()

    def _read_events(self) -> None:
        for line in self._event_file.lines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                self.events.append(event)

    def _read_settings(self) -> None:
        file = self.directory / "settings.json"
        try:
            written = file.stat().st_mtime
            if written != self._settings_time:
                self._settings_time, self.settings = written, read_json(file)
        except (OSError, UserError):  # it is replaced by each start
            return

    def _ask(self) -> None:
        self._asked = time.monotonic()
        files = ("events.jsonl", "launch.json")
        if not any((self.directory / name).exists() for name in files):
            has_lines = bool(self.step or self.numbers.newest)  # copied without its events
            self.status = {"state": "unknown" if has_lines else NEVER}
            return
        try:
            self.status = self._status(self.directory)
        except UserError as error:  # a damaged file
            self.status = {"state": "unknown", "last_end": {"cause": "unknown", "detail": str(error)}}

    @property
    def num_steps(self) -> int:
        """Steps of the whole run; 0: unknown."""
        return int(self.settings.get("training", {}).get("steps", 0))

    def next_due(self, section: str) -> int | None:
        """The next step at which `section`, evaluation or checkpoint, is due; None: unknown, or none."""
        of, last, step = self.settings.get(section, {}), self.num_steps, self.step.get("step", 0)
        every = of.get("every_steps", 0)
        if not step or step >= last or of.get("hours_between_failures"):
            return None
        due = (step // every + 1) * every if every else last
        at_end = section == "checkpoint" or of.get("at_end")
        return due if due < last else last if at_end else None

    @property
    def seconds_left(self) -> float | None:
        pace = self.numbers.seconds_per_step(self.step)
        return pace * (self.num_steps - self.step["step"]) if pace is not None and self.num_steps else None
