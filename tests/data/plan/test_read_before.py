"""Over all segments of a run every position is given once in each epoch of its source, whatever the changes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.checks import segment_order
from bigmodel.checks.segment_order import Given, check_segments
from bigmodel.config.settings import UserError
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan import shuffle
from bigmodel.data.plan.exclusion import Excluded
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.read_before import pack_shards, unpack_shards
from bigmodel.data.plan.segments import order_of_segment, repeats, resume_order
from bigmodel.data.plan.shuffle import lengths_in
from tests.data.plan.test_segments import run, saved
from tests.support.memory_store import MemoryStore, given_positions

SOURCES = {
    "a": [[41, 9, 2, 5, 14], [30, 3, 1, 8], [7, 7, 22]],
    "b": [[6, 12, 35, 0], [17, 4], [2, 28, 11, 11, 3]],
    "c": [[50, 2, 9], [13, 26, 2]],
}
CHANGE = st.fixed_dictionaries(
    {
        "sources": st.sets(st.sampled_from("abc"), min_size=1),
        "mixed": st.sets(st.sampled_from("abc")),
        "max_document_length": st.sampled_from([4, 9, 13]),
        "lanes": st.sampled_from([1, 2]),
        "packing_buffer": st.integers(1, 4),
        "steps": st.integers(0, 6),
        "excluded": st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.integers(0, 1)), max_size=3),
    }
)
Named = tuple[str, int, int, int, int]  # source, shard, row, position, epoch


def named(store: MemoryStore, packs: Any) -> Counter[Named]:
    return Counter({(store.sources[at[0]], *at[1:]): count for at, count in given_positions(packs).items()})


def settings_of(change: dict[str, Any], folder: Path) -> Any:
    names = ("max_document_length", "lanes", "packing_buffer")
    data = {name: change[name] for name in names}
    if mixed := change["mixed"] & change["sources"]:
        data["mix"] = dict.fromkeys(sorted(mixed), 1.0)
    listed = sorted(entry for entry in change["excluded"] if entry[0] in change["sources"])
    if listed:
        data["exclude"] = folder / f"{hash(tuple(listed))}.jsonl"
        lines = [json.dumps({"source": source, "shard": shard, "row": row}) for source, shard, row in listed]
        data["exclude"].write_text("\n".join(lines) + "\n")
    return run(**data), set(listed)


@pytest.mark.parametrize("block", [2, 5, 65_536])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(changes=st.lists(CHANGE, min_size=2, max_size=4))
def test_each_position_is_given_once_in_an_epoch_over_all_segments(
    block: int, changes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To the end of every source's epoch; a source whose shards are not in the data keeps what was unread of it."""
    folder, given_so_far = tmp_path_factory.mktemp("lists"), Counter[Named]()
    state: dict[str, Any] | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BLOCK_DOCUMENTS", block)
        used: set[str] = set()
        for change in changes:
            used |= change["sources"]  # data stay in the folder; `mix` leaves them out
            change["sources"] = set(used)
            now, excluded = settings_of(change, folder)
            store = MemoryStore({name: SOURCES[name] for name in used})
            order, segments = order_or_same(store, now, state)
            packs = [pack for _ in range(change["steps"]) for pack in order.next_step()]
            assert not {at[:3] for at in named(store, packs)} & excluded
            given_so_far += named(store, packs)
            state = saved(order, segments)
            assert repeats(store, now, state["segments"]) == []
        _, after = resume_order(store, now, state)  # the restart of the last segment
        again, _ = resume_order(store, now, state)
        lanes = [resume_order(store, now, state, lanes=[lane])[0] for lane in range(now.data.lanes)]
        for _ in range(3):
            packs = again.next_step()
            assert [pack for lane in lanes for pack in lane.next_step()] == packs
            given_so_far += named(store, packs)
        for _ in range(60):
            given_so_far += named(store, again.next_step())
    assert set(given_so_far.values()) <= {1}
    ever_excluded = {entry for change in changes for entry in change["excluded"]}
    for source, progress in again.progress().items():
        for shard, lengths in enumerate(SOURCES[source]):
            for row, length in enumerate(lengths):
                if (source, shard, row) not in ever_excluded:
                    epochs = range(progress.epochs_complete)
                    assert all(
                        given_so_far[source, shard, row, position, epoch] == 1
                        for position in range(length - 1)
                        for epoch in epochs
                    ), (source, shard, row)
    for number in range(len(after)):  # each segment is planned again from what the checkpoint says
        order_of_segment_or_changed(store, now, after, number)


