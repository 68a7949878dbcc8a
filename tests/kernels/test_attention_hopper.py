"""The forward for Hopper: under the interpreter in its own process, as compiled, and the calls that it leaves."""

import json
from pathlib import Path

import pytest
import torch

from bigmodel.kernels import attention_hopper
from bigmodel.kernels.attention import KERNELS
from bigmodel.kernels.attention_dropout import make_dropout
from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.mask import causal
from bigmodel.kernels.tiles import make_tile_metadata
from tests.kernels.test_mask import offsets_of
from tests.support.interpreted import run_interpreted, run_python


@pytest.mark.timeout(900)
def test_the_kernel_passes_its_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/support/interpreted_attention_hopper.py") == 10


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("channels", "most"), [(128, 380), pytest.param(64, 550, marks=pytest.mark.long)])
def test_it_compiles_with_specialized_warps_below_its_ceiling(channels: int, most: int, tmp_path: Path) -> None:
    options = ["--only", "hopper", "--channels", str(channels), "--out", str(tmp_path)]
    run_python(["-m", "tools.kernel_model", *options], interpret=False)
    (row,) = json.loads((tmp_path / "kernel_model.json").read_text())["rows"]
    assert row["loop"] == "every"
    assert row["is_specialized"]  # Triton drops the specialization of a loop that it cannot split, without a word
    assert row["stack_bytes"] == 0
    assert row["shared_bytes"] <= 232_448
    assert row["instructions"] <= most
    assert "copies" not in row["classes"]  # they are the producer's
    assert "global memory" not in row["classes"]


def call(channels: int = 64, dtype: torch.dtype = torch.bfloat16, block: int = 128, rows: int = 4, **changed):
    mask = causal(offsets_of([rows]))
    tensor = torch.zeros(rows, 2, channels, dtype=dtype)
    plain = {"scale": 1.0, "softcap": None, "bias_HR": None, "dropout": None}
    made = make_tile_metadata(mask, rows, rows, block)
    return AttentionCall(tensor, tensor, tensor, mask, made, **(plain | changed))


DROPS = make_dropout(0.5, torch.arange(4), torch.arange(4))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (call(), None),
        (call(channels=128, dtype=torch.float16), None),
        (call(softcap=2.0), "it has no cap, bias and dropout"),
        (call(bias_HR=torch.zeros(2, 3)), "it has no cap, bias and dropout"),
        (call(dropout=DROPS), "it has no cap, bias and dropout"),
        (call(dtype=torch.float32), "it needs one of (torch.bfloat16, torch.float16), not torch.float32"),
        (call(channels=96), "it needs 64 or 128 channels a head, not 96"),
        (call(block=64), "it needs tiles of 128 rows, not 64"),
        (call(rows=0), "it needs queries and keys"),
    ],
)
def test_it_leaves_what_it_does_not_cover(made: AttentionCall, reason: str | None) -> None:
    assert KERNELS["hopper"].refusal(made) == reason


def test_other_architectures_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    made = call()._replace(q_THK=call().q_THK.as_subclass(OnGpu))
    for capability, reason in (((8, 0), "it needs Hopper (sm_90)"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert attention_hopper.refusal(made) == reason
