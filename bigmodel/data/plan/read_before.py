"""Read before: what the segments of a run have read, for the plan of the next one.

In: the segments of a checkpoint, each earlier one with its plan's identity, the sizes and digests of its shards and the
cursor at its end; a store. Out: per source and shard, what is unread, epoch by epoch (`ShardUnread`).

A lane reads blocks in order: at its cursor every block before is read, of the current block the chunks before, minus
chunks that were drawn and not given. So only the current blocks and packing buffers are planned again, of the lanes
that are asked for: about 2 microseconds a document of a block. A source that is left out keeps what was unread.

A shard is known by the digest of its files. One that is gone or was written again cannot be followed. Then the current
packing buffers count as unread, and so do the current blocks of its source (`lost`). Where an earlier segment's plan
rests on shards that are gone now, its sources begin again (`forgotten`). Both are settled when a segment begins, are
stored with it, and make documents repeat, never be left out.
"""

import base64
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.plan.order import READ_BEFORE, Order
from bigmodel.data.plan.packing_buffer import Lane, LaneCursor
from bigmodel.data.plan.shuffle import BLOCK_DOCUMENTS, Lengths, SourceCursor, SourceStream
from bigmodel.data.plan.unread import Pieces, ShardUnread

Segment = dict[str, Any]
Key = tuple[int, int]  # digest of a shard, and its number among the equal ones of its source
NEW = ShardUnread()


class Identified(Lengths, Protocol):
    """The part of `ShardStore` that tells whether a shard is still the same."""

    def shard_digests(self, source: str) -> np.ndarray: ...  # (shards,) int64


def pack_shards(store: Identified, sources: Iterable[str]) -> dict[str, str]:
    """The sizes and digests of the shards, for a checkpoint: base64 of compressed int64 (shards, 4)."""
    tables = {name: np.column_stack([store.shard_sizes(name), store.shard_digests(name)]) for name in sources}
    return {
        name: base64.b64encode(zlib.compress(table.astype("<i8").tobytes())).decode() for name, table in tables.items()
    }


def unpack_shards(text: str) -> np.ndarray:
    """(shards, 4): documents, positions, skipped, digest."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").reshape(-1, 4)


def keys_of(digests: np.ndarray) -> list[Key]:
    seen: dict[int, int] = defaultdict(int)
    keys = []
    for digest in digests.tolist():
        keys.append((digest, seen[digest]))
        seen[digest] += 1
    return keys


class EarlierStore:
    """The lengths of the shards of a segment, by the numbers that they had, out of the store as it is now."""

    def __init__(self, store: Any, segment: Segment) -> None:
        self.sources: list[str] = segment["sources"]
        self.fingerprint: str = segment["identity"]["prepared data"]
        self.base = getattr(store, "base", store)
        self._tables = {name: unpack_shards(text) for name, text in segment["shards"].items()}
        self._now: dict[str, dict[Key, int]] = {}
        self._numbers: dict[str, list[int | None]] = {}

    def __getattr__(self, name: str) -> Any:  # of the store as it is: pair_sources, supervised_sources, passes
        return getattr(self.base, name)

    def keys(self, source: str) -> list[Key]:
        return keys_of(self._tables[source][:, 3])

    def shard_sizes(self, source: str) -> np.ndarray:
        return self._tables[source][:, :3]

    def shard_digests(self, source: str) -> np.ndarray:
        return self._tables[source][:, 3]

    def gone(self, source: str) -> list[int]:
        return [shard for shard in range(len(self._tables[source])) if self.number_now(source, shard) is None]

    def number_now(self, source: str, shard: int) -> int | None:
        """The shard's number in the store as it is; None: it is gone."""
        if source not in self._now:
            self._now[source] = {}
            if source in self.base.sources:
                keys = keys_of(self.base.shard_digests(source))
                self._now[source] = {key: number for number, key in enumerate(keys)}
            self._numbers[source] = [self._now[source].get(key) for key in self.keys(source)]
        return self._numbers[source][shard]

    def lengths(self, source: str, shard: int) -> np.ndarray:
        return self.base.lengths(source, self._found(source, shard))

    def lengths_of_pass(self, source: str, shard: int, number: int, side: str = "") -> np.ndarray:
        return self.base.lengths_of_pass(source, self._found(source, shard), number, side)

    def target_lengths(self, source: str, shard: int) -> np.ndarray:
        return self.base.target_lengths(source, self._found(source, shard))

    def spans(self, source: str, shard: int) -> np.ndarray:
        return self.base.spans(source, self._found(source, shard))

    def _found(self, source: str, shard: int) -> int:
        number = self.number_now(source, shard)
        if number is None:
            raise UserError(f"source {source!r}: shard {shard} of an earlier segment is no longer in the prepared data")
        return number


