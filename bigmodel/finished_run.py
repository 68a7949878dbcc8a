"""Whether a start has nothing to do, because its run has finished.

In: the settings of a start. Out: a line for the user, or "" where ranks have to begin. It is finished if no start
followed its end, its last checkpoint is there, and settings, DeepSpeed JSON and data are those of its last start: then
the end recorded every evaluation, too. A run with a store of checkpoints always begins: the store may have newer ones.

Call it in one process before any rank begins, never in one of several ranks: each would read the run directory at
another moment, and one could end while the others wait for it. Costs: a few small files; imports no torch.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.secret_text import without_secrets_inside
from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.run_directory import read_json, read_json_lines

AFTER_THE_END = ("launch_ended", "decided", "start_refused", "stop_requested")  # events of the launcher
TAIL_BYTES = 1 << 16


def finished(settings: Settings, world_size: int) -> str:
    """What to say of a finished run; "": start it. Anything unreadable means a start, whose message tells more."""
    directory = settings.run.directory
    with suppress(OSError, UserError, LookupError, TypeError, AttributeError):
        step = 0 if settings.checkpoint.remote else _last_step(directory)
        if step and _is_unchanged(settings, world_size) and _is_saved(settings, step):
            return (
                f"{directory}: the run is finished, at step {step} of {settings.training.steps}, with these settings "
                f"and data: see bigmodel report {directory}; to go on, raise training.steps; to start over, --fresh"
            )
    return ""


def _last_step(directory: Path) -> int:
    """The step at which the run finished; 0: it did not, or was started again."""
    events = read_json_lines(directory / "events.jsonl", TAIL_BYTES)
    last: dict[str, Any] = {}
    for event in events:
        last = last if event["event"] in AFTER_THE_END else event
    return int(last["step"]) if last["event"] == "finished" else 0


def _is_unchanged(settings: Settings, world_size: int) -> bool:
    """Whether settings, DeepSpeed JSON and data are those of the last start."""
    directory = settings.run.directory
    effective, settings = resolve_deepspeed(settings, world_size)
    now = {"settings.json": to_toml_table(settings), "deepspeed.json": effective}
    return (
        all(without_secrets_inside(table) == read_json(directory / name) for name, table in now.items())
        and (directory / "data_manifest.json").read_bytes() == (settings.data.directory / "manifest.json").read_bytes()
    )


def _is_saved(settings: Settings, step: int) -> bool:
    """Whether the checkpoint of this step is the newest, its files have their sizes, and the summary is there."""
    from bigmodel.training.checkpoint.folder import looks_whole, path_of, steps

    directory = settings.run.directory
    checkpoints = directory / "checkpoints"
    is_summed_up = (directory / "summary.json").is_file() or not settings.evaluation.at_end
    return is_summed_up and steps(checkpoints)[-1:] == [step] and looks_whole(path_of(checkpoints, step))
