"""`check accounting`: the books of a run close, and the check is red when they do not."""

import json
import statistics
from pathlib import Path

import pytest

from bigmodel.__main__ import app
from bigmodel.checks.audit import audit, torch_agrees
from bigmodel.checks.runs import check_accounting
from bigmodel.config.settings import UserError, load_settings
from bigmodel.run_directory import read_json_lines
from tests.support.tiny_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of two ranks that was killed and resumed, by the check itself; its books hold."""
    folder = tmp_path_factory.mktemp("books")
    run_file = write_run(folder, shards)
    kept = folder / "kept"
    import bigmodel.checks.runs as check

    def keep(directory: Path, observed: tuple[float, float] | None = None) -> list:
        kept.mkdir()
        for name in ("metrics.jsonl", "settings.json", "deepspeed.json", "data_manifest.json"):
            (kept / name).write_bytes((directory / name).read_bytes())
        return audit(directory, observed)

    check.audit, whole = keep, check.audit
    try:
        findings = check_accounting(run_file, [])
    finally:
        check.audit = whole
    assert [finding for finding in findings if not finding.holds] == []
    assert len(findings) == 5
    return kept


def test_the_books_of_a_killed_and_resumed_run_hold(run: Path) -> None:
    kinds = [line["kind"] for line in read_json_lines(run / "metrics.jsonl")]
    assert kinds.count("start") == 2
    assert all(finding.holds for finding in audit(run))


def test_a_plan_is_calibrated_with_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the run itself it plans the median step that was measured; what no run of CPUs says is named as assumed."""
    words = ["plan", str(run.parent / "run.toml"), "--ranks", "2", "--measured", str(run)]
    assert not app([*words, "--json"], standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)["time"]
    steps = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    seconds = [one["step_seconds"] - one["data_wait_seconds"] - one["compile_seconds"] for one in steps]
    assert planned["step_seconds"] == pytest.approx(statistics.median(seconds[len(seconds) // 2 :]), rel=0.01)
    assert not app(words, standalone_mode=False)
    first, *printed = capsys.readouterr().out.splitlines()
    assert "H100 SXM, assumed: [hardware] gpu is not set" in first
    rates = [line for line in printed if "measured by kept: " in line]
    assert [line.split("  ")[1] for line in rates] == ["matrix products", "attention", "memory"]
    assert any("not measured" in line and "memory, links and power are those above" in line for line in printed)


def broken(run: Path, tmp_path: Path, change) -> list[str]:
    """The claims that fail when `change` has worked on the lines."""
    lines = list(read_json_lines(run / "metrics.jsonl"))
    changed = change(lines)
    (tmp_path / "settings.json").write_bytes((run / "settings.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    return [finding.claim.split(",")[0] for finding in audit(tmp_path) if not finding.holds]


def without(step: int):
    return lambda lines: [line for line in lines if (line["kind"], line.get("step")) != ("step", step)]


def altered(kind: str, name: str, factor: float):
    def change(lines: list[dict]) -> list[dict]:
        line = [line for line in lines if line["kind"] == kind][-1]
        line[name] = line[name] * factor
        return lines

    return change


SECONDS = "productive and lost seconds add up to the wall time from the first start"
COUNTS = "tokens"


@pytest.mark.parametrize(
    ("change", "claims"),
    [
        (lambda lines: lines, []),
        (without(12), ["metrics.jsonl has every step once", COUNTS]),
        (altered("step", "positions", 2), [COUNTS]),
        (altered("step", "documents", 3), [COUNTS]),
        (altered("start", "lap", 1.5), [SECONDS]),
        (altered("start", "lap", 0.5), [SECONDS]),
    ],
    ids=["whole", "a step lost", "tokens", "documents", "seconds added", "seconds lost"],
)
def test_an_error_in_the_books_is_found(run: Path, tmp_path: Path, change, claims: list[str]) -> None:
    found = broken(run, tmp_path, change)
    assert set(claims) <= set(found)
    assert bool(found) == bool(claims)


def test_flops_are_those_that_torch_counts_on_the_users_own_data(tmp_path: Path, shards: Path) -> None:
    finding = torch_agrees(load_settings(write_run(tmp_path, shards)))
    assert finding.holds, finding.evidence


def test_a_directory_without_books_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no step yet; there is nothing to account for"):
        audit(tmp_path)