class History:
    """What the segments before one read: a `ReadBefore`."""

    def __init__(
        self,
        store: Identified,
        segments: Sequence[Segment],
        place: Mapping[str, Any],
        make_order: Callable[[Lengths, int], Order],
    ) -> None:
        """`segments`: the earlier ones, whose data are those of `store` or known by their digests; `place`: `lost` and
        `forgotten` of the one that begins; `make_order(store, number)`: the plan of an earlier segment."""
        self._store, self._segments, self._make_order = store, segments, make_order
        self._lost, self._forgotten = frozenset(place.get("lost", ())), place.get("forgotten", ())
        self.digest = hashlib.sha256(json.dumps([list(segments), _settled(place)], sort_keys=True).encode()).hexdigest()
        self._lanes: dict[int, dict[tuple[str, Key], ShardUnread]] = {}
        self._keys: dict[str, list[Key]] = {}

    def unread(self, source: str, shard: int) -> ShardUnread:
        """Of a shard by its number in the store."""
        if source not in self._keys:
            self._keys[source] = keys_of(self._store.shard_digests(source))
        return self.by_key(source, self._keys[source][shard])

    def by_key(self, source: str, key: Key) -> ShardUnread:
        if self._forgotten == "all" or source in self._forgotten:
            return NEW
        if source not in self._segments[-1]["shards"]:  # left out by the last segment
            return self._before.by_key(source, key) if self._before else NEW
        lane = self._lane_of.get((source, key))
        if lane is None:
            return ShardUnread(self.floor(source))
        if lane not in self._lanes:
            self._lanes[lane] = self._after_lane(lane)
        return self._lanes[lane][source, key]

    def floor(self, source: str) -> int:
        """The oldest epoch of a source that some lane was in: where a shard begins that it did not have."""
        if self._forgotten == "all" or source in self._forgotten:
            return 0
        if source not in self._segments[-1]["shards"]:
            return self._before.floor(source) if self._before else 0
        number = self._segments[-1]["sources"].index(source)
        lanes = self._segments[-1]["end"]["lanes"]
        carried = [chunk[5] for lane in lanes for chunk in lane["carried"] if chunk[0] == number]
        return min([lane["sources"][source]["epoch"] for lane in lanes] + carried)

    @cached_property
    def _before(self) -> "History | None":
        """Of the last segment's plan; None: it began all sources anew."""
        read = self._order.read
        return read if isinstance(read, History) else None

    @cached_property
    def _earlier(self) -> EarlierStore:
        return EarlierStore(self._store, self._segments[-1])

    @cached_property
    def _order(self) -> Order:
        return self._make_order(self._earlier, len(self._segments) - 1)

    @cached_property
    def _lane_of(self) -> dict[tuple[str, Key], int]:
        found: dict[tuple[str, Key], int] = {}
        for source in self._segments[-1]["shards"]:
            keys = self._earlier.keys(source)
            for lane, shards in enumerate(self._order.dealt.get(source, ())):
                found |= {(source, keys[shard.number]): lane for shard in shards}
        return found

    def _after_lane(self, number: int) -> dict[tuple[str, Key], ShardUnread]:
        """What is unread of the shards of a lane at the end of the last segment."""
        lane, saved = self._order.lane(number), self._segments[-1]["end"]["lanes"][number]
        start = self._order.start_of(number, saved)
        following, pending = start, start.carried
        if not self._lost:
            following, pending = _drawn(lane, start, saved["packs_given"])
        found: dict[tuple[str, Key], ShardUnread] = {}
        for stream, cursor in zip(lane.streams, following.sources, strict=True):
            assert isinstance(stream, SourceStream)
            assert isinstance(cursor, SourceCursor)
            keys, is_lost = self._earlier.keys(stream.name), stream.name in self._lost
            left = _left(stream, cursor, pending[pending[:, 0] == stream.source], is_lost)
            found |= {(stream.name, keys[shard]): unread for shard, unread in left.items()}
        return found


