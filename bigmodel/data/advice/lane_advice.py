"""Lane advice: the share of the data that uneven lanes leave unread, and numbers of lanes that leave none.

In: shard sizes from the manifest, a run's settings. Out: a warning, or nothing. Each step takes the same number of
packed sequences from every lane, so under `data.max_epochs` the run ends with the lane that holds least. Example: 5
shards of equal size on 4 lanes give the lanes 2, 1, 1 and 1; with one epoch the last fifth is out of reach.

Guarantee: the share is that of tokens, if all lanes fill their packed sequences alike. Opens no file.
"""

import math
from collections.abc import Mapping, Sequence

from bigmodel.config.settings import DataSettings, Settings, num_micro_batches
from bigmodel.data.plan.lanes import deal, mixed_shards, supplies
from bigmodel.data.plan.shuffle import Lengths, Shard
from bigmodel.sizes import counted_noun

WARNED_SHARE = 0.01
Shards = Mapping[str, Sequence[Shard]]


def lane_warning(store: Lengths, settings: Settings) -> str:
    """A warning where lanes leave at least `WARNED_SHARE` of the data unread; else empty."""
    data, shards = settings.data, mixed_shards(store, settings.data)
    share = unread_share(data, shards)
    if share < WARNED_SHARE:
        return ""
    held = _lane_positions(data, shards)
    better = _better_lanes(settings, shards, share)
    remedy = f"set data.lanes = {better} ({unread_share(_with(data, better), shards):.1%}), or " if better else ""
    return (
        f"warning: {share:.1%} of the data cannot be reached: data.max_epochs ends the run with the lane that holds "
        f"least, and the shards of {counted_noun(len(shards), 'source')} give the {data.lanes} lanes between "
        f"{min(held):,} and {max(held):,} tokens; {remedy}prepare again with smaller prepare.shard_tokens: with n "
        "shards in a lane, at most one n-th is left"
    )


def repeat_warning(store: Lengths, settings: Settings) -> str:
    """A warning where lanes begin a source again at least `WARNED_SHARE` of it too early, without data.max_epochs."""
    data, shards = settings.data, mixed_shards(store, settings.data)
    uncapped = {name: of_source for name, of_source in shards.items() if not data.max_epochs.get(name)}
    shares = {name: unread_share(_once(data, name), {name: of_source}) for name, of_source in uncapped.items()}
    if not shares or max(shares.values()) < WARNED_SHARE:
        return ""
    worst = max(shares, key=lambda name: shares[name])
    return (
        f"the lanes repeat source {worst!r} unevenly: when the lane that holds least of it begins its second pass, "
        f"{shares[worst]:.1%} of the source has not been read; with more shards for each of the {data.lanes} lanes "
        "(smaller prepare.shard_tokens, or fewer data.lanes) it is less"
    )


def unread_share(data: DataSettings, shards: Shards) -> float:
    """The share of the positions under data.max_epochs that are left when the smallest lane ends; 0: endless."""
    found = supplies(data, deal(shards, data.lanes))
    return 0.0 if math.inf in found else 1 - len(found) * min(found) / sum(found)


def _better_lanes(settings: Settings, shards: Shards, share: float) -> int:
    """The number of lanes nearest to the present one that the batch sizes allow and that leaves next to nothing; else
    the one that leaves least; 0: none is better."""
    training, data = settings.training, settings.data
    sizes = [training.global_batch_size, *(packs for _, packs in training.batch_ramp)]
    fewest = min(sum(shard.positions > 0 for shard in of_source) for of_source in shards.values())
    fitting = [number for number in range(1, fewest + 1) if not any(packs % number for packs in sizes)]
    left = {number: unread_share(_with(data, number), shards) for number in fitting}
    good = [number for number in fitting if left[number] < WARNED_SHARE]
    best = min(good or fitting, key=lambda number: (abs(number - data.lanes) if good else left[number], -number))
    return best if left[best] < share else 0


def _with(data: DataSettings, lanes: int) -> DataSettings:
    return data.model_copy(update={"lanes": lanes})


def _once(data: DataSettings, name: str) -> DataSettings:
    """These settings for one pass through one source."""
    return data.model_copy(update={"max_epochs": {name: 1.0}, "mix": {}, "curriculum": []})


def _lane_positions(data: DataSettings, shards: Shards) -> list[int]:
    return [int(size) for size in supplies(data, deal(shards, data.lanes))]


def padding_warning(packs: int, places: int, per_micro_batch: int) -> str:
    """A warning if a step's packs do not fill the micro-batches of all places; empty if they do.

    places: ranks, or groups of ranks that share their packs.
    """
    room = num_micro_batches(packs, places, per_micro_batch) * per_micro_batch * places
    if room == packs:
        return ""
    return (
        f"warning: {(room - packs) / room:.0%} of the computed packed sequences are empty: "
        f"{counted_noun(places, 'rank')} with micro-batches of {per_micro_batch} compute {room} per step, "
        f"and a step has {packs}; "
        f"set training.global_batch_size = {room}, or use fewer ranks"
    )
