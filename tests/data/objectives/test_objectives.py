"""Objectives: pure functions whose lengths are planned, whose targets are the document's, and which lose nothing."""

import contextlib
import doctest
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bigmodel.config.settings import (
    SAVED,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    Settings,
    UserError,
    load_settings,
)
from bigmodel.data.objectives import causal, decoder, fill_in_the_middle, masked, pairs, prefix, span_corruption
from bigmodel.data.objectives.example import (
    IGNORED,
    ChunkText,
    Columns,
    Example,
    Rule,
    SpecialTokens,
    chunk_text_of,
    teacher_forced,
)
from bigmodel.data.objectives.examples import Examples, Pair, num_special_tokens, objectives_of
from bigmodel.data.objectives.span_corruption import restore
from bigmodel.data.objectives.table import OBJECTIVES, ObjectiveKind
from bigmodel.data.plan.attention_work import count_work
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.evaluation.training_tasks import require_harness
from bigmodel.run_directory import read_json_lines
from tests.support.example_batches import BOS, EOS, VOCABULARY, fragment_of, text
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run

MARKS = SpecialTokens(BOS, EOS, VOCABULARY, 100)
ONE_SIDE = {"max_document_length": 200, "sequence_length": 200, "sentinels": 200}
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 200}
KINDS = [
    {"kind": "causal"},
    {"kind": "causal", "ahead": 4},
    {"kind": "prefix", "prefix_share": 0.7},
    {"kind": "fill_in_the_middle"},
    {"kind": "span_corruption"},
    {"kind": "span_corruption", "density": 0.5, "mean_span": 8.0},
    {"kind": "ul2"},
    {"kind": "denoising", "noise": [{"kind": "drop_tokens", "share": 0.2}, {"kind": "infill", "share": 0.3}]},
]


def settings_of(data: dict, *objectives: dict) -> DataSettings:
    """Also with sentinels that none of these objectives uses."""
    return DataSettings.model_validate(data | {"objectives": objectives}, context=SAVED)


def test_the_examples_in_the_docstrings_hold() -> None:
    modules = (causal, prefix, fill_in_the_middle, span_corruption, masked, pairs, decoder)
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in results) > 8
    assert not any(result.failed for result in results)


@pytest.mark.parametrize("sides", [ONE_SIDE, TWO_SIDES], ids=["one_side", "two_sides"])
@given(length=st.integers(1, 90), start=st.integers(0, 60), kind=st.integers(0, len(KINDS) - 1))
@settings(max_examples=150, deadline=None)
def test_every_example_has_the_planned_lengths(sides: dict, length: int, start: int, kind: int) -> None:
    """Of pieces anywhere in a document, its end included, under every objective and mode."""
    document = text(89)
    start, length = min(start, 89), max(1, min(length, 90 - start))
    examples = Examples(settings_of(sides, KINDS[kind]), 1, VOCABULARY)
    for number in range(examples.pairs):
        columns = examples.measure(np.array([number]), np.array([length]), np.array([90 - start - length]))[0]
        piece = Chunk(0, 0, 0, start, length, 0, *columns.tolist())
        example = examples.make(piece, document)
        found = len(example.tokens), int((example.labels != IGNORED).sum()), len(example.source)
        assert found == (piece.num_tokens, piece.num_labels, piece.source_positions)
        assert len(example.labels) == len(example.tokens)


@given(
    length=st.integers(1, 90),
    kind=st.sampled_from([one for one in KINDS if "ahead" not in one]),
    fixed=st.sampled_from([0, 20, 150]),
    masked=st.sampled_from([0.0, 0.3]),
    dropped=st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=100, deadline=None)
def test_every_example_has_the_planned_lengths_under_any_decoder_inputs(
    length: int, kind: dict, fixed: int, masked: float, dropped: float
) -> None:
    inputs = {"fixed_target_tokens": fixed, "masked_decoder_share": masked, "dropped_decoder_share": dropped}
    examples = Examples(settings_of(TWO_SIDES | inputs, kind), 1, VOCABULARY)
    for number in range(examples.pairs):
        columns = examples.measure(np.array([number]), np.array([length]), np.array([90 - length]))[0]
        piece = Chunk(0, 0, 0, 0, length, 0, *columns.tolist())
        example = examples.make(piece, text(89))
        found = len(example.tokens), int((example.labels != IGNORED).sum()), len(example.source)
        assert found == (piece.num_tokens, piece.num_labels, piece.source_positions)
        places = np.arange(len(example.tokens)) if example.places is None else example.places
        assert places.shape == example.labels.shape
        assert (np.diff(places) > 0).all()


