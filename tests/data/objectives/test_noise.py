"""Noise: what is read is changed as the papers say, by key and in planned lengths; what is predicted is not."""

import doctest
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from bigmodel.config.augmentation_settings import NoiseSettings
from bigmodel.config.settings import SAVED, DataSettings, UserError
from bigmodel.data.load.stream import Builder, all_chunks, validation_batches
from bigmodel.data.objectives import noise, sentences
from bigmodel.data.objectives.example import IGNORED, Example
from bigmodel.data.objectives.examples import Document, Examples, Pair, num_special_tokens
from bigmodel.data.objectives.noise import infill, infill_counts, mask_tokens, noised, noised_lengths, window_order
from bigmodel.data.objectives.noise_table import NOISES
from bigmodel.data.objectives.sentences import kinds_of, sentence_ends
from bigmodel.data.plan.shuffle import Chunk
from tests.support.example_batches import BOS, EOS, VOCABULARY, fragment_of, text

MASK = 1000
PIECES = ["", "", "", *(" w" if number % 9 else "." for number in range(3, VOCABULARY))]
ONE_SIDE = {"max_document_length": 200, "sequence_length": 200}
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 200}
EACH = [
    {"kind": "mask_tokens", "share": 0.3},
    {"kind": "drop_tokens", "share": 0.3},
    {"kind": "permute_tokens"},
    {"kind": "permute_sentences"},
    {"kind": "infill", "share": 0.3},
]


def noises(*tables: dict) -> list[NoiseSettings]:
    return [NoiseSettings.model_validate(table) for table in tables]


def data_of(sides: dict, **changes: object) -> DataSettings:
    return DataSettings.model_validate(sides | changes, context=SAVED)


def examples_of(data: DataSettings, seed: int = 1) -> Examples:
    made = Examples(data, seed, VOCABULARY)
    made.kinds_of_tokens = kinds_of(PIECES)
    return made


def made(data: DataSettings, document: Document, number: int = 0, seed: int = 1) -> Example:
    examples = examples_of(data, seed)
    return examples.make(fragment_of(0, document, examples, number), document)


def test_the_examples_in_the_docstrings_hold() -> None:
    results = [doctest.testmod(module) for module in (noise, sentences)]
    assert [result.failed for result in results] == [0, 0]
    assert sum(result.attempted for result in results) >= 6


