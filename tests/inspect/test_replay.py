"""`bigmodel replay`: a step of a real run computed again, from the run directory and the data alone."""

import hashlib
import json
import math
import os
import random
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.replay_record import read_record
from bigmodel.launcher.network import free_port
from bigmodel.run_directory import record_event
from tests.support.ranks import run_ranks
from tests.support.tiny_corpus import text
from tests.support.tiny_run import write_run
from tests.system.test_classification_run import document, prepare_labelled, write_classification

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+/"
REPEATED = " ".join(["qzxj"] * 60)
NOISE = " ".join("".join(random.Random(word).choices(LETTERS, k=6)) for word in range(25))
CHANGES = ["checkpoint.every_steps=5", "checkpoint.keep=9"]


def train(run_file: Path, *changes: str) -> None:
    from bigmodel.training.loop import train as run

    run(load_settings(run_file, [*CHANGES, *changes]))


def go_on(run_file: Path, *changes: str) -> None:
    """With a new plan."""
    from bigmodel.training.loop import train as run

    run(load_settings(run_file, [*CHANGES, *changes]), new_plan=True)


def replay(directory: Path, step: int, out: Path, given: int | None = None) -> None:
    from bigmodel.inspect.replay import replay as run
    from bigmodel.inspect.replay_text import Outputs

    run(directory, step, given, Outputs(out, out / "bad.jsonl", 1))


def replay_unread(directory: Path, step: int, out: Path) -> None:
    """With nobody who reads what is printed."""
    gone = open("/dev/full", "w")  # noqa: SIM115 - closing it fails too
    with redirect_stdout(gone), pytest.raises(OSError, match="No space left"):
        replay(directory, step, out)


def refusals(cases: list[tuple[Path, int, int | None]], ports: list[int], out: Path) -> None:
    """Write what is said of each case."""
    said = []
    for number, ((directory, step, given), port) in enumerate(zip(cases, ports, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        try:
            replay(directory, step, out.parent / f"refused-{number}", given)
            said.append("")
        except UserError as error:
            said.append(str(error))
    out.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 documents of two sources, and two of garbage in the second."""
    folder = tmp_path_factory.mktemp("garbage")
    crawl = [*map(text, range(60, 75)), REPEATED, *map(text, range(75, 90)), NOISE, *map(text, range(90, 100))]
    sources = []
    for name, texts in {"web": list(map(text, range(60))), "crawl": crawl}.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        sources.append({"name": name, "files": [str(file)]})
    section = {"validation_share": 0.05, "vocabulary": 300, "workers": 1, "shard_tokens": 1000, "sources": sources}
    settings = Settings.model_validate({"prepare": section, "data": {"directory": str(folder / "data")}})
    return prepare(settings, quiet())


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file: 30 steps on 2 ranks, begun again after step 20, without an update in step 27."""
    folder = tmp_path_factory.mktemp("run")
    run_file = write_run(folder, data)
    run_ranks(2, train, run_file, "training.steps=20")
    (folder / "run" / "left_out.json").write_text(json.dumps([{"at": 27, "to": 20, "first": 27}]))
    run_ranks(2, train, run_file, "training.steps=30")
    return run_file


def steps_with(data: Path, run_file: Path, begins: str) -> list[int]:
    """Training steps from 12 on, when the model knows its usual text, with the document whose text begins so."""
    store, order = ShardStore(data, "train"), Order.of_run(ShardStore(data, "train"), load_settings(run_file))

    def is_it(chunk: Any) -> bool:
        document: Any = store.document(store.sources[chunk.source], chunk.shard, chunk.row)
        return store.decode(document).startswith(begins)

    packs = {number: order.next_step() for number in range(1, 31)}
    return [number for number, step in packs.items() if number >= 12 and any(is_it(one) for p in step for one in p)]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "replay.json").read_text())
    return found


