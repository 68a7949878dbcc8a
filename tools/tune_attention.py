"""Timing of attention on a GPU: the implementations, for `training.attention_kernel = "fastest"`, and tile shapes.

    python -m tools.tune_attention RUN.toml                                         # on the GPU, for a run
    python -m tools.tune_attention                                                  # a usual shape, and tiles
    TRITON_INTERPRET=1 python -m tools.tune_attention --device cpu --quick          # smoke test; times mean nothing

First every implementation (`tools/measure_attention.py`), at the shapes of the run file or of the case with a target:
packed lognormal documents, 32 heads on 8 of 128, 64 and 256 channels. Results are kept by device, versions and shape in
~/.cache/bigmodel/attention.json; the same command goes on where it was ended, and `--again` measures again.

Then, without a run file, tiles. A row is one shape (rows x columns, warps, stages) of one kernel: milliseconds of the
whole forward or backward with the other kernels as shipped, TFLOP/s on visible pairs, and the relative difference of
the output from that of the shipped shape. The winner is copied by hand into TILE_SHAPES of kernels/attention.py if it
also compiles without spilling (`python -m tests.support.compile_kernels`); all results stay in the record.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import UserError, load_settings
from bigmodel.kernels import attention as kernels
from bigmodel.kernels.triton_import import INTERPRETED
from bigmodel.training.attention_kernel import not_choosable, shapes_of
from bigmodel.training.attention_measurements import Shape, measurements_file
from tools.bench_attention import Case
from tools.measure import REPEATS, Record, Row, check_device, milliseconds, relative_error, sizes
from tools.measure_attention import Work, case_of, measure_implementations

Tiles = tuple[int, int, int, int]
# The shipped shape is first in each list. Shapes that may spill or not fit are kept: a GPU decides.
CANDIDATES: dict[str, list[Tiles]] = {
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


def shapes_of_tiles(kernel: str, width: int) -> list[Tiles]:
    """The shipped shape, then the candidates."""
    shipped = kernels.TILE_SHAPES[kernel, width]
    return [shipped, *(shape for shape in CANDIDATES[kernel] if shape != shipped)]


def measure(work: Work, case: Case, kernel: str, shape: Tiles, exact: list[Tensor], device: str, repeats: int) -> Row:
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


def shapes_of_run(run_file: Path, overrides: Sequence[str], ranks: int) -> list[Shape]:
    """Raises `UserError` for a run file that is wrong, or whose attention has no other implementation."""
    effective, settings = resolve_deepspeed(load_settings(run_file, overrides), ranks)
    if problem := not_choosable(settings):
        raise UserError(f"{run_file}: nothing to measure, triton computes its attention: {problem}")
    return list(shapes_of(settings, effective["train_micro_batch_size_per_gpu"]))


def tune_tiles(case: Case, device: str, repeats: int, only: str, quick: bool, ends: float) -> Iterator[Row]:
    """A row per shape of tiles of each kernel whose name contains `only`. ends: by time.monotonic."""
    work = Work(case, device)
    for kernel in CANDIDATES:
        if only not in kernel:
            continue
        shipped, *others = shapes_of_tiles(kernel, case.channels)[: 3 if quick else None]
        shipped_tables = dict(kernels.TILE_SHAPES), dict(kernels.TILE_SHAPES_IN_99_KB)
        exact = work.forward(0) if kernel == "forward" else work.backward(0)
        for shape in (shipped, *others):
            label = "{} x {}, {} warps, {} stages".format(*shape) + (" (shipped)" if shape == shipped else "")
            row: Row = {"case": f"{kernel}, {case.name}", "contender": label}
            if time.monotonic() > ends:
                yield row | {"not_run": "out of time"}
            else:
                yield row | measure(work, case, kernel, shape, exact, device, repeats)
        for table, before in zip((kernels.TILE_SHAPES, kernels.TILE_SHAPES_IN_99_KB), shipped_tables, strict=True):
            table.update(before)


def main(
    run_file: Annotated[Path | None, typer.Argument(help="run file: only its shapes, and no tiles")] = None,
    override: Annotated[list[str], typer.Option("--set", help="section.key=value, over the run file")] = [],  # noqa: B006
    ranks: Annotated[int, typer.Option(min=1, help="of the run; may decide its micro-batch")] = 1,
    device: Annotated[str, typer.Option(help="cuda, or cpu under TRITON_INTERPRET=1")] = "cuda",
    cache: Annotated[Path | None, typer.Option(help="file of the measurements; training reads the default")] = None,
    again: Annotated[bool, typer.Option(help="measure implementations with a result again")] = False,
    quick: Annotated[bool, typer.Option(help="a tiny case and few repeats, as a smoke test")] = False,
    only: Annotated[str, typer.Option(help="only tiles of kernels whose name contains this")] = "",
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks"),
) -> None:
    """Time every implementation, then every shape of tiles of every kernel; each row is written at once."""
    check_device(device)
    if device == "cpu" and not INTERPRETED:
        raise SystemExit("--device cpu: on a CPU the kernels run under TRITON_INTERPRET=1 only")
    ends, size, file = time.monotonic() + seconds, sizes(device, quick), cache or measurements_file()
    total, heads = (16_384, (32, 8)) if size == "gpu" else (100, (1, 1))
    dtype = "float16" if INTERPRETED else "bfloat16"
    shapes = [Shape(*heads, width, dtype, None, 0, total) for width in WIDTHS[size]]
    try:
        if run_file:
            shapes = shapes_of_run(run_file, override, ranks)
        record = Record(out, "tune_attention" if device == "cuda" else "tune_attention_cpu", device)
        for shape in shapes:
            for row in () if only else measure_implementations(shape, device, REPEATS[size], file, again, ends):
                record.add(row)
            case = replace(case_of(shape), name=f"{shape.channels} channels")
            for row in () if run_file else tune_tiles(case, device, REPEATS[size], only, quick, ends):
                record.add(row)
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    record.show(["case", "contender", "ms", "tflops", "difference", "share_of_bound"])
    print(record.path, "" if only else f"and {file}")


if __name__ == "__main__":
    typer.run(main)
