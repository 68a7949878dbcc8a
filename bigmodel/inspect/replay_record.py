"""What a run directory says about a step to be computed again: its settings, its checkpoint, its recorded numbers.

In: a run directory, perhaps in use; it is only read. Out: a `Record`. Raises `UserError` for a step that cannot be
computed again, with the steps that can.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.run_directory import read_json, read_json_lines, tokenizer_of
from bigmodel.sizes import counted_noun
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.spikes import Rewind, declared_in, read_rewinds


@dataclass(frozen=True)
class Start:
    """A start of the run, and what it recorded. step: done before it. node_size: ranks of a node. new_plan: identity of
    the plan that began with it; None: the plan went on."""

    step: int
    world_size: int
    node_size: int
    settings: Settings
    deepspeed: dict[str, Any]  # effective
    versions: dict[str, str]
    new_plan: dict[str, Any] | None

    @classmethod
    def read(cls, file: Path, event: dict[str, Any]) -> "Start":
        """event: the start's line of events.jsonl, with the `identity` of a new plan."""
        table = read_json(file)
        environment, ranks = table["environment"], event["world_size"]
        node_size = int(environment["variables"].get("LOCAL_WORLD_SIZE", ranks))
        settings = settings_from_table(table["settings"], file, saved=True)
        deepspeed, versions = table["deepspeed"], environment["versions"]
        return cls(event["step"], ranks, node_size, settings, deepspeed, versions, event.get("identity"))


@dataclass(frozen=True)
class Record:
    """What the run recorded. lines: of metrics.jsonl by step, from 1. declared: all rewinds; rewinds: those that a
    later start has heeded."""

    directory: Path
    lines: dict[int, dict[str, Any]]
    starts: list[Start]
    saved: list[int]  # steps of usable checkpoints
    declared: list[Rewind]
    rewinds: list[Rewind]
    tokenizer: str  # sha256, "" if not recorded

    @property
    def last(self) -> int:
        return max([*self.lines, *(one.at for one in self.declared)], default=0)

    def start(self, step: int) -> Start:
        """The one that computed this step last."""
        return next((one for one in reversed(self.starts) if one.step < step), self.starts[0])

    def starts_of(self, first: int, last: int) -> list[Start]:
        """Those that computed these steps last, in their order."""
        return list({id(one): one for one in map(self.start, range(first, last + 1))}.values())

    def is_left_out(self, step: int) -> bool:
        """Whether the run applied no update in this step. A step without a record counts as applied."""
        is_left_out = any(step in one.steps for one in self.rewinds) or any(step == one.at for one in self.declared)
        return is_left_out or bool(self.lines.get(step, {}).get("skipped"))

    @property
    def possible(self) -> str:
        """Which steps can be computed again, in words."""
        if not self.saved:
            return "there is no usable checkpoint; --checkpoint 0 begins with the initial weights"
        first = min(self.saved)
        if first >= self.last:
            return f"the only checkpoint is of step {first}; --checkpoint 0 begins with the initial weights"
        return f"steps {first + 1} to {self.last} can be computed again from the checkpoints"


def read_record(directory: Path) -> Record:
    """Raises `UserError` if it is not the directory of a run that has begun."""
    files = sorted((directory / "starts").glob("*.json"))
    events: list[dict[str, Any]] = []
    waiting: list[Rewind] = []
    for line in read_json_lines(directory / "events.jsonl"):
        if line["event"] == "start":
            events.append(line)
            waiting = []
        elif line["event"] == "rewind":
            waiting.append(Rewind(line["step"], line["to"], line["first"]))
        elif line["event"] == "new_plan" and events:
            events[-1] = line | events[-1]
    starts = [Start.read(file, event) for file, event in _pairs(files, events)]
    if not starts:
        raise UserError(f"{directory}: no run directory (no starts/0001.json); give the run.directory of a run")
    lines = {line["step"]: line for line in read_json_lines(directory / "metrics.jsonl") if line["kind"] == "step"}
    declared = read_rewinds(directory)
    rewinds = [one for one in declared if one not in waiting]
    saved = [step for step in checkpoint.steps(directory / "checkpoints") if _is_usable(directory, step, rewinds)]
    return Record(directory, lines, starts, saved, declared, rewinds, tokenizer_of(directory))


def _pairs(files: list[Path], events: list[dict[str, Any]]) -> list[tuple[Path, dict[str, Any]]]:
    """Each start's event with its file, which is written right before it. A start that was killed between has a file
    alone; a full disk may keep an event from being written."""
    times = [(read_json(file)["time"], file) for file in files]
    found = [(max([one for one in times if one[0] <= event["time"]], default=None), event) for event in events]
    return [(file[1], event) for file, event in found if file]


def _is_usable(directory: Path, step: int, rewinds: list[Rewind]) -> bool:
    """Whether its weights were not trained on steps that the run has left out since."""
    try:
        state = checkpoint.open_checkpoint(checkpoint.path_of(directory / "checkpoints", step)).state
    except (OSError, ValueError, LookupError):
        return False
    known = declared_in(state)
    return all(one in known or step < one.first for one in rewinds)


def choose(record: Record, step: int, given: int | None) -> list[int]:
    """Steps of the checkpoints to begin from, the best first; 0: the initial weights. given: by the user.

    Raises `UserError` for a step beyond the run, or without a checkpoint before it.
    """
    if not record.last:
        raise UserError(f"{record.directory}: the run has no step yet; start it, or wait for its first step")
    if not 1 <= step <= record.last:
        raise UserError(f"--step {step}: {record.directory} has steps 1 to {record.last}; {record.possible}")
    if given is not None:
        if given not in (0, *record.saved):
            kept = ", ".join(map(str, record.saved)) or "none"
            raise UserError(f"--checkpoint {given}: the run has no usable one of that step, but {kept}; or give 0")
        if given >= step:
            raise UserError(f"--checkpoint {given}: is not before --step {step}; give a step below {step}")
        return [given]
    before = [one for one in reversed(record.saved) if one < step]
    if not before:
        remote = record.start(step).settings.checkpoint.remote
        copy = f"copy one back from checkpoint.remote = {remote}, or " if remote else ""
        begins = max((one.step for one in record.starts_of(1, step) if one.new_plan and one.step), default=0)
        if begins:
            raise UserError(
                f"--step {step}: no checkpoint before it; {record.possible}; {copy}put back one from step {begins} on, "
                "after which a new plan began"
            )
        again = f", which trains {counted_noun(step - 1, 'step')} again" if step > 1 else ""
        raise UserError(
            f"--step {step}: no checkpoint before it; {record.possible}; {copy}give --checkpoint 0, the initial "
            f"weights{again}"
        )
    return before
