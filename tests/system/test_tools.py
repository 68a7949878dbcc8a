"""The tools: what they draw and count is checked against the dense rule; every benchmark runs on a CPU."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, dense
from tests.kernels.test_mask import offsets_of
from tests.support.interpreted import run_python
from tools import (
    bench_attention,
    bench_block,
    bench_checkpoint,
    bench_linear_cross_entropy,
    bench_start,
    gpu_suite,
    show_mask,
    tune_attention,
)
from tools.bench_attention import CONTENDERS, Case, cases, errors, lognormal_lengths, order_of
from tools.bench_linear_cross_entropy import contenders, gradient_error
from tools.gpu_suite import PARTS, Part, markdown_of, run_part
from tools.measure import Record, milliseconds
from tools.show_mask import FULL, PARTIAL, Tile, check_tiles, drawing_of, text_of

ROOT = Path(__file__).parents[2]

# Drawing.


@pytest.mark.parametrize(
    "mask",
    [
        causal(offsets_of([21, 34, 3, 0, 25])),
        causal(offsets_of([64, 9]), left=20),
        bidirectional(offsets_of([1, 30, 7])),
        cross(offsets_of([12, 20, 0, 9]), offsets_of([24, 8, 5, 0])),
        AttentionMask(offsets_of([33]), offsets_of([50]), left=9, right=14),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_the_tiles_drawn_are_those_of_the_rule(mask: AttentionMask, padding: int) -> None:
    drawing = drawing_of("", mask, padding, rows=8, columns=4)  # checks every tile against dense()
    assert drawing.count(FULL) > 0
    full = sum(len(tile.rows) * len(tile.columns) for tile in drawing.tiles if tile.state == FULL)
    assert full <= drawing.sees_QK.sum()
    assert "#" in "".join(text_of(drawing, 1))


def test_the_terminal_shows_one_document_as_expected() -> None:
    assert text_of(drawing_of("", causal(offsets_of([6])), 2, rows=3, columns=2), 1) == [
        "+---....",
        "++--....",
        "+++-....",
        "####--..",
        "####+-..",
        "####++..",
        "........",
        "........",
    ]


@pytest.mark.parametrize(
    ("tiles", "complaint"),
    [
        ([Tile(range(2), range(2), FULL)], "has a masked pair"),
        ([Tile(range(2), range(2), PARTIAL), Tile(range(1), range(1), PARTIAL)], "visited twice"),
        ([Tile(range(1), range(2), PARTIAL)], "is not visited"),
    ],
)
def test_a_wrong_tile_ends_the_drawing(tiles: list[Tile], complaint: str) -> None:
    sees_QK = np.array([[True, False], [True, True]])
    with pytest.raises(AssertionError, match=complaint):
        check_tiles(tiles, sees_QK)


DRAWN = {
    "lengths": "5,6", "rule": "causal", "key_lengths": "7,4", "left": 3, "padding": 1,
    "tile_rows": 4, "tile_columns": 2, "cell": 0,
}  # fmt: skip


def test_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "picture.png"
    show_mask.main(**DRAWN | {"rule": "causal,cross"}, png=png)
    assert capsys.readouterr().out.count("cross") == 1
    assert png.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "prefx"}, "--rule prefx: choose one or more of causal, window, prefix, bidirectional, cross"),
        ({"lengths": "3,x"}, "lengths '3,x': give whole numbers"),
        ({"rule": "cross", "key_lengths": "5"}, "both sides need the same documents"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message) as ending:
        show_mask.main(**DRAWN | changes, png=tmp_path / "x.png")
    assert "\n" not in str(ending.value)


# Counting.


@pytest.mark.parametrize("size", ["quick", "cpu"])
def test_visible_pairs_are_counted_as_the_dense_rule_has_them(size: str) -> None:
    checked = [case for case in cases(size) if sum(case.lengths) <= 2_048]
    assert len(checked) >= 7
    for case in checked:
        seen = dense(case.mask("cpu"), sum(case.lengths), sum(case.keys)).sum()
        assert case.pairs == int(seen) > 0, case.name
    assert Case("", (3,), (2, 1), 8).flops == 4 * 6 * 8 * 2


def test_the_cases_on_a_gpu_are_those_of_the_pass_marks() -> None:
    packed, longer, single, packed_cross, *_ = cases("gpu")
    assert (sum(packed.lengths), sum(longer.lengths), single.lengths) == (16_384, 65_536, (8_192,))
    assert packed.channels == single.channels == 128
    assert (len(packed.lengths), len(longer.lengths)) == (16, 65)
    assert sum(longer.lengths) > 2 * 65 * sorted(longer.lengths)[10]  # many short ones, few long ones
    assert len(packed_cross.lengths) == len(packed_cross.keys) == 64
    assert (sum(packed_cross.lengths), sum(packed_cross.keys)) == (64 * 128, 64 * 512)
    assert lognormal_lengths(1_000, 50, seed=1) == lognormal_lengths(1_000, 50, seed=1)


def test_every_contender_that_runs_on_a_cpu_computes_the_same() -> None:
    ran = 0
    for case in cases("quick")[2:6]:
        for contender in CONTENDERS:
            if not contender.refusal(case, "cpu"):
                assert max(errors(contender, case.smaller(), torch.float32, "cpu")) < 1e-5, (case.name, contender.name)
                ran += 1
    assert ran == 12
    losses = [loss for loss in contenders("cpu", "aot_eager").values() if not isinstance(loss, str)]
    assert len(losses) == 4
    assert all(gradient_error(loss, torch.float32, "cpu") < 1e-5 for loss in losses)


def test_the_median_of_the_repeats_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.001, 0.002, 0.9])
    monkeypatch.setattr("tools.measure.seconds_of", lambda _call, _number: next(seconds))
    assert milliseconds(lambda _number: None, "cpu", 3) == pytest.approx(2.0)


# Running.


def test_a_record_keeps_its_rows_whenever_it_ends(tmp_path: Path) -> None:
    record = Record(tmp_path, "bench", "cpu")
    for number in range(3):
        record.add({"case": "a", "contender": str(number), "both_ms": 1.5})
        assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == number + 1
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert "says nothing of a GPU" in saved["device"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("tool", "options", "rows"),
    [
        (bench_attention, {"only": "one of 128"}, 9),
        (bench_linear_cross_entropy, {"compiler": "aot_eager"}, 10),
        (bench_block, {"compiler": "aot_eager"}, 8),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "main") else "",
)
def test_a_benchmark_runs_on_a_cpu(tool, options: dict, rows: int, tmp_path: Path, capsys) -> None:
    tool.main(device="cpu", quick=True, out=tmp_path, **options)
    assert "says nothing of a GPU" in capsys.readouterr().out
    name = f"{tool.__name__.removeprefix('tools.')}_cpu"
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(saved["rows"]) == rows
    ran = [row for row in saved["rows"] if "not_run" not in row]
    assert len(ran) >= 3
    assert all(row["both_ms"] > 0 and math.isfinite(row["both_ms"]) for row in ran)
    assert (tmp_path / f"{name}.png").exists()


def test_every_tile_shape_computes_the_same_and_the_shipped_ones_stay(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--quick", "--only", "key_gradient", "--out", str(tmp_path)]
    run_python(["-m", "tools.tune_attention", *options], interpret=True)
    rows = json.loads((tmp_path / "tune_attention_cpu.json").read_text())["rows"]
    assert len(rows) == 3
    assert rows[0]["contender"] == "128 x 64, 8 warps, 2 stages (shipped)"
    assert rows[0]["difference"] == 0.0
    assert all(row["difference"] < 2e-3 and row["ms"] > 0 for row in rows)
    assert any(row["difference"] > 0.0 for row in rows)  # another shape ran
    with pytest.raises(SystemExit, match="on a CPU the kernels run under TRITON_INTERPRET=1 only"):
        tune_attention.main(device="cpu", out=tmp_path)


def test_the_autotuned_contender_comes_after_all_others() -> None:
    order = [contender.name for _, contender in order_of(cases("gpu"))]
    assert order.count("FlexAttention, autotuned") == 3
    assert set(order[-3:]) == {"FlexAttention, autotuned"}


def test_a_benchmark_out_of_time_says_so_in_each_row(tmp_path: Path, capsys) -> None:
    bench_block.main(device="cpu", quick=True, seconds=0.0, out=tmp_path)
    saved = json.loads((tmp_path / "bench_block_cpu.json").read_text())
    assert {row["not_run"] for row in saved["rows"]} == {"out of time (0 s)"}
    assert "no picture: nothing ran" in capsys.readouterr().out


# The suite.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ending:
        gpu_suite.main(out=tmp_path)
    assert ending.value.exit_code == 2
    assert capsys.readouterr().err == "gpu_suite: torch sees no GPU here; run it on a machine with one\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU here"):
        bench_attention.main(out=tmp_path)


def test_the_suite_ends_within_eight_minutes_and_checks_first() -> None:
    assert sum(part.limit_seconds for part in PARTS) < 8 * 60
    assert PARTS[0].name == "correctness"
    need_no_gpu = {
        "prepare",
        "stream",
        "stream_scale",
        "metrics",
        "export",
        "generate",
        "watching",
        "watch_view",
        "report",
        "seen",
        "restart",
        "step",
        "plan",
        "start",
        "checkpoint",
        "experts",
        "expert_parallel",
        "position_sharing",
        "model_parallel",
    }
    costs = dict(re.findall(r"^    (\w+) +(\d+) ", str(gpu_suite.__doc__), re.MULTILINE))
    assert costs == {part.name: str(part.limit_seconds) for part in PARTS}
    benchmarks = {path.stem for path in (ROOT / "tools").glob("bench_*.py")}
    others = {"hopper", "tune_attention"}
    assert {part.name for part in PARTS[1:]} == benchmarks - {f"bench_{name}" for name in need_no_gpu} | others


def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path) -> None:
    failing = run_part(Part("failing", ("-c", "print('why'); raise SystemExit(3)"), 60, False), tmp_path)
    assert (failing.state, failing.last_lines) == ("failed", ["why"])
    hanging = run_part(Part("hanging", ("-c", "import time; time.sleep(60)"), 1, False), tmp_path)
    assert hanging.state == "out of time (1 s)"
    assert hanging.seconds < 30


def test_the_rows_become_a_table() -> None:
    rows = [
        {"case": "a", "contender": "ours", "both_ms": 1.25},
        {"case": "a", "contender": "other", "not_run": "no GPU"},
    ]
    lines = markdown_of({"rows": rows, "command": "x", "date": "today", "commit": "abc"})
    assert lines[-4:] == [
        "| case | contender | both ms |",
        "|---|---|---|",
        "| a | ours | 1.25 |",
        "| a | other | no GPU |",
    ]


# The long tests.


@pytest.mark.parametrize(("options", "ran"), [([], "test_short"), (["-m", "long"], "test_long")])
def test_long_tests_run_only_when_asked_for(tmp_path: Path, options: list[str], ran: str) -> None:
    lines = ["import pytest", "def test_short(): pass", "@pytest.mark.long", "def test_long(): pass"]
    (tmp_path / "test_both.py").write_text("\n".join(lines))
    pytest_ = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-v"]
    done = subprocess.run([*pytest_, *options, "test_both.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 deselected" in done.stdout
    assert f"{ran} PASSED" in done.stdout


@pytest.mark.parametrize("side", bench_checkpoint.SIDES)
def test_both_sides_of_the_save_benchmark_load_what_they_saved(side: str, tmp_path: Path) -> None:
    facts = bench_checkpoint.SIDES[side](bench_checkpoint.state_of(1), tmp_path)  # asserts the loaded numbers
    assert facts.keys() >= {"next_save_stall_s", "next_save_cpu_s", "save_peak_of_state", "load_cpu_s"}
    assert min(facts.values()) >= 0


def test_a_measured_command_that_fails_ends_the_start_benchmark(tmp_path: Path) -> None:
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    assert bench_start.cpu_seconds(busy, tmp_path) >= 0.2
    with pytest.raises(SystemExit, match="exit code 3\nwhy"):
        bench_start.cpu_seconds([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path)
