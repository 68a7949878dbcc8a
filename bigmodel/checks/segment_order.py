"""Order check over the segments of a run: each position at most once in an epoch of its source, across all plans.

In: a run's newest checkpoint and its data. Out: a finding. Plans only, no tokens are read. What a segment could not
follow (`lost`, `forgotten`) is counted, as told when it began.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel.checks.audit import Finding
from bigmodel.config.settings import Settings
from bigmodel.data.plan.order import READ_BEFORE, Order
from bigmodel.data.plan.read_before import Segment, keys_of, unpack_shards
from bigmodel.data.plan.segments import order_of_segment
from bigmodel.data.store.shards import ShardStore

MOST_POSITIONS = 2_000_000_000  # a longer run is walked up to this number

Chunks = dict[tuple[str, Any, int], list[tuple[int, int, int]]]  # source, shard's key, epoch -> row, first, end


def check_segments(settings: Settings, store: ShardStore, state: Mapping[str, Any]) -> list[Finding]:
    """Of the plans of all segments up to the checkpoint. Nothing for a run of one segment.

    Raises `UserError` where the data of an earlier segment is gone.
    """
    segments: Sequence[Segment] = state["segments"]
    first = max(number for number, one in enumerate(segments) if number == 0 or READ_BEFORE not in one["identity"])
    if first == len(segments) - 1:
        return []
    given: Chunks = defaultdict(list)
    positions = 0
    for number in range(first, len(segments)):
        ends = [one["first_step"] for one in segments[number + 1 :]] + [state["cursor"]["step"]]
        order = order_of_segment(store, settings.data, segments, number)[1]
        positions += _walk(order, segments[number], ends[0], given, MOST_POSITIONS - positions)
    repeated = sum(map(_repeated, given.values()))
    may = any(one.get("lost") or one.get("forgotten") for one in segments[first:])
    return [
        Finding(
            f"over {len(segments) - first} segments each token is given at most once in an epoch of its source"
            + (", but for documents that could not be followed" if may else ""),
            may or not repeated,
            f"{positions:,} tokens, {repeated:,} of them again",
        )
    ]


def _walk(order: Order, segment: Segment, end: int, given: Chunks, at_most: int) -> int:
    keys = {name: keys_of(unpack_shards(text)[:, 3]) for name, text in segment["shards"].items()}
    positions = 0
    while order.step < end and positions < at_most:
        for chunk in (chunk for pack in order.next_step() for chunk in pack):
            source = segment["sources"][chunk.source]
            at = source, keys[source][chunk.shard], chunk.epoch
            given[at].append((chunk.row, chunk.start, chunk.start + chunk.length))
            positions += chunk.length
    return positions


def _repeated(chunks: list[tuple[int, int, int]]) -> int:
    """Positions given more than once."""
    table = np.array(chunks, dtype=np.int64)
    firsts, ends = np.sort(table[:, 0] * 2**32 + table[:, 1]), np.sort(table[:, 0] * 2**32 + table[:, 2])
    points = np.unique(np.concatenate([firsts, ends]))
    depth = np.searchsorted(firsts, points, side="right") - np.searchsorted(ends, points, side="right")
    return int((np.diff(points) * np.maximum(depth[:-1] - 1, 0)).sum())
