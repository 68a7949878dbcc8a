"""What a run directory says about a step to be computed again: its settings, its checkpoint, its recorded numbers.

In: a run directory, perhaps in use; it is only read. Out: a `Record`. Raises `UserError` for a step that cannot be
computed again, with the steps that can.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.run_directory import read_json, read_json_lines, tokenizer_of
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.spikes import Rewind, declared_in, read_rewinds


@dataclass(frozen=True)
class Start:
    """A start of the run. number: of its file in starts/, from 1; world_size 0: not recorded."""

    step: int
    world_size: int
    number: int


@dataclass(frozen=True)
class Record:
    """What the run recorded. lines: of metrics.jsonl by step, from 1; starts: the start that computed each step."""

    directory: Path
    lines: dict[int, dict[str, Any]]
    starts: dict[int, Start]
    saved: list[int]  # steps of usable checkpoints
    rewinds: list[Rewind]
    tokenizer: str  # sha256, "" if not recorded

    def settings(self, step: int) -> Settings:
        """Of the start that computed this step."""
        start = self.starts.get(step)
        file = self.directory / "starts" / f"{start.number:04}.json" if start else self.directory / "settings.json"
        if not file.exists():
            return settings_from_table(read_json(self.directory / "settings.json"), self.directory, saved=True)
        table = read_json(file)
        return settings_from_table(table["settings"] if start else table, file, saved=True)

    def deepspeed(self, step: int) -> dict[str, Any]:
        """The effective DeepSpeed JSON of the start that computed this step; {}: not recorded."""
        start = self.starts.get(step)
        file = self.directory / "starts" / f"{start.number:04}.json" if start else Path()
        return read_json(file)["deepspeed"] if start and file.exists() else {}

    def versions(self, step: int) -> dict[str, str]:
        """Package versions of the start that computed this step; {}: not recorded."""
        start = self.starts.get(step)
        file = self.directory / "starts" / f"{start.number:04}.json" if start else Path()
        return read_json(file)["environment"]["versions"] if start and file.exists() else {}

    def is_left_out(self, step: int) -> bool:
        """Whether the run applied no update in this step. A step without a record counts as applied."""
        return any(step in one.steps for one in self.rewinds) or bool(self.lines.get(step, {}).get("skipped"))


def read_record(directory: Path) -> Record:
    """Raises `UserError` if it is not the directory of a run."""
    if not (directory / "settings.json").exists():
        raise UserError(
            f"{directory}: not a run directory (no settings.json); give the run.directory of a training run"
        )
    lines: dict[int, dict[str, Any]] = {}
    starts: dict[int, Start] = {}
    now, count = None, 0
    for line in read_json_lines(directory / "metrics.jsonl"):
        if line["kind"] == "start":
            count += 1
            now = Start(line["step"], line.get("world_size", 0), count)
        elif line["kind"] == "step":
            lines[line["step"]] = line
            if now:
                starts[line["step"]] = now
    rewinds = read_rewinds(directory)
    saved = [step for step in checkpoint.steps(directory / "checkpoints") if _is_usable(directory, step, rewinds)]
    return Record(directory, lines, starts, saved, rewinds, tokenizer_of(directory))


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
    last = max([*record.lines, *(one.at for one in record.rewinds)], default=0)
    possible = f"{record.directory}: {_replayable(record, last)}"
    if not 1 <= step <= last:
        raise UserError(f"--step {step}: the run has steps 1 to {last}; {possible}")
    if given is not None:
        if given not in (0, *record.saved):
            kept = ", ".join(map(str, record.saved)) or "none"
            raise UserError(f"--checkpoint {given}: there is no usable one of that step; the run has {kept}; or give 0")
        if given >= step:
            raise UserError(f"--checkpoint {given}: is not before --step {step}; give a step below {step}")
        return [given]
    before = [one for one in reversed(record.saved) if one < step]
    if not before:
        raise UserError(
            f"--step {step}: no checkpoint before it; {possible}; or give --checkpoint 0, which trains steps 1 to "
            f"{step - 1} again from the initial weights"
        )
    return before


def _replayable(record: Record, last: int) -> str:
    if not record.saved:
        return "it has no usable checkpoint"
    first = min(record.saved)
    return f"steps {first + 1} to {last} can be replayed" if first < last else f"its only checkpoint is of step {first}"
