"""Pair advice: budgets of packs with a source and a target side that suit the data.

In: a store's lengths, data settings. Out: how many pairs are cut, and suggested longest texts and budgets. A ratio of
the budgets that is off by some share leaves that share of one side empty in every pack.

Costs: a pass over all lengths, and for each budget tried planning 1,000 packs or 3 packing buffers.
"""

from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.advice.packing_advice import (
    CONTEXTS,
    FILLED_SHARE,
    PACK_CONTEXTS,
    SEED,
    WHOLE_SHARE,
    Suggestion,
    measure_packing,
    suggest_window,
    whole_share,
)
from bigmodel.data.load.stream import all_chunks
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.objectives.examples import Examples, objectives_of
from bigmodel.data.plan.shuffle import Lengths, has_pairs, sizes

CONTEXTS_OF_SIDES = (*(2**exponent for exponent in range(4, 7)), *CONTEXTS)  # 16 to 8,192
BUDGETS_MULTIPLE = 8


@dataclass(frozen=True)
class CutPairs:
    """Numbers of pairs, and of texts that lose their end."""

    num_pairs: int
    sources: int  # source texts cut
    targets: int  # target texts cut


def pair_positions(store: Lengths) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all source and target texts of pairs, EOS included."""
    places = [
        (name, shard)
        for name in store.sources
        if has_pairs(store, name)
        for shard in range(len(store.shard_sizes(name)))
    ]
    sources = [num_tokens(store.lengths(*place)) for place in places]
    targets = [num_tokens(store.target_lengths(*place)) for place in places]  # type: ignore[attr-defined]
    nothing = [np.zeros(0, np.int64)]
    return np.concatenate(sources + nothing), np.concatenate(targets + nothing)


def count_cut(store: Lengths, data: DataSettings) -> CutPairs:
    sources, targets = pair_positions(store)
    columns = Examples(data.without_augmentation(), SEED).measure_pairs(sources, targets)
    if data.classes:
        read = columns[:, 3] if data.source_sequence_length else columns[:, 1] - data.ends_classified
        return CutPairs(len(sources), int((read < sources).sum()), 0)
    kept = columns[:, 2]
    read = columns[:, 3] if data.source_sequence_length else columns[:, 1] - columns[:, 2]
    if data.fixed_target_tokens or data.dropped_decoder_share:  # planned targets are shorter there without being cut
        kept = np.minimum(targets, data.fixed_target_tokens or data.max_document_length)
    return CutPairs(len(sources), int((read < sources).sum()), int((kept < targets).sum()))


def suggest_sides(store: Lengths, data: DataSettings) -> list[Suggestion]:
    """Budgets and packing buffer for the current longest texts; for pairs, also longest texts that cut few."""
    sources, targets = pair_positions(store)
    settings, suggestions = suggest_budgets(store, data)
    suggestions.append(suggest_window(store, settings))
    if len(sources):
        suggestions += [
            _suggest_context("data.max_document_length", targets, data.max_document_length),
            _suggest_context("data.max_source_length", sources, data.longest_source),
        ]
    return suggestions


def _suggest_context(setting: str, positions: np.ndarray, now: int) -> Suggestion:
    shares = {context: whole_share(positions, context) for context in CONTEXTS_OF_SIDES}
    suggested = next((context for context, share in shares.items() if share >= WHOLE_SHARE), CONTEXTS_OF_SIDES[-1])
    reason = f"{shares[suggested]:.1%} of the tokens in texts that are not cut, now {whole_share(positions, now):.1%}"
    return Suggestion(setting, now, suggested, reason)


def suggest_budgets(store: Lengths, data: DataSettings) -> tuple[DataSettings, list[Suggestion]]:
    """The smallest packs that fill on both sides; the budgets are in the ratio of the data.

    Raises `UserError` where no document has a source side.
    """
    target_positions, source_positions = sizes(all_chunks(store, data, SEED, data.mix)).sum(axis=0).tolist()
    if not source_positions:
        kinds = ", ".join(objective.settings.kind for objective in objectives_of(data))
        raise UserError(
            f"data.objectives = {kinds}: none gives the encoder a source, and no data source of the mix has pairs; "
            'add an objective such as span_corruption, prefix or ul2, or set model.kind = "decoder" and '
            "data.source_sequence_length = 0"
        )
    ratio = source_positions / target_positions
    smallest = max(data.max_document_length, int(data.longest_source / ratio))
    tried: list[tuple[float, Suggestion, Suggestion, DataSettings]] = []
    for number in PACK_CONTEXTS:
        target = smallest * number
        source = max(data.longest_source, -(-int(target * ratio) // BUDGETS_MULTIPLE) * BUDGETS_MULTIPLE)
        settings = _with_budgets(data, target, source)
        packed = measure_packing(store, settings)
        filled = f"{packed.filled:.2%} of the target and {packed.source_filled:.2%} of the source positions filled"
        why = f"{ratio:.2f} source positions for each target position in the data"
        suggestions = (
            Suggestion("data.sequence_length", data.sequence_length, target, filled),
            Suggestion("data.source_sequence_length", data.source_sequence_length, source, why),
        )
        tried.append((min(packed.filled, packed.source_filled), *suggestions, settings))
        if tried[-1][0] >= FILLED_SHARE:
            break
    _, first, second, settings = max(tried, key=lambda one: one[0])
    return settings, [first, second]


def _with_budgets(data: DataSettings, target: int, source: int) -> DataSettings:
    automatic = DataSettings(max_document_length=data.max_document_length, sequence_length=target).max_documents
    return data.model_copy(
        update={
            "max_source_length": data.longest_source,
            "sequence_length": target,
            "source_sequence_length": source,
            "max_documents": max(data.max_documents, automatic),
        }
    )
