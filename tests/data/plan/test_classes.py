"""Resampled classes: each class gives its documents once in a pass, with its share of documents, and the plan stays a
pure function of seed, lengths and settings."""

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.classes import class_shares, counts_by_class, resampled
from bigmodel.data.plan.mixing import stages
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.shuffle import Chunk, read_shards
from tests.support.memory_store import MemoryStore

CLASSES = ("common", "rare", "medium")
COUNTS = {"common": 40, "rare": 3, "medium": 11}


class LabelledStore(MemoryStore):
    """The label of a document is the number of its class; documents without text are in no class's stream."""

    def __init__(
        self,
        classes: dict[str, list[list[int]]],
        is_counted: bool = True,
        lengths: dict[str, list[list[int]]] | None = None,
    ) -> None:
        lengths = lengths or {
            source: [[2 + (7 * row + number) % 19 for row in range(len(shard))] for shard in shards]
            for source, shards in classes.items()
            for number in [len(source)]
        }
        super().__init__(lengths)
        self.directory, self.pair_sources, self.classes, self._is_counted = "data", self.sources, classes, is_counted

    def target_lengths(self, source: str, shard: int) -> np.ndarray:
        return np.full(len(self._lengths[source][shard]), 3, np.uint32)

    def labels(self, source: str, shard: int) -> tuple[np.ndarray, list[np.ndarray]]:
        found, numbers = np.unique(self.classes[source][shard], return_inverse=True)
        return numbers.astype(np.uint16), [np.array([1, number, 2]) for number in found]

    def label_counts(self, source: str) -> dict[str, int]:
        counts = Counter(number for shard in self.classes[source] for number in shard)
        return {CLASSES[number]: count for number, count in counts.items()} if self._is_counted else {}

    def encode(self, text: str) -> np.ndarray:
        return np.array([1, CLASSES.index(text) if text in CLASSES else 99, 2])

    def decode(self, ids: np.ndarray) -> str:
        return f"label {ids[1]}"


def store_of(num_shards: int = 2, **more: Any) -> LabelledStore:
    """40, 3 and 11 documents, dealt to the shards in turn; the second source has two classes alone."""
    documents = [number for number, name in enumerate(CLASSES) for _ in range(COUNTS[name])]
    mail = [documents[shard::num_shards] for shard in range(num_shards)]
    return LabelledStore({"mail": mail, "web": [[0, 0, 2]] * num_shards}, **more)


def settings_of(**changes: Any) -> DataSettings:
    table = {"max_document_length": 24, "sequence_length": 48, "packing_buffer": 4, "mix": {"mail": 3.0, "web": 1.0}}
    return DataSettings(**(table | {"class_exponent": 0.0} | changes)).with_classes(CLASSES, False, {})


