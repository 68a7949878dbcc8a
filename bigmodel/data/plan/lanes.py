"""Lanes: which shards of each source a lane holds.

In: shard sizes from the manifest, settings. Out: the shards of each lane and source.
Guarantees: a pure function of sizes and settings; each lane holds about the same number of positions of each source.
Opens no file.
"""

import heapq
from collections.abc import Mapping, Sequence

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.plan.mixing import stages, supply
from bigmodel.data.plan.shuffle import Lengths, Shard, read_shards


def mixed_shards(store: Lengths, settings: DataSettings) -> dict[str, list[Shard]]:
    """The shards of every source in the mix. Raises `UserError` for a source name that the data lacks."""
    mixes: list[tuple[str, Mapping[str, float]]] = [("data.mix", settings.mix)]
    mixes += [(f"data.curriculum[{number}].mix", stage.mix) for number, stage in enumerate(settings.curriculum)]
    for setting, shares in [*mixes, ("data.max_epochs", settings.max_epochs)]:
        for name in shares:
            if name not in store.sources:
                raise UserError(
                    f"{setting}.{name} = {shares[name]}: no such source; the prepared data has "
                    f"{', '.join(store.sources) or 'none'}"
                )
    asked = {name: (setting, shares[name]) for setting, shares in reversed(mixes) for name in shares}
    shards = {}
    for name in store.sources:
        if settings.mix and name not in asked:
            continue
        of_source = read_shards(store, name)
        if any(shard.positions for shard in of_source):
            shards[name] = of_source
        elif name in asked:
            setting, share = asked[name]
            raise UserError(
                f"{setting}.{name} = {share}: the source has no document of at least 2 tokens; leave it out"
            )
    if not shards:
        raise UserError(
            f"{settings.directory}: no source holds a document of at least 2 tokens; prepare data with text in it"
        )
    return shards


def deal(shards: Mapping[str, Sequence[Shard]], lanes: int) -> dict[str, list[list[Shard]]]:
    """`deal_shards` of every source."""
    loads = [0] * lanes
    return {name: deal_shards(name, shards[name], loads) for name in shards}


def deal_shards(source: str, shards: Sequence[Shard], loads: list[int]) -> list[list[Shard]]:
    """The shards of a source for each lane: largest first, each to the lane with the fewest positions of this source.

    `loads`: positions per lane of the sources dealt before; they break ties and are updated in place.
    Raises `UserError` if there are fewer shards with positions than lanes.
    """
    lanes = len(loads)
    filled = [shard for shard in shards if shard.positions]
    if len(filled) < lanes:
        raise UserError(
            f"data.lanes = {lanes} but source {source!r} has {len(filled)} shards with text, and every lane needs one: "
            f"lower data.lanes to {len(filled)}, or prepare again with smaller prepare.shard_tokens"
        )
    dealt: list[list[Shard]] = [[] for _ in range(lanes)]
    lightest = [(0, loads[lane], lane) for lane in range(lanes)]
    heapq.heapify(lightest)
    for shard in sorted(filled, key=lambda shard: (-shard.positions, shard.number)):
        held, load, lane = lightest[0]
        dealt[lane].append(shard)
        heapq.heapreplace(lightest, (held + shard.positions, load, lane))
    for held, load, lane in lightest:
        loads[lane] = load + held
    return dealt


def supplies(settings: DataSettings, dealt: Mapping[str, list[list[Shard]]]) -> list[float]:
    """The positions that each lane can give under data.max_epochs; infinite: endless."""
    found = []
    for number in range(settings.lanes):
        positions = [sum(shard.positions for shard in lanes[number]) for lanes in dealt.values()]
        caps = [settings.max_epochs.get(name, 0) or float("inf") for name in dealt]
        held = [epochs * count for epochs, count in zip(caps, positions, strict=True)]
        found.append(supply(stages(settings, list(dealt), positions), held))
    return found


def packs_in_smallest_lane(settings: DataSettings, dealt: Mapping[str, list[list[Shard]]]) -> int | None:
    """The least number of packs of any lane, if every pack were full; None: endless."""
    least = min(supplies(settings, dealt))
    return None if least == float("inf") else -(-int(least) // settings.sequence_length)
