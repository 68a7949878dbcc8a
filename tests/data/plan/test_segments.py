"""A run goes on in the plan of its checkpoint, or in a new one that is asked for and recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bigmodel.__main__ import train as train_command
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import order_of_segment, resume_order
from bigmodel.data.store.shards import ShardStore
from bigmodel.evaluation.baselines import Bigram, token_pairs
from bigmodel.inspect.show import order_before
from bigmodel.launcher.__main__ import application
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from tests.data.plan.test_classes import CLASSES, store_of
from tests.data.plan.test_order import TWO_SOURCES
from tests.support.memory_store import MemoryStore, given_positions
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run

DATA = {"max_document_length": 13, "sequence_length": 16, "max_documents": 4, "lanes": 2, "packing_buffer": 3}


def run(**data: Any) -> Settings:
    return Settings.model_validate({"data": DATA | data, "training": {"global_batch_size": 4}})


def saved(order, segments) -> dict[str, Any]:
    """The state of a checkpoint, as it comes back from disk."""
    return json.loads(json.dumps({"step": order.step, "cursor": order.state(), "segments": segments}))


def walked(settings: Settings, store: MemoryStore, steps: int, state=None, new_plan: bool = False):
    order, segments = resume_order(store, settings, state, new_plan)
    packs = [pack for _ in range(steps) for pack in order.next_step()]
    return packs, saved(order, segments)


CHANGES = {
    "source added": (run(), MemoryStore({**TWO_SOURCES, "wiki": [[40, 8], [31, 2, 9]]}), "prepared data: '"),
    "context changed": (
        run(max_document_length=9),
        MemoryStore(TWO_SOURCES),
        "data.max_document_length: 13 when saved, 9 now",
    ),
    "mix changed": (run(mix={"web": 1.0}), MemoryStore(TWO_SOURCES), "data.mix: {} when saved"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_going_on_is_refused_and_a_new_plan_is_a_segment(change: str) -> None:
    changed, other, difference = CHANGES[change]
    _, state = walked(run(), MemoryStore(TWO_SOURCES), 9)
    with pytest.raises(UserError) as refused:
        resume_order(other, changed, state)
    assert difference in str(refused.value)
    assert "--new-plan" in str(refused.value)
    packs, second = walked(changed, other, 9, state, new_plan=True)
    assert [segment["first_step"] for segment in second["segments"]] == [0, 9]
    assert second["segments"][0]["identity"] == state["cursor"]["identity"]
    assert second["step"] == second["cursor"]["step"] == 18
    assert set(given_positions(packs).values()) == {1}  # exactly once within the segment
    fresh, _ = walked(changed, other, 9)
    assert packs != fresh  # draws of its own

    # Later checkpoints go on in the newest segment, and it alone.
    more, _ = walked(changed, other, 5, state, new_plan=True)
    assert more == packs[: len(more)]
    whole, end = walked(changed, other, 14, state, new_plan=True)
    rest, resumed = walked(changed, other, 5, second)
    assert packs + rest == whole
    assert resumed == end
    again, resumed = walked(changed, other, 5, second, new_plan=True)  # a restarted job gives the same command
    assert (again, resumed) == (rest, end)


@pytest.mark.parametrize("name", ["mix_exponent", "class_exponent"])
def test_an_exponent_of_zero_is_a_plan_of_its_own_also_in_checkpoints_of_earlier_versions(name: str) -> None:
    store = store_of()
    plain, zero = (
        Settings.model_validate(
            {
                "data": {"max_document_length": 24, "sequence_length": 48, "packing_buffer": 4, name: exponent},
                "model": {"kind": "encoder"},
                "classification": {"classes": CLASSES},
            }
        )
        for exponent in (1.0, 0.0)
    )
    given, state = walked(zero, store, 9)
    other, state_of_plain = walked(plain, store, 9)
    assert given != other
    with pytest.raises(UserError, match=f"data.{name}: 0.0 when saved, None now"):
        walked(plain, store, 1, state)
    with pytest.raises(UserError, match=f"data.{name}: None when saved, 0.0 now"):
        walked(zero, store, 1, state_of_plain)
    _, state = walked(zero, store, 4)
    segment = {"first_step": 0, "identity": without(state["segments"][0]["identity"], f"data.{name}")}
    cursor = state["cursor"] | {"identity": segment["identity"], "fingerprint": "of that"}
    earlier = state | {"cursor": cursor, "segments": [segment]}
    rest, resumed = walked(zero, store, 5, earlier)
    for segments in (state["segments"], earlier["segments"], resumed["segments"]):
        _, order = order_of_segment(store, zero.data, segments, 0)
        assert [pack for _ in range(9) for pack in order.next_step()] == given
    assert given[-len(rest) :] == rest
    assert resumed["segments"][0]["identity"][f"data.{name}"] == 0


def without(identity: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key != name}


def test_a_third_plan_follows_the_second() -> None:
    store = MemoryStore(TWO_SOURCES)
    _, first = walked(run(), store, 3)
    _, second = walked(run(packing_buffer=4), store, 3, first, new_plan=True)
    _, third = walked(run(), store, 3, second, new_plan=True)
    assert [segment["first_step"] for segment in third["segments"]] == [0, 3, 6]
    assert third["cursor"]["identity"]["segment"] == 2


def test_a_new_plan_without_a_change_or_a_checkpoint_is_refused() -> None:
    store = MemoryStore(TWO_SOURCES)
    with pytest.raises(UserError, match="--new-plan: no checkpoint to continue"):
        resume_order(store, run(), None, new_plan=True)
    _, state = walked(run(), store, 2)
    with pytest.raises(UserError, match="--new-plan: data and settings are those of the checkpoint"):
        resume_order(store, run(), state, new_plan=True)


def test_the_command_line_passes_it_on_and_refuses_it_beside_fresh(shards: Path, tmp_path: Path, capsys) -> None:
    run_file = write_run(tmp_path, shards)
    command = [str(run_file), "--ranks", "2", "--dry-run", "--new-plan"]
    with pytest.raises(SystemExit) as left:
        application(["local", *command])
    assert left.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "bigmodel train" in line]  # after the rank map
    assert [line.endswith(f"train {run_file} --new-plan") for line in lines] == [True, True]
    with pytest.raises(UserError, match="--fresh starts from step 0 and --new-plan continues"):
        train_command(run_file, [], fresh=True, new_plan=True)


def train(run_file: Path, overrides: list[str], new_plan: bool) -> int:
    from bigmodel.training.loop import train as run_

    return run_(load_settings(run_file, overrides), new_plan=new_plan)


def bigram_of_both(shards: Path, run_file: Path, overrides: list[str], segments: list[dict[str, Any]]) -> float:
    """Bits per byte of a bigram that has read the trunk's 4 steps and the branch's 4, from plans made here."""
    store, validation = ShardStore(shards, "train"), ShardStore(shards, "validation")
    bigram = Bigram(store.manifest.vocabulary)
    for segment, first_step, changes in ((0, 0, []), (1, 4, overrides)):
        assert segments[segment]["first_step"] == first_step
        _, order = order_of_segment(store, load_settings(run_file, changes).data, segments, segment)
        chunks = [chunk for _ in range(4) for pack in order.next_step() for chunk in pack]
        texts = [(store.document(store.sources[p.source], p.shard, p.row), p) for p in chunks]
        bigram.fit((t[p.start : p.start + p.length], t[p.start + 1 : p.start + p.length + 1]) for t, p in texts)
    return bigram.bits(token_pairs(validation)) / validation.text_bytes


def test_an_earlier_segment_is_replayed_by_what_the_checkpoint_says_of_it() -> None:
    store, first = (
        MemoryStore(TWO_SOURCES),
        run(max_epochs={"web": 30}, curriculum=[{"from_tokens": 90, "mix": {"web": 1}}]),
    )
    given, state = walked(first, store, 9)
    later, state = walked(run(sequence_length=32, packing_buffer=2), store, 5, state, new_plan=True)
    for number, packs, steps in ((0, given, 9), (1, later, 5)):
        data, order = order_of_segment(store, run(max_document_length=4).data, state["segments"], number)
        assert data.sequence_length == (16, 32)[number]
        assert order.first_step == order.step == (0, 9)[number]
        assert [pack for _ in range(steps) for pack in order.next_step()] == packs
    with pytest.raises(UserError, match=r"segment 0: [^\n]*\n.*prepared data: '"):
        order_of_segment(MemoryStore({"web": [[9, 9, 9], [9]]}), first.data, state["segments"], 0)


@pytest.mark.parametrize("step", [0, 3, 8, 9, 11, 13, 14, 16])
def test_a_step_is_shown_in_the_plan_that_the_run_had_then(step: int) -> None:
    store, now = MemoryStore(TWO_SOURCES), run(mix={"web": 1.0})
    first, state = walked(run(), store, 9)
    later, state = walked(now, store, 5, state, new_plan=True)
    more, _ = walked(now, store, 3, state)
    order, data = order_before(store, now, step, state)
    assert order.step == step
    assert order.next_step() == [*first, *later, *more][4 * step : 4 * step + 4]
    assert data.mix == ({} if step < 9 else {"web": 1.0})
    tried = run(mix={"books": 1.0})  # settings that the run never had: as in a new run
    order, data = order_before(store, tried, step, state)
    fresh = Order.of_run(store, tried)
    assert order.next_step() == [fresh.next_step() for _ in range(step + 1)][-1]


def test_a_decay_phase_branches_from_a_copied_checkpoint(shards: Path, tmp_path: Path) -> None:
    """The branch trains on one source from step 4 on, in a directory of its own; the trunk stays as it is."""
    run_file = write_run(tmp_path, shards, name="trunk")
    run_ranks(1, train, run_file, ["training.steps=4"], False)
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(trunk / "checkpoints", branch / "checkpoints")
    overrides = ["training.steps=8", f"run.directory={branch}", "data.mix={news = 1.0}", "evaluation.at_end=true"]
    run_ranks(1, train, run_file, overrides, True)
    newest = checkpoint.newest(branch / "checkpoints")
    assert newest
    assert newest.state["step"] == 8
    assert [segment["first_step"] for segment in newest.state["segments"]] == [0, 4]
    assert set(newest.state["cursor"]["lanes"][0]["sources"]) == {"news"}
    events = [event for event in read_json_lines(branch / "events.jsonl") if event["event"] == "new_plan"]
    assert [(event["segment"], event["first_step"]) for event in events] == [(1, 4)]
    marks = json.loads((branch / "summary.json").read_text())
    assert marks["bigram_bits_per_byte"] == pytest.approx(
        bigram_of_both(shards, run_file, overrides, newest.state["segments"]), rel=1e-12
    )
    kept = checkpoint.newest(trunk / "checkpoints")
    assert kept
    assert kept.state["step"] == 4
    order, _ = resume_order(ShardStore(shards, "train"), load_settings(run_file, overrides), newest.state)
    assert order.step == 8
