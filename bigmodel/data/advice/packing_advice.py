"""Packing advice: how full packs are under the settings, and settings that fill them better.

In: a store's lengths, data settings. Out: the fill of packs, measured on packs of the real order, and a suggestion with
its reason for each setting that depends on lengths.

Costs: for each of a dozen settings planning 1,000 packs or 3 packing buffers, whichever is more: seconds; and a pass
over all lengths.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.load.stream import num_document_limited
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.shuffle import Lengths, has_pairs
from bigmodel.data.store.manifest import Manifest

MEASURED_WINDOWS, MEASURED_PACKS = 3, 1000  # packing buffers, packs: whichever is more
SEED = 1
CONTEXTS = tuple(2**exponent for exponent in range(7, 14))  # 128 to 8,192
PACK_CONTEXTS = (1, 2, 4, 8)
WINDOWS = (50, 100, 200, 500, 1000, 2000)
WHOLE_SHARE = 0.9  # suggested max_document_length: share of tokens in documents that are not split
FILLED_SHARE = 0.99  # suggested sequence_length: share of positions filled
SPARE_SHARE = 0.001  # share of positions that a smaller packing buffer may lose
SHARDS_A_LANE = 4
LARGEST_SHARD_TOKENS = 32_000_000


@dataclass(frozen=True)
class Packed:
    """Measurements of planned packs."""

    num_packs: int
    filled: float  # share of positions
    documents: float  # per pack; each chunk of a long document counts
    document_limited: float  # share of packs closed by data.max_documents
    source_filled: float  # share of positions of the source side; 0 without one
    positions: dict[str, float]  # per source: positions per pack; for pairs, of their source texts
    documents_by_source: dict[str, float]  # per pack, as `documents`


@dataclass(frozen=True)
class Suggestion:
    setting: str
    now: int
    suggested: int
    reason: str


def measure_packing(store: Lengths, data: DataSettings) -> Packed:
    """Measure packs planned as in training; without data.max_epochs, which would end the packs."""
    order = Order(store, data.model_copy(update={"max_epochs": {}}), data.lanes, SEED)
    wanted = max(MEASURED_PACKS, MEASURED_WINDOWS * data.packing_buffer)
    packs = [pack for _ in range(-(-wanted // data.lanes)) for pack in order.next_step()]
    positions = sum(chunk.num_tokens for pack in packs for chunk in pack)
    by_source = Counter(chunk.source for pack in packs for chunk in pack)
    of_sources = sum(chunk.source_positions for pack in packs for chunk in pack)
    return Packed(
        len(packs),
        positions / (len(packs) * data.sequence_length),
        sum(map(len, packs)) / len(packs),
        num_document_limited(PackTable.of_packs(packs), data) / len(packs),
        of_sources / (len(packs) * data.source_sequence_length) if data.source_sequence_length else 0.0,
        {name: given.positions / len(packs) for name, given in order.progress().items()},
        {store.sources[number]: count / len(packs) for number, count in by_source.items()},
    )


def whole_share(positions: np.ndarray, max_document_length: int) -> float:
    """Share of positions in documents of at most `max_document_length`."""
    return float(positions[positions <= max_document_length].sum() / max(1, positions.sum()))


def all_positions(store: Lengths) -> np.ndarray:
    """Positions of every document in packs of one side; for a pair, of both texts."""
    positions = []
    for source in store.sources:
        for shard in range(len(store.shard_sizes(source))):
            positions.append(num_tokens(store.lengths(source, shard)))
            if has_pairs(store, source):
                positions[-1] += num_tokens(store.target_lengths(source, shard))  # type: ignore[attr-defined]
    return np.concatenate(positions)


def suggest(store: Lengths, manifest: Manifest, data: DataSettings) -> list[Suggestion]:
    """One per setting, even where it fits already; each assumes the suggestions before it."""
    positions = all_positions(store)
    context = suggest_context(positions, data)
    settings = data.model_copy(update={"max_document_length": context.suggested})
    pack = _suggest_pack(store, settings)
    settings = _with_packs_of(settings, pack.suggested)
    return [context, pack, suggest_window(store, settings), suggest_shard(manifest, data.lanes)]


def suggest_context(positions: np.ndarray, data: DataSettings) -> Suggestion:
    shares = {context: whole_share(positions, context) for context in CONTEXTS}
    suggested = next((context for context, share in shares.items() if share >= WHOLE_SHARE), CONTEXTS[-1])
    now = whole_share(positions, data.max_document_length)
    reason = f"{shares[suggested]:.1%} of the tokens are in documents that are not split, now {now:.1%}"
    if shares[suggested] < WHOLE_SHARE:
        reason += f"; {CONTEXTS[-1]:,} is the longest suggestion"
    return Suggestion("data.max_document_length", data.max_document_length, suggested, reason)


def _suggest_pack(store: Lengths, data: DataSettings) -> Suggestion:
    """`data` has the suggested max_document_length and the current sequence_length."""
    filled = {
        size: measure_packing(store, _with_packs_of(data, size)).filled
        for size in (data.max_document_length * number for number in PACK_CONTEXTS)
    }
    suggested = _first(filled, FILLED_SHARE)
    reason = f"{filled[suggested]:.2%} of the positions filled, with that max_document_length"
    return Suggestion("data.sequence_length", data.sequence_length, suggested, reason)


def _with_packs_of(data: DataSettings, sequence_length: int) -> DataSettings:
    """`data` with this sequence_length, and max_documents raised to its default for it if that is more."""
    automatic = DataSettings(
        max_document_length=data.max_document_length, sequence_length=sequence_length
    ).max_documents
    changes = {"sequence_length": sequence_length, "max_documents": max(data.max_documents, automatic)}
    return data.model_copy(update=changes)


def suggest_window(store: Lengths, data: DataSettings) -> Suggestion:
    filled = {}
    for number in WINDOWS:
        packed = measure_packing(store, data.model_copy(update={"packing_buffer": number}))
        filled[number] = min(packed.filled, packed.source_filled) if data.source_sequence_length else packed.filled
    suggested = _first(filled, max(filled.values()) - SPARE_SHARE)
    reason = f"{filled[suggested]:.2%} filled, {WINDOWS[-1]:,} packed sequences fill {filled[WINDOWS[-1]]:.2%}"
    return Suggestion("data.packing_buffer", data.packing_buffer, suggested, reason)


def _first(filled: dict[int, float], enough: float) -> int:
    """The smallest with enough filled, else the one with most."""
    return next((key for key, share in filled.items() if share >= enough), max(filled, key=lambda key: filled[key]))


def suggest_shard(manifest: Manifest, lanes: int) -> Suggestion:
    tokens = {source: manifest.counts[source]["train"]["tokens"] for source in manifest.sources}
    source = min(tokens, key=lambda name: tokens[name])
    suggested = min(LARGEST_SHARD_TOKENS, max(1000, _round_down(tokens[source] // (SHARDS_A_LANE * lanes))))
    reason = (
        f"the smallest source, {source}, has {tokens[source]:,} tokens: at least {SHARDS_A_LANE} shards for each of "
        f"{lanes} lanes"
        if suggested < LARGEST_SHARD_TOKENS
        else "every lane has enough shards, and a shard is read and fetched whole"
    )
    return Suggestion("prepare.shard_tokens", int(manifest.recipe.get("shard_tokens", 0)), suggested, reason)


def _round_down(number: int) -> int:
    """To one significant digit."""
    scale = 10 ** (len(str(max(1, number))) - 1)
    return number // scale * scale


def mix_shares(tokens: dict[str, int], mix: dict[str, float], exponent: float = 1.0) -> dict[str, float]:
    """Each source's share of the trained tokens; `exponent`: data.mix_exponent."""
    sizes = {source: float(count) ** exponent if count else 0.0 for source, count in tokens.items()}
    weights = {source: mix.get(source, 0.0) if mix else sizes[source] for source in tokens}
    return {source: weight / sum(weights.values()) for source, weight in weights.items()}
