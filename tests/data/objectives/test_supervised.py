"""Supervised documents: whole turns within the limit, counted by the plan as the examples have them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from bigmodel.data.objectives.supervised import UNITS, Supervised, keep, measure, supervised

Document = tuple[int, list[tuple[int, int, int]]]


@some.composite
def documents(draw: some.DrawFn) -> Document:
    """(tokens, spans)"""
    edges = sorted(draw(some.sets(some.integers(1, 30), max_size=8)))
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    weights = draw(some.lists(some.integers(1, UNITS), min_size=len(pairs), max_size=len(pairs)))
    return 31, [(first, end, weight) for (first, end), weight in zip(pairs, weights, strict=True)]


@given(some.lists(documents(), min_size=1, max_size=5), some.integers(2, 40))
def test_the_plan_counts_what_the_examples_have(stored: list[Document], longest: int) -> None:
    table = [(row, *span) for row, (_, spans) in enumerate(stored) for span in spans]
    measured = measure(np.array(table, np.uint32).reshape(-1, 4), len(stored), longest)
    for row, (size, spans) in enumerate(stored):
        example = supervised(Supervised(np.arange(size), np.array(spans, np.uint32).reshape(-1, 3)), longest)
        assert example.weights is not None
        assert measured.tokens[row] == len(example.tokens) <= longest
        assert measured.labels[row] == (example.labels != -100).sum()
        assert measured.weights[row] / UNITS == example.weights.astype(np.float64).sum()
        assert (example.labels[example.labels != -100] == np.flatnonzero(example.labels != -100) + 1).all()


def test_a_long_document_keeps_its_first_whole_turns() -> None:
    spans = np.array([[3, 5, UNITS], [8, 12, UNITS], [15, 16, UNITS]])
    assert [keep(spans, longest)[0] for longest in (20, 15, 14, 11, 10, 4, 3, 2)] == [15, 15, 11, 11, 4, 4, 3, 1]
    assert keep(spans, 3)[1].tolist() == [[3, 4, UNITS]]  # the first turn is cut
    assert keep(spans, 2)[1].tolist() == []  # it begins behind the limit