def given_by(order: Order, steps: int) -> list[list[Chunk]]:
    """The chunks of each lane, with those that are planned and not given yet."""
    lanes: list[list[Chunk]] = [[] for _ in order.lanes]
    for _ in range(steps):
        packs = order.next_step()
        for number, pack in enumerate(packs):
            lanes[number * len(lanes) // len(packs)] += pack
    for lane, at in order.position().lanes.items():
        lanes[lane] += [chunk for pack in at.buffer.packs[at.packs_given :] for chunk in pack]
        lanes[lane] += [Chunk(*row) for row in at.buffer.following.carried.tolist()]
    return lanes


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("changes", "alpha"), [({}, 0.0), ({"class_exponent": 0.3}, 0.3), ({"packing_buffer": 1}, 0.0)]
)
def test_a_class_gives_its_documents_once_in_a_pass_and_has_its_share(lanes: int, changes: Any, alpha: float) -> None:
    store = store_of(lanes * 2)
    order = Order(store, settings_of(lanes=lanes, **changes), 2, seed=5)
    for chunks in given_by(order, 60):
        passes: dict[tuple[int, int], dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for chunk in chunks:
            number = store.classes[store.sources[chunk.source]][chunk.shard][chunk.row]
            passes[chunk.source, number][chunk.shard, chunk.row].append(chunk.epoch)
        for (source, number), documents in passes.items():
            held = store.label_counts(store.sources[source])[CLASSES[number]]
            assert lanes > 1 or len(documents) == held
            assert all(sorted(times) == list(range(len(times))) for times in documents.values())
            assert len({len(times) for times in documents.values()}) <= 2
            assert max(map(len, documents.values())) - min(map(len, documents.values())) <= 1
        mail = {number: sum(map(len, of.values())) for (source, number), of in passes.items() if source == 0}
        weights = np.array([COUNTS[name] for name in CLASSES]) ** alpha
        expected = weights / weights.sum() * sum(mail.values())
        assert all(-3 <= mail[number] - expected[number] <= 1 for number in mail), (mail, expected)


@pytest.mark.parametrize(
    ("shares", "lengths"),
    [((0.5, 0.3, 0.2), [9, 3, 17, 8, 12, 2, 20]), ((0.9, 0.02, 0.08), [2, 2, 2, 20, 20, 3, 2])],
)
def test_the_next_document_is_of_the_class_furthest_behind_its_share(
    shares: tuple[float, float, float], lengths: list[int]
) -> None:
    """Against a plain loop, however far each call looks ahead."""
    store = LabelledStore({"mail": [[0, 0, 0, 1, 2, 0, 0]]}, lengths={"mail": [lengths]})
    settings = settings_of(mix={}, class_exponent=1.0, class_mix=dict(zip(CLASSES, shares, strict=True)))
    stream = resampled(store, "mail", read_shards(store, "mail"), settings, 1, Examples(settings, 1))
    found, cursor = [], stream.beginning()
    for positions in (1, 40, 7, 300, 1, 90):
        table, places = stream.ahead(cursor, positions)
        count = int(np.searchsorted(np.cumsum(table[:, 4]), positions)) + 1
        found += [int(store.classes["mail"][0][row]) for row in table[:count, 2].tolist()]
        cursor = stream.advance(cursor, table[:count], places)
    given, expected = [0, 0, 0], []
    for _ in found:
        behind = min(range(3), key=lambda number: (given[number] / shares[number], number))
        expected.append(behind)
        given[behind] += 1
    assert found == expected
    assert cursor.documents == tuple(given)
    assert cursor.positions == sum(one.positions for one in cursor.classes) > 400


def test_restored_at_any_step_and_planned_by_lane_the_packs_are_the_same() -> None:
    store, settings = store_of(4), settings_of(lanes=2, curriculum=[{"from_tokens": 300, "mix": {"web": 1.0}}])
    order = Order(store, settings, 2, seed=5)
    by_lane = [Order(store, settings, 2, seed=5, lanes=[lane]) for lane in range(2)]
    for _ in range(30):
        state = json.loads(json.dumps(order.state()))
        again = Order(store, settings, 2, seed=5)
        again.restore(state)
        packs = order.next_step()
        assert again.next_step() == packs == [pack for one in by_lane for pack in one.next_step()]


def test_a_limit_of_epochs_holds_for_every_class_and_all_is_given() -> None:
    store = store_of(1)
    order = Order(store, settings_of(mix={"mail": 1.0}, max_epochs={"mail": 2}), 1, seed=5)
    given: Counter[tuple[int, int]] = Counter()
    order.require(23)
    for _ in range(23):
        given.update((chunk.row, chunk.epoch) for pack in order.next_step() for chunk in pack)
    with pytest.raises(UserError, match=r"data.max_epochs: lane 0 has no packed sequence left"):
        order.next_step()
    assert given == Counter({(row, epoch): 1 for row in range(54) for epoch in range(2)})


def test_shares_are_powers_of_counts_or_those_of_the_table() -> None:
    assert class_shares(settings_of(), [40, 0, 10], "mail") == {0: 0.5, 2: 0.5}
    found = class_shares(settings_of(class_exponent=0.3), [40, 3, 11], "mail")
    powers = np.array([40, 3, 11]) ** 0.3
    assert list(found.values()) == pytest.approx((powers / powers.sum()).tolist(), rel=1e-12)
    mix = {"common": 1.0, "rare": 3.0}
    assert class_shares(settings_of(class_exponent=1.0, class_mix=mix), [9, 1, 0], "mail") == {0: 0.25, 1: 0.75}
    assert counts_by_class(store_of(is_counted=False), "mail", CLASSES) == [40, 3, 11]


def test_an_exponent_of_the_mix_is_mt5s_temperature_sampling() -> None:
    """p ~ |D|^alpha (Xue et al. 2021, section 3.2)."""
    sizes = [9_000_000, 40_000, 600]
    for alpha in (0.0, 0.3, 0.7):
        (stage,) = stages(settings_of(mix={}, mix_exponent=alpha), ["en", "sw", "yo"], sizes)
        expected = np.array(sizes, float) ** alpha
        assert stage.shares == pytest.approx((expected / expected.sum()).tolist(), rel=1e-12)
    (stage,) = stages(settings_of(mix={}), ["en", "sw"], [3, 1])
    assert stage.shares == (0.75, 0.25)


def test_settings_of_shares_belong_to_the_order_only_where_they_are_set() -> None:
    store = store_of(1)
    plain, other = (Order(store, settings_of(class_exponent=value), 1, seed=5).plan.identity for value in (1.0, 0.5))
    assert {**plain, "data.class_exponent": 0.5} == other
    with pytest.raises(UserError, match=r"data.class_exponent: None when saved, 0.5 now"):
        Order(store, settings_of(class_exponent=0.5), 1, seed=5).restore(
            Order(store, settings_of(class_exponent=1.0), 1, seed=5).state()
        )


@pytest.mark.parametrize(
    ("store", "changes", "message"),
    [
        (store_of(4), {"lanes": 4, "mix": {"mail": 1.0}}, r"0\.0 with data\.lanes = 4: a lane holds no document of"),
        (store_of(1), {"class_exponent": 1.0, "class_mix": {"common": 1.0}}, r"lacks class 'rare', of which source "),
        (
            store_of(1),
            {"class_exponent": 1.0, "class_mix": dict.fromkeys(CLASSES, 1.0), "mix": {"web": 1.0}},
            r"data\.class_mix\.rare = 1\.0: source 'web' has no training document of this class; .* use class_exponent",
        ),
        (LabelledStore({"mail": [[0, 0, 1, 7]]}), {"mix": {}}, r"the label 'label 7' of document 3 in shard 0 "),
    ],
)  # fmt: skip
def test_classes_that_cannot_have_their_share_are_refused(store: Any, changes: Any, message: str) -> None:
    if "7" in message and "label 7" in message:
        store.label_counts = lambda source: {"common": 2, "rare": 1}
    with pytest.raises(UserError, match=message):
        Order(store, settings_of(**changes), settings_of(**changes).lanes, seed=5)


def test_a_source_without_labels_is_refused() -> None:
    store = store_of(1)
    store.pair_sources = ["web"]
    with pytest.raises(UserError, match=r"data: source 'mail' has no labels, so that its classes have no shares"):
        Order(store, settings_of(), 1, seed=5)
