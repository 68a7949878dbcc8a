"""A sample of `make soak`, and that it finds what is planted."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.support.ranks import start_ranks
from tools import soak_run
from tools.soak import summary
from tools.soak_defects import DEFECTS
from tools.soak_faults import KINDS, deck, draw
from tools.soak_run import Row, Run, Soaked, Start, in_time, undisturbed
from tools.soak_trace import Broken, Design, Trace, compare

DESIGN, STEPS = Design(stage=0, world_size=2), 32


def test_each_kind_of_fault_is_the_first_of_a_run_in_turn_and_all_follow_from_the_seed() -> None:
    decks = [deck(random.Random(f"7/{number}"), list(KINDS), number) for number in range(len(KINDS))]
    assert [one[0] for one in decks] == list(KINDS)
    assert all(sorted(one) == sorted(KINDS) for one in decks)
    drawn = [[draw(random.Random(3), list(decks[4]), 0, 80, 2, 0) for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_into_a_run(kind: str) -> None:
    found = {draw(random.Random(seed), [kind], 0, 80, 2, 2).kind for seed in range(20)}
    assert found == {kind}
    assert draw(random.Random(1), [kind], 76, 80, 2, 2).kind == ""


def test_the_table_has_median_and_worst() -> None:
    rows = [Row("killed", 0.1, 2.0, 1.0), Row("killed", 0.3, 2.0, 3.0), Row("slow", 4.0, 15.0, None)]
    first, second = summary(rows)
    assert (first["detected_median"], first["detected_worst"], first["recovered_worst"]) == (0.2, 0.3, 3.0)
    assert (second["fault"], second["count"], second["recovered_median"]) == ("slow", 1, None)


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Trace:
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", shards, DESIGN, STEPS)


@pytest.fixture
def any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make soak` has a quiet machine; here a fault may be named later than its bound."""
    monkeypatch.setattr(soak_run, "in_time", lambda row: row)


def soak_one(folder: Path, shards: Path, kind: str, expected: Trace, defect: str = "") -> list[Row]:
    soaked = Soaked(Run(folder / "soaked", shards, DESIGN, STEPS, defect), random.Random(1), [kind], print)
    soaked.go()
    compare(soaked.run.trace(), expected, DESIGN, STEPS, exact=True)
    return soaked.rows


def test_a_killed_rank_is_named_and_nothing_is_lost(
    tmp_path: Path, shards: Path, undisturbed_run: Trace, any_time: None
) -> None:
    (row,) = soak_one(tmp_path, shards, "killed", undisturbed_run)
    assert row.kind == "killed"
    assert row.detected > 0
    assert row.recovered


@pytest.mark.parametrize(
    ("defect", "kind", "words"),
    [
        pytest.param("published early", "killed", "published and not whole", marks=pytest.mark.long),
        pytest.param("barrier missing", "killed", "published and not whole", marks=pytest.mark.long),
        pytest.param(
            "cursor from the loader", "killed", "metrics.jsonl has steps|the batches of step", marks=pytest.mark.long
        ),
        ("replica hash ignored", "flipped bit", "nothing names rank"),
    ],
)
def test_a_planted_defect_is_found(
    tmp_path: Path, shards: Path, undisturbed_run: Trace, any_time: None, defect: str, kind: str, words: str
) -> None:
    assert defect in DEFECTS
    with pytest.raises(Broken, match=words):
        soak_one(tmp_path, shards, kind, undisturbed_run, defect)


def test_a_fault_that_is_named_too_late_is_found() -> None:
    assert in_time(Row("killed", 1.9, 2.0, None)).kind == "killed"
    with pytest.raises(Broken, match=r"deleted: named after 20.50 s; the bound is 20.00 s"):
        in_time(Row("deleted", 20.5, 20.0, None))


def end_or_stay() -> int:
    """On rank 0: exit code 1; the other one stays."""
    time.sleep(60.0 * int(os.environ["RANK"]))
    return 1


def test_a_rank_that_lives_on_after_another_ones_end_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(soak_run, "GRACE_SECONDS", 0.3)
    start = Start(tmp_path, start_ranks(2, end_or_stay), tmp_path / "printed")
    while start.poll():
        time.sleep(0.01)
    assert (start.dead, start.late, start.seen().codes) == ((0, 1), [1], [1, -9])
