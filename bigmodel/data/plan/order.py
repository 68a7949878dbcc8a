"""Order: the packs of every step.

In: shard sizes, document lengths, settings, a seed. Out: packs, step by step, without end.

    shards of a source --deal--> lanes --shuffle--> blocks --split--> chunks --mix--> packing buffers --pack--> packs

Each lane is an endless stream. A step takes the same number of packs from every lane; its canonical order is lane 0's
packs, then lane 1's, and so on. Example: 2 lanes, `global_batch_size` = 4: step 0 has packs 0 and 1 of lane 0, then
packs 0 and 1 of lane 1; step 1 has packs 2 and 3 of each. An `Order` may plan some lanes only: it gives their packs and
opens the length files of their shards only.

Guarantees: a pure function of (seed, lengths, settings), independent of world size, rank and process. In an epoch of a
source every position of every document of at least 2 stored tokens is in exactly one pack. The cursor is small plain
JSON; restoring it plans one packing buffer per lane, whatever the step.
Resampled classes have epochs of their own (`bigmodel.data.plan.classes`); their labels are read when the order is made.
Costs about 2 microseconds a document. Memory: one packing buffer per planned lane, and at most two blocks per planned
lane and source.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bigmodel.config.renamed import NEW_NAMES, OLD_NAMES
from bigmodel.config.sections import without_effect
from bigmodel.config.settings import SAVED, DataSettings, Settings, UserError, packs_at
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.classes import cursor_of
from bigmodel.data.plan.exclusion import Excluded, without
from bigmodel.data.plan.lanes import deal, mixed_shards, packs_in_smallest_lane
from bigmodel.data.plan.packing_buffer import Lane, LaneCursor, LanePosition, PackingBuffer, make_lane
from bigmodel.data.plan.planned import PackTable, PlannedSteps, in_canonical_order
from bigmodel.data.plan.shuffle import BLOCK_DOCUMENTS, Lengths, Pack, chunk_table, has_wide
from bigmodel.data.plan.unread import ReadBefore
from bigmodel.data.randomness import make_key

ORDER_VERSION = 1  # raise it with every change that gives another order from the same input
EXCLUDED = "excluded documents"  # in the identity of a plan with data.exclude
NAMES = {EXCLUDED: "data.exclude, the hash of its documents"}  # for users
READ_BEFORE = "read by earlier segments"  # in the identity of a segment that goes on where they ended
EXAMPLES = {  # settings of examples; in a plan's identity only where they differ from their defaults
    "source_sequence_length",
    "max_source_length",
    "objectives",
    "augmentation",
    "sentinels",
    "first_sentinel",
    "mask_token",
    "bidirectional_prefix",
    "target_ahead",
    "fixed_target_tokens",
    "masked_decoder_share",
    "dropped_decoder_share",
}
RESAMPLING = {"mix_exponent", "class_mix", "class_exponent"}  # as EXAMPLES, of the shares of sources and classes


@dataclass(frozen=True, slots=True)
class SourceProgress:
    """Progress through a source of the packs given so far."""

    epochs_complete: int  # every lane has given every position of them; of classes, the fewest
    positions: int  # given so far, over all epochs
    passes: float  # positions given / positions in one epoch


Taken = tuple[PackingBuffer, int, int]  # packs [first, end) of it
LaneProgress = dict[str, tuple[int, int]]  # per source: epochs complete, positions given


@dataclass(frozen=True, slots=True)
class Plan:
    """The inputs of an order; stored in every checkpoint."""

    identity: dict[str, Any]  # by names of settings
    num_lanes: int
    source_positions: dict[str, int]  # per mixed source, in one epoch

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Position:
    """The planned lanes after `step` data steps. Cheap to keep; `cursor` makes the JSON."""

    plan: Plan
    step: int
    lanes: Mapping[int, LanePosition] = field(repr=False)

    def cursor(self) -> dict[str, Any]:
        """Plain JSON: a few hundred bytes a lane plus its carried chunks; null for lanes not planned here."""
        lanes = [
            self._describe(self.lanes[number]) if number in self.lanes else None
            for number in range(self.plan.num_lanes)
        ]
        return {
            "fingerprint": self.plan.fingerprint,
            "identity": self.plan.identity,
            "step": self.step,
            "lanes": lanes,
        }

    def lane_progress(self) -> dict[int, LaneProgress]:
        """Per planned lane and source: complete epochs, positions given."""
        progress: dict[int, LaneProgress] = {}
        for number, at in self.lanes.items():
            progress[number] = {}
            for column, name in enumerate(self.plan.source_positions):
                cursor = at.buffer.following.sources[column]
                given = cursor.positions - int(at.buffer.pending_positions[at.packs_given, column])
                epochs = min(cursor.epoch, int(at.buffer.pending_epochs[at.packs_given, column]))
                progress[number][name] = (epochs, given)
        return progress

    def _describe(self, at: LanePosition) -> dict[str, Any]:
        start = at.start
        names = self.plan.source_positions
        later = {"stage": start.stage, "since": list(start.since)} if start.stage else {}
        return {
            "window": start.buffer,  # the stored name
            "packs_given": at.packs_given,
            "sources": {name: asdict(cursor) for name, cursor in zip(names, start.sources, strict=True)},
            "carried": start.carried.tolist(),
            **later,
        }


class Order:
    """The endless sequence of steps: `next_step` gives the packs of a step, `state` the cursor after it."""

    def __init__(
        self,
        store: Lengths,
        settings: DataSettings,
        global_batch_size: int,
        seed: int,
        batch_ramp: Sequence[tuple[int, int]] = (),
        lanes: Iterable[int] | None = None,
        segment: int = 0,
        first_step: int = 0,
        read: ReadBefore | None = None,
        excluded: Excluded | None = None,
    ) -> None:
        """Plan the given lanes; None: all. Opens no length file before the first step, but those of shards with
        excluded documents.

        `global_batch_size` and `batch_ramp`: of [training]. Segment n > 0 is a plan that begins at `first_step`, after
        a change of data or settings; it gives what is left of `read` first. `excluded`: None: as data.exclude says.

        Raises `UserError` where mix, sources or lanes do not fit the data.
        """
        self._global_batch_size, self._batch_ramp = global_batch_size, batch_ramp
        for packs in (global_batch_size, *(packs for _, packs in batch_ramp)):
            assert packs % settings.lanes == 0, f"packs = {packs} is not a multiple of lanes = {settings.lanes}"
        if excluded is None:
            excluded = Excluded.read(settings.exclude)
            excluded.check(store)
        self.excluded = excluded
        store = without(store, self.excluded)
        shards = mixed_shards(store, settings)
        identity = _identity(store, settings, global_batch_size, batch_ramp, seed, segment)
        identity |= {EXCLUDED: self.excluded.digest} if self.excluded else {}
        identity |= {READ_BEFORE: read.digest} if read else {}
        totals = {name: sum(shard.positions for shard in shards[name]) for name in shards}
        self.plan = Plan(identity, settings.lanes, totals)
        self.num_skipped_documents = sum(shard.skipped for parts in shards.values() for shard in parts)
        self.step = self.first_step = first_step  # data steps given by this and earlier segments
        key = make_key("segment", seed, segment) if segment else seed
        self.read, self.dealt = read, deal(shards, settings.lanes)
        dealt = self.dealt
        examples = Examples(settings, seed)
        wide = not examples.is_plain or any(has_wide(store, name) for name in dealt)
        self._packs_in_lane = packs_in_smallest_lane(settings, dealt)  # at least, for plain text; None: endless
        self._is_counted = not wide and not read and not getattr(store, "passes", 0)  # by the shard sizes
        self._lanes = {
            number: make_lane(number, store, dealt, settings, key, examples if wide else None, read)
            for number in (range(settings.lanes) if lanes is None else sorted(lanes))
        }
        self._at: dict[
            int, LanePosition
        ] = {}  # filled on first use: a restored order plans one packing buffer, not two

    @classmethod
    def of_run(cls, store: Lengths, settings: Settings, **place: Any) -> "Order":
        """The order of a run file; `place`: lanes, segment, first_step, read."""
        training = settings.training
        return cls(store, settings.data, training.global_batch_size, settings.run.seed, training.batch_ramp, **place)

    @property
    def fingerprint(self) -> str:
        return self.plan.fingerprint

    @property
    def lanes(self) -> list[int]:
        """The planned lanes, ascending."""
        return list(self._lanes)

    def packs_at(self, step: int) -> int:
        """Packs in a data step, over all lanes."""
        return packs_at(step, self._global_batch_size, self._batch_ramp)

    def next_step(self) -> list[Pack]:
        """The planned lanes' packs of the next data step, in canonical order.

        Raises `UserError` where data.max_epochs leaves too few in a lane; then no lane has moved.
        """
        return self.next_packs()[0]

    def next_packs(self) -> tuple[list[Pack], PackTable]:
        """As `next_step`, and the same packs as arrays."""
        share = self.packs_at(self.step) // self.plan.num_lanes
        taken = [part for parts in self._take_of_all(share) for part in parts]
        self.step += 1
        packs = [pack for buffer, first, end in taken for pack in buffer.packs[first:end]]
        chunks, num_chunks = zip(*(buffer.tables(first, end) for buffer, first, end in taken), strict=True)
        return packs, PackTable(np.concatenate(chunks), np.concatenate(num_chunks))

    def next_tables(self, steps: int) -> PlannedSteps:
        """The same of the next data steps together, as arrays: a fifth of the time of objects. Raises as `next_step`,
        then without a move."""
        shares = [self.packs_at(step) // self.plan.num_lanes for step in range(self.step, self.step + steps)]
        taken = self._take_of_all(sum(shares))
        lanes = [[buffer.tables(first, end) for buffer, first, end in parts] for parts in taken]
        planned = in_canonical_order(self.step, shares, lanes)
        self.step += steps
        return planned

    def position(self) -> Position:
        """The position after the last step given."""
        return Position(self.plan, self.step, {number: self._lane_at(number) for number in self._lanes})

    def state(self) -> dict[str, Any]:
        """The cursor after the last step given; see `Position.cursor`."""
        return self.position().cursor()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step of `state`, which must hold all lanes. Plans one packing buffer per planned lane.

        Raises `UserError` with the differences if the state was made from other data or settings.
        """
        if state["fingerprint"] != self.fingerprint and in_force(state["identity"]) != in_force(self.plan.identity):
            raise UserError(describe_difference(state["identity"], self.plan.identity))
        for number, lane in self._lanes.items():
            saved = state["lanes"][number]
            self._at[number] = replace(lane.enter(self.start_of(number, saved)), packs_given=saved["packs_given"])
        self.step = state["step"]

    def lane(self, number: int) -> Lane:
        return self._lanes[number]

    def start_of(self, number: int, saved: Mapping[str, Any]) -> LaneCursor:
        """The start of the packing buffer in a lane's part of a cursor."""
        cursors = tuple(cursor_of(saved["sources"][name]) for name in self.plan.source_positions)
        carried = chunk_table(saved["carried"], self._lanes[number].wide)
        return LaneCursor(saved["window"], cursors, carried, saved.get("stage", 0), tuple(saved.get("since", ())))

    def progress(self) -> dict[str, SourceProgress]:
        """Per mixed source: progress over the planned lanes."""
        return total_progress(self.plan, self.position().lane_progress())

    def require(self, steps: int) -> None:
        """Raise `UserError` if data.max_epochs leaves too few packs for data steps up to `steps`.

        Where shard sizes cannot prove that there are enough, this plans the rest of the planned lanes as far as needed:
        2 microseconds a document, 20 to 40 with two sides.
        """
        if self._packs_in_lane is None:
            return
        in_all = sum(map(self.packs_at, range(self.first_step, steps))) // self.plan.num_lanes
        if self._is_counted and in_all <= self._packs_in_lane:
            return
        given = sum(map(self.packs_at, range(self.first_step, self.step))) // self.plan.num_lanes
        for number, lane in self._lanes.items():
            left = lane.packs_left(self._lane_at(number), at_most=in_all - given)
            if left < in_all - given:
                raise UserError(
                    f"data.max_epochs: training.steps = {steps} needs {in_all:,} packed sequences from every lane, but "
                    f"lane {number} holds {given + left:,}; train fewer steps, raise data.max_epochs or "
                    "prepare more data"
                )

    def _lane_at(self, number: int) -> LanePosition:
        if number not in self._at:
            self._at[number] = self._lanes[number].enter(self._lanes[number].beginning())
        return self._at[number]

    def _take_of_all(self, count: int) -> list[list[Taken]]:
        """Advance each planned lane by `count` packs. After an error no lane has moved."""
        before = dict(self._at)
        try:
            return [self._take(number, count) for number in self._lanes]
        except BaseException:
            self._at = before
            raise

    def _take(self, number: int, count: int) -> list[Taken]:
        taken: list[Taken] = []
        while count:
            at = self._lane_at(number)
            if at.packs_given == at.buffer.num_packs:
                at = self._lanes[number].enter(at.buffer.following)
                if not at.buffer.num_packs:
                    raise UserError(
                        f"data.max_epochs: lane {number} has no packed sequence left for step {self.step + 1}: every "
                        "source of its mix has reached its limit; train fewer steps, or raise data.max_epochs"
                    )
            end = min(at.packs_given + count, at.buffer.num_packs)
            taken.append((at.buffer, at.packs_given, end))
            count -= end - at.packs_given
            self._at[number] = replace(at, packs_given=end)
        return taken