def order_or_same(store: MemoryStore, now: Any, state: dict[str, Any] | None) -> Any:
    try:
        return resume_order(store, now, state, new_plan=state is not None)
    except UserError as error:
        if "are those of the checkpoint" not in str(error):
            raise
        return resume_order(store, now, state)


def order_of_segment_or_changed(store: MemoryStore, now: Any, segments: list[dict[str, Any]], number: int) -> None:
    if segments[number]["identity"]["prepared data"] == store.fingerprint:
        assert order_of_segment(store, now.data, segments, number)[1].plan.identity == segments[number]["identity"]


def test_shards_that_are_gone_are_said_with_counts_and_nothing_is_left_out() -> None:
    first = run(packing_buffer=2)
    order, segments = resume_order(MemoryStore(SOURCES), first, None)
    packs = [pack for _ in range(5) for pack in order.next_step()]
    state = saved(order, segments)
    other = MemoryStore({**SOURCES, "b": [SOURCES["b"][0], [17, 5], SOURCES["b"][2]]})  # the second was written again
    order, segments = resume_order(other, first, state, new_plan=True)
    told = repeats(other, first, segments)
    assert told[0].startswith("source 'b': 1 of 3 shards are gone or were written again, with 2 documents")
    assert segments[1]["lost"] == ["b"]
    before, after = named(other, packs), Counter[Named]()
    while not all(one.epochs_complete >= 1 for one in order.progress().values()):
        after += named(other, order.next_step())
    for source, shards in {**SOURCES, "b": [SOURCES["b"][0], [17, 5], SOURCES["b"][2]]}.items():
        for shard, lengths in enumerate(shards):
            for row, length in enumerate(lengths):
                for position in range(length - 1):
                    at = source, shard, row, position, 0
                    assert after[at] == 1 or (before[at] and (source, shard) != ("b", 1)), at


def test_a_segment_of_an_earlier_version_goes_on_as_it_was() -> None:
    store, second = MemoryStore(SOURCES), run(max_document_length=9)
    order, segments = resume_order(store, run(), None)
    order.next_step()
    state = saved(order, segments)
    old = Order.of_run(store, second, segment=1, first_step=1)
    packs = [old.next_step() for _ in range(6)]
    kept = [{name: one[name] for name in ("first_step", "identity")} for one in state["segments"]]
    again = Order.of_run(store, second, segment=1, first_step=1)
    again.next_step()
    stored = saved(again, [*kept, {"first_step": 1, "identity": again.plan.identity}])
    resumed, _ = resume_order(store, second, stored)
    assert [resumed.next_step() for _ in range(5)] == packs[1:]
    third, segments = resume_order(store, run(), stored, new_plan=True)  # goes on where the second ended
    assert "end" in segments[1]
    given_here = named(store, [pack for step in packs[:1] for pack in step])
    given_here += named(store, [pack for _ in range(4) for pack in third.next_step()])
    assert set(given_here.values()) == {1}


def test_the_order_check_counts_over_segments_whose_data_grew() -> None:
    few = MemoryStore({name: SOURCES[name] for name in "ab"})
    order, segments = resume_order(few, run(), None)
    for _ in range(4):
        order.next_step()
    state, store = saved(order, segments), MemoryStore(SOURCES)
    order, segments = resume_order(store, run(max_document_length=9), state, new_plan=True)
    given_here = sum(chunk.length for _ in range(40) for pack in order.next_step() for chunk in pack)
    (finding,) = check_segments(run(), store, saved(order, segments))
    complete = sum(progress.epochs_complete for progress in order.progress().values())
    assert complete > 3
    assert finding.claim.startswith("over 2 segments each token")
    assert finding.claim.endswith(f"once in each of {complete} complete epochs")
    assert finding.holds
    assert given_here < int(finding.evidence.split()[0].replace(",", "")) < given_here + 4 * 4 * 16 + 1
    assert not check_segments(run(), few, state)  # one segment


def test_a_token_given_in_two_segments_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given_here, keys = Given(), {"a": ["x", "y"]}
    given_here.add(np.array([[0, 0, 3, 0, 9, 0], [0, 0, 7, 0, 5, 0], [0, 1, 3, 0, 9, 0]]), ["a"], keys)
    given_here.add(np.array([[1, 0, 3, 5, 2, 0], [1, 0, 3, 8, 3, 0], [1, 0, 3, 0, 9, 1]]), ["", "a"], keys)
    assert given_here.repeated() == 2 + 1  # positions 5, 6 and 8 of row 3
    assert given_here.in_epoch("a", 0) == 9 + 5 + 9 + 2 + 3
    monkeypatch.setattr(segment_order, "MOST_CHUNKS", 6)
    given_here.add(np.array([[0, 0, 4, 0, 1, 0]]), ["a"], keys)
    assert (given_here.every, given_here.repeated()) == (2, 3)


