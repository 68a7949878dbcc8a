"""Every two settings of the engine together: gradient, norm and weights are those of plain torch in one process."""

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.engine_worker import launch
from tests.support.exactness import FACTORS, FEW_STEPS, everything, failures, job_of, name_of, pairwise
from tools import exactness
from tools.exactness import RESULTS, TABLE, run_batch, support_table
from tools.exactness_state import Sources, State, read_runs, read_sources

CASES = pairwise()
pytestmark = pytest.mark.timeout(600)  # all cases run in the first test's set-up


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exactness")
    jobs = {name_of(case): job_of(case, folder, FEW_STEPS) for case in CASES}
    outcome = launch(list(jobs.values()), 2, folder)
    return {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_is_plain_torch(results: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    assert failures(results[name_of(case)]) == []


def test_every_valid_pair_of_settings_is_among_the_cases() -> None:
    assert len(CASES) < 40
    for one, two in itertools.combinations(FACTORS, 2):
        possible = {(case[one], case[two]) for case in everything()}
        assert {(case[one], case[two]) for case in CASES} == possible


def test_the_matrix_has_tensor_parallel_ranks_where_there_are_two() -> None:
    counts = {size: sum("tensors" in case for case in exactness.matrix(size, quick=True)) for size in (1, 2, 4)}
    assert counts == {1: 0, 2: 4, 4: 4}


# The state of a run, and its publication.

SOURCES = Sources("abc1234")


def row_of(world_size: int, case: dict[str, Any], failures: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"world_size": world_size, "case": case, "differences": {"loss": [1e-9, 1e-6]}, "failures": list(failures)}


class Workshop:
    """The tool over four cheap cases on one and two ranks; a batch is one case. Counts the cases that it ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[tuple[int, int]] = []  # (ranks, stage)
        self.sources = SOURCES
        self.before: Callable[[], None] = lambda: None  # runs before each batch
        self.results, self.table = folder / "exactness.jsonl", folder / "support.md"
        self.state = folder / "runs/exactness"
        names = {"STATE": self.state, "RESULTS": self.results, "TABLE": self.table, "BATCH": 1, "WORLD_SIZES": (1, 2)}
        for name, value in names.items():
            monkeypatch.setattr(exactness, name, value)
        monkeypatch.setattr(exactness, "read_sources", lambda root: self.sources)
        monkeypatch.setattr(exactness, "matrix", lambda world_size, quick: [{"stage": n} for n in range(2 - quick)])
        monkeypatch.setattr(exactness, "run_batch", self._run_batch)

    def _run_batch(self, cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[dict[str, Any]]:
        self.before()
        self.ran += [(world_size, case["stage"]) for case in cases]
        return [row_of(world_size, case) for case in cases]

    def call(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything printed, in one line."""
        done = CliRunner().invoke(exactness.app, arguments)
        return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def test_a_run_that_was_stopped_goes_on_and_publishes_when_it_is_complete(workshop: Workshop) -> None:
    def stop() -> None:
        if len(workshop.ran) == 2:
            raise KeyboardInterrupt

    workshop.before = stop
    code, printed = workshop.call("--worlds", "1,2")
    assert (code, workshop.ran) == (130, [(1, 0), (2, 0)])
    assert "2 cases are in" in printed
    assert "the same command goes on" in printed
    assert not workshop.results.exists()
    assert not workshop.table.exists()
    workshop.before = lambda: None
    code, printed = workshop.call("--worlds", "1,2")
    assert (code, workshop.ran) == (0, [(1, 0), (2, 0), (1, 1), (2, 1)])
    assert "published" in printed
    ((about, rows),) = read_runs(workshop.results)
    assert [(row["world_size"], row["case"]["stage"]) for row in rows] == workshop.ran
    assert about["commit"] == "abc1234"
    assert "| all | exact (2) | exact (2) | - | - |" in workshop.table.read_text()
    assert "Not complete" not in workshop.table.read_text()


def test_a_quick_run_is_published_only_when_told_and_then_says_that_it_is_not_complete(workshop: Workshop) -> None:
    assert workshop.call("publish")[0] == 2
    assert workshop.call("--quick", "--worlds", "1,2")[0] == 0
    assert not workshop.results.exists()
    code, printed = workshop.call("publish")
    assert code == 2
    assert "1 of 2 cases on 1 rank, 1 of 2 cases on 2 ranks" in printed
    assert not workshop.results.exists()
    assert not workshop.table.exists()
    assert workshop.call("publish", "--partial")[0] == 0
    assert [len(rows) for _, rows in read_runs(workshop.results)] == [2]
    assert "Not complete: 2 cases of the full matrix did not run." in workshop.table.read_text()


def test_results_of_other_commits_are_kept_only_when_told(workshop: Workshop) -> None:
    assert workshop.call("--worlds", "1,2")[0] == 0
    for commit in ("def5678", "def5678", "fed8765"):
        workshop.sources = Sources(commit)
        assert workshop.call("--quick", "--worlds", "1,2")[0] == 0
        assert workshop.call("publish", "--partial", *(["--add"] if commit == "def5678" else []))[0] == 0
        kept = [(about["commit"], len(rows)) for about, rows in read_runs(workshop.results)]
        assert kept == ([("abc1234", 4), ("def5678", 2)] if commit == "def5678" else [("fed8765", 2)])
        table = workshop.table.read_text()
        assert ("4 cases on" in table, "| all | exact (4) | exact (2) |" in table) == (commit == "def5678",) * 2
        assert ("Not complete: 2 cases of the full matrix did not run." in table) == (commit == "fed8765")


def test_results_of_uncommitted_sources_are_published_only_when_told(workshop: Workshop) -> None:
    workshop.sources = Sources("abc1234", "0123456789ab")
    code, printed = workshop.call()
    assert code == 0
    assert "changes that are not committed" in printed
    assert workshop.call("publish", "--partial")[0] == 2
    assert not workshop.results.exists()
    assert workshop.call("publish", "--uncommitted")[0] == 0
    assert "commit abc1234-changed-0123456789ab" in workshop.table.read_text()
    workshop.sources = Sources("abc1234")
    assert workshop.call("publish", "--partial", "--uncommitted")[0] == 2, "these sources have no results"


def test_results_are_not_kept_where_the_sources_change_during_the_run(workshop: Workshop) -> None:
    def edit() -> None:
        if workshop.ran:
            workshop.sources = Sources("abc1234", "0123456789ab")

    workshop.before = edit
    code, printed = workshop.call()
    assert code == 2
    assert "changed from abc1234 to abc1234-changed-0123456789ab during the run" in printed
    assert len(State(workshop.state, SOURCES).rows) == 1
    assert State(workshop.state, workshop.sources).rows == []


def test_a_wrong_case_is_the_exit_code_and_stands_in_the_table(workshop: Workshop, monkeypatch) -> None:
    monkeypatch.setattr(exactness, "run_batch", lambda cases, size, folder: [row_of(size, cases[0], ("norm: 1 > 0",))])
    assert workshop.call()[0] == 1
    assert "- wrong: 2 ranks, {'stage': 1}: ['norm: 1 > 0']" in workshop.table.read_text()


def test_numbers_of_ranks_that_are_none_are_one_line(workshop: Workshop) -> None:
    assert workshop.call("--worlds", "1,x") == (
        2,
        "exactness: --worlds 1,x: give numbers of ranks, as in --worlds 1,2,4",
    )


def test_a_line_that_was_cut_off_is_run_again_and_damages_no_other(tmp_path: Path) -> None:
    state = State(tmp_path, SOURCES)
    state.begin("a machine")
    for stage in range(3):
        state.add(row_of(1, {"stage": stage, "tied": True}))
    state.path.write_bytes(state.path.read_bytes()[:-9])
    state = State(tmp_path, SOURCES)
    state.begin("another machine")
    assert state.about["hardware"] == "a machine"
    assert [state.has(1, {"tied": True, "stage": stage}) for stage in range(3)] == [True, True, False]
    assert not state.has(2, {"stage": 0, "tied": True})
    state.add(row_of(1, {"stage": 2, "tied": True}))
    assert [row["case"]["stage"] for row in State(tmp_path, SOURCES).rows] == [0, 1, 2]


def test_what_is_not_committed_is_part_of_the_key_and_documents_are_not(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("bigmodel/one.py", "README.md", "benchmarks/support.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one\n")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = read_sources(tmp_path)
    assert clean.changes == ""
    for name in ("README.md", "benchmarks/support.md", "notes.md", "bigmodel/one.pyc"):
        (tmp_path / name).write_text("two\n")
    assert read_sources(tmp_path) == clean
    (tmp_path / "bigmodel/one.py").write_text("two\n")
    changed = read_sources(tmp_path)
    git("add", "bigmodel/one.py")
    assert read_sources(tmp_path) == changed, "staged or not"
    (tmp_path / "bigmodel/new.py").write_text("new\n")
    new = read_sources(tmp_path)
    (tmp_path / "bigmodel/new.py").write_text("newer\n")
    assert len({clean, changed, new, read_sources(tmp_path)}) == 4
    git("add", ".")
    git("commit", "-m", "two")
    assert read_sources(tmp_path).changes == ""
    assert read_sources(tmp_path) != clean


def test_a_batch_gives_one_row_for_each_case(tmp_path: Path) -> None:
    case = next(one for one in CASES if (one["precision"], one["offload"]) == ("fp32", "none"))
    (row,) = run_batch([case], 1, tmp_path)
    assert (row["world_size"], row["case"], row["failures"]) == (1, case, [])
    assert set(row["differences"]) == {"loss", "gradient", "norm", "weights", "average"}


def test_the_published_table_is_that_of_the_published_results() -> None:
    runs = read_runs(RESULTS)
    rows = [row for _, some in runs for row in some]
    assert len(RESULTS.read_text().splitlines()) == len(rows) + len(runs) > 1000, "one line for each case"
    assert len({json.dumps([row["world_size"], row["case"]], sort_keys=True) for row in rows}) == len(rows)
    assert TABLE.read_text() == support_table(runs)
