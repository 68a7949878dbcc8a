"""What a run was trained on: the chunks of each step, over all of its segments.

In: a run directory: settings, the newest checkpoint's segments, metrics, rewinds; the manifests and length files of its
data. Out: `TrainedSteps`, arrays of the chunks of training steps 1 to the newest checkpoint's. Training step n is data
step n - 1 of the plan. A step without an update (skipped, or left out by a rewind) keeps its place, with its reason.

Guarantees: the rows are those that the run computed, at any number of ranks and restarts. No shard is opened.
Costs: 1 to 2 microseconds a chunk, from the checkpoint before the first step asked for; without one from the start of
its segment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import DataSettings, Settings, UserError, settings_from_table
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import order_of_segment
from bigmodel.data.store.manifest import MANIFEST
from bigmodel.data.store.shards import ShardStore
from bigmodel.run_directory import read_json, read_json_lines
from bigmodel.training.checkpoint.folder import newest_state, path_of, state_of, steps
from bigmodel.training.spikes import declared_in

DIGESTS = "order_digests.jsonl"
BATCH_PACKS = 100_000  # planned together


@dataclass(frozen=True)
class TrainedSteps:
    """Chunks of consecutive training steps of one segment, n rows: by step, then pack, then place in the pack."""

    segment: int
    store: ShardStore
    steps: np.ndarray  # (n,) int64: training step, from 1, as in metrics.jsonl
    packs: np.ndarray  # (n,) int64: place of the pack in its step
    chunks: np.ndarray  # (n, 6) or (n, 10): `bigmodel.data.plan.shuffle`

    @property
    def last_tokens(self) -> np.ndarray:
        """(n,) place in its document of the last token, which is a label only; the first is column 3."""
        return self.chunks[:, 3] + self.chunks[:, 4]

    def where(self, rows: np.ndarray | slice) -> "TrainedSteps":
        return TrainedSteps(self.segment, self.store, self.steps[rows], self.packs[rows], self.chunks[rows])


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it. `reached`: the step of its newest checkpoint. `data`: folders to look for its
    data in, before those that its records name."""

    directory: Path
    settings: Settings
    segments: Sequence[Mapping[str, Any]]
    reached: int
    without_update: Mapping[int, str] = field(default_factory=dict)  # step -> reason
    data: Sequence[Path] = ()

    @classmethod
    def open(cls, directory: Path, data: Sequence[Path] = ()) -> "Run":
        """Raises `UserError` for what is no run directory, and for a run without checkpoint and digests."""
        directory = Path(directory)
        file = directory / "settings.json"
        if not file.exists():
            raise UserError(f"{directory}: no run directory: it has no settings.json; give the run.directory of a run")
        settings = settings_from_table(read_json(file), file, saved=True)
        state = newest_state(directory / "checkpoints") or _from_digests(directory / DIGESTS)
        if state is None:
            raise UserError(
                f"{directory}: no checkpoint yet, so no step is kept; train until checkpoint.every_steps is reached, "
                f"or put back {directory / 'checkpoints'} or {DIGESTS}"
            )
        reasons = {  # of a step that a restart computed again, the last line
            line["step"]: line["skip_reason"] if line["skipped"] else ""
            for line in read_json_lines(directory / "metrics.jsonl")
            if line["kind"] == "step" and line["step"] <= state["step"]
        }
        left_out = {step: "left_out" for rewind in declared_in(state) for step in rewind.steps if step <= state["step"]}
        known = {int(step): reason for step, reason in state.get("without_update", {}).items()}
        all_reasons = {step: reason for step, reason in (known | reasons | left_out).items() if reason}
        return cls(directory, settings, state["segments"], state["step"], all_reasons, data)

    @cached_property
    def folders(self) -> list[Path]:
        """The given folders, then the prepared ones of the run's starts, the newest first."""
        starts = sorted((self.directory / "starts").glob("*.json"), reverse=True)
        tables = [read_json(start).get("settings", {}).get("data", {}) for start in starts]
        named = [self.settings.data.directory, *(Path(one["directory"]) for one in tables if "directory" in one)]
        return list(dict.fromkeys([*self.data, *named]))

    def store(self, number: int) -> ShardStore:
        """The prepared data of a segment, found by its hash. Raises `UserError` if no known folder has it."""
        wanted = self.segments[number]["identity"]["prepared data"]
        problems = [self._open(folder) for folder in self.folders if wanted not in self._stores]
        if wanted in self._stores:
            return self._stores[wanted]
        first, last = self.steps_of(number)
        raise UserError(
            f"{self.directory}: steps {first} to {last} were planned from other data than "
            f"{' and '.join(map(str, self.folders))} holds now{''.join(problems)}; put back the "
            "folder of that time: manifest, tokenizer and length files are enough"
            + ("; the steps of other segments do not need it" if len(self.segments) > 1 else "")
        )

    @cached_property
    def gone(self) -> dict[int, str]:
        """The segments whose data is gone, with the error that says so."""
        found = {}
        for number in range(len(self.segments)):
            try:
                self.store(number)
            except UserError as error:
                found[number] = str(error)
        return found

    def steps_of(self, number: int) -> tuple[int, int]:
        """The first and last training step of a segment."""
        ends = [segment["first_step"] for segment in self.segments[number + 1 :]][:1] or [self.reached]
        return self.segments[number]["first_step"] + 1, ends[0]

    def walk(self, first: int = 1, last: int = 0, leaves_out: bool = False) -> Iterator[TrainedSteps]:
        """The chunks of training steps `first` to `last`; 0: the newest checkpoint's. Raises `UserError` for a step
        that the run has not reached, and for data that has changed; `leaves_out` leaves out the steps of such data."""
        last = last or self.reached
        for step in (first, last):
            if not 1 <= step <= self.reached:
                raise UserError(
                    f"{self.directory}: no step {step}: its newest checkpoint is of step {self.reached}; give a step "
                    f"from 1 to {self.reached}"
                )
        for number in range(len(self.segments)):
            begin, end = self.steps_of(number)
            if begin <= last and first <= end and not (leaves_out and number in self.gone):
                yield from self._walk_segment(number, max(first, begin), min(last, end))

    def _walk_segment(self, number: int, first: int, last: int) -> Iterator[TrainedSteps]:
        store = self.store(number)
        _, order = order_of_segment(store, self._data(store), self.segments, number)  # type: ignore[arg-type]
        if cursor := self._cursor_before(number, first - 1, order):
            order.restore(cursor)
        while order.step < last:
            until = first - 1 if order.step < first - 1 else last
            planned = order.next_tables(min(until - order.step, max(1, BATCH_PACKS // order.packs_at(order.step))))
            if order.step >= first:
                yield TrainedSteps(number, store, planned.steps + 1, planned.packs, planned.chunks)

    def _data(self, store: ShardStore) -> DataSettings:
        return self.settings.data.model_copy(update={"directory": store.directory})

    def _cursor_before(self, number: int, step: int, order: Order) -> Mapping[str, Any] | None:
        """The cursor of the newest checkpoint of a segment at or before a data step."""
        folder = self.directory / "checkpoints"
        for saved in reversed([one for one in steps(folder) if order.first_step < one <= step]):
            try:
                state = state_of(path_of(folder, saved))
            except (OSError, ValueError, LookupError):
                continue
            if len(state["segments"]) == number + 1 and state["cursor"]["fingerprint"] == order.fingerprint:
                return dict(state["cursor"])
        return None

    @cached_property
    def _stores(self) -> dict[str, ShardStore]:
        return {}

    def _open(self, folder: Path) -> str:
        """Add the data of a folder to `_stores`; returns why it cannot be used, in brackets."""
        data = self.settings.data
        remote = data.remote if folder == data.directory else ""
        if not (folder / MANIFEST).exists() and not remote:
            return f" (there is no {folder / MANIFEST})"
        try:
            store = ShardStore(folder, "train", remote, data.cache_bytes)
        except UserError as error:
            return f" ({error})"
        self._stores.setdefault(store.fingerprint, store)
        return ""


def _from_digests(file: Path) -> dict[str, Any] | None:
    lines = list(read_json_lines(file))
    if not lines:
        return None
    try:
        skipped = {step: reason for line in lines[1:] for step, reason in line["without_update"].items()}
        return {"segments": lines[0]["segments"], "step": lines[-1]["last"], "without_update": skipped}
    except (TypeError, LookupError, AttributeError):
        raise UserError(f"{file}: no digests of this version; put the file back from a copy") from None