def test_steps_are_repeated_to_the_last_bit_and_planted_garbage_is_first_in_the_list(
    data: Path, run: Path, tmp_path: Path
) -> None:
    directory = run.with_suffix("")
    before = hashes(directory)
    steps = [steps_with(data, run, REPEATED[:20])[-1], steps_with(data, run, NOISE[:20])[-1]]
    assert min(steps) > 27, "steps whose checkpoint, of step 25, is before the step without an update"
    for step in steps:
        run_ranks(2, replay, directory, step, tmp_path / str(step))
    for step, garbage in zip(steps, (REPEATED, NOISE), strict=True):
        found, first = found_in(tmp_path / str(step)), found_in(tmp_path / str(step))["documents"][0]
        assert found["may_differ"] == []
        assert all(one["equal"] for one in found["recorded"].values()), found["recorded"]
        assert first["text"] in garbage, found["documents"]
        assert first["source"] == found["sources"][0]["source"] == "crawl"
        (bad,) = [json.loads(line) for line in (tmp_path / str(step) / "bad.jsonl").read_text().splitlines()]
        assert {name: bad[name] for name in ("source", "shard", "row")} == {
            name: first[name] for name in ("source", "shard", "row")
        }
    assert (tmp_path / str(steps[0]) / "replay.png").stat().st_size > 10_000
    assert hashes(directory) == before


def test_the_parts_add_up_to_the_step(data: Path, run: Path, tmp_path: Path) -> None:
    """On one rank, which the run had not: the bound holds. Files are written before the table is printed."""
    run_ranks(1, replay_unread, run.with_suffix(""), 18, tmp_path)
    found = found_in(tmp_path)
    assert found["may_differ"] == ["2 ranks then, 1 now"]
    assert all(one["difference"] <= one["bound"] < 1e-4 for one in found["recorded"].values()), found["recorded"]
    labels, nats = zip(*((one["labels"], one["labels"] * one["loss"]) for one in found["documents"]), strict=True)
    assert sum(nats) / sum(labels) == pytest.approx(found["loss"], rel=1e-5)
    norms = [one["gradient"] for one in found["layers"] if one["gradient"] is not None]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(found["gradient_norm"], rel=1e-5)
    gradients = [one["gradient"] for one in found["documents"]]
    assert gradients == sorted(gradients, reverse=True)
    assert max(gradients) < found["gradient_norm"] < sum(gradients)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1
    assert {one["layer"] for one in found["layers"]} == {"blocks.0", "blocks.1", "embedding", "head", "norm"}


def test_a_start_that_was_killed_before_its_event_is_not_taken_for_another(run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run.with_suffix(""), directory)
    starts = directory / "starts"
    shutil.move(starts / "0002.json", starts / "0003.json")
    first, last = (json.loads((starts / f"{name}.json").read_text()) for name in ("0001", "0003"))
    killed = {**first, "time": last["time"] - 1, "settings": {**first["settings"], "run": {"seed": 77}}}
    (starts / "0002.json").write_text(json.dumps(killed))
    assert [one.settings.training.steps for one in read_record(directory).starts] == [20, 30]
    assert {one.settings.run.seed for one in read_record(directory).starts} == {3}


def test_steps_before_a_rewind_are_repeated_as_they_were_until_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    """Updates of steps that the next start will leave out were applied in this one."""
    run_file = write_run(tmp_path, data)
    run_ranks(1, train, run_file, "training.steps=9")
    rewind = {"to": 5, "first": 7}
    (tmp_path / "run" / "left_out.json").write_text(json.dumps([{"at": 10, **rewind}]))
    record_event(tmp_path / "run", "rewind", step=10, last=10, **rewind)
    record = read_record(tmp_path / "run")
    assert record.last == 10
    assert [step for step in range(1, 11) if record.is_left_out(step)] == [10]
    run_ranks(1, replay, tmp_path / "run", 9, tmp_path / "out", 5)
    assert all(one["equal"] for one in found_in(tmp_path / "out")["recorded"].values())
    record_event(tmp_path / "run", "start", step=5, world_size=1)
    assert [step for step in range(1, 11) if read_record(tmp_path / "run").is_left_out(step)] == [7, 8, 9, 10]


