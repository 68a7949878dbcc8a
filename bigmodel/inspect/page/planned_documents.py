"""The documents of a few steps, planned again, for the table of worst steps.

In: a run directory with a checkpoint, its prepared data (manifest and length files, on this machine), and steps. Out:
chunks as events.jsonl has them. Guarantees: the chunks that the run trained on (`bigmodel.provenance.trained`), or
none: steps after the newest checkpoint, of data that is gone or remote, or far behind a checkpoint have none. Costs: 1
to 2 microseconds a chunk, `MOST_CHUNKS` for all steps together; nothing for a step that was asked for before. Imports
no torch.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError, packs_at, settings_from_table
from bigmodel.inspect.page.history import RunHistory
from bigmodel.provenance.trained import Run
from bigmodel.run_directory import read_json
from bigmodel.training.checkpoint.folder import newest_state, steps

MOST_CHUNKS = 500_000  # about a second


def planned_documents(
    history: RunHistory, wanted: Iterable[int], most_chunks: int = MOST_CHUNKS
) -> dict[int, list[list[Any]]]:
    """Step -> [source, shard, row, first token, number of tokens] of each chunk, the steps of least work first."""
    known, missing = history.documents, [step for step in wanted if step not in history.documents]
    if missing and (run := _open(history)):
        left = most_chunks
        for work, step in sorted((_work(history, run, step), step) for step in missing if 1 <= step <= run.reached):
            left -= work
            if left < 0:
                break
            known[step] = _chunks(run, step)
    return known


def _open(history: RunHistory) -> Run | None:
    file = history.directory / "settings.json"
    try:
        settings = settings_from_table(read_json(file), file, saved=True)
        state = newest_state(history.directory / "checkpoints")
        if state is None or settings.data.remote:
            return None
        return Run(history.directory, settings, state["segments"], state["step"])
    except (UserError, OSError, LookupError):
        return None


def _work(history: RunHistory, run: Run, step: int) -> int:
    """Chunks to plan: those since the checkpoint before the step or the beginning of its segment, and a packing buffer
    of each lane."""
    begins = [segment["first_step"] for segment in run.segments] + steps(history.directory / "checkpoints")
    begin = max(one for one in begins if one < step)
    documents, numbers = history.column("documents"), history.column("step")
    since = float(np.nansum(documents[(numbers > begin) & (numbers <= step)]))
    training = run.settings.training
    of_pack = float(np.nanmean(documents)) / packs_at(step - 1, training.global_batch_size, training.batch_ramp)
    return int(since + of_pack * run.settings.data.packing_buffer * run.settings.data.lanes)


def _chunks(run: Run, step: int) -> list[list[Any]]:
    try:
        (trained,) = run.walk(step, step)
    except (UserError, OSError):  # the data is gone, or other data is there now
        return []
    names = trained.store.sources
    return [
        [names[source], shard, row, first, length] for source, shard, row, first, length, *_ in trained.chunks.tolist()
    ]
