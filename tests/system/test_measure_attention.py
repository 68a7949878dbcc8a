"""Measuring the implementations of attention: wrong ones are marked, results are kept. Times mean nothing here."""

import math
from pathlib import Path

import pytest
import torch

from bigmodel.kernels import attention as kernels
from bigmodel.kernels.attention import KERNELS
from bigmodel.kernels.mask import dense
from bigmodel.training.attention_measurements import Shape, add_measured, machine_of, read_measured
from tests.support.tiny_run import write_run
from tools import measure_attention, tune_attention
from tools.bench_attention import Case
from tools.measure_attention import BEGAN, ORDER, case_of, errors_of, measure_implementations

SHAPE = Shape(2, 1, 32, "bfloat16", None, 0, 60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "attention.json"


def measure(file: Path, again: bool = False, ends: float = math.inf) -> list[dict]:
    return list(measure_implementations(SHAPE, "cpu", 1, file, again, ends))


def results(file: Path) -> dict:
    return read_measured(file, machine_of(torch.device("cpu")), SHAPE)


def test_every_implementation_gets_a_result(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(file)
    assert results(file).keys() == KERNELS.keys()
    assert ORDER[-1] == "hopper"
    assert [row["contender"] for row in rows] == [name for name in ORDER for _ in range(2)]
    ours = results(file)["triton"]
    assert "wrong" not in ours
    assert 0 < ours["forward_seconds"] < math.inf
    assert {"out", "dq", "dk", "dv", "with prefixes, out"} <= ours["errors"].keys()
    assert all(error <= bound for error, bound in ours["errors"].values())
    assert "not_run" in results(file)["torch-varlen"]
    assert "1 of 4: triton, 2 heads on 1 of 32 channels, bfloat16" in capsys.readouterr().out


def test_a_wrong_implementation_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = kernels.attention_reference
    assert errors_of("triton", SHAPE, "cpu")[1] == ""
    monkeypatch.setattr(kernels, "attention_reference", lambda *rows: reference(*rows) * 1.02)
    errors, wrong = errors_of("triton", SHAPE, "cpu")
    assert wrong.startswith("out: error ")
    assert errors["out"][0] > errors["out"][1]


def test_bits_that_change_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, calls = kernels.attention_reference, []

    def drifting(*rows):
        calls.append(1)
        return reference(*rows) * (1 + 0.004 * (len(calls) % 2))  # half a rounding of bf16

    monkeypatch.setattr(kernels, "attention_reference", drifting)
    assert errors_of("triton", SHAPE, "cpu")[1] == "out: other bits in a second run"


def test_an_ended_measurement_goes_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(torch.device("cpu"))
    assert measure(file, ends=0.0) == []
    add_measured(
        file, machine, SHAPE, "triton", {"forward_seconds": 0.5, "backward_seconds": 0.5, "errors": {"out": [1, 2]}}
    )

    def interrupted(*_rest):
        assert results(file)["flash-attn"] == {"not_run": BEGAN}  # what a kill would leave
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measure_attention, "measured", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(file)
    assert results(file).keys() == {"triton"}
    measure(file)
    assert results(file).keys() == KERNELS.keys()
    assert results(file)["triton"]["forward_seconds"] == 0.5
    measure(file, again=True)
    assert results(file)["triton"]["forward_seconds"] != 0.5


def test_a_case_has_the_mask_of_its_shape() -> None:
    case = case_of(SHAPE._replace(left=4, right=4))
    assert sum(case.lengths) == 60
    assert case.pairs == int(dense(case.mask("cpu"), 60, 60).sum())
    assert Case("", (5,), left=1, both_ways=True).pairs == 13


def test_a_run_without_a_choice_is_one_line(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, tmp_path, precision="fp32")
    with pytest.raises(tune_attention.UserError, match=r"nothing to measure, triton computes its attention: .*fp32"):
        tune_attention.shapes_of_run(run_file, [], 1)
    assert tune_attention.shapes_of_run(write_run(tmp_path, tmp_path, precision="bf16"), [], 2) == [
        Shape(4, 2, 8, "bfloat16", None, 0, 96)
    ]