def test_positions_that_are_left_out_cannot_be_counted_where_targets_lie_further_on() -> None:
    sparse = TWO_SIDES | {"dropped_decoder_share": 0.4}
    with pytest.raises(ValidationError, match=r"data.dropped_decoder_share = 0.4: with ahead above 1"):
        settings_of(sparse, {"kind": "causal", "ahead": 2})
    with pytest.raises(ValidationError, match=r"gaps between labels, so that model.num_mtp_modules would not predict"):
        Settings.model_validate({"data": sparse, "model": {"kind": "encoder_decoder", "num_mtp_modules": 1}})


@given(length=st.integers(0, 300), density=st.floats(0.01, 0.99), mean_span=st.floats(1, 70), key=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_span_corruption_loses_nothing(length: int, density: float, mean_span: float, key: int) -> None:
    document, special_tokens = text(length), SpecialTokens(BOS, EOS, VOCABULARY, 400)
    for mode in ("", "X"):
        example = span_corruption.span_corruption(
            chunk_text_of(document, 0, length + 1), density, mean_span, mode, key, special_tokens
        )
        assert restore(example.source, example.labels, special_tokens).tolist() == document[1:-1].tolist()


def test_span_corruption_is_that_of_the_paper() -> None:
    """Raffel et al. 2020, figure 2: sentinels in order, visible first and hidden last, one more sentinel at the end."""
    document = text(200)
    example = span_corruption.span_corruption(chunk_text_of(document, 0, 201), 0.15, 3.0, "", 7, MARKS)
    sentinels = MARKS.sentinel(np.arange(11)).tolist()
    assert sentinels[:2] == [VOCABULARY + 7 + 99, VOCABULARY + 7 + 98]  # the highest id of all first
    assert [token for token in example.source.tolist() if token >= VOCABULARY] == sentinels[:10]
    assert [token for token in example.labels.tolist() if token >= VOCABULARY] == sentinels
    assert len(example.labels) == 30 + 10 + 2  # 15% of 200 hidden in spans of 3 on average, one sentinel, EOS
    assert len(example.source) == 170 + 10 + 1
    assert (example.source[0], example.source[-2]) == (document[1], sentinels[9])
    assert (example.source[-1], example.labels[-1], example.tokens[0]) == (EOS, EOS, BOS)
    assert example.tokens[1:].tolist() == example.labels[:-1].tolist()


def test_spans_are_drawn_by_key_and_cover_every_place() -> None:
    document, special_tokens = np.array([1, *range(100, 160), 2]), SpecialTokens(BOS, EOS, 200, 100)
    piece = chunk_text_of(document, 0, 61)
    sources = [
        span_corruption.span_corruption(piece, 0.3, 3.0, "", key, special_tokens).source.tolist() for key in range(400)
    ]
    assert len(set(map(tuple, sources))) > 390
    assert sources[3] == span_corruption.span_corruption(piece, 0.3, 3.0, "", 3, special_tokens).source.tolist()
    visible = np.mean([np.isin(np.arange(100, 160), source) for source in sources], axis=0)
    assert (visible[0], visible[-1]) == (1.0, 0.0)
    assert 0.5 < visible[5:-5].min() < 0.7 < visible[5:-5].max() < 0.9
    assert visible.mean() == pytest.approx(0.7)


def test_fill_in_the_middle_holds_the_text_in_both_orders() -> None:
    document = text(30)
    piece, (pre, suf, mid) = chunk_text_of(document, 0, 31), MARKS.fill
    for spm_share, first in ((0.0, [pre]), (1.0, [pre, suf])):
        for key in range(20):
            said = fill_in_the_middle.fill_in_the_middle(piece, spm_share, key, MARKS).labels.tolist()
            assert said[: len(first)] == first
            assert said[-1] == EOS
            low, high = said.index(suf), said.index(mid)
            if spm_share:
                suffix, prefix_and_middle = said[low + 1 : high], said[high + 1 : -1]
                assert prefix_and_middle + suffix == document[1:-1].tolist()
            else:
                prefix, suffix, middle = said[1:low], said[low + 1 : high], said[high + 1 : -1]
                assert prefix + middle + suffix == document[1:-1].tolist()


def test_masked_tokens_are_asked_for_in_their_places() -> None:
    document = text(3000)
    example = masked.masked(chunk_text_of(document, 0, 3001), 0.15, 5, MARKS)
    asked = np.flatnonzero(example.labels != IGNORED)
    assert len(asked) == 450
    assert (example.labels[asked] == document[asked]).all()
    others = np.setdiff1d(np.arange(3002), asked)
    assert (example.tokens[others] == document[others]).all()
    assert float((example.tokens[asked] == MARKS.mask).mean()) == pytest.approx(0.8, abs=0.06)
    assert float((example.tokens[asked] == document[asked]).mean()) == pytest.approx(0.1, abs=0.05)


def test_a_piece_predicts_across_its_end_and_not_across_its_documents() -> None:
    """The token `ahead` may lie in the next piece of the same document."""
    document = np.array([1, 11, 12, 13, 14, 15, 2])
    first, last = (causal.causal_ahead(chunk_text_of(document, start, 3), 3) for start in (0, 3))
    assert (first.tokens.tolist(), first.labels.tolist()) == ([1, 11, 12], [13, 14, 15])
    assert (last.tokens.tolist(), last.labels.tolist()) == ([13, 14, 15], [2, IGNORED, IGNORED])


def test_ul2_is_seven_denoisers_with_their_modes() -> None:
    data = DataSettings(**TWO_SIDES, objectives=[{"kind": "ul2", "share": 3}, {"kind": "causal"}])
    found = objectives_of(data)
    assert [one.name for one in found] == ["ul2_r"] * 2 + ["ul2_x"] * 4 + ["ul2_s", "causal"]
    assert sum(one.share for one in found[:7]) == pytest.approx(0.75)
    assert {one.share for one in found[:7]} == {found[0].share}
    assert num_special_tokens(data) == 7 + 200
    examples = Examples(data, 1, VOCABULARY)
    firsts = [int(examples.make(fragment_of(0, text(40), examples, n), text(40)).source[0]) for n in range(7)]
    assert firsts == [MARKS.mode("R")] * 2 + [MARKS.mode("X")] * 4 + [MARKS.mode("S")]


def test_special_tokens_of_the_tokenizer_are_used_where_their_ids_are_given() -> None:
    own = {"first_sentinel": 40, "sentinels": 30, "mask_token": 41}
    assert num_special_tokens(settings_of(TWO_SIDES | own, {"kind": "span_corruption"})) == 0
    assert num_special_tokens(settings_of(TWO_SIDES | own, {"kind": "ul2"})) == 7
    assert num_special_tokens(settings_of(ONE_SIDE | own, {"kind": "masked"})) == 0
    assert num_special_tokens(settings_of(ONE_SIDE | {"first_sentinel": 40, "sentinels": 30}, {"kind": "masked"})) == 7
    document = np.array([BOS, *range(200, 240), EOS])
    spans = Examples(settings_of(TWO_SIDES | own, {"kind": "span_corruption"}), 1, 300)
    example = spans.make(fragment_of(0, document, spans, 0), document)
    assert [token for token in example.labels.tolist() if 10 < token < 200] == [40, 39, 38]
    few = Examples(settings_of(TWO_SIDES | own | {"sentinels": 3}, {"kind": "span_corruption"}), 1, 300)
    with pytest.raises(UserError, match=r"is too few for span_corruption: .* set a longer mean_span or a shorter"):
        few.choose(0, 0, np.array([0]), np.array([0]))  # other ids below the first are words
    masks = Examples(settings_of(ONE_SIDE | own, {"kind": "masked", "density": 0.9}), 1, 300)
    assert 41 in masks.make(fragment_of(0, document, masks, 0), document).tokens
    with pytest.raises(UserError, match=r"data.mask_token = 41: the tokenizer of data/embedded has the ids 0 to 40"):
        Examples(settings_of(ONE_SIDE | own, {"kind": "masked"}), 1, 41)
    with pytest.raises(ValidationError, match=r"data.first_sentinel = 5: data.sentinels = 30 ids do not fit"):
        settings_of(TWO_SIDES | own | {"first_sentinel": 5}, {"kind": "span_corruption"})


def test_objectives_are_chosen_by_share_anew_in_every_epoch() -> None:
    data = settings_of(TWO_SIDES, {"kind": "causal"}, {"kind": "prefix", "share": 3})
    examples = Examples(data, 1)
    shards, rows = np.repeat([0, 1], 4000), np.tile(np.arange(4000), 2)
    chosen = examples.choose(0, 0, shards, rows)
    assert float(chosen.mean()) == pytest.approx(0.75, abs=0.02)
    for other in (examples.choose(0, 1, shards, rows), examples.choose(1, 0, shards, rows)):
        assert float((other == chosen).mean()) == pytest.approx(0.625, abs=0.03)
    assert (Examples(data, 2).choose(0, 0, shards, rows) != chosen).any()
    some = np.array([7, 4100, 11])
    assert examples.choose(0, 0, shards[some], rows[some]).tolist() == chosen[some].tolist()


@pytest.mark.parametrize("sides", [ONE_SIDE, TWO_SIDES], ids=["one_side", "two_sides"])
def test_long_documents_are_cut_where_their_examples_just_fit(sides: dict) -> None:
    for kind in KINDS:
        examples = Examples(settings_of(sides, kind), 1)
        for number, longest in enumerate(examples.longest.tolist()):
            for length, fits in ((longest, True), (longest + 1, False)):
                _, positions, _, source = examples.measure(np.array([number]), np.array([length]), np.array([9]))[0]
                assert (positions <= 200 and source <= 200) == fits, f"{kind}: {length}"


def test_a_cut_pair_keeps_its_beginnings_and_the_end_of_its_source() -> None:
    examples = Examples(DataSettings(max_document_length=4, sequence_length=8, source_sequence_length=6), 1)
    pair = Pair(np.array([1, 11, 12, 13, 14, 15, 16, 2]), np.array([1, 21, 22, 23, 24, 25, 2]))
    example = examples.make(fragment_of(0, pair, examples, 0), pair)
    assert example.source.tolist() == [11, 12, 13, 14, 15, 2]
    assert (example.tokens.tolist(), example.labels.tolist()) == ([1, 21, 22, 23], [21, 22, 23, 24])


def test_a_pair_on_one_side_is_source_then_target() -> None:
    examples = Examples(DataSettings(max_document_length=9, sequence_length=9), 1)
    pair = Pair(np.array([1, 11, 12, 2]), np.array([1, 21, 22, 2]))
    example = examples.make(fragment_of(0, pair, examples, 0), pair)
    assert example.tokens.tolist() == [1, 11, 12, 2, 21, 22]
    assert example.labels.tolist() == [IGNORED] * 3 + [21, 22, 2]
    long = Pair(text(40), text(40))
    cut = examples.make(fragment_of(0, long, examples, 0), long)
    assert (len(cut.tokens), int((cut.labels != IGNORED).sum())) == (9, 4)  # a target may have half


def test_decoder_inputs_are_fixed_masked_or_sparse() -> None:
    pair = Pair(text(5), text(20))

    def made(**inputs: object) -> Example:
        examples = Examples(DataSettings(**TWO_SIDES, **inputs), 1, VOCABULARY)
        return examples.make(fragment_of(0, pair, examples, 0), pair)

    plain = made()
    padded, cut = made(fixed_target_tokens=30), made(fixed_target_tokens=10)
    assert padded.labels.tolist() == plain.labels.tolist() + [IGNORED] * 9
    assert cut.tokens.tolist() == plain.tokens[:10].tolist()
    masked = made(masked_decoder_share=0.5)
    assert masked.labels.tolist() == plain.labels.tolist()
    changed = np.flatnonzero(masked.tokens != plain.tokens)
    assert (len(changed), changed.min() > 0, set(masked.tokens[changed])) == (10, True, {MARKS.mask})
    sparse = made(dropped_decoder_share=0.5)
    assert (len(sparse.tokens), sparse.places[0]) == (11, 0)
    assert sparse.tokens.tolist() == plain.tokens[sparse.places].tolist()
    assert sparse.labels.tolist() == plain.labels[sparse.places].tolist()


def decoder_inputs_in_numpy(
    target: np.ndarray, ahead: int, masked: list[int], kept: list[int] | None, fixed: int
) -> tuple[list[int], list[int], list[int]]:
    """Inputs, labels and positions, token by token; `masked` and `kept`: places before anything is left out."""
    inputs = [BOS if place < ahead else int(target[place - ahead]) for place in range(len(target))]
    inputs = [MARKS.mask if place in masked else token for place, token in enumerate(inputs)]
    places = list(range(len(target))) if kept is None else kept
    rows = [(inputs[place], int(target[place]), place) for place in places][: fixed or None]
    rows += [(0, IGNORED, rows[-1][2] + 1 + more) for more in range(fixed - len(rows))]
    return tuple(map(list, zip(*rows, strict=True)))


@pytest.mark.parametrize("ahead", [1, 2, 5, 30])
@pytest.mark.parametrize("fixed", [0, 10, 30])
@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_decoder_inputs_are_those_of_numpy(ahead: int, fixed: int, masked: float, dropped: float) -> None:
    """The draws are read from the example itself: their number and what they never touch are checked."""
    shares = {"masked_decoder_share": masked, "dropped_decoder_share": dropped}
    pair, length = Pair(text(5), text(20)), 21

    def made(**inputs: object) -> Example:
        examples = Examples(DataSettings(**TWO_SIDES, target_ahead=ahead, **inputs), 1, VOCABULARY)
        chunk = fragment_of(0, pair, examples, 0)
        example = examples.make(chunk, pair)
        assert (len(example.tokens), int((example.labels != IGNORED).sum())) == (chunk.num_tokens, chunk.num_labels)
        return example

    hidden = np.flatnonzero(made(masked_decoder_share=masked).tokens == MARKS.mask).tolist()
    assert len(hidden) == round(masked * max(0, length - ahead))
    assert all(place >= ahead for place in hidden)
    kept = made(dropped_decoder_share=dropped).places.tolist() if dropped else None
    assert kept is None or (kept[0] == 0 and len(kept) == length - round(dropped * (length - 1)))
    example = made(fixed_target_tokens=fixed, **shares)
    places = range(len(example.tokens)) if example.places is None else example.places.tolist()
    found = example.tokens.tolist(), example.labels.tolist(), list(places)
    assert found == decoder_inputs_in_numpy(pair.target[1:], ahead, hidden, kept, fixed)


def test_texts_under_every_objective_are_read_later_too() -> None:
    """The start token of a text without a source is the token before it."""
    for kind in ("causal", "prefix", "span_corruption"):
        plain, later = (
            Examples(settings_of(TWO_SIDES | {"target_ahead": ahead}, {"kind": kind}), 1, VOCABULARY)
            for ahead in (1, 3)
        )
        document = text(30)
        one, other = (examples.make(fragment_of(0, document, examples, 0), document) for examples in (plain, later))
        assert other.labels.tolist() == one.labels.tolist()
        assert other.tokens.tolist() == [one.tokens[0]] * 2 + one.tokens[:-2].tolist()


def test_inputs_and_labels_do_not_both_move() -> None:
    with pytest.raises(ValidationError, match=r"data.target_ahead = 2: with ahead above 1 in data.objectives"):
        settings_of(TWO_SIDES | {"target_ahead": 2}, {"kind": "causal", "ahead": 2})


def test_tasks_and_classes_need_targets_one_ahead() -> None:
    table = {"data": TWO_SIDES | {"target_ahead": 2}, "model": {"kind": "encoder_decoder"}}
    assert Settings.model_validate(table)
    with pytest.raises(ValidationError, match=r"evaluation.tasks with data.target_ahead = 2: tasks are scored token"):
        Settings.model_validate(table | {"evaluation": {"tasks": ["arc_easy"]}})
    with pytest.raises(ValidationError, match=r"data.target_ahead cannot be combined with classes"):
        Settings.model_validate(table | {"classification": {"classes": ["a", "b"]}})
    with pytest.raises(UserError, match=r"--tasks: with data.target_ahead = 2 no token is predicted from the one"):
        require_harness(Settings.model_validate(table).model, "--tasks", target_ahead=2)


# ---- an objective of one's own: a rule, and a row in the table


def _backwards_lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    """Source: half of the piece. Targets: the other half, from its end."""
    return lengths // 2, lengths - lengths // 2, lengths - lengths // 2


def _backwards(
    settings: ObjectiveSettings, mode: str, piece: ChunkText, key: int, special_tokens: SpecialTokens
) -> Example:
    half = len(piece.tokens) // 2
    return teacher_forced(piece.tokens[:half], special_tokens.bos, piece.tokens[half:][::-1])


BACKWARDS = Rule(_backwards_lengths, _backwards)
ROW = ObjectiveKind(about="a piece from its end", rule=f"{__name__}:BACKWARDS", reads=("density",), has_source=True)


@pytest.mark.parametrize("sides", [ONE_SIDE, TWO_SIDES], ids=["one_side", "two_sides"])
def test_a_row_in_the_table_is_all_that_another_objective_takes(sides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="Input should be 'causal', 'prefix'"):
        settings_of(sides, {"kind": "backwards"})
    monkeypatch.setitem(OBJECTIVES, "backwards", ROW)
    data = settings_of(sides, {"kind": "backwards", "density": 0.3})
    assert num_special_tokens(data) == 0
    with pytest.raises(ValidationError, match=r'mean_span = 9\.0 has no effect with kind = "backwards"'):
        ObjectiveSettings(kind="backwards", mean_span=9.0)
    examples, document = Examples(data, 1, VOCABULARY), np.array([BOS, 11, 12, 13, 14, 15, EOS])
    piece = fragment_of(0, document, examples, 0)
    example = examples.make(piece, document)
    assert example.source.tolist() == ([11, 12, 13] if sides is TWO_SIDES else [])
    assert example.labels.tolist() == ([] if sides is TWO_SIDES else [IGNORED] * 3) + [EOS, 15, 14]
    pairs_seen = 6 * 7 // 2 + 4 * 3 // 2 if sides is ONE_SIDE else 3 * 4 // 2  # a source before its targets sees itself
    one_layer = ModelSettings(kind="decoder" if sides is ONE_SIDE else "encoder_decoder", num_layers=1)
    work = count_work(PackTable.of_packs([(piece,)]), data, partial(visible_pairs, settings=one_layer))
    assert work.pairs == pairs_seen


def train_backwards(run_file: Path) -> int:
    """On a rank, which plans and trains."""
    from bigmodel.training import loop

    OBJECTIVES["backwards"] = ROW
    overrides = ["data.objectives=[{kind='backwards'}]", "training.steps=3"]
    with open(run_file.with_suffix(".printed"), "w") as output, contextlib.redirect_stdout(output):
        return loop.train(load_settings(run_file, overrides))


def test_and_a_model_is_trained_on_it(tmp_path: Path, shards: Path) -> None:
    run_ranks(1, train_backwards, write_run(tmp_path, shards))
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {part["objective"] for part in steps[-1]["parts"]} == {"backwards"}
    assert all(0 < line["targets"] <= line["positions"] / 1.5 for line in steps)


def test_the_run_file_of_the_page_on_objectives_is_one_that_runs() -> None:
    """Budgets, contexts and sentinels fit one another, without a setting that is not shown."""
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    table = tomllib.loads(page.split("```toml")[1].partition("\n")[2].partition("```")[0])
    data = Settings.model_validate(table).data
    nothing = np.zeros(1, int)
    Examples(data, 1).choose(0, 0, nothing, nothing)
    assert {one.name for one in objectives_of(data)} == {"span_corruption", "ul2_r", "ul2_s", "ul2_x"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sentinels": 9}, "data.sentinels = 9 is too few for span_corruption"),
        ({"max_document_length": 2}, "hold no example of span_corruption"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, complaint: str) -> None:
    data = DataSettings(**(ONE_SIDE | changes), objectives=[{"kind": "span_corruption"}])
    with pytest.raises(UserError, match=complaint):
        Examples(data, 1).choose(0, 0, np.zeros(1, int), np.zeros(1, int))