def test_sizes_and_digests_of_shards_come_back() -> None:
    store = MemoryStore(SOURCES)
    packed = json.loads(json.dumps(pack_shards(store, ["a"])))
    table = unpack_shards(packed["a"])
    assert (table[:, :3] == store.shard_sizes("a")).all()
    assert (table[:, 3] == store.shard_digests("a")).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no JSON", "line 1: is not"),
        ('{"source": "a", "shard": 0}', "line 1: is not"),
        ('{"source": "a", "shard": 0, "row": "x"}', "whole numbers"),
        ('{"source": "x", "shard": 0, "row": 0}', "source 'x'"),
        ('{"source": "a", "shard": 0, "row": 99}', "no such document"),
    ],
)
def test_a_wrong_list_of_excluded_documents_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "list.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=said):
        resume_order(MemoryStore(SOURCES), run(exclude=tmp_path / "list.jsonl"), None)


def test_further_keys_of_a_list_of_excluded_documents_may_hold_any_text(tmp_path: Path) -> None:
    line = '{"source": "a", "shard": 1, "row": 2, "text": "one\u2028two\u0085three"}'
    (tmp_path / "list.jsonl").write_text(f"{line}\r\n\n", encoding="utf-8", newline="")
    assert Excluded.read(tmp_path / "list.jsonl").rows == {"a": {1: [2]}}


class KindsStore(MemoryStore):
    """Sources of pairs, of supervised documents, or texts whose segmentations differ by pass."""

    def __init__(self, pairs: str = "", supervised: str = "", passes: int = 0) -> None:
        super().__init__(SOURCES)
        self.pair_sources, self.supervised_sources, self.passes = pairs, supervised, passes

    def target_lengths(self, source: str, shard: int) -> np.ndarray:
        return self.lengths(source, shard) // 2 + 2

    def spans(self, source: str, shard: int) -> np.ndarray:
        lengths = self.lengths(source, shard).tolist()
        return np.array([(row, length // 2, length, 1) for row, length in enumerate(lengths) if length > 3])

    def lengths_of_pass(self, source: str, shard: int, number: int, side: str = "") -> np.ndarray:
        lengths = self.target_lengths(source, shard) if side else self.lengths(source, shard)
        return np.where(lengths > 1, lengths + number % self.passes, lengths)


LIMITED = {"max_epochs": dict.fromkeys("abc", 3)}
STAGED = {"mix": {"a": 1.0, "b": 1.0}, "curriculum": [{"from_tokens": 50, "mix": dict.fromkeys("abc", 1.0)}]}


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        ({"pairs": "ab"}, {}),
        ({"supervised": "bc"}, {}),
        ({"passes": 3}, {}),
        ({"passes": 3, "pairs": "a"}, {}),
        ({}, STAGED),
        ({}, LIMITED),
    ],
    ids=["pairs", "supervised", "random segmentation", "segmented pairs", "curriculum", "max_epochs"],
)
def test_each_kind_of_data_and_of_plan_is_given_once_in_an_epoch_over_segments(
    kinds: dict[str, Any], changes: dict[str, Any]
) -> None:
    store, state, given_so_far = KindsStore(**kinds), None, Counter[Named]()
    base = {"max_document_length": 64, "sequence_length": 64, **changes}
    for number, more in enumerate(({}, {"packing_buffer": 2}, {"max_documents": 2})):
        order, segments = resume_order(store, run(**base, **more), state, new_plan=number > 0)
        for _ in range(2):
            given_so_far += named(store, order.next_step())
        state = saved(order, segments)
    order, _ = resume_order(store, run(**base, **more), state)
    while not all(one.epochs_complete >= 2 for one in order.progress().values()):
        given_so_far += named(store, order.next_step())
    assert set(given_so_far.values()) == {1}
    for source, shards in SOURCES.items():
        for epoch in range(2):
            held = sum(int(num_tokens(lengths_in(store, source, at, epoch)).sum()) for at in range(len(shards)))
            assert sum(at[0] == source and at[4] == epoch for at in given_so_far) == held
    if changes is LIMITED:  # over the whole run
        steps: list[Any] = []
        with pytest.raises(UserError, match="every source of its mix has reached its limit"):
            steps.extend(iter(order.next_step, None))
        given_so_far += named(store, [pack for packs in steps for pack in packs])
        assert {at[4] for at in given_so_far} == {0, 1, 2}
        assert set(given_so_far.values()) == {1}
