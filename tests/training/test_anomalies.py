"""Faults of a device, and spikes, on real ranks: found, named, and gone after the next start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bigmodel.checks.audit import audit
from bigmodel.inspect.report import table
from bigmodel.launcher.record import launches
from bigmodel.launcher.watch import status
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json_lines
from tests.support.faulty import BROKEN, FLIPPED, LOUD, POISONED, Fault, train
from tests.support.ranks import command, finish, start_ranks
from tests.support.tiny_run import write_run

ATTENTION = "blocks.1.attention.output"
FEED_FORWARD = "blocks.1.feed_forward"


def on_ranks(world_size: int, run_file: Path, fault: Fault | None, *changes: str) -> tuple[list[int], list[str]]:
    """Exit codes, and what the ranks printed."""
    output = run_file.with_suffix(".printed")
    arguments = ["train", str(run_file), *(word for change in changes for word in ("--set", change))]
    given = (train, fault, arguments, output) if fault else (command, arguments, output)
    codes = finish(start_ranks(world_size, *given))
    return codes, [Path(f"{output}.{rank}").read_text() for rank in range(world_size)]


def learned(run: Path) -> list[tuple[Any, ...]]:
    """What must not differ from the undisturbed run, step by step."""
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    return [(line["step"], line["loss"], line["gradient_norm"], line["skipped"]) for line in lines]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(run / "events.jsonl") if event["event"] == kind]


def counted(run: Path) -> dict[str, float]:
    """Spikes by signal, as the metrics endpoint counts them."""
    accounting = RunAccounting()
    for line in read_json_lines(run / "metrics.jsonl"):
        accounting.add(line)
    return {labels[0]: count for labels, count in accounting.samples()["spikes"]}


def noted(run: Path) -> dict[str, float]:
    """Spikes by signal in events.jsonl."""
    return {signal: sum(signal in event for event in events(run, "spike")) for signal in ("loss", "gradient_norm")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert on_ranks(2, write_run(folder, shards), None)[0] == [0, 0]
    return learned(folder / "run")


def test_a_flipped_bit_of_one_replica_is_found_and_the_run_goes_back_to_agreed_weights(
    tmp_path: Path, shards: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The lowest bit of one weight among 34,752, at ZeRO 0; found before the next save."""
    run_file, run = write_run(tmp_path, shards, stage=0), tmp_path / "run"
    codes, printed = on_ranks(3, run_file, Fault(FLIPPED, step=6, module=ATTENTION))
    assert codes == [5, 5, 5]
    assert all("step 8: rank 1 on " in text and f"holds other bits than the other ranks in {ATTENTION}" in text
               for text in printed), printed  # fmt: skip
    (found,) = events(run, "bad_device")
    assert (found["fault"], found["step"], found["agreed_step"], found["ranks"]) == ("replica", 8, 4, [1])
    assert len(found["hosts"]) == 1
    told = status(run)["last_end"]
    assert told["cause"] == "bad_device"
    assert told["detail"].startswith("rank 1 on ")
    assert "bad device" in table(run)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000004"]
    codes, printed = on_ranks(3, run_file, None)
    assert codes == [0, 0, 0]
    assert "resuming at step 4" in printed[0]
    assert [loss for _, loss, *_ in learned(run)] == pytest.approx([loss for _, loss, *_ in undisturbed], rel=1e-5)


