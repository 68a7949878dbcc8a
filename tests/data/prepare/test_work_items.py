"""Units run anywhere, in any order, any number of times, and what they make is the same."""

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bigmodel import run_directory as run_directory
from bigmodel.config.settings import UserError
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.work_items import Team


def wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def process_number(pause: float) -> int:
    time.sleep(pause)
    return os.getpid()


class LastFirst:
    """An executor that finishes the last task first."""

    def __init__(self) -> None:
        self.started: list[tuple[Future[Any], Any, tuple[Any, ...]]] = []

    def submit(self, function: Any, *task: Any) -> Future[Any]:
        self.started.append((Future(), function, task))
        if len(self.started) == 3:
            for future, call, arguments in reversed(self.started):
                future.set_result(call(*arguments))
        return self.started[-1][0]


def test_results_come_in_the_order_of_the_tasks_whatever_ends_first() -> None:
    for executor in (LastFirst(), None):
        seen: list[int] = []
        team = Team(executor, quiet())  # type: ignore[arg-type]
        assert team.run("x", lambda n: n * n, [(1,), (2,), (3,)], [1, 1, 1], seen.append) == [1, 4, 9]
        assert sorted(seen) == [1, 4, 9]


def test_processes_do_the_work_and_a_killed_one_is_an_error_and_no_hang() -> None:
    with units.processes(2, quiet()) as team:
        numbers = team.run("x", process_number, [(0.01,)] * 20, [1] * 20)
        assert os.getpid() not in numbers
        with pytest.raises(UserError, match=r"a process was killed.*lower prepare.workers"):
            team.run("x", die, [(1,), (2,)], [1, 1])


def test_an_error_ends_the_processes_at_once() -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), units.processes(2, quiet()) as team:
        team.run("x", wait, [(0.0,), (500.0,), (500.0,)], [1, 1, 1], stop)
    assert time.monotonic() - started < 100


def test_a_log_gets_a_line_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rich.console import Console
    from rich.progress import Progress

    monkeypatch.setattr(units, "LOG_SECONDS", 0.0)
    progress = Progress(console=Console(width=100, force_terminal=False), disable=True)
    Team(None, progress).run("reading", wait, [(0.01,), (0.01,)], [3_000_000, 1_000_000])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("reading: 75%, ")
    assert lines[0].endswith(" s left")
    assert lines[1].endswith(" 0 s left")


def test_a_scheduler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(units, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match=r"prepare.scheduler = 'tcp://127.0.0.1:9': cannot be reached"):  # noqa: SIM117
        with units.cluster("tcp://127.0.0.1:9", quiet()):
            pass


def test_a_worker_with_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = units.versions()
    with ThreadPoolExecutor(1) as worker:
        team = Team(worker, quiet(), elsewhere=True)
        assert team.run("x", lambda n: n * n, [(3,)], [1]) == [9]
        theirs = tuple((name, "1.0" if name == "numpy" else number) for name, number in ours)
        answers = iter([ours, theirs])  # of this process, and of the worker
        monkeypatch.setattr(units, "versions", lambda: next(answers))
        with pytest.raises(UserError, match=r"a worker on .* has numpy 1\.0 for \d.*install the same versions there"):
            team.run("x", lambda n: pytest.fail("worked"), [(3,)], [1])


def test_no_two_processes_of_any_machines_write_one_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(run_directory.os, "replace", lambda part, _: names.append(Path(part).name))
    for _ in range(2):
        run_directory.write_atomically(tmp_path / "a", "x")
    assert len(set(names)) == 2
    assert all(name.startswith(f".a.{os.uname().nodename}.{os.getpid()}.") for name in names)
    assert all(name.endswith(".part") for name in names)


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    from bigmodel.config.settings import PrepareSettings
    from bigmodel.data.prepare.corpus import Unit
    from bigmodel.data.prepare.encoding import Work, scan_unit

    with pytest.raises(UserError, match=r"elsewhere/scan: does not exist on .*every worker of prepare.scheduler has"):
        scan_unit(0, Unit("a", (), ("text",), None), PrepareSettings(), Work(tmp_path / "elsewhere"))


def test_without_distributed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'bigmodel\[dask\]'"), units.cluster("tcp://x:1", quiet()):
        pass


def test_on_a_cluster_of_which_a_worker_is_killed_the_bytes_are_those_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three worker processes; one is stopped before it begins, so that it holds units, and killed midway."""
    import threading

    distributed = pytest.importorskip("distributed")
    from bigmodel.data.prepare import corpus
    from bigmodel.data.prepare.pipeline import prepare
    from tests.data.prepare.test_pipeline import content, elsewhere, partial_files, wait_until
    from tests.support.tiny_corpus import tiny_settings

    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)
    prepare(tiny_settings(tmp_path), quiet())
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            processes = list(client.run(os.getpid).values())
        assert len(set(processes)) == 3
        victim = processes[0]
        os.kill(victim, signal.SIGSTOP)
        folder = tmp_path / "cluster"
        before_kill: list[int] = []

        def kill_midway() -> None:
            wait_until(lambda: len(partial_files(folder)) >= 5, 60)
            before_kill.append(len(partial_files(folder)))
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill_midway)
        killer.start()
        settings = elsewhere(tiny_settings(tmp_path, scheduler=cluster.scheduler_address), folder)
        prepare(settings, quiet())
        killer.join()
    assert 5 <= before_kill[0] < 2 * 20
    assert content(folder / "data") == content(tmp_path / "data")