@given(
    length=st.integers(0, 120), number=st.integers(0, len(EACH) - 1), share=st.floats(0.01, 0.99), key=st.integers(0)
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_each_noise_has_the_planned_length_and_keeps_a_token(length: int, number: int, share: float, key: int) -> None:
    one = EACH[number] | ({"share": share} if "share" in EACH[number] else {})
    both = noises(one, {"kind": "infill", "share": share, "mean_span": 1.0})
    for steps in (both[:1], both):
        found = noised(steps, text(length)[1:-1], key, MASK, kinds_of(PIECES))
        assert len(found) == int(noised_lengths(steps, np.array(length)))
        assert len(found) >= min(length, 1)


def test_the_shares_of_masked_and_dropped_tokens_are_exact_and_even_over_places() -> None:
    original = np.arange(40)
    masked = np.array([mask_tokens(original, 0.25, key, MASK) for key in range(2000)])
    assert ((masked == original) | (masked == MASK)).all()  # the inverse: the others are in their places
    assert ((masked == MASK).sum(axis=1) == 10).all()
    dropped = [noise.drop_tokens(original, 0.25, key) for key in range(2000)]
    assert all(len(kept) == 30 and (np.diff(kept) > 0).all() for kept in dropped)
    for counts in ((masked == MASK).sum(axis=0), 2000 - np.bincount(np.concatenate(dropped), minlength=40)):
        assert stats.chisquare(counts).pvalue > 1e-4


def test_no_token_moves_further_than_the_window_and_moves_are_those_of_a_plain_computation() -> None:
    orders = np.array([window_order(60, 3, key) for key in range(1500)])
    moves = orders - np.arange(60)
    assert np.abs(moves).max() == 3
    assert (np.sort(orders) == np.arange(60)).all()  # the inverse: argsort
    generator = np.random.default_rng(0)
    theirs = np.argsort(np.arange(60) + generator.uniform(0, 4, (1500, 60)), axis=1) - np.arange(60)
    table = [np.bincount(some[:, 10:50].reshape(-1) + 3, minlength=7) for some in (moves, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_sentences_are_found_whole_and_all_orders_are_equally_likely() -> None:
    pieces = ["", "We", " run", ".", " 3", ".", "14", ' "', "Stop", "!", '"', " Go", "。", "行", "\n", " e.g"]
    tokens = np.array([1, 2, 3, 4, 5, 6, 3, 7, 8, 9, 10, 11, 3, 14, 14, 13, 12, 13, 1])
    ends = sentence_ends(tokens, kinds_of(pieces))
    found = ["".join(pieces[one] for one in part) for part in np.split(tokens, ends[:-1])]
    assert found == ["We run.", " 3.14.", ' "Stop!"', " Go.", "\n", "\n行。", "行We"]
    some, at = np.arange(9), np.array([2, 3, 7, 9])
    seen = Counter(tuple(noise.permute_sentences(some, at, key).tolist()) for key in range(4800))
    assert len(seen) == math.factorial(4)
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4
    for order in seen:  # each sentence is whole: its tokens follow each other
        assert all(order[place + 1] == first + 1 for first in (0, 3, 4, 5, 7) if (place := order.index(first)) < 8)


def test_infilling_hides_the_share_in_spans_of_poisson_length_one_mask_each() -> None:
    """Lengths are multinomial, which is Poisson given the sum; scipy has the marginal distribution."""
    original, lengths = np.arange(200), []
    for key in range(600):
        found = infill(original, 0.3, 3.0, key, MASK)
        assert len(found) == 200 - 60 + 20
        masks = np.flatnonzero(found == MASK)
        assert len(masks) == 20
        assert (np.diff(masks) > 1).all()  # a token between two spans, so what a mask hides can be told:
        around = np.concatenate([[-1], found, [200]])
        hidden = around[masks + 2] - around[masks] - 1
        restored = [range(around[mask] + 1, around[mask + 2]) for mask in masks]
        assert sorted([*found[found != MASK], *(one for span in restored for one in span)]) == list(range(200))
        lengths += hidden.tolist()
    assert np.mean(lengths) == 3.0
    counts = np.bincount(lengths, minlength=12)
    expected = stats.binom.pmf(np.arange(12), 60, 1 / 20) * len(lengths)
    assert counts[0] > 0.03 * len(lengths)  # spans of length 0: a mask that hides nothing
    tail = len(lengths) - counts[:9].sum()
    both = [*counts[:9], tail], [*expected[:9], len(lengths) - expected[:9].sum()]
    assert stats.chisquare(*both).pvalue > 1e-4


@pytest.mark.parametrize(("length", "counts"), [(0, (0, 0)), (1, (0, 0)), (2, (1, 1)), (3, (2, 2)), (10, (9, 2))])
def test_a_short_text_keeps_a_token_and_room_between_spans(length: int, counts: tuple[int, int]) -> None:
    hidden, spans = infill_counts(np.array(length), 0.9, 1.0)
    assert (int(hidden), int(spans)) == counts


def test_denoising_reads_the_noise_and_predicts_the_text() -> None:
    document = text(80)
    for sides in (ONE_SIDE, TWO_SIDES):
        data = data_of(sides, objectives=[{"kind": "denoising"}])  # the default is BART's
        example = made(data, document)
        said = example.labels[example.labels != IGNORED]
        assert said.tolist() == document[1:].tolist()
    mask = VOCABULARY
    assert (example.source == mask).sum() == round(0.3 * 80 / 3)
    assert len(example.source) == 80 - 24 + 8 + 1
    assert example.source[-1] == EOS
    assert set(example.source.tolist()) <= {*document.tolist(), mask}
    assert num_special_tokens(data) == 7 + 100
    assert num_special_tokens(data_of(TWO_SIDES, objectives=[{"kind": "denoising"}], mask_token=9)) == 0
    one, other = (examples_of(data, seed).make for seed in (1, 2))
    piece = fragment_of(0, document, examples_of(data), 0)
    assert one(piece, document).source.tolist() == example.source.tolist()
    assert other(piece, document).source.tolist() != example.source.tolist()
    again = one(piece._replace(epoch=1), document)  # anew in each pass
    assert again.source.tolist() != example.source.tolist()
    assert again.labels.tolist() == example.labels.tolist()


@pytest.mark.parametrize("one", EACH, ids=lambda one: one["kind"])
def test_pairs_are_read_with_noise_and_their_targets_stay(one: dict) -> None:
    pair = Pair(text(60), text(20))
    for sides in (ONE_SIDE, TWO_SIDES):
        clean, changed = (made(data_of(sides, augmentation=given), pair) for given in ([], [one]))
        answers = [example.labels[example.labels != IGNORED].tolist() for example in (clean, changed)]
        assert answers == [pair.target[1:].tolist()] * 2
        sources = [example.source if sides is TWO_SIDES else example.tokens[1:-20] for example in (clean, changed)]
        assert sources[0].tolist() == pair.source[1:].tolist()
        expected = noised_lengths(noises(one), np.array(60))
        assert sources[1][-1] == EOS
        assert len(sources[1]) == int(expected) + 1
        assert sources[1].tolist() != sources[0].tolist()


def test_labelled_documents_keep_begin_end_and_class() -> None:
    document = Pair(text(40), np.array([BOS, 7, EOS]))
    for ends, sides in ((False, ONE_SIDE), (True, ONE_SIDE), (False, TWO_SIDES)):
        data = data_of(sides, augmentation=EACH).with_classes(("a", "b"), ends, {})
        examples = examples_of(data)
        examples.find_class = lambda label, *place: int(label[1])
        piece = fragment_of(0, document, examples, 0)
        example = examples.make(piece, document)
        read = example.tokens if sides is ONE_SIDE else example.source
        assert (len(example.tokens), len(example.source)) == (piece.num_tokens, piece.source_positions)
        assert example.labels[example.labels != IGNORED].tolist() == [7]
        assert example.labels[-1] == 7
        assert example.tokens[0] == BOS
        assert (read[-1] == EOS) == (ends or sides is TWO_SIDES)
        assert len(read) < 40


def test_inputs_of_causal_text_are_masked_and_its_labels_stay() -> None:
    """Word dropout of Bowman et al. 2016; the other noises would shift labels against inputs and do not apply."""
    document = text(50)
    given = [EACH[0], EACH[2]]
    for sides in (ONE_SIDE, TWO_SIDES):
        data = data_of(sides, augmentation=given, objectives=[{"kind": "causal"}])
        examples = examples_of(data)
        assert not examples.is_plain
        example = made(data, document)
        assert example.labels.tolist() == document[1:].tolist()
        changed = example.tokens != document[:-1]
        assert changed.sum() == round(0.3 * 50)
        assert set(example.tokens[changed]) == {VOCABULARY}
        assert not changed[0]
    assert num_special_tokens(data_of(ONE_SIDE, augmentation=given)) == 107
    assert num_special_tokens(data_of(ONE_SIDE, augmentation=given, mask_token=5)) == 0
    assert num_special_tokens(data_of(ONE_SIDE, augmentation=EACH[1:4])) == 0
    assert examples_of(data_of(ONE_SIDE, augmentation=EACH[1:4])).is_plain


class Texts:
    """Documents in memory: 40 texts, or pairs."""

    fingerprint, sources, pieces = "made up", ["a"], PIECES
    manifest = SimpleNamespace(vocabulary=VOCABULARY)

    def __init__(self, has_pairs: bool = False) -> None:
        self.pair_sources = frozenset(self.sources if has_pairs else ())

    def shard_sizes(self, source: str) -> np.ndarray:
        return np.array([[40, 40 * 31, 0]])

    def lengths(self, source: str, shard: int) -> np.ndarray:
        return np.full(40, 32, np.uint32)

    target_lengths = lengths

    def document(self, source: str, shard: int, row: int) -> Document:
        one = text(30, row)
        return Pair(one, one) if self.pair_sources else one


def test_validation_reads_pairs_without_augmentation_and_denoises_all_the_same() -> None:
    clean, changed = (
        validation_batches(Texts(has_pairs=True), data_of(TWO_SIDES, augmentation=given), 1) for given in ([], EACH)
    )
    assert [batch.fingerprint() for batch in clean] == [batch.fingerprint() for batch in changed]
    batch = validation_batches(Texts(), data_of(TWO_SIDES, objectives=[{"kind": "denoising"}]), 1)[0]
    assert (batch.source.tokens == VOCABULARY).any()


def test_a_noise_that_no_example_has_is_refused() -> None:
    permuted = data_of(ONE_SIDE, augmentation=[{"kind": "permute_tokens"}])
    with pytest.raises(UserError, match=r'data.augmentation: kind = "permute_tokens" has no effect on this data'):
        Builder(Texts(), permuted, 1)
    Builder(Texts(has_pairs=True), permuted, 1)
    masks = [{"kind": "mask_tokens"}]
    Builder(Texts(), data_of(ONE_SIDE, augmentation=masks), 1)
    with pytest.raises(UserError, match=r'data.augmentation: kind = "mask_tokens" has no effect'):
        Builder(Texts(), data_of(ONE_SIDE, augmentation=masks, objectives=[{"kind": "prefix"}]), 1)
    with pytest.raises(ValidationError, match=r"Input should be 'mask_tokens', 'drop_tokens'.*did you mean 'infill'"):
        NoiseSettings(kind="infil")
    assert {one["kind"] for one in EACH} == NOISES.keys()


def test_each_document_of_a_pass_is_planned_once_whatever_the_noise() -> None:
    store = Texts(has_pairs=True)
    tables = [all_chunks(store, data_of(TWO_SIDES, augmentation=given), 1) for given in ([], EACH)]
    assert [sorted(table[:, 2]) for table in tables] == [list(range(40))] * 2
    assert (tables[1][:, 9] < tables[0][:, 9]).all()
    rows = [Chunk(*row) for row in tables[1].tolist()]
    examples = examples_of(data_of(TWO_SIDES, augmentation=EACH))
    assert all(len(examples.make(row, store.document("a", 0, row.row)).source) == row.source_positions for row in rows)
