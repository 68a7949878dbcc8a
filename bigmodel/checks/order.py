"""Order check: same batch bytes in each step at any world size; each token of an epoch occurs once.

In: the plan of the user's settings and data. Simulates ranks and nodes in one process; trains nothing.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmodel.checks.audit import Finding
from bigmodel.checks.class_order import ClassWalk
from bigmodel.checks.segment_order import check_segments
from bigmodel.config.deepspeed_config import agree
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.load.stream import Builder, take_share
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan.exclusion import without
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.shuffle import Chunk, lengths_in, neighbour_distance
from bigmodel.data.store.shards import ShardStore
from bigmodel.training.checkpoint.folder import newest_state

WORLDS = ((2, 1), (3, 1), (4, 2), (8, 8), (8, 2), (64, 8))  # ranks, ranks per node
ORDER_STEPS = 20  # compared byte for byte
EPOCH_POSITIONS = 200_000_000  # a longer epoch is walked up to this number
SHUFFLED = 0.01  # share of the random distance; below it, data counts as not shuffled


def check_order(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Walk the plan at several world sizes, from a saved cursor, and over an epoch."""
    settings = agree(load_settings(run_file, overrides))
    store = ShardStore.of_run(settings.data, "train")
    steps = min(ORDER_STEPS, settings.training.steps)
    reference = _step_fingerprints(settings, store, steps, 1, 1)
    findings = [
        Finding(
            f"{steps} steps have the same bytes on {size} ranks, {node_size} per node, as on one; "
            "each packed sequence once",
            _step_fingerprints(settings, store, steps, size, node_size) == reference,
            f"{sum(map(len, reference))} packed sequences",
        )
        for size, node_size in WORLDS
    ]
    state = newest_state(settings.run.directory / "checkpoints")
    return [
        *findings,
        _cursor_continues(settings, store, steps),
        *_each_position_once(settings, store),
        *(check_segments(settings, store, state) if state else []),
    ]


def _order(settings: Settings, store: ShardStore) -> Order:
    return Order.of_run(store, settings)


def _step_fingerprints(
    settings: Settings, store: ShardStore, steps: int, world_size: int, node_size: int
) -> list[list[tuple[int, str]]]:
    """Per step, sorted (number, fingerprint) of its packed sequences as the ranks build them.

    Each node has an order of its own lanes, as in training.
    """
    merged: list[list[tuple[int, str]]] = [[] for _ in range(steps)]
    builder = Builder(store, settings.data, settings.run.seed)
    for first_rank in range(0, world_size, node_size):
        place = Place(first_rank, world_size, node_size)
        order = Order.of_run(store, settings, lanes=place.lanes(settings.data.lanes))
        for number in range(steps):
            node = take_share(order, settings.data.lanes, place, 1)
            for at in (at for rank in node.slots for slot in rank for at in slot):
                batch = builder.build([node.packs[at]], number, [node.numbers[at]])
                merged[number].append((node.numbers[at], batch.fingerprint()))
    return [sorted(step) for step in merged]


def _cursor_continues(settings: Settings, store: ShardStore, steps: int) -> Finding:
    order, differing = _order(settings, store), 0
    for _ in range(steps):
        state = json.loads(json.dumps(order.state()))
        again = _order(settings, store)
        again.restore(state)
        differing += again.next_step() != order.next_step()
    return Finding(
        "a saved cursor continues with the same packed sequences, at every step", differing == 0, f"{steps} cursors"
    )


def _each_position_once(settings: Settings, store: ShardStore) -> list[Finding]:
    """Count each (source, document, position, epoch) until an epoch of every source is complete.

    Also measures how well these documents are shuffled.
    """
    order = _order(settings, store)
    included: Any = without(store, order.excluded)
    seen: Counter[tuple[int, int, int, int, int]] = Counter()
    lengths: Counter[tuple[int, int]] = Counter()
    given: list[Chunk] = []
    positions, walk = 0, ClassWalk(included, settings.data)
    while positions < EPOCH_POSITIONS and not _epoch_complete(order):
        try:
            packs = order.next_step()
        except UserError:  # data.max_epochs is used up
            break
        walk.add(packs)
        for chunk in (chunk for pack in packs for chunk in pack):
            seen[chunk.source, chunk.shard, chunk.row, chunk.start, chunk.epoch] += 1
            positions += chunk.length
            given.append(chunk)
            if chunk.epoch == 0:
                lengths[chunk.source, chunk.shard] += chunk.length
    whole = [
        lengths[source, shard] == int(num_tokens(lengths_in(included, name, shard, 0)).sum())
        for source, name in enumerate(store.sources)
        if name in order.plan.source_positions
        for shard in range(store.num_shards(name))
    ]
    finished = _epoch_complete(order)
    return [
        Finding(
            ("each token of each document occurs exactly once in an epoch" + walk.of_its_class)
            if finished
            else f"no token occurs twice in the first {positions:,} (an epoch is longer than this check walks)",
            max(seen.values()) == 1 and (all(whole) or not finished),
            f"{positions:,} tokens, {len(seen):,} chunks of documents",
        ),
        Finding(
            "neighbours in a shard are far apart in training",
            (distance := neighbour_distance(given)) > SHUFFLED,
            f"{distance:.2f} of the random distance",
        ),
        *walk.findings(order),
    ]


def _epoch_complete(order: Order) -> bool:
    return all(source.epochs_complete >= 1 for source in order.progress().values())
