"""What a profile is asked by, what the exporter passes on, and what ranks do with it; the live run is in
test_watched_run.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError
from bigmodel.inspect.profile_command import parse_ranks, profile
from bigmodel.metrics.profiling import Profiler, Relay, group_stacks, request, wait
from bigmodel.metrics.rank_record import read_record


@pytest.mark.parametrize(
    ("text", "ranks"), [("0", [0]), ("all", [0, 1, 2, 3]), ("3,1", [1, 3]), ("0-2", [0, 1, 2]), ("2-3,0", [0, 2, 3])]
)
def test_ranks_are_numbers_and_ranges(text: str, ranks: list[int]) -> None:
    assert parse_ranks(text, world_size=4) == ranks


@pytest.mark.parametrize("text", ["4", "0-9", "x", "1-", "-1", "", "3-1"])
def test_other_ranks_are_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=rf"--ranks {text}"):
        parse_ranks(text, world_size=4)


def test_a_run_that_does_not_go_on_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile flames: no such kind; choose one of trace, memory, stacks"):
        profile(tmp_path, "flames", "0", 1, 1.0)
    with pytest.raises(UserError, match="no live run"):
        profile(tmp_path, "trace", "0", 1, 1.0)
    assert not list(tmp_path.iterdir())


def test_ranks_with_one_stack_are_told_together_and_the_odd_one_apart() -> None:
    other, main = 'Thread 0x1 (most recent call first):\n  File "x.py", line 1 in data\n\n', "Current thread 0x2 (most"
    waiting = (
        f'{other}{main} recent call first):\n  File "c.py", line 5 in all_reduce\n  File "l.py", line 9 in train\n'
    )
    reading = f'{main} recent call first):\n  File "d.py", line 7 in read\n'
    groups = group_stacks({0: waiting, 1: reading, 2: waiting})
    assert [ranks for ranks, _ in groups] == [[0, 2], [1]]
    assert groups[0][1].split("\n")[0].strip() == 'File "c.py", line 5 in all_reduce'
    assert "data" not in groups[0][1]


def test_a_rank_records_what_is_asked_for_and_nothing_else(tmp_path: Path) -> None:
    """The relay hands a request to the node's ranks; each looks between two steps."""
    run, node = tmp_path / "run", tmp_path / "node"
    node.mkdir()
    (run / "profile").mkdir(parents=True)
    old = request(run, "trace", [0], 1)  # from before this start: not for it
    relay, profiler = Relay(node, run), Profiler(node, 0)
    records = [{"rank": 0, "pid": os.getpid()}]
    relay.look(records)
    profiler.step()
    try:
        folder = request(run, "trace", [0], 2)
        relay.look(records)
        for _ in range(3):  # the look that begins it, and two steps
            assert not list(folder.glob("rank-*"))
            profiler.step()
            torch.ones(4, 4) @ torch.ones(4, 4)
        assert [path.name for path in folder.iterdir()] == ["rank-0.trace.json.gz"]
        elsewhere = request(run, "trace", [1], 1)
        relay.look([*records, {"rank": 1, "pid": os.getpid()}])  # another rank of this node
        profiler.step()
        profiler.step()
        memory = request(run, "memory", [0], 1)
        relay.look(records)
        for _ in range(2):
            profiler.step()
            torch.ones(1000, 100) + 1
        assert "aten::ones" in (memory / "rank-0.memory.txt").read_text()
        stacks = request(run, "stacks", [0], 1)
        relay.look(records)
        assert wait(stacks, [0], 1.0) == {0: stacks / "rank-0.stacks.txt"}
        assert "test_a_rank_records_what_is_asked_for" in (stacks / "rank-0.stacks.txt").read_text()
        assert not list(old.iterdir()) + list(elsewhere.iterdir())
    finally:
        profiler.close()
    late = request(run, "stacks", [0], 1)
    relay.look(records)  # this process has no handler any more, and lives
    assert not list(late.iterdir())


def test_a_profile_that_fails_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    profiler = Profiler(tmp_path, 0)
    asked = {"id": "a", "kind": "trace", "ranks": [0], "steps": 1}
    try:
        for text in (json.dumps({"asked": asked, "folder": str(tmp_path / "gone")}), "{torn", json.dumps({"asked": 3})):
            (tmp_path / "profile.json").write_text(text)
            os.utime(tmp_path / "profile.json", ns=(1, time.time_ns()))
            profiler.step()
            profiler.step()
            assert "rank 0: the profile failed" in capfd.readouterr().err
        (tmp_path / "good").mkdir()
        (tmp_path / "profile.json").write_text(json.dumps({"asked": asked, "folder": str(tmp_path / "good")}))
        profiler.step()
        profiler.step()
        assert [path.name for path in (tmp_path / "good").iterdir()] == ["rank-0.trace.json.gz"], "the next one works"
    finally:
        profiler.close()