def end_in_divergence(run_file: Path) -> None:
    with pytest.raises(UserError, match="loss scale"):
        train(run_file, "training.steps=30", "optimizer.learning_rate=1e4", "checkpoint.every_steps=1")


def test_the_last_step_of_a_run_that_diverged_in_fp16_is_repeated(data: Path, tmp_path: Path) -> None:
    """Its loss scale is the smallest after it."""
    run_file = write_run(tmp_path, data, "fp16")
    deepspeed = tmp_path / "run-deepspeed.json"
    scale = {"initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}
    deepspeed.write_text(json.dumps(json.loads(deepspeed.read_text()) | {"fp16": {"enabled": True} | scale}))
    run_ranks(1, end_in_divergence, run_file)
    last = read_record(tmp_path / "run").last
    run_ranks(1, replay, tmp_path / "run", last, tmp_path / "out", 0)
    found = found_in(tmp_path / "out")
    assert all(one["equal"] for one in found["recorded"].values()), found["recorded"]
    assert not math.isfinite(float(found["gradient_norm"]))
    assert len(found["sources"]) == 2


def test_other_zero_stages_are_repeated_to_the_last_bit_with_the_same_gradients_of_documents(
    data: Path, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path, data, "fp32", stage, f"zero{stage}") for stage in (0, 3)]
    for run_file in runs:
        run_ranks(2, train, run_file, "training.steps=12")
        run_ranks(2, replay, run_file.with_suffix(""), 12, run_file.with_suffix(".out"))
    gradients = []
    for run_file in runs:
        found = found_in(run_file.with_suffix(".out"))
        assert all(one["equal"] for one in found["recorded"].values()), (run_file, found["recorded"])
        gradients.append([one["gradient"] for one in found["documents"]])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_steps_whose_scores_were_clipped_are_repeated_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    """The limit is another one after step 8, between the checkpoint and the step."""
    run_file = write_run(tmp_path, data)
    run_ranks(1, train, run_file, "training.steps=8", "model.qk_norm=false", "optimizer.qk_clip=0.05")
    run_ranks(1, train, run_file, "training.steps=12", "model.qk_norm=false", "optimizer.qk_clip=0.02")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clipped = {line["step"]: line["clipped_heads"] for line in lines if line.get("clipped_heads")}
    assert set(clipped) >= {6, 7, 8, 9}
    run_ranks(1, replay, tmp_path / "run", 10, tmp_path / "out", 5)
    assert all(one["equal"] for one in found_in(tmp_path / "out")["recorded"].values())


@pytest.mark.parametrize(("balance", "strength"), [("loss", "balance_weight"), ("bias", "bias_rate")])
def test_loads_and_biases_of_experts_move_in_steps_that_are_trained_again(
    data: Path, tmp_path: Path, balance: str, strength: str
) -> None:
    run_file = write_run(tmp_path, data, balance=balance)
    run_ranks(1, train, run_file, "training.steps=8", "checkpoint.every_steps=4", f"model.experts.{strength}=0.5")
    run_ranks(1, replay, tmp_path / "run", 7, tmp_path / "out", 4)
    assert all(one["equal"] for one in found_in(tmp_path / "out")["recorded"].values())


