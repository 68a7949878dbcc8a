"""The marks are honest: the bigram's probabilities sum to one, are what the formula says, and beat simpler ones."""

import lzma
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.evaluation import baselines
from bigmodel.evaluation.baselines import Bigram, token_pairs, xz_bits_per_byte
from tests.support.tiny_corpus import prepared

V = 50


def markov_chain(seed: int, length: int) -> np.ndarray:
    """Tokens 0..46 of a random chain with few likely successors each; 47 to 49 never occur."""
    chances = np.random.default_rng(0).dirichlet(np.full(47, 0.1), size=47).cumsum(axis=1)
    draws = np.random.default_rng(seed).random(length)
    tokens = np.zeros(length, np.int64)
    for place in range(1, length):
        tokens[place] = min(int(np.searchsorted(chances[tokens[place - 1]], draws[place])), 46)
    return tokens


TRAIN, HELD_OUT = markov_chain(1, 4000), markov_chain(2, 4000)
PAIRS, HELD_OUT_PAIRS = [(TRAIN[:-1], TRAIN[1:])], [(HELD_OUT[:-1], HELD_OUT[1:])]


def test_probabilities_sum_to_one_after_every_context_seen_or_not() -> None:
    for pairs in (PAIRS, [(np.array([3]), np.array([4]))]):
        bigram = Bigram(V).fit(pairs)
        for context in range(V):
            probabilities = bigram.probabilities(context)
            assert probabilities.min() > 0
            assert math.isclose(probabilities.sum(), 1, rel_tol=1e-12)


def test_a_probability_is_what_the_formula_says() -> None:
    counts = Counter(zip(TRAIN[:-1].tolist(), TRAIN[1:].tolist(), strict=True))
    variety = Counter(target for _, target in counts)

    def discount(values: Counter, count: int) -> float:
        if count == 0:
            return 0.0
        n = [0, *(sum(1 for value in values.values() if value == size) for size in (1, 2, 3, 4))]
        if not all(n[1:]):
            return 0.5
        size = min(count, 3)
        free = size - (size + 1) * n[1] / (n[1] + 2 * n[2]) * n[size + 1] / n[size]
        return min(max(free, 0.05), size - 0.05)

    def by_hand(context: int, target: int) -> float:
        mine = {pair: count for pair, count in counts.items() if pair[0] == context}
        total = sum(mine.values())
        handed = sum(discount(variety, count) for count in variety.values())
        lower = (variety[target] - discount(variety, variety[target]) + handed / V) / len(counts)
        kept = counts[(context, target)] - discount(counts, counts[(context, target)])
        return kept / total + sum(discount(counts, count) for count in mine.values()) / total * lower

    bigram = Bigram(V).fit(PAIRS)
    for context, target in [*list(counts)[:20], (0, 49), (5, 48), (7, 7)]:
        assert math.isclose(bigram.probabilities(context)[target], by_hand(context, target), rel_tol=1e-9)


def test_it_beats_a_unigram_add_one_and_absolute_discounting_on_held_out_tokens() -> None:
    nats, count = Bigram(V).fit(PAIRS).score(HELD_OUT_PAIRS)
    assert count == 3999
    unigram = (np.bincount(TRAIN, minlength=V) + 1) / (len(TRAIN) + V)
    table = np.zeros((V, V))
    np.add.at(table, (TRAIN[:-1], TRAIN[1:]), 1)
    context_counts = np.maximum(table.sum(axis=1, keepdims=True), 1)
    add_one = (table + 1) / (table.sum(axis=1, keepdims=True) + V)
    handed_on = np.where(table.sum(axis=1, keepdims=True) > 0, 0.75 * (table > 0).sum(axis=1, keepdims=True), 1)
    discounted = np.maximum(table - 0.75, 0) / context_counts + handed_on / context_counts * unigram
    inputs, targets = HELD_OUT_PAIRS[0]
    assert nats < -np.log(discounted[inputs, targets]).sum() * 1.002  # as good as plain discounting, or better
    assert nats < -np.log(add_one[inputs, targets]).sum() * 0.95
    assert nats < -np.log(unigram[targets]).sum() * 0.8


def test_how_the_pairs_are_cut_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Bigram(V).fit(PAIRS).score(HELD_OUT_PAIRS)
    monkeypatch.setattr(baselines, "CHUNK_PAIRS", 300)
    cuts = range(0, 3999, 57)
    pieces = [
        (TRAIN[:-1][cut : cut + 57].astype(np.uint16), TRAIN[1:][cut : cut + 57].astype(np.uint16)) for cut in cuts
    ]
    nats, count = Bigram(V).fit(iter(pieces)).score(HELD_OUT_PAIRS)
    assert count == whole[1]
    assert math.isclose(nats, whole[0], rel_tol=1e-12)
    assert math.isclose(Bigram(V).fit(PAIRS).bits(HELD_OUT_PAIRS), whole[0] / math.log(2))


def test_a_vocabulary_of_32000_takes_memory_for_the_pairs_seen_only() -> None:
    tokens = np.random.default_rng(0).integers(0, 32_000, 20_000)
    tracemalloc.start()
    nats, count = Bigram(32_000).fit([(tokens[:-1], tokens[1:])]).score([(tokens[:-1], tokens[1:])])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 19_999
    assert nats > 0
    assert peak < 50e6  # 32,000 squared would be a thousand million


def test_a_bigram_of_nothing_and_unequal_pairs_are_errors() -> None:
    with pytest.raises(UserError, match="needs at least one pair"):
        Bigram(V).fit([])
    with pytest.raises(ValueError, match="as many inputs as labels, got 2 and 3"):
        Bigram(V).fit([(np.zeros(2, np.int64), np.zeros(3, np.int64))])


def test_the_pairs_of_a_prepared_split_are_its_targets(tmp_path: Path) -> None:
    from bigmodel.data.store.shards import ShardStore

    store = ShardStore(prepared(tmp_path), "validation")
    pairs = list(token_pairs(store))
    assert sum(len(targets) for _, targets in pairs) == store.num_labels > 1000
    assert all(inputs[0] == store.manifest.bos and targets[-1] == store.manifest.eos for inputs, targets in pairs)


def test_xz_is_measured_in_bits_per_byte_of_the_file(tmp_path: Path) -> None:
    text = b"the quick brown fox " * 500 + bytes(np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8))
    (tmp_path / "text").write_bytes(text)
    assert xz_bits_per_byte(tmp_path / "text") == 8 * len(lzma.compress(text, preset=9)) / len(text)
    (tmp_path / "text").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        xz_bits_per_byte(tmp_path / "text")
    with pytest.raises(UserError, match="cannot be read"):
        xz_bits_per_byte(tmp_path / "missing")
