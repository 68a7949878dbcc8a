"""The static model of the attention kernels: the instructions of their loops stay below the ceilings that were reached.

The ceilings are a few instructions above Triton 3.7.1: a compiler that loses registers, asynchronous copies or the
comparison with constants is seen here; speed is not.
"""

import json
from pathlib import Path

import pytest

from tests.support.interpreted import run_python
from tools.kernel_model import class_of, inner_loops, products


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kernel", "channels", "full", "masked"),
    [("forward", 64, 450, 605), ("forward", 128, 345, 435), ("key_gradient", 128, 340, 450)],
)
def test_a_loop_needs_no_more_instructions_than_its_ceiling(kernel, channels, full, masked, tmp_path: Path) -> None:
    options = ["--only", kernel, "--channels", str(channels), "--out", str(tmp_path), "--no-plain"]
    run_python(["-m", "tools.kernel_model", *options], interpret=False)
    rows = json.loads((tmp_path / "kernel_model.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["full", "masked"]
    assert rows[0]["instructions"] <= full
    assert rows[1]["instructions"] <= masked
    for row in rows:
        assert row["stack_bytes"] == 0
        assert row["stages"] >= 2
        assert row["classes"]["copies"] >= 4
        assert "global memory" not in row["classes"]  # tiles come through asynchronous copies
        assert 0 < row["share_of_peak"] <= 1


SASS = """
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT ;
        /*0030*/              @!P0 MUFU.EX2 R3, R4 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R8, R4, gdesc[UR4].tnspB, R8 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   BRA 0x80 ;
"""


def test_the_innermost_loop_with_products_is_found_and_counted() -> None:
    (loop,) = inner_loops(SASS)
    assert [class_of(text) for text in loop] == ["tensor core", "exponential", "tensor core", "integers"]
    # 64*64*16 / 2048 = 32 cycles, as many as its 4,096 bytes of shared memory; 64*128*16 / 2048 = 64
    assert products(loop) == (96.0, 96.0)
    narrow = products(["HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], RZ"])
    assert narrow == (16.0, 24.0)  # (2*64*16 + 2*32*16) / 128 bytes
