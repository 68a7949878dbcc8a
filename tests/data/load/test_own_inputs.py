"""Which inputs scheduled sampling replaces: the scheduled share, by draws that belong to places in documents."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from bigmodel.config.settings import DataSettings, ScheduledSamplingSettings, Settings
from bigmodel.data.load.batch import IGNORED, Batch, build_batch, make_dropout_seeds
from bigmodel.data.load.own_inputs import with_own_inputs
from bigmodel.data.load.stream import Builder, Stream, validation_batches
from bigmodel.data.objectives.examples import Examples, Pair
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.shuffle import Chunk, Pack
from tests.support.example_batches import VOCABULARY, batch_of, plan_of, text
from tests.support.memory_store import MemoryStore

DATA = DataSettings(max_document_length=64, sequence_length=64, max_documents=4, source_sequence_length=64)
DOCUMENTS = [[Pair(text(9), text(20)), Pair(text(3), text(1))], [Pair(text(30), text(40))], []]


def sampled(documents: list, data: DataSettings, share: float, drawn: bool = False) -> Batch:
    plan = plan_of(documents, Examples(data, 1, VOCABULARY))
    return with_own_inputs(batch_of(documents, data), plan, 1, share, data.target_ahead, drawn)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("fixed", [0, 30])
def test_an_input_is_replaced_where_its_own_document_predicts_it(ahead: int, fixed: int) -> None:
    data = DATA.model_copy(update={"target_ahead": ahead, "fixed_target_tokens": fixed})
    batch = sampled(DOCUMENTS, data, 1.0)
    expected = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        for row in range(start + ahead, end):
            if IGNORED not in (batch.labels[row], batch.labels[row - ahead]):
                assert batch.labels[row - ahead] == batch.tokens[row]
                expected.append(row)
    assert batch.replaced.tolist() == expected
    assert (batch.replaced - batch.predicted_at).unique().tolist() == [ahead]


def test_a_prompt_is_not_replaced_and_an_answer_is() -> None:
    data = DataSettings(max_document_length=64, sequence_length=64, objectives=[{"kind": "prefix"}])
    batch = sampled([[text(20)]], data, 1.0)
    labelled = np.flatnonzero(batch.labels.numpy() != IGNORED)
    assert batch.replaced.tolist() == labelled[1:].tolist()


def places_of(batch: Batch, packs: list[Pack], size: int) -> dict[int, list[tuple[int, int]]]:
    """By document: the replaced places and the words of their draws."""
    words = dict(zip(batch.replaced.tolist(), batch.choice_seeds.tolist(), strict=True))
    found = {}
    for number, pack in enumerate(packs):
        start = number * size
        for chunk in pack:
            rows = range(start, start + chunk.num_tokens)
            found[chunk.row] = [(row - start, words[row]) for row in rows if row in words]
            start += chunk.num_tokens
    return found


def test_draws_belong_to_places_of_documents_in_any_pack_and_step() -> None:
    documents = [text(length, seed=length) for length in (30, 25, 12, 40, 3)]
    data = DataSettings(max_document_length=64, sequence_length=64, max_documents=4)
    chunks = [Chunk(0, 0, row, 0, len(document) - 1, 0) for row, document in enumerate(documents)]

    def found(packs: list[Pack], step: int) -> dict[int, list[tuple[int, int]]]:
        seeds = make_dropout_seeds(1, step, range(len(packs)), 64)
        batch = build_batch(packs, lambda chunk: documents[chunk.row], data, seeds)
        return places_of(with_own_inputs(batch, packs, 1, 0.4, drawn=True), packs, 64)

    one = found([(chunks[0], chunks[1]), (chunks[2], chunks[3], chunks[4])], 0)
    other = found([(), (chunks[3], chunks[4]), (chunks[1], chunks[2]), (chunks[0],)], 7)
    assert one == other
    assert sum(map(len, one.values())) > 30


def test_a_larger_share_replaces_more_and_keeps_what_a_smaller_one_replaced() -> None:
    documents, data = [[text(60, seed) for seed in range(30)]], DataSettings(sequence_length=2048)
    plan = plan_of(documents, Examples(data, 1, VOCABULARY))
    wide = batch_of(documents, data)
    before: set[int] = set()
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        rows = set(with_own_inputs(wide, plan, 1, share).replaced.tolist())
        assert before <= rows
        assert len(rows) == pytest.approx(share * 30 * 60, abs=4 * math.sqrt(30 * 60 * share * (1 - share)) + 1)
        before = rows
    assert (
        with_own_inputs(wide, plan, 2, 0.5).replaced.tolist() != with_own_inputs(wide, plan, 1, 0.5).replaced.tolist()
    )


BENGIO = {  # share of true inputs at step i: Bengio et al. 2015, section 2.4
    "linear": ({"steps": 200, "share": 0.75}, lambda i: max(0.25, 1 - 0.75 / 200 * i)),
    "exponential": ({"k": 0.99, "share": 1.0}, lambda i: 0.99**i),
    "inverse_sigmoid": ({"k": 40.0, "share": 0.9}, lambda i: max(0.1, 40 / (40 + math.exp(i / 40)))),
    "constant": ({"share": 0.3}, lambda i: 0.7),
}


@pytest.mark.parametrize("schedule", BENGIO)
def test_schedules_are_those_of_the_paper(schedule: str) -> None:
    given, truth = BENGIO[schedule]
    settings = ScheduledSamplingSettings(schedule=schedule, first_step=5, **given)
    assert settings.share_at(4) == 0.0
    for step in (0, 1, 17, 100, 199, 200, 1000):
        assert settings.share_at(5 + step) == pytest.approx(1 - truth(step), abs=1e-12)
    assert 0 <= settings.share_at(10**7) <= 1


NO_SOURCE = {"source_sequence_length": 0}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"data": {"masked_decoder_share": 0.1}}, "with data.masked_decoder_share = 0.1: the input after a prediction"),
        ({"data": {"dropped_decoder_share": 0.1}}, "with data.dropped_decoder_share = 0.1"),
        ({"data": {"objectives": [{"kind": "causal", "ahead": 2}]}}, "with ahead above 1 in data.objectives"),
        (
            {"model": {"kind": "decoder"}, "data": NO_SOURCE, "training": {"sequence_parallel_ranks": 2}},
            "with training.sequence_parallel_ranks = 2",
        ),
        ({"distillation": {"teacher": "runs/a"}}, "with distillation.teacher: the teacher would read other inputs"),
        (
            {"model": {"kind": "lstm_encoder_decoder", "num_layers": 1}},
            'with model.kind = "lstm_encoder_decoder": only transformers have its first pass',
        ),
        ({"classification": {"classes": ["a", "b"]}}, "with classification.classes: a class is predicted"),
        (
            {"model": {"kind": "encoder"}, "data": {"source_sequence_length": 0, "objectives": [{"kind": "masked"}]}},
            'with model.kind = "encoder": an encoder has no decoder inputs',
        ),
    ],
)
def test_what_scheduled_sampling_makes_no_sense_with(table: dict, words: str) -> None:
    base = {"model": {"kind": "encoder_decoder"}, "data": {"source_sequence_length": 64}, "training": {}}
    merged = {name: base.get(name, {}) | table.get(name, {}) for name in base | table}
    if "classification" not in table:
        assert Settings.model_validate(merged)
    merged["training"]["scheduled_sampling"] = {}
    with pytest.raises(ValidationError, match=r"training\.scheduled_sampling") as caught:
        Settings.model_validate(merged)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedule": "exponential", "k": 1.0}, 'k = 1 with schedule = "exponential": must be between 0 and 1'),
        ({"schedule": "inverse_sigmoid"}, 'k = 0 with schedule = "inverse_sigmoid": must be at least 1'),
    ],
)
def test_k_must_fit_its_schedule(given: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=r"training\.scheduled_sampling\.k") as caught:
        ScheduledSamplingSettings(**given)
    assert words in str(caught.value)


def test_training_batches_are_sampled_by_their_step_and_validation_is_not() -> None:
    store = MemoryStore({"web": [[30, 40, 25, 33, 8, 64, 12, 50]]})
    data = DataSettings(max_document_length=64, sequence_length=64, max_documents=4, packing_buffer=2)
    sampling = ScheduledSamplingSettings(schedule="linear", share=1.0, steps=2, choice="drawn")
    stream = Stream(store, Order(store, data, 2, 1), data, 1, Place(0, 1), 1, sampling=sampling)
    steps = [next(stream) for _ in range(3)]
    stream.close()
    assert [batch.replaced is None for batch in steps[0].micro_batches] == [True, True]
    shares = [sum(len(batch.replaced) for batch in step.micro_batches) / step.num_labels for step in steps[1:]]
    assert 0.3 < shares[0] < 0.7
    assert shares[1] > 0.9
    again = Builder(store, data, 1, sampling=sampling).build([steps[1].packs[0]], 1, [0])
    assert again.fingerprint() in {batch.fingerprint() for batch in steps[1].micro_batches}
    assert all(batch.replaced is None for batch in validation_batches(store, data, 1))


def test_it_begins_within_the_run() -> None:
    training = {"steps": 8, "scheduled_sampling": {"first_step": 7}}
    assert Settings.model_validate({"training": training})
    with pytest.raises(ValidationError, match=r"first_step = 8 is not below training\.steps = 8: no input would be"):
        Settings.model_validate({"training": training | {"scheduled_sampling": {"first_step": 8}}})