def test_a_flipped_bit_of_gathered_weights_is_found_in_its_step_and_named_also_among_two(
    tmp_path: Path, shards: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """At ZeRO 1 the weights are gathered from their masters again, which shows whose copy was wrong."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    codes, _ = on_ranks(2, run_file, Fault(FLIPPED, step=3, module=ATTENTION), "training.replica_check_every_steps=1")
    assert codes == [5, 5]
    (found,) = events(run, "bad_device")
    assert (found["step"], found["ranks"], found["tensors"]) == (3, [1], [f"{ATTENTION}.weight"])
    assert on_ranks(2, run_file, None)[0] == [0, 0]
    assert learned(run) == undisturbed


def test_a_value_that_does_not_come_back_is_a_devices_and_its_step_is_not_lost(
    tmp_path: Path, shards: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """Once, in a backward pass, so that every rank's gradient is spoilt and no loss is."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    codes, printed = on_ranks(2, run_file, Fault(BROKEN, step=7, backward=True))
    assert codes == [5, 5]
    assert "step 7: a loss or gradient that is not finite, made by rank 1 on " in printed[0]
    (found,) = events(run, "bad_device")
    assert (found["fault"], found["step"], found["ranks"], len(found["hosts"])) == ("nonfinite", 7, [1], 1)
    assert not events(run, "step_skipped")
    assert [launch.cause for launch in launches(read_json_lines(run / "events.jsonl"))] == ["bad_device"]
    assert on_ranks(2, run_file, None)[0] == [0, 0]
    assert learned(run) == undisturbed


def test_a_value_that_another_rank_computes_without_is_a_devices_at_zero_3_too(tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards, "bf16", 3), tmp_path / "run"
    assert on_ranks(2, run_file, Fault(BROKEN, rank=0, step=2, times=1000))[0] == [5, 5]
    (found,) = events(run, "bad_device")
    assert (found["ranks"], found["layer"]) == ([0], FEED_FORWARD)
    assert "which another rank computes without" in found["detail"]


def test_a_value_that_another_rank_repeats_is_of_the_data_and_its_step_is_skipped(tmp_path: Path, shards: Path) -> None:
    """One micro-batch in five, which any rank spoils; the examination changes nothing: also computed on one rank."""
    for size, name in ((2, "two"), (1, "one")):
        assert on_ranks(size, write_run(tmp_path, shards, stage=2, name=name), Fault(POISONED))[0] == [0] * size
    skipped = events(tmp_path / "two", "step_skipped")
    assert [event["step"] for event in skipped] == [event["step"] for event in events(tmp_path / "one", "step_skipped")]
    assert 2 <= len(skipped) <= 8
    assert all(
        event["detail"].startswith(f"made in {FEED_FORWARD} of rank ") and "data or settings" in event["detail"]
        for event in skipped
    )
    assert "repeated by the same rank" in events(tmp_path / "one", "step_skipped")[0]["detail"]
    assert all(finding.holds for finding in audit(tmp_path / "two"))
    losses = [[loss for _, loss, norm, bad in learned(tmp_path / name) if not bad] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SPIKES = "training.spikes={{policy='{}', window=8, sigmas=40{}}}"


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of two ranks that spikes in step 10 and goes back from there; its folder."""
    folder = tmp_path_factory.mktemp("spiked")
    codes, printed = on_ranks(2, write_run(folder, shards), Fault(LOUD, step=10), *REWOUND)
    assert codes == [4, 4]
    assert "a spike in step 10 (gradient norm " in printed[1]
    assert "back to step 4, steps 7 to 10 are left out; the same command goes on from there" in printed[1]
    return folder


REWOUND = ("training.steps=12", SPIKES.format("rewind", ", left_out_steps=4"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rewind_leaves_out_the_same_steps_on_any_number_of_ranks(
    spiked: Path, tmp_path: Path, world_size: int
) -> None:
    """Checkpoint 8 was trained on them: it is made anew."""
    shutil.copytree(spiked / "run", tmp_path / "run")
    run_file = tmp_path / "run.toml"
    text = (spiked / "run.toml").read_text().replace(str(spiked / "run"), str(tmp_path / "run"))
    run_file.write_text(text)
    shutil.copy(spiked / "run-deepspeed.json", tmp_path)
    run = tmp_path / "run"
    then = (run / "checkpoints" / "step-00000008" / "manifest.json").read_bytes()
    codes, printed = on_ranks(world_size, run_file, Fault(LOUD, step=10), *REWOUND)
    assert codes == [0] * world_size
    assert "resuming at step 4" in printed[0]
    assert [step for step, _, _, skipped in learned(run) if skipped] == [7, 8, 9, 10]
    assert [event["step"] for event in events(run, "step_skipped")] == [7, 8, 9, 10]
    assert (run / "checkpoints" / "step-00000008" / "manifest.json").read_bytes() != then
    state = json.loads((run / "checkpoints" / "step-00000012" / "state.json").read_text())["state"]
    assert state["left_out"] == [{"at": 10, "to": 4, "first": 7}]
    assert [finding for finding in audit(run) if not finding.holds] == []
    assert status(run)["restarts"][0]["after"] == "rewind"
    assert counted(run) == noted(run) == {"loss": 0, "gradient_norm": 1}


def test_a_skipped_spike_is_declared_with_its_documents(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    skip = ("training.steps=12", SPIKES.format("skip", ""))
    assert on_ranks(2, run_file, Fault(LOUD, step=10), *skip)[0] == [0, 0]
    assert [step for step, _, _, skipped in learned(tmp_path / "run") if skipped] == [10]
    (event,) = events(tmp_path / "run", "step_skipped")
    assert event["reason"] == "spike"
    assert event["documents"]
    (spike,) = events(tmp_path / "run", "spike")
    assert spike["gradient_norm"] > 100
    assert counted(tmp_path / "run") == noted(tmp_path / "run") == {"loss": 0, "gradient_norm": 1}
    assert all(finding.holds for finding in audit(tmp_path / "run"))
