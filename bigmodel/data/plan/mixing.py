"""Mixing: which source the next chunk of a lane comes from.

In: a lane's streams and the current mix. Out: the next chunks of the lane, each from the source furthest behind its
share of tokens (a pair counts the tokens of its source text). Example: shares 0.75 and 0.25 and chunks of equal
length give A B A A, A B A A, ...

Guarantees: a pure function of the cursors. A source that has given `data.max_epochs` drops out; the others split its
share in their own proportions. The curriculum (`data.curriculum`) changes the mix between packing buffers: a stage
begins with the first buffer of a lane that starts at or after the lane's part of `from_tokens`, and shares are counted
from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.plan.classes import Cursor, Stream
from bigmodel.data.plan.shuffle import chunk_table, starts_of


@dataclass(frozen=True, slots=True)
class Stage:
    """A mix of one lane: the lane position where it begins, and the share of each source (0: left out)."""

    from_positions: float
    shares: tuple[float, ...]


def stages(settings: DataSettings, names: Sequence[str], positions: Sequence[int]) -> list[Stage]:
    """The stages of a lane: data.mix, then data.curriculum; `positions`: held by the lane, per source."""
    mixes: list[tuple[float, Mapping[str, float]]] = [(0.0, settings.mix)]
    mixes += [(later.from_tokens / settings.lanes, later.mix) for later in settings.curriculum]
    made = []
    for start, mix_ in mixes:
        held = [float(count) ** settings.mix_exponent if count else 0.0 for count in positions]
        weights = [mix_.get(name, 0.0) if mix_ else of_size for name, of_size in zip(names, held, strict=True)]
        made.append(Stage(start, tuple(weight / sum(weights) for weight in weights)))
    return made


def mix_lag_tokens(settings: DataSettings) -> int:
    """The most tokens between a stage's `from_tokens` and its first pack.

    Each lane finishes its packing buffer first; chunks carried over may come up to a few packs later.
    """
    return settings.lanes * settings.packing_buffer * (settings.sequence_length + settings.source_sequence_length)


def mix(
    streams: Sequence[Stream],
    shares: Sequence[float],
    cursors: Sequence[Cursor],
    wanted: int,
    since: Sequence[int] = (),
) -> tuple[np.ndarray, tuple[Cursor, ...]]:
    """The next chunks of a lane as a table, and the cursors after them.

    Gives at least `wanted` positions, fewer only where every source with a share has ended. `since`: positions that
    each source had given when these shares began; empty: 0.

    The next chunk comes from the source with the smallest (positions given since) / share, the first of equals. With
    C = the longest chunk and k sources, a source of share s has given between s * N - s * k * C and s * N + C of the
    first N positions of a lane, for every N.
    """
    if wanted <= 0:
        return chunk_table([], streams[0].wide), tuple(cursors)
    taken = [cursor.positions - start for cursor, start in zip(cursors, since or [0] * len(cursors), strict=True)]
    found = _look_ahead(streams, shares, cursors, taken, wanted)
    clocks = [
        (before + starts_of(table[:, 4])[:-1]) / (share or 1.0)
        for before, (table, _), share in zip(taken, found, shares, strict=True)
    ]
    joined = np.concatenate([table for table, _ in found])
    turns = np.argsort(np.concatenate(clocks), kind="stable")
    turns = turns[: int(np.searchsorted(np.cumsum(joined[turns, 4]), wanted)) + 1]
    numbers = np.repeat(np.arange(len(found)), [len(table) for table, _ in found])[turns]
    counts = np.bincount(numbers, minlength=len(found)).tolist()
    after = tuple(
        stream.advance(cursor, table[:count], places)
        for stream, cursor, (table, places), count in zip(streams, cursors, found, counts, strict=True)
    )
    return joined[turns], after


def _look_ahead(
    streams: Sequence[Stream],
    shares: Sequence[float],
    cursors: Sequence[Cursor],
    taken: Sequence[int],
    wanted: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each stream the chunks that `wanted` positions could need; more of the others where one ends."""
    found = [stream.ahead(cursor, 0) for stream, cursor in zip(streams, cursors, strict=True)]
    live, ended = {number for number, share in enumerate(shares) if share}, 0
    total = sum(before for before, share in zip(taken, shares, strict=True) if share) + wanted
    while live:
        clock = (total - ended) / sum(shares[number] for number in live)
        dry = set()
        for number in sorted(live):
            needed = int(shares[number] * clock) + 1 - taken[number]
            found[number] = streams[number].ahead(cursors[number], needed)
            given = int(found[number][0][:, 4].sum())
            if given < needed:
                dry.add(number)
                ended += taken[number] + given
        if not dry:
            break
        live -= dry
    return found


def supply(lane_stages: Sequence[Stage], held: Sequence[float]) -> float:
    """All positions that a lane can give, when each source ends after `held` (infinite: never)."""
    left, given = list(held), 0.0
    ends = [stage.from_positions for stage in lane_stages[1:]] + [float("inf")]
    for stage, end in zip(lane_stages, ends, strict=True):
        while given < end:
            live = [number for number, share in enumerate(stage.shares) if share and left[number] > 0]
            if not live:
                return given
            total = sum(stage.shares[number] for number in live)
            clock, first = min((left[number] / stage.shares[number], number) for number in live)
            room = (end - given) / total
            if min(clock, room) == float("inf"):
                return float("inf")
            for number in live:
                left[number] -= min(clock, room) * stage.shares[number]
            if clock <= room:
                left[first] = 0.0
            given = given + clock * total if clock < room else end
    return given