ODD = {
    "many steps": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": "many"}', "steps = 'many'"),
    "no steps": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": 0}', "steps = 0"),
    "steps without end": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": 1000000}', "steps = 1000000"),
    "half a step": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": 1.5}', "steps = 1.5"),
    "one rank": ('{"id": "a", "kind": "trace", "ranks": 5, "steps": 1}', "ranks = 5"),
    "no rank": ('{"id": "a", "kind": "trace", "ranks": [], "steps": 1}', "ranks = []"),
    "a rank before the first": ('{"id": "a", "kind": "trace", "ranks": [-1], "steps": 1}', "ranks.0 = -1"),
    "a rank that is none": ('{"id": "a", "kind": "trace", "ranks": [0, true], "steps": 1}', "ranks.1 = True"),
    "a rank after the last": ('{"id": "a", "kind": "trace", "ranks": [0, 7], "steps": 1}', "rank 7: this run has"),
    "a path": ('{"id": "../../out", "kind": "trace", "ranks": [0], "steps": 1}', "id = '../../out'"),
    "an absolute path": ('{"id": "/tmp/out", "kind": "stacks", "ranks": [0], "steps": 1}', "id = '/tmp/out'"),
    "the folder itself": ('{"id": "..", "kind": "stacks", "ranks": [0], "steps": 1}', "id = '..'"),
    "a line break": ('{"id": "a\\n", "kind": "stacks", "ranks": [0], "steps": 1}', "id = 'a\\n'"),
    "a link": ('{"id": "link", "kind": "stacks", "ranks": [0], "steps": 1}', "link is a link"),
    "no kind": ('{"id": "a", "kind": "flames", "ranks": [0], "steps": 1}', "kind = 'flames'"),
    "no id": ('{"kind": "trace", "ranks": [0], "steps": 1}', "id: Field required"),
    "a key of two lines": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": 1, "x\\ny": 1}', "x\\ny = 1: Extra"),
    "a long key": (json.dumps({"id": "a", "kind": "trace", "ranks": [0], "steps": 1, "k" * 999: 1}), "k... = 1: Extra"),
    "a rank of 400 digits": (
        '{"id": "a", "kind": "trace", "ranks": [1' + "0" * 400 + '], "steps": 1}',
        "000...: this run",
    ),
    "another key": ('{"id": "a", "kind": "trace", "ranks": [0], "steps": 1, "code": "x"}', "code = 'x'"),
    "a list": ("[1]", "[1]: Input should be an object"),
    "torn": ('{"id": "a', "Invalid JSON"),
    "empty": ("", "Invalid JSON"),
    "deep": ("[" * 100_000, "Invalid JSON"),
}


def test_an_odd_request_is_refused_with_a_line_and_nothing_else_happens(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run, node = tmp_path / "run", tmp_path / "node"
    node.mkdir()
    (run / "profile").mkdir(parents=True)
    (run / "profile/link").symlink_to(tmp_path)
    (run / "world.json").write_text('{"ranks": [{}, {}]}')
    relay, profiler = Relay(node, run), Profiler(node, 0)
    records = [{"rank": 0, "pid": os.getpid()}]

    def ask(text: str) -> str:
        (run / "profile/request.json").write_text(text)
        os.utime(run / "profile/request.json", ns=(1, time.time_ns()))
        relay.look(records)
        for _ in range(2):
            profiler.step()
        return capfd.readouterr().err

    try:
        before = sorted(tmp_path.rglob("*"))
        for what, (text, told) in ODD.items():
            said = ask(text)
            assert f"bigmodel: profile: {run}/profile/request.json: refused: " in said, what
            assert told in said, what
            assert len(said.splitlines()) == 2, what  # of the exporter, and of rank 0
            assert len(said) < 2 * (250 + len(str(run))), what
            assert told in (run / "profile/refused.txt").read_text(), what
        new = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path not in before]
        assert new == ["node/profile.json", "run/profile/refused.txt", "run/profile/request.json"]
        (run / "profile/request.json").unlink()
        os.mkfifo(run / "profile/request.json")  # to open it would wait for a writer
        relay.look(records)
        profiler.step()
        assert "refused: not a file" in capfd.readouterr().err
        (run / "profile/request.json").unlink()
        said = ask('{"id": "a", "kind": "trace", "ranks": [0], "steps": 1}')  # a good one, by hand
        assert "bigmodel" not in said
        assert [path.name for path in (run / "profile/a").iterdir()] == ["rank-0.trace.json.gz"]
    finally:
        profiler.close()


def test_a_rank_without_a_handler_is_never_signalled(tmp_path: Path) -> None:
    """A signal without a handler would kill it: a rank that is still loading data."""
    code = "import sys, time; from pathlib import Path; from bigmodel.metrics.rank_record import RankRecord\n"
    code += "RankRecord(Path(sys.argv[1]), 0).write({'samples': {}}); time.sleep(60)"
    (tmp_path / "profile").mkdir()
    relay = Relay(tmp_path, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 30
        while not (record := read_record(tmp_path / "rank-0")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        folder = request(tmp_path, "stacks", [0], 1)
        relay.look([record])
        assert wait(folder, [0], 0.3) == {}
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