def settle(store: Identified, segments: Sequence[Segment], resamples: bool) -> tuple[dict[str, Any], list[str]]:
    """`lost` and `forgotten` of a segment that begins in `store` after these, where anything is; and lines that say
    what may repeat. `resamples`: the new plan draws classes with shares of their own, whose passes differ."""
    last = segments[-1]
    if resamples or "data.class_mix" in last["identity"] or "data.class_exponent" in last["identity"]:
        return {"forgotten": "all"}, ["resampled classes have passes of their own: documents may repeat"]
    if "shards" not in last:
        return {"forgotten": "all"}, [
            "the checkpoint is of an earlier version and the data changed: documents may repeat"
        ]
    forgotten, lines = _forgotten(store, segments)
    lost = []
    for source in sorted(set(last["shards"]) - set(forgotten)):
        earlier = EarlierStore(store, last)
        if gone := earlier.gone(source):
            lost.append(source)
            sizes = earlier.shard_sizes(source)
            lines.append(
                f"source {source!r}: {len(gone):,} of {len(sizes):,} shards are gone or were written again, with "
                f"{int(sizes[gone, 0].sum()):,} documents: what was read of them is not known"
            )
    if lost:
        lines.append(
            f"documents of the current packing buffers may repeat, and of {', '.join(lost)} at most "
            f"{BLOCK_DOCUMENTS:,} in a lane"
        )
    return {name: value for name, value in (("lost", lost), ("forgotten", forgotten)) if value}, lines


def _forgotten(store: Identified, segments: Sequence[Segment]) -> tuple[list[str], list[str]]:
    """Sources of earlier plans that cannot be planned again, because shards of theirs are gone by now."""
    forgotten: set[str] = set()
    for segment, following in pairwise(segments):
        sources, settled = segment.get("shards", {}), following.get("lost", ())
        if READ_BEFORE in following["identity"]:
            earlier = EarlierStore(store, segment)
            if any(earlier.gone(source) for source in sources if source not in settled):
                forgotten |= set(sources)
    lines = [f"source {name!r}: shards of an earlier segment are gone; its documents may repeat" for name in forgotten]
    return sorted(forgotten), sorted(lines)


def _settled(place: Mapping[str, Any]) -> dict[str, Any]:
    return {name: place[name] for name in ("lost", "forgotten") if place.get(name)}


def _drawn(lane: Lane, start: LaneCursor, packs_given: int) -> tuple[LaneCursor, np.ndarray]:
    """The cursor after the packing buffer, and a table of the chunks drawn and not given."""
    buffer = lane.plan(start)
    return buffer.following, np.concatenate([buffer.table[buffer.starts[packs_given] :], buffer.following.carried])


def _left(stream: SourceStream, cursor: SourceCursor, pending: np.ndarray, is_lost: bool) -> dict[int, ShardUnread]:
    """What is unread of the stream's shards. `pending`: table of chunks before the cursor that were not given."""
    epoch, rows = cursor.epoch, stream.block_rows(cursor.epoch, cursor.block)
    listed = pending
    if not is_lost:
        block = stream.block_of(cursor)
        listed = np.concatenate([pending, block.table(cursor.fragment, block.num_chunks, stream.source, epoch)])
    listed = listed[np.argsort(listed[:, 1], kind="stable")]
    shards, found = listed[:, 1].copy(), {}
    for shard in stream.shards:
        low, high = rows[shard.number]
        before = stream.read.unread(stream.name, shard.number) if stream.read else NEW
        later = before.in_epoch(epoch, shard.documents).within(low if is_lost else high, shard.documents)
        left = {number: pieces for number, pieces in before.left.items() if number > epoch} | {epoch: later}
        mine = listed[slice(*np.searchsorted(shards, [shard.number, shard.number + 1]))]
        for number in np.unique(mine[:, 5]).tolist():
            chunks = mine[mine[:, 5] == number]
            parts = np.column_stack([chunks[:, 2], chunks[:, 3], chunks[:, 3] + chunks[:, 4]])
            known = left.get(number) or Pieces.of([], [])
            left[number] = Pieces.of(known.rows, [known.parts, parts])
        left = {number: pieces for number, pieces in left.items() if len(pieces.rows) or len(pieces.parts)}
        found[shard.number] = ShardUnread(max(before.whole_from, epoch + 1), left)
    return found