def merge_cursors(cursors: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The cursor of all lanes, from cursors of some lanes each, at the same step."""
    known = [cursor for cursor in cursors if cursor]
    merged: dict[str, Any] = {**known[0], "lanes": list(known[0]["lanes"])}
    for cursor in known:
        assert (cursor["fingerprint"], cursor["step"]) == (merged["fingerprint"], merged["step"]), "another step"
        for number, lane in enumerate(cursor["lanes"]):
            if lane is not None:
                assert merged["lanes"][number] in (None, lane), f"two cursors of lane {number} differ"
                merged["lanes"][number] = lane
    assert None not in merged["lanes"], f"no cursor of lane {merged['lanes'].index(None)}"
    return merged


def total_progress(plan: Plan, lanes: Mapping[int, LaneProgress]) -> dict[str, SourceProgress]:
    """Progress of the sources, summed over these lanes."""
    progress = {}
    for name, positions in plan.source_positions.items():
        given = sum(lane[name][1] for lane in lanes.values())
        epochs = min(lane[name][0] for lane in lanes.values())
        progress[name] = SourceProgress(epochs, given, given / positions)
    return progress


def _identity(
    store: Lengths,
    settings: DataSettings,
    global_batch_size: int,
    batch_ramp: Sequence[tuple[int, int]],
    seed: int,
    segment: int,
) -> dict[str, Any]:
    """The inputs of the order by setting; a renamed setting keeps its old name in stored identities."""
    chosen = settings.model_dump(include=EXAMPLES | RESAMPLING, exclude_defaults=True)
    examples = {f"data.{name}": value for name, value in chosen.items()}
    names = ("max_document_length", "sequence_length", "max_documents", "lanes", "packing_buffer", "mix")
    planned = {f"data.{name}": getattr(settings, name) for name in names}
    optional = {
        "training.batch_ramp": [list(entry) for entry in batch_ramp],
        "data.max_epochs": {name: epochs for name, epochs in settings.max_epochs.items() if epochs},
        "data.curriculum": [stage.model_dump() for stage in settings.curriculum],
        "classification.classes": list(settings.classes),
        "segment": segment,
    }
    return {
        "version of the order": ORDER_VERSION,
        "documents shuffled together": BLOCK_DOCUMENTS,
        "prepared data": store.fingerprint,
        "run.seed": seed,
        OLD_NAMES["training.global_batch_size"]: global_batch_size,
        **{OLD_NAMES.get(name, name): value for name, value in planned.items()},
        **{OLD_NAMES.get(name, name): value for name, value in optional.items() if value},
        **{OLD_NAMES.get(name, name): value for name, value in examples.items()},  # 0 and false, too
    }


def in_force(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without settings that have no effect; earlier versions accepted and stored them."""
    named = {NEW_NAMES.get(name, name): value for name, value in identity.items()}
    given = {name: named[f"data.{name}"] for name in DataSettings.model_fields if f"data.{name}" in named}
    data = DataSettings.model_validate(given, context=SAVED)
    found = {name: value for name, value in named.items() if name.removeprefix("data.") not in without_effect(data)}
    if "data.objectives" in found:
        found["data.objectives"] = [
            {name: value for name, value in saved.items() if name not in without_effect(one)}
            for saved, one in zip(found["data.objectives"], data.objectives, strict=True)
        ]
    return found


def describe_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The differences between two identities, as an error for the user."""
    lines = [
        f"  {(NEW_NAMES | NAMES).get(name, name)}: {saved.get(name)!r} when saved, {current.get(name)!r} now"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    return (
        "the saved position belongs to another order of the data; to continue would repeat and skip documents:\n"
        + "\n".join(lines or ["  the saved position itself was altered"])
        + "\nset these back, continue from this step with a new plan, which gives what is unread first (--new-plan), "
        "or start a new run in another run.directory"
    )
