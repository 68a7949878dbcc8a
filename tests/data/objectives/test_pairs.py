"""Pairs and objectives through plan, packs and stream: exactly once, the same at any world size, both sides full."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.config.settings import SAVED, DataSettings, UserError
from bigmodel.data.advice import packing_advice as planned
from bigmodel.data.advice.packing_advice import measure_packing
from bigmodel.data.advice.pair_advice import count_cut, suggest_budgets
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.load.stream import Builder, Stream, validation_batches
from bigmodel.data.objectives.examples import Pair, objectives_of
from bigmodel.data.plan import packing
from bigmodel.data.plan.mixing import mix_lag_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.packing import pack_two_sides
from bigmodel.data.plan.sharing import Place
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation import evaluate
from bigmodel.inspect.show import window_text
from tests.support.memory_store import MemoryStore
from tools.bench_seq2seq import instructions, lognormal, summaries, translations

DATA = DataSettings(
    max_document_length=24, sequence_length=48, source_sequence_length=64, max_documents=6, lanes=2, packing_buffer=6
)
OBJECTIVES = [{"kind": "span_corruption"}, {"kind": "prefix"}, {"kind": "causal"}]


class PairStore(MemoryStore):
    """A memory store one of whose sources, `pairs`, has targets too."""

    def __init__(self, lengths: dict[str, list[list[int]]], targets: list[list[int]]) -> None:
        super().__init__(lengths)
        self.pair_sources = frozenset(["pairs"])
        self._targets = targets

    def target_lengths(self, source: str, shard: int) -> np.ndarray:
        return np.array(self._targets[shard], dtype=np.uint32)

    def document(self, source: str, shard: int, row: int) -> np.ndarray | Pair:
        tokens = super().document(source, shard, row) % 50
        if source != "pairs":
            return tokens
        return Pair(tokens, np.arange(self._targets[shard][row]) % 40)


def a_store(seed: int = 0, num_shards: int = 4, rows: int = 12) -> PairStore:
    random = np.random.default_rng(seed)

    def lengths(most: int) -> list[list[int]]:
        return [random.integers(3, most, rows).tolist() for _ in range(num_shards)]

    return PairStore({"pairs": lengths(40), "text": lengths(90)}, lengths(30))


def steps_of(store: PairStore, data: DataSettings, count: int) -> list:
    order = Order(store, data, 4, seed=5)
    return [order.next_step() for _ in range(count)]


@given(
    seed=st.integers(0, 50),
    objectives=st.sampled_from([[], OBJECTIVES, [{"kind": "ul2"}]]),
    source_sequence_length=st.sampled_from([0, 64]),
)
@settings(max_examples=16, deadline=None)
def test_every_position_of_pairs_and_text_is_given_once_an_epoch(
    seed: int, objectives: list, source_sequence_length: int
) -> None:
    store = a_store(seed)
    changes = {"objectives": objectives, "source_sequence_length": source_sequence_length}
    data = DataSettings(**(DATA.model_dump() | changes))
    order = Order(store, data, 4, seed=seed)
    seen: Counter = Counter()
    while min(source.epochs_complete for source in order.progress().values()) < 1:
        for pack in order.next_step():
            assert len(pack) <= 6
            assert sum(piece.num_tokens for piece in pack) <= 48
            assert sum(piece.source_positions for piece in pack) <= source_sequence_length
            seen.update(
                (piece.source, piece.shard, piece.row, position)
                for piece in pack
                if piece.epoch == 0
                for position in range(piece.start, piece.start + piece.length)
            )
    expected = {
        (source, shard, row, position)
        for source, name in enumerate(store.sources)
        for shard in range(4)
        for row, length in enumerate(store.lengths(name, shard).tolist())
        for position in range(length - 1)
    }
    assert set(seen) == expected
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("objectives", [[], OBJECTIVES])
def test_steps_are_the_same_bytes_at_any_world_size_and_after_any_restart(objectives: list) -> None:
    store = a_store()
    data = DataSettings(**(DATA.model_dump() | {"objectives": objectives}))
    seen = {}
    for size, node_size in ((1, 1), (2, 1), (3, 1), (4, 2), (4, 4)):
        found: dict = {}
        for rank in range(size):
            stream = Stream(store, Order(store, data, 4, seed=5), data, 1, Place(rank, size, node_size), seed=5)
            for step in (next(stream) for _ in range(5)):
                for batch in step.micro_batches:
                    if batch.num_documents:
                        found.setdefault(step.number, []).append(batch.fingerprint())
                assert step.num_labels == sum(step.labels_by_group)
            stream.close()
        seen[size, node_size] = {number: sorted(prints) for number, prints in found.items()}
    assert len(set(map(json.dumps, seen.values()))) == 1
    order, again = (Order(store, data, 4, seed=5) for _ in range(2))
    for _ in range(4):
        order.next_step()
    again.restore(json.loads(json.dumps(order.state())))
    assert order.next_step() == again.next_step()


def test_counts_of_a_step_are_those_of_its_batches() -> None:
    store, data = a_store(), DataSettings(**(DATA.model_dump() | {"objectives": OBJECTIVES}))
    stream = Stream(store, Order(store, data, 4, seed=5), data, 2, Place(0, 1), seed=5)
    step = next(stream)
    stream.close()
    assert stream.loss_groups == [
        ("pairs", "pairs"),
        ("span_corruption", "text"),
        ("prefix", "text"),
        ("causal", "text"),
    ]
    counts = [0] * 4
    for batch in step.micro_batches:
        asked = batch.loss_groups[batch.labels != -100].tolist()
        counts = [count + asked.count(part) for part, count in enumerate(counts)]
    assert step.labels_by_group == counts
    assert min(counts) > 0
    positions = sum(batch.num_tokens + batch.source.num_tokens for batch in step.micro_batches)
    assert step.num_tokens == positions
    assert step.num_tokens + step.num_padding == 4 * (48 + 64)


@pytest.mark.parametrize("objective", ["causal", "prefix", "fill_in_the_middle"])
def test_a_decoder_takes_pairs_beside_text_under_any_objective(objective: str) -> None:
    """Causal text alone is planned without examples; pairs among it must not be."""
    store = a_store()
    data = DataSettings(
        max_document_length=48,
        sequence_length=96,
        max_documents=6,
        lanes=2,
        packing_buffer=6,
        objectives=[{"kind": objective}],
    )
    stream = Stream(store, Order(store, data, 4, seed=5), data, 4, Place(0, 1), seed=5)
    step = next(stream)
    stream.close()
    (batch,) = step.micro_batches
    pairs = [piece for pack in step.packs for piece in pack if store.sources[piece.source] == "pairs"]
    assert 0 < len(pairs) < step.num_documents
    assert stream.loss_groups == [("pairs", "pairs"), (objective, "text")]
    assert step.labels_by_group == [
        sum(piece.num_labels for piece in pairs),
        step.num_labels - sum(piece.num_labels for piece in pairs),
    ]
    with_prefix = step.num_documents if objective == "prefix" else len(pairs)
    assert int((batch.prefixes > 0).sum()) == with_prefix
    assert batch.num_labels == step.num_labels < batch.num_tokens


@pytest.mark.parametrize("source_sequence_length", [0, 24])
def test_texts_of_no_to_three_tokens_have_examples_under_every_objective(source_sequence_length: int) -> None:
    """What is planned is what is built, which building asserts; nothing is lost on the way."""
    lengths = np.random.default_rng(2).integers(2, 6, (2, 30)).tolist()
    store = PairStore({"pairs": lengths, "text": lengths[::-1]}, lengths)
    kinds = ["causal", "prefix", "span_corruption", "ul2", *([] if source_sequence_length else ["fill_in_the_middle"])]
    for objectives in ([{"kind": kind} for kind in kinds], [{"kind": "causal", "ahead": 5}]):
        data = DataSettings(
            max_document_length=12,
            sequence_length=24,
            source_sequence_length=source_sequence_length,
            max_documents=6,
            packing_buffer=6,
            objectives=objectives,
        )
        stream = Stream(store, Order(store, data, 8, seed=5), data, 2, Place(0, 1), seed=5)
        steps = [next(stream) for _ in range(8)]
        stream.close()
        found = {piece.objective for step in steps for pack in step.packs for piece in pack}
        assert found == set(range(len(objectives_of(data)) + 1))  # and pairs
        assert sum(batch.num_labels for step in steps for batch in step.micro_batches) > 0


@pytest.mark.parametrize("objective", [{"kind": "causal", "ahead": 90}, {"kind": "masked"}])
def test_documents_too_short_for_what_is_asked_are_an_error_and_no_division_by_zero(
    objective: dict, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    store = MemoryStore({"web": [[2] * 400]})  # begin and end
    data = DataSettings(max_document_length=48, sequence_length=48, objectives=[objective])
    stream = Stream(store, Order(store, data, 4, seed=5), data, 4, Place(0, 1), seed=5)
    with pytest.raises(UserError, match=r"data\.objectives = .*: no label in step 1, whose documents"):
        next(stream)
    stream.close()
    store.directory = shards  # of the tokenizer
    monkeypatch.setattr(evaluate.ShardStore, "of_run", lambda *_: store)
    with pytest.raises(UserError, match="no label in the validation split"):
        evaluate.Validation(data, 1).run(lambda batch, _output: torch.zeros(3, len(batch.tokens)), ALONE)


def test_a_document_that_is_alone_in_its_micro_batch_has_no_wrong_source(
    monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    """Its own would be taken for one that makes no difference."""
    store, asked = a_store(), []
    store.directory = shards  # of the tokenizer
    monkeypatch.setattr(evaluate.ShardStore, "of_run", lambda *_: store)

    def forward(batch: Batch, _output: str) -> torch.Tensor:
        asked.append(batch)
        return (batch.labels != IGNORED).float().expand(3, -1)  # losses, surprise, likeliest token

    several = DataSettings(**(DATA.model_dump() | {"mix": {"pairs": 1.0}}))
    alone = several.model_copy(update={"max_documents": 1})
    for data, packs, scored in ((several, 1, True), (alone, 2, True), (alone, 1, False)):
        validation = evaluate.Validation(data, packs)
        whole, wrong = validation.run(forward, ALONE), validation.run_with_wrong_sources(forward, ALONE)
        assert whole.nats == whole.num_labels > 0
        assert (wrong is not None) == scored
        assert not scored or 0.8 * whole.num_labels < wrong.num_labels == wrong.nats <= whole.num_labels


def test_validation_holds_every_document_once_and_always_the_same() -> None:
    store = a_store()
    data = DataSettings(**(DATA.model_dump() | {"objectives": OBJECTIVES}))
    first, second = (validation_batches(store, data, size) for size in (1, 3))
    one, other = (sum(batch.num_documents for batch in batches) for batches in (first, second))
    assert one == other >= 96
    assert {name: batch.fingerprint() for name, batch in enumerate(first)} == {
        name: batch.fingerprint() for name, batch in enumerate(validation_batches(store, data, 1))
    }


def test_the_identity_of_a_plan_names_what_decides_its_examples() -> None:
    store = a_store()
    plain, other = (
        Order(store, DataSettings(**(DATA.model_dump() | {"objectives": objectives})), 4, seed=5)
        for objectives in ([], OBJECTIVES)
    )
    assert plain.plan.identity["data.source_pack_tokens"] == 64
    assert "data.objectives" not in plain.plan.identity
    assert [one["kind"] for one in other.plan.identity["data.objectives"]] == ["span_corruption", "prefix", "causal"]


def test_a_position_goes_on_without_settings_that_had_no_effect_when_it_was_saved() -> None:
    """Earlier versions accepted these; now they are refused in the run file."""
    store, plain = a_store(), DATA.model_dump() | {"objectives": [{"kind": "prefix", "prefix_share": 0.3}]}
    idle = {"sentinels": 7, "objectives": [{"kind": "prefix", "prefix_share": 0.3, "density": 0.4}]}
    before = Order(store, DataSettings.model_validate(plain | idle, context=SAVED), 4, seed=5)
    given = [before.next_step() for _ in range(3)][-1]
    state, after = json.loads(json.dumps(before.state())), Order(store, DataSettings(**plain), 4, seed=5)
    assert state["identity"] != after.plan.identity
    assert [after.next_step() for _ in range(3)][-1] == given
    after.restore(state)
    assert after.next_step() == before.next_step()
    other = plain | {"objectives": [{"kind": "prefix", "prefix_share": 0.4}]}
    with pytest.raises(UserError, match=r"data\.objectives: .*0\.3.* when saved, .*0\.4.* now"):
        Order(store, DataSettings(**other), 4, seed=5).restore(state)


def test_a_builder_makes_the_same_example_in_every_pack_and_step() -> None:
    store, data = a_store(), DataSettings(**(DATA.model_dump() | {"objectives": OBJECTIVES}))
    pack = next(pack for step in steps_of(store, data, 5) for pack in step if len(pack) > 2)
    builder = Builder(store, data, 5)
    alone, together = builder.build([(pack[1],)], 0, [0]), builder.build([pack], 9, [3])
    start, end = together.cu_seqlens[1:3].tolist()
    assert together.tokens[start:end].tolist() == alone.tokens[: end - start].tolist()
    assert together.labels[start:end].tolist() == alone.labels[: end - start].tolist()


def test_shares_of_objectives_are_shares_of_the_texts_tokens_whatever_is_asked_of_them() -> None:
    """Documents are drawn, not tokens; the draw knows no length, so the tokens of an epoch follow the shares too."""
    lengths = lognormal(8, 12_000, 100, 1.0, 3, 4_000) + 1
    store = MemoryStore({"web": [part.tolist() for part in np.array_split(lengths, 4)]})
    shares = {"causal": 0.2, "prefix": 0.3, "span_corruption": 0.5}
    wanted = [{"kind": kind, "share": 7 * share} for kind, share in shares.items()]
    changes = {"objectives": wanted, "max_document_length": 64, "sequence_length": 512, "source_sequence_length": 512}
    data = DataSettings(**(DATA.model_dump() | changes | {"max_documents": 64, "packing_buffer": 200}))
    order, tokens, targets = Order(store, data, 4, seed=5), np.zeros(3), np.zeros(3)
    while order.progress()["web"].epochs_complete < 1:
        for piece in (piece for pack in order.next_step() for piece in pack if piece.epoch == 0):
            tokens[piece.objective] += piece.length
            targets[piece.objective] += piece.num_labels
    assert tokens.sum() == (lengths - 1).sum()
    assert tokens / tokens.sum() == pytest.approx(list(shares.values()), abs=0.02)
    assert targets[2] / targets.sum() < 0.3  # span corruption asks for a part of what it reads


# ---- packing two sides ----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), max_size=60),
    num_first=st.integers(0, 10),
    documents=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_two_sides_are_packed_within_all_limits(lengths: list, num_first: int, documents: int) -> None:
    table = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    packing = pack_two_sides(table, (20, 30), documents, num_first)
    assert sorted(index for pack in packing.packs for index in pack) == list(range(len(table)))
    for number, pack in enumerate(packing.packs):
        assert 1 <= len(pack) <= documents
        target, source = table[pack].sum(axis=0)
        assert (target, source) == (packing.num_tokens[number], packing.num_sources[number])
        assert target <= 20
        assert source <= 30


@pytest.mark.parametrize(
    ("table", "budgets", "better"),
    [
        (summaries(600), (512, 2048), "first_fit"),  # few documents a pack
        (instructions(1500), (3456, 2048), "fill_one_by_one"),  # many
    ],
)
def test_the_rule_that_needs_fewer_packs_is_taken(
    table: np.ndarray, budgets: tuple[int, int], better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = len(pack_two_sides(table, budgets, 256).packs)
    alone = {}
    for name, other in (("first_fit", "fill_one_by_one"), ("fill_one_by_one", "first_fit")):
        with monkeypatch.context() as patch:
            patch.setattr(packing, other, lambda lengths, *_: [[index] for index in range(len(lengths))])
            alone[name] = len(pack_two_sides(table, budgets, 256).packs)
    assert both == alone[better] == min(alone.values())
    assert alone["first_fit"] != alone["fill_one_by_one"]


def store_of(table: np.ndarray, num_shards: int = 4) -> PairStore:
    """The pairs whose texts have these positions, (n, 2): target, source."""
    parts = np.array_split(table + 1, num_shards)
    return PairStore({"pairs": [part[:, 1].tolist() for part in parts]}, [part[:, 0].tolist() for part in parts])


@pytest.mark.parametrize(
    ("table", "contexts"),
    [(translations(16_000), (256, 256)), (summaries(12_000), (256, 2048)), (instructions(12_000), (2048, 2048))],
    ids=["translations", "summaries", "instructions"],
)
def test_with_the_suggested_budgets_both_sides_are_full(table: np.ndarray, contexts: tuple[int, int]) -> None:
    store = store_of(table)
    data = DataSettings(
        max_document_length=contexts[0],
        sequence_length=contexts[0],
        source_sequence_length=contexts[1],
        packing_buffer=200,
    )
    suggested, _ = suggest_budgets(store, data)
    packed = measure_packing(store, suggested)
    assert packed.filled >= 0.99
    assert packed.source_filled >= 0.99
    assert (suggested.max_document_length, suggested.longest_source) == contexts


def test_with_the_suggested_budgets_corrupted_spans_fill_both_sides() -> None:
    lengths = np.clip(lognormal(7, 12_000, 740, 1.1, 4, 20_000), 4, 20_000)
    store = MemoryStore({"web": [part.tolist() for part in np.array_split(lengths, 4)]})
    data = DataSettings(max_document_length=114, sequence_length=456, source_sequence_length=456, packing_buffer=200)
    packed = measure_packing(store, suggest_budgets(store, data)[0])
    assert packed.filled >= 0.99
    assert packed.source_filled >= 0.99


def test_what_is_told_of_a_window_of_pairs_is_what_is_planned() -> None:
    """The window counts source texts; that of long targets holds many packs more than data.packing_buffer."""
    table = np.stack([lognormal(1, 12_000, 60, 0.5, 2, 200), lognormal(2, 12_000, 20, 0.5, 2, 60)], axis=1)
    data = DataSettings(
        max_document_length=200,
        sequence_length=600,
        source_sequence_length=200,
        max_source_length=60,
        packing_buffer=50,
    )
    store = store_of(table)
    told = window_text(data, measure_packing(store, data))
    order = Order(store, data, 1, 1)
    order.next_step()
    while (at := order.position().lanes[0]).start.buffer < 2:
        order.next_step()
    assert 190 < len(at.buffer.packs) < 210
    assert abs(int(told.split()[-6]) - len(at.buffer.packs)) <= 5
    assert "data.packing_buffer = 50" in told


def test_the_suggested_window_of_pairs_is_the_smallest_that_fills_both_sides_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planned, "WINDOWS", (5, 20, 80, 160))
    monkeypatch.setattr(planned, "MEASURED_PACKS", 300)
    monkeypatch.setattr(planned, "SPARE_SHARE", 0.005)
    store = store_of(translations(12_000))
    data = DataSettings(
        max_document_length=256,
        sequence_length=526,
        source_sequence_length=512,
        max_source_length=256,
        packing_buffer=5,
    )
    window = planned.suggest_window(store, data)
    filled = {}
    for number in planned.WINDOWS:
        packed = measure_packing(store, data.model_copy(update={"packing_buffer": number}))
        filled[number] = min(packed.filled, packed.source_filled)
    assert filled[5] < filled[20] < 0.985 < filled[160] - 0.005 <= filled[80]
    assert window.suggested == 80


def test_a_decoder_is_suggested_a_context_that_holds_both_texts_of_its_pairs() -> None:
    store = store_of(np.full((400, 2), 100))
    assert set(planned.all_positions(store).tolist()) == {200}
    data = DataSettings(max_document_length=128, sequence_length=256)
    assert planned.suggest_context(planned.all_positions(store), data).suggested == 256
    for context, cut in ((128, 400), (256, 0)):
        assert count_cut(store, data.model_copy(update={"max_document_length": context})).sources == cut


def test_a_stage_of_the_curriculum_comes_within_the_lag_that_is_told_on_two_sides() -> None:
    store = store_of(np.stack([np.full(4_000, 10), np.full(4_000, 90)], axis=1))
    random = np.random.default_rng(1)
    store = PairStore(
        {
            "pairs": [store.lengths("pairs", n).tolist() for n in range(4)],
            "web": random.integers(20, 90, (4, 500)).tolist(),
        },
        [store.target_lengths("pairs", n).tolist() for n in range(4)],
    )
    stage = {"from_tokens": 20_000, "mix": {"web": 1.0}}
    changes = {"mix": {"pairs": 1.0}, "curriculum": [stage], "max_document_length": 64, "sequence_length": 64}
    data = DataSettings(
        **(DATA.model_dump() | changes | {"source_sequence_length": 640, "packing_buffer": 10, "lanes": 1})
    )
    order, given, first = Order(store, data, 1, seed=3), 0, 0
    while not first:
        (pack,) = order.next_step()
        given += sum(piece.length for piece in pack)
        if any(store.sources[piece.source] == "web" for piece in pack):
            first = given
    assert 20_000 + 10 * 64 < first <= 20_000 + mix_lag_tokens(data)
    assert mix_lag_tokens(data) == 10 * (64 + 640)


def test_pairs_that_are_cut_are_counted_by_side() -> None:
    store = store_of(np.array([[10, 5], [30, 5], [10, 70], [24, 64], [25, 65]]))
    cut = count_cut(store, DATA)
    assert (cut.num_pairs, cut.sources, cut.targets) == (5, 2, 2)