def test_the_first_steps_of_a_new_plan_are_repeated_also_before_its_first_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    """The checkpoint that they go on from knows only the plan before."""
    run_file, bad = write_run(tmp_path, data), tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"source": "web", "shard": 0, "row": 1}) + "\n")
    run_ranks(1, train, run_file, "training.steps=5")
    run_ranks(1, go_on, run_file, "training.steps=8", f"data.exclude={bad}")
    run_ranks(1, replay, run_file.with_suffix(""), 8, tmp_path / "stored")
    shutil.rmtree(run_file.with_suffix("") / "checkpoints" / "step-00000008")
    run_ranks(1, replay, run_file.with_suffix(""), 7, tmp_path / "made")
    for out in ("stored", "made"):
        found = found_in(tmp_path / out)
        assert (found["checkpoint"], found["may_differ"]) == (5, [])
        assert all(one["equal"] for one in found["recorded"].values()), found["recorded"]
    shutil.rmtree(run_file.with_suffix("") / "checkpoints" / "step-00000005")
    run_ranks(1, refusals, [(run_file.with_suffix(""), 7, None)], [free_port()], tmp_path / "said.json")
    (said,) = json.loads((tmp_path / "said.json").read_text())
    assert said.endswith("; put back one from step 5 on, after which a new plan began")


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    from bigmodel.inspect.replay_text import Outputs

    file = tmp_path / "a.jsonl"
    file.write_text("")
    for outputs, message in {
        Outputs(None, None, 3): "--count 3: has an effect only with --exclude",
        Outputs(None, file, 1): "exists already",
        Outputs(file, None, 1): "is a file; give a folder",
        Outputs(file / "out", None, 1): "--out .*/out: cannot be written: Not a directory; choose another place",
        Outputs(None, file / "bad.jsonl", 1): "--exclude .*: cannot be written: File exists; choose another place",
    }.items():
        with pytest.raises(UserError, match=message):
            outputs.begin()


def test_of_weighted_classes_texts_and_classes_are_shown_and_losses_add_up_to_the_step(tmp_path: Path) -> None:
    labelled = prepare_labelled(tmp_path / "mail", [document(number) for number in range(60)])
    run_file = write_classification(tmp_path, labelled, 1, "run", "weights = { odd = 3.0 }")
    run_ranks(1, train, run_file, "training.steps=2", "schedule.kind=constant")
    run_ranks(1, replay, run_file.with_suffix(""), 2, tmp_path / "out", 0)
    found = found_in(tmp_path / "out")
    assert all(one["equal"] for one in found["recorded"].values()), found["recorded"]
    assert found["sources"][0]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert sum(one["above_mean"] for one in found["documents"]) == pytest.approx(0, abs=1e-4)
    texts = [one["text"] for one in found["documents"]]
    assert {text.partition(" -> ")[2] for text in texts} == {"even", "odd"}
    assert all(text.startswith("time" if text.endswith("even") else "state") for text in texts), texts


def test_a_step_that_cannot_be_repeated_is_refused_with_what_is_still_possible(
    data: Path, run: Path, tmp_path: Path
) -> None:
    directory = run.with_suffix("")
    other, gone = tmp_path / "other", tmp_path / "gone"
    shutil.copytree(directory, gone)
    shutil.copytree(data, tmp_path / "without")
    for shard in (tmp_path / "without").rglob("*.mds"):
        shard.unlink()
    for start in (gone / "starts").iterdir():
        start.write_text(start.read_text().replace(str(data), str(tmp_path / "without")))
    shutil.copytree(directory, other)
    manifest = json.loads((other / "data_manifest.json").read_text())
    (other / "data_manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    cases = [(directory, 31, None), (directory, 3, None), (directory, 8, 7), (directory, 8, 10), (tmp_path, 1, None)]
    cases += [(gone, 9, None), (other, 9, None), (directory, 9, None)]
    (tmp_path / f"refused-{len(cases) - 1}").write_text("")
    run_ranks(1, refusals, cases, [free_port() for _ in cases], tmp_path / "said.json")
    beyond, before, unknown, late, no_run, no_shards, tokenizer, is_file = json.loads(
        (tmp_path / "said.json").read_text()
    )
    assert "has steps 1 to 30" in beyond
    assert "steps 6 to 30 can be computed again" in beyond
    assert "no checkpoint before it" in before
    assert "give --checkpoint 0" in before
    assert "no usable one of that step, but 5, 10, 15, 20, 25, 30" in unknown
    assert "is not before --step 8" in late
    assert "no run directory" in no_run
    assert f"`bigmodel seen` lists the documents of step 9 of {gone}" in no_shards
    assert "another tokenizer than the run's" in tokenizer
    assert "is a file; give a folder" in is_file
