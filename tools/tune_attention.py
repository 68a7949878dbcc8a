"""Timing of tile shapes for the attention kernels on a GPU, compared with the shipped shapes.

    python -m tools.tune_attention                                                  # on the GPU
    TRITON_INTERPRET=1 python -m tools.tune_attention --device cpu --quick          # smoke test; times mean nothing

A row is one shape (rows x columns, warps, stages) of one kernel: milliseconds of the whole forward or backward with
the other kernels as shipped, TFLOP/s on visible pairs, and the relative difference of the output from that of the
shipped shape. The case is the one with a target: packed lognormal documents, 32 heads on 8. Shapes are tried for 128
channels, then 64, then 256; before them, with the shipped shapes, every implementation of attention that covers the
case (`training.attention_kernel`). The winner is copied by hand into TILE_SHAPES of kernels/attention.py if it also
compiles without spilling (`python -m tests.support.compile_kernels`); all results stay in the record.
"""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bigmodel.kernels import attention as kernels
from bigmodel.kernels.attention import KERNELS, attention, make_tile_metadata
from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.attention_libraries import LIBRARIES, missing
from bigmodel.kernels.triton_import import INTERPRETED
from tools.bench_attention import Case, lognormal_lengths, packed_inputs
from tools.measure import REPEATS, Record, Row, check_device, milliseconds, relative_error, sizes

Shape = tuple[int, int, int, int]
# The shipped shape is first in each list. Shapes that may spill or not fit are kept: a GPU decides.
CANDIDATES: dict[str, list[Shape]] = {
    "forward": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3),
        (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (64, 32, 8, 2),
    ],
    "query_gradient": [
        (128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2),
        (64, 32, 4, 3), (64, 128, 8, 1), (32, 64, 4, 2),
    ],
    "key_gradient": [
        (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2),
        (64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 4, 2),
    ],
}  # fmt: skip
WIDTHS = {"gpu": (128, 64, 256), "cpu": (64,), "quick": (64,)}


def shapes_of(kernel: str, width: int) -> list[Shape]:
    """The shipped shape, then the candidates."""
    shipped = kernels.TILE_SHAPES[kernel, width]
    return [shipped, *(shape for shape in CANDIDATES[kernel] if shape != shipped)]


class Work:
    """One case, forward and backward."""

    def __init__(self, case: Case, device: str, kernel: str = "triton") -> None:
        dtype = torch.float16 if INTERPRETED else torch.bfloat16
        mask = case.mask(device)
        tile_metadata = make_tile_metadata(mask, sum(case.lengths), sum(case.keys))
        self.attend = partial(attention, mask=mask, tile_metadata=tile_metadata, kernel=kernel)
        self.sets = [packed_inputs(case, dtype, device, seed) for seed in range(3)]
        for one in self.sets:
            one[:3] = [rows.requires_grad_() for rows in one[:3]]
        (q, k, v, _), scale = self.sets[0], case.channels**-0.5
        self.refusal = KERNELS[kernel].refusal(AttentionCall(q, k, v, mask, tile_metadata, scale, None, None, None))
        self.outs = [self.attend(q, k, v) for q, k, v, _ in self.sets]

    def forward(self, number: int) -> list[Tensor]:
        q, k, v, _ = self.sets[number]
        with torch.no_grad():
            return [self.attend(q, k, v)]

    def backward(self, number: int) -> list[Tensor]:
        q, k, v, d_out = self.sets[number]
        return list(torch.autograd.grad(self.outs[number], (q, k, v), d_out, retain_graph=True))


def measure(work: Work, case: Case, kernel: str, shape: Shape, exact: list[Tensor], device: str, repeats: int) -> Row:
    """The row of one shape; it is put into the tables while it is measured."""
    call, factor = (work.forward, 1.0) if kernel == "forward" else (work.backward, 2.5)
    for table in (kernels.TILE_SHAPES, kernels.TILE_SHAPES_OF_BLACKWELL, kernels.TILE_SHAPES_IN_99_KB):
        table[kernel, case.channels] = shape
    try:
        difference = relative_error(call(0), exact)
        took = milliseconds(call, device, repeats)
        return {"ms": took, "tflops": factor * case.flops / took / 1e9, "difference": difference}
    except Exception as error:  # too much shared memory, or too few rows for the warps: recorded in its row
        return {"not_run": f"refuses: {str(error).strip().splitlines()[0][:90]}"}


def implementations(case: Case, device: str, repeats: int) -> list[Row]:
    """A row for the forward and one for the backward of each implementation; differences are from ours."""
    rows: list[Row] = []
    ours = Work(case, device)
    for part, factor in (("forward", 1.0), ("backward", 2.5)):
        exact = getattr(ours, part)(0)
        for name in KERNELS:
            row: Row = {"case": f"{part}, {case.name}", "contender": name}
            if name in LIBRARIES and (reason := missing(name)):
                rows.append(row | {"not_run": reason})
                continue
            work = Work(case, device, name)
            if work.refusal:
                rows.append(row | {"not_run": work.refusal})
                continue
            call = getattr(work, part)
            took = milliseconds(call, device, repeats)
            result = {
                "ms": took,
                "tflops": factor * case.flops / took / 1e9,
                "difference": relative_error(call(0), exact),
            }
            rows.append(row | result)
    return rows


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu under TRITON_INTERPRET=1")] = "cuda",
    quick: Annotated[bool, typer.Option(help="a tiny case and few repeats, as a smoke test")] = False,
    only: Annotated[str, typer.Option(help="only kernels whose name contains this")] = "",
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks"),
) -> None:
    """Time every shape of every kernel; each row is written at once."""
    check_device(device)
    if device == "cpu" and not INTERPRETED:
        raise SystemExit("--device cpu: on a CPU the kernels run under TRITON_INTERPRET=1 only")
    started = time.monotonic()
    size = sizes(device, quick)
    record = Record(out, "tune_attention" if device == "cuda" else "tune_attention_cpu", device)
    total, heads = (16_384, (32, 8)) if size == "gpu" else (100, (1, 1))
    for width in WIDTHS[size]:
        case = Case(f"{width} channels", lognormal_lengths(total, min(1_000, total // 2), 1), heads, width)
        for measured in implementations(case, device, REPEATS[size]) if not only else ():
            record.add(measured)
        work = Work(case, device)
        for kernel in CANDIDATES:
            if only not in kernel:
                continue
            shipped, *others = shapes_of(kernel, width)[: 3 if quick else None]
            shipped_tables = dict(kernels.TILE_SHAPES), dict(kernels.TILE_SHAPES_IN_99_KB)
            exact = work.forward(0) if kernel == "forward" else work.backward(0)
            for shape in (shipped, *others):
                label = "{} x {}, {} warps, {} stages".format(*shape) + (" (shipped)" if shape == shipped else "")
                row: Row = {"case": f"{kernel}, {case.name}", "contender": label}
                if time.monotonic() - started > seconds:
                    record.add(row | {"not_run": f"out of time ({seconds:.0f} s)"})
                else:
                    record.add(row | measure(work, case, kernel, shape, exact, device, REPEATS[size]))
            for table, before in zip((kernels.TILE_SHAPES, kernels.TILE_SHAPES_IN_99_KB), shipped_tables, strict=True):
                table.update(before)
    record.show(["case", "contender", "ms", "tflops", "difference"])
    print(record.path)


if __name__ == "__main__":
    typer.run(main)
