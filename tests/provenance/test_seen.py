"""`bigmodel seen` says what a real run was trained on: restarted on two ranks, with a new plan and a left out step."""

import json
import os
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.plan.order import READ_BEFORE, Order
from bigmodel.data.plan.segments import resume_order
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.page.page import open_run
from bigmodel.inspect.page.planned_documents import planned_documents
from bigmodel.inspect.page.tables import worst_steps
from bigmodel.provenance import seen
from bigmodel.provenance.digests import read_digests, verify, write_digests
from bigmodel.provenance.export import export
from bigmodel.provenance.trained import DIGESTS, Run
from bigmodel.run_directory import read_json_lines
from tests.support.ranks import run_ranks
from tests.support.tiny_corpus import prepared, write_sources
from tests.support.tiny_run import write_run

SKIPS = ['training.spikes={policy = "skip", window = 8, sigmas = 0.01}', "optimizer.learning_rate=1.0"]
NEW_PLAN = "data.mix={news = 1.0}"


def train(run_file: Path, overrides: list[str], new_plan: bool) -> int:
    from bigmodel.training.loop import train as run_

    return run_(load_settings(run_file, overrides), new_plan=new_plan)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file. Steps 1 to 4 on one rank, to 8 on two, 9 to 12 in a new plan with step 10 left out. The rate of steps
    5 to 8 is far too high, and what rises is skipped."""
    folder = tmp_path_factory.mktemp("seen")
    run_file = write_run(folder, shards)
    run_ranks(1, train, run_file, ["training.steps=4"], False)
    run_ranks(2, train, run_file, ["training.steps=8", *SKIPS], False)
    (folder / "run" / "left_out.json").write_text(json.dumps([{"at": 10, "to": 8, "first": 10}]))
    run_ranks(1, train, run_file, ["training.steps=12", NEW_PLAN], True)
    return run_file


def planned(run_file: Path, shards: Path) -> list[list[list[Chunk]]]:
    """Step by step from the settings, made here."""
    steps, state, store = [], None, ShardStore(shards, "train")
    for changes, count in (([], 8), ([NEW_PLAN], 4)):
        order, segments = resume_order(store, load_settings(run_file, changes), state, new_plan=state is not None)
        steps += [[list(pack) for pack in order.next_step()] for _ in range(count)]
        state = {"cursor": order.state(), "segments": segments}
    return steps


def lines_of(show, *arguments) -> list[str]:
    said: list[str] = []
    show(*arguments, said.append)
    return said


def test_the_parquet_file_has_each_chunk_of_each_step_as_it_was_computed(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    run, store = Run.open(trained.with_suffix("")), ShardStore(shards, "train")
    out = tmp_path / "order.parquet"
    rows = export(run, out)
    table = pyarrow.parquet.read_table(out).to_pylist()
    expected = [
        (number, pack, store.sources[c.source], c.epoch, f"shard.{c.shard:05}.mds", c.row, c.start, c.start + c.length)
        for number, step in enumerate(planned(trained, shards), start=1)
        for pack, chunks in enumerate(step)
        for c in chunks
    ]
    assert [tuple(row.values())[:8] for row in table] == expected
    assert rows == len(expected)
    steps = [line for line in read_json_lines(run.directory / "metrics.jsonl") if line["kind"] == "step"]
    skipped = {(line["step"], line["skip_reason"]) for line in steps if line["skipped"]}
    assert {reason for _, reason in skipped} == {"spike", "left_out"}
    assert {(row["step"], row["without_update"]) for row in table if row["without_update"]} == skipped
    assert [path.name for path in tmp_path.iterdir()] == ["order.parquet"]
    declared = [event for event in read_json_lines(run.directory / "events.jsonl") if event["event"] == "step_skipped"]
    assert {event["step"] for event in declared} == {step for step, _ in skipped}
    for event in declared:
        mine = [row for row in table if row["step"] == event["step"]]
        assert sorted(map(tuple, event["documents"])) == sorted(
            (r["source"], int(r["file"][6:11]), r["row"], r["first_token"], r["last_token"] - r["first_token"])
            for r in mine
        )


def test_steps_of_a_document_and_documents_of_a_step_agree(trained: Path, shards: Path) -> None:
    run = Run.open(trained.with_suffix(""))
    steps_of = defaultdict(set)
    store = ShardStore(shards, "train")
    for number, step in enumerate(planned(trained, shards), start=1):
        for chunk in (chunk for pack in step for chunk in pack):
            steps_of[store.sources[chunk.source], chunk.shard, chunk.row].add(number)
    place = max(steps_of, key=lambda one: len(steps_of[one]))
    assert len(steps_of[place]) > 1
    found = seen.steps_with(run, store, [place])
    assert {step for part in found for step in part.steps.tolist()} == steps_of[place]
    source, shard, row = place
    said = lines_of(seen.show_document, run, f"{source}:{shard}:{row}")
    assert said[0].startswith(f"{source}:shard.{shard:05}.mds:{row}: ")
    assert {int(line.split()[1].rstrip(",")) for line in said[1:]} == steps_of[place]
    step = min(steps_of[place])
    assert any(f" {source}:shard.{shard:05}.mds:{row} " in line for line in lines_of(seen.show_step, run, step))
    assert "without an update: left out" in lines_of(seen.show_step, run, 10)[0]


def test_the_page_s_worst_steps_have_the_documents_that_were_planned(trained: Path, shards: Path) -> None:
    store, run = ShardStore(shards, "train"), trained.with_suffix("")
    expected = {
        number: [[store.sources[c.source], c.shard, c.row, c.start, c.length] for pack in step for c in pack]
        for number, step in enumerate(planned(trained, shards), start=1)
    }
    assert planned_documents(open_run(run), range(1, 15)) == expected, "steps 13 and 14 are not reached"
    assert planned_documents(open_run(run), range(1, 15), most_chunks=0) == {}
    rows = worst_steps(open_run(run), "")["rows"]
    assert len(rows) >= 5
    for step, *_, documents, _ in rows:
        made = [
            f"{source} {shard}:{row}, tokens {at} to {at + size}"
            for source, shard, row, at, size in expected[int(step)]
        ]
        more = [f"and {len(made) - 8} more: bigmodel seen {run} --step {step}"] if len(made) > 8 else []
        assert documents == "; ".join(made[:8] + more)


def test_a_text_is_told_with_the_steps_that_trained_its_tokens(trained: Path, shards: Path) -> None:
    run, store = Run.open(trained.with_suffix("")), ShardStore(shards, "train")
    assert not seen.show_text(run, "never written", lambda line: None)
    steps_of = defaultdict(set)  # of a chunk
    for number, step in enumerate(planned(trained, shards), start=1):
        for chunk in (chunk for pack in step for chunk in pack):
            steps_of[store.sources[chunk.source], chunk.shard, chunk.row, chunk.start].add(number)
    place = next(chunk[:3] for chunk in steps_of if chunk[3] and (*chunk[:3], 0) in steps_of)
    chunks = [chunk for chunk in steps_of if chunk[:3] == place]
    ids = store.document(*place)
    for wanted, last, held in ((store.decode(ids[:20]), 18, [(*place, 0)]), (store.decode(ids), len(ids) - 2, chunks)):
        said = lines_of(seen.show_text, run, wanted)
        at = said.index(f"{place[0]}:shard.{place[1]:05}.mds:{place[2]}, tokens 1 to {last}")
        told = {int(line.split()[1].rstrip(",")) for line in said[at + 3 :] if line.startswith("  step ")}
        assert told == set.union(*(steps_of[chunk] for chunk in held))


def test_steps_without_an_update_are_not_counted_as_trained(trained: Path) -> None:
    run = Run.open(trained.with_suffix(""))
    step = next(step for step, reason in run.without_update.items() if reason == "spike")
    only = [line.split()[2] for line in lines_of(seen.show_step, run, step)[1:]]
    for name in only:
        head, *lines = lines_of(seen.show_document, run, name)
        applied = {line for line in lines if "without an update" not in line}
        assert any(f"step {step}, " in line and line.endswith(", without an update: spike") for line in lines)
        assert ("not trained on up to step 12" in head) == (not applied), head
        if applied:
            assert f"trained in {len({line.split()[1] for line in applied})} step" in head


def test_a_step_that_a_restart_computed_again_has_the_update_of_its_last_line(trained: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(trained.with_suffix(""), tmp_path / "run")
    before = Run.open(theirs).without_update
    lines = (theirs / "metrics.jsonl").read_text()
    again = {"kind": "step", "step": 3, "skipped": True, "skip_reason": "spike"}  # of a start that was killed
    (theirs / "metrics.jsonl").write_text(json.dumps(again) + "\n" + lines)
    assert Run.open(theirs).without_update == before
    assert 3 not in before


def test_the_data_of_all_segments_is_searched_and_what_is_gone_is_said(shards: Path, tmp_path: Path) -> None:
    one, other = shards, prepared(tmp_path, shard_tokens=1500, sources=write_sources(tmp_path / "text")[:1])
    settings = load_settings(write_run(tmp_path, other))
    segments = []
    for number, (folder, first_step) in enumerate(((one, 0), (other, 8))):
        order = Order.of_run(ShardStore(folder, "train"), settings, segment=number, first_step=first_step)
        segments.append({"first_step": first_step, "identity": order.plan.identity})
    run = Run(tmp_path, settings, segments, reached=12)
    (tmp_path / "starts").mkdir()
    start = tmp_path / "starts" / "0001.json"
    start.write_text(json.dumps({"settings": {"data": {"directory": str(one)}}}))
    said = lines_of(seen.show_text, run, "Document 111:")  # of the letters, which only the first segment has
    assert said[0].startswith("1 occurrence in 1 document, ")
    assert lines_of(seen.show_text, run, "Document 11:")[0].startswith("2 occurrences in 2 documents, ")
    assert lines_of(seen.show_document, run, "letters:1")[0].startswith("letters:shard.00000.mds:1: ")

    theirs = Order.of_run(ShardStore(other, "train"), settings).plan.identity
    write_digests(Run(tmp_path, settings, segments[:1], reached=4))
    problems = verify(Run(tmp_path, settings, [{"first_step": 0, "identity": theirs}], reached=4), tmp_path / DIGESTS)
    assert problems[0].startswith("segment 0 has another plan:\n  prepared data: ")
    assert problems[1] == "steps 1 to 4 differ: the first block with another order"

    start.unlink()
    left = Run(tmp_path, settings, segments, reached=12)
    said = lines_of(seen.show_text, left, "Document 111:")
    assert said[0].startswith("left out: ")
    assert "steps 1 to 8 were planned from other data" in said[0]
    assert said[1].startswith("not in the training data: ")
    with pytest.raises(UserError, match="no source 'letters'"):
        seen.show_document(left, "letters:1", print)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"steps 1 to 8 .* \(.*is not the tokenizer that made these shards"):
        seen.show_text(Run(tmp_path, settings, segments, reached=12), "a", print)


def test_digests_agree_without_shards_and_name_the_first_other_block(
    trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigmodel.provenance.digests.BLOCK_STEPS", 3)  # a run of 1,000 steps takes a minute
    source = Run.open(trained.with_suffix(""))
    blocks = write_digests(source)
    assert [(block.first, block.last) for block in blocks] == [(1, 3), (4, 6), (7, 9), (10, 12)]
    assert blocks[3].without_update == {"10": "left_out"}
    file = source.directory / DIGESTS
    assert verify(source, file) == []

    # The other party: run records without checkpoints, data without shards.
    theirs, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(source.directory, theirs, ignore=shutil.ignore_patterns("checkpoints", DIGESTS))
    shutil.copytree(shards, data, ignore=shutil.ignore_patterns("*.mds"))
    with pytest.raises(UserError, match=r"no checkpoint yet, .* put back .*checkpoints or order_digests.jsonl"):
        Run.open(theirs)
    shutil.copy(file, theirs / DIGESTS)
    shards_gone = Run.open(theirs, [data])
    assert verify(shards_gone, file) == []
    with pytest.raises(UserError, match=r"shard.*; --step, --document, --export"):
        seen.show_text(shards_gone, "woman", print)
    said = lines_of(seen.show_step, shards_gone, 2)
    assert "without texts" in said[1]
    assert len(said) > 3

    # Before the new plan.
    (first, *_), skipped = source.segments, {step: why for step, why in source.without_update.items() if step <= 8}
    open_ended = {name: value for name, value in first.items() if name != "end"}
    early = Run(tmp_path, source.settings, [open_ended], 8, skipped)
    write_digests(early)
    assert verify(source, tmp_path / DIGESTS) == []
    assert verify(early, file) == ["the run has reached step 8, the digests step 12"]
    earlier_still = replace(source, segments=[first, {**source.segments[1], "first_step": 9}])
    assert verify(earlier_still, file)[0] == "segment 1 begins after step 9, that of the digests after step 8"

    lines = file.read_text().splitlines()
    forged = json.loads(lines[2]) | {"leaf": "0" * 64}
    (tmp_path / "forged.jsonl").write_text("\n".join([*lines[:2], json.dumps(forged), *lines[3:]]))
    assert verify(source, tmp_path / "forged.jsonl") == ["steps 4 to 6 differ: the first block with another order"]
    surplus, rewritten = [*lines, lines[-1]], json.loads(lines[4]) | {"first": 11}
    not_hexadecimal, other_reason = (
        lines[4].replace('"leaf": "', '"leaf": "z', 1),
        lines[4].replace("left_out", "spike"),
    )
    for forgery in (surplus, *([*lines[:4], one] for one in (json.dumps(rewritten), not_hexadecimal, other_reason))):
        (tmp_path / "forged.jsonl").write_text("\n".join(forgery))
        assert "steps 1" in verify(source, tmp_path / "forged.jsonl")[0], forgery[-1]
    (tmp_path / "forged.jsonl").write_text("\n".join([*lines[:4], lines[4][1:]]))
    with pytest.raises(UserError, match="no digests of this version"):  # a damaged last line is no shorter file
        verify(source, tmp_path / "forged.jsonl")
    ahead = [*lines[:4], json.dumps(json.loads(lines[4]) | {"last": 13})]
    (tmp_path / "forged.jsonl").write_text("\n".join(ahead))
    assert verify(source, tmp_path / "forged.jsonl") == ["the run has reached step 12, the digests step 13"]
    metrics = theirs / "metrics.jsonl"
    changed = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in changed:
        if line["kind"] == "step" and line["step"] == 5:
            line["documents"] += 1
    metrics.write_text("\n".join(map(json.dumps, changed)))
    assert verify(Run.open(theirs), file)[0].startswith("step 5: training counted ")
    (tmp_path / "other.txt").write_text("{}\n")
    with pytest.raises(UserError, match="no digests of this version"):
        read_digests(tmp_path / "other.txt")
    (theirs / DIGESTS).write_text("{}\n")
    with pytest.raises(UserError, match="no digests of this version; put the file back"):
        Run.open(theirs)
    (theirs / DIGESTS).unlink()
    (theirs / DIGESTS).mkdir()  # root may write into every folder
    with pytest.raises(UserError, match=r"order_digests.jsonl: cannot be written: .*; digest a copy of the run"):
        write_digests(replace(source, directory=theirs))


def test_wrong_questions_are_answered_with_what_is_possible(trained: Path, shards: Path, tmp_path: Path) -> None:
    run, store = Run.open(trained.with_suffix("")), ShardStore(shards, "train")
    with pytest.raises(UserError, match=r"no step 13: its newest checkpoint is of step 12; give a step from 1 to 12"):
        seen.show_step(run, 13, print)
    last = sum(int(size[0]) for size in store.shard_sizes("news")) - 1
    assert seen.place_of(store, "news:0") == ("news", 0, 0)
    assert seen.place_of(store, f"news:{last}")[1] == store.num_shards("news") - 1
    for asked, answer in {
        f"news:{last + 1}": f"news has the documents 0 to {last}",
        "books:1": "no source 'books'; the data has letters, news",
        "news": "give SOURCE:NUMBER or SOURCE:FILE:ROW",
        "news:shard.00099.mds:1": r"news has the files shard.00000.mds to shard.\d{5}.mds$",
        "news:0:9999": "shard.00000.mds has the rows 0 to",
    }.items():
        with pytest.raises(UserError, match=answer):
            seen.place_of(store, asked)
    with pytest.raises(UserError, match="no run directory: it has no settings"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        export(run, tmp_path / "absent" / "a.parquet")
    with pytest.raises(UserError, match=r"--text: is empty; give a text to look for$"):
        seen.show_text(run, "", print)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a device; give the path of a file"):
        export(run, tmp_path / "pipe")
    with pytest.raises(UserError, match="is a folder; give the path of a file"):
        export(run, tmp_path)
    with pytest.raises(UserError, match=r"a.csv: the file is Parquet; give it the name a.parquet"):
        export(run, tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot be written: No such file or directory; choose another place"):
        export(run, Path("/proc/order.parquet"))
    with pytest.raises(UserError, match="there is no such file"):
        read_digests(tmp_path / "absent")
    first, second = (dict(segment["identity"]) for segment in run.segments)
    first["prepared data"] = "0"  # its folder is gone
    del second[READ_BEFORE]  # as earlier versions wrote it: a plan of its own
    identities = [{"identity": first}, {"identity": second}]
    segments = [segment | identity for segment, identity in zip(run.segments, identities, strict=True)]
    moved = Run(run.directory, run.settings, segments, run.reached)
    with pytest.raises(
        UserError, match=r"steps 1 to 8 were planned from other data .* the steps of other segments do not need it"
    ):
        list(moved.walk(1, 2))
    assert sum(len(part.steps) for part in moved.walk(9, 12)) > 10
