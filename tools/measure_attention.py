"""Time and error of each implementation of attention at a shape, kept for `training.attention_kernel = "fastest"`.

In: shapes. Out: results in the file of `bigmodel.training.attention_measurements`, written one by one, so an ended run
goes on where it was. Documents are lognormal with a mean of 1,000 tokens. Errors are those of tests/gpu on a batch of
1,000 tokens: against float64, with the shape's mask and with prefixes, and bits that repeat.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.kernels.attention import KERNELS, attention, make_tile_metadata
from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.attention_libraries import LIBRARIES, missing
from bigmodel.kernels.mask import AttentionMask, prefix_lm
from bigmodel.kernels.triton_import import INTERPRETED
from bigmodel.training.attention_measurements import Shape, add_measured, machine_of, problem_of, read_measured
from tests.support.dense_attention import errors_and_bounds, make_inputs, out_and_gradients, problem_of_results
from tools.bench_attention import Case, lognormal_lengths, offsets_of, packed_inputs
from tools.measure import Row, milliseconds

# Hopper's last: what it breaks on a GPU for the rest of a process breaks no other implementation.
ORDER = sorted(KERNELS, key=lambda name: name == "hopper")
LENGTHS = [0, 1, 700, 0, 129, 3, 128, 40, 0] if not INTERPRETED else [0, 1, 30, 0, 7]
REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
BEGAN = "was begun and did not end; --again measures it again"


class Work:
    """One case, forward and backward."""

    def __init__(self, case: Case, device: str, kernel: str = "triton", dtype: torch.dtype | None = None) -> None:
        dtype = dtype or (torch.float16 if INTERPRETED else torch.bfloat16)
        mask = case.mask(device)
        tile_metadata = make_tile_metadata(mask, sum(case.lengths), sum(case.keys))
        self.attend = partial(attention, mask=mask, tile_metadata=tile_metadata, kernel=kernel)
        self.sets = [packed_inputs(case, dtype, device, seed) for seed in range(3)]
        for one in self.sets:
            one[:3] = [rows.requires_grad_() for rows in one[:3]]
        (q, k, v, _), scale = self.sets[0], case.channels**-0.5
        self.refusal = KERNELS[kernel].refusal(AttentionCall(q, k, v, mask, tile_metadata, scale, None, None, None))
        self.outs = [] if self.refusal else [self.attend(q, k, v) for q, k, v, _ in self.sets]

    def forward(self, number: int) -> list[Tensor]:
        q, k, v, _ = self.sets[number]
        with torch.no_grad():
            return [self.attend(q, k, v)]

    def backward(self, number: int) -> list[Tensor]:
        q, k, v, d_out = self.sets[number]
        return list(torch.autograd.grad(self.outs[number], (q, k, v), d_out, retain_graph=True))


def case_of(shape: Shape) -> Case:
    lengths = lognormal_lengths(shape.tokens, max(1, min(1_000, shape.tokens // 2)), 1)
    heads = shape.heads, shape.key_heads
    return Case(str(shape), lengths, heads, shape.channels, shape.left, both_ways=shape.right != 0)


def measure_implementations(
    shape: Shape, device: str, repeats: int, file: Path, again: bool, ends: float
) -> Iterator[Row]:
    """A row for the forward and one for the backward of each implementation, as soon as it is measured.

    `again`: also of those with a result in `file`. ends: by time.monotonic; none is begun later. Ends the program if an
    implementation has broken the GPU.
    """
    machine = machine_of(torch.device(device))
    known = {} if again else read_measured(file, machine, shape)
    for number, name in enumerate(ORDER, start=1):
        print(f"{number} of {len(ORDER)}: {name}, {shape}{': measured before' if name in known else ''}", flush=True)
        if name not in known and time.monotonic() > ends:
            print("out of time; the same command goes on from here")
            return
        if name not in known:
            add_measured(file, machine, shape, name, {"not_run": BEGAN})  # a hang or a crash leaves it
            try:
                known[name] = measured(name, shape, device, repeats)
            except KeyboardInterrupt:
                add_measured(file, machine, shape, name, None)
                raise
            add_measured(file, machine, shape, name, known[name])
        yield from rows_of(name, known[name], case_of(shape))
        _require_sound(name, device)


def measured(name: str, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """The result of one implementation, as in `bigmodel.training.attention_measurements`."""
    if name in LIBRARIES and (reason := missing(name)):
        return {"not_run": reason}
    try:
        work = Work(case_of(shape), device, name, getattr(torch, shape.dtype))
        if work.refusal:
            return {"not_run": work.refusal}
        errors, wrong = errors_of(name, shape, device)
        times = {part: milliseconds(getattr(work, part), device, repeats) / 1e3 for part in ("forward", "backward")}
    except Exception as error:  # of an implementation: it is recorded; the others go on
        return {"not_run": f"refuses: {(str(error).strip() or type(error).__name__).splitlines()[0][:90]}"}
    result: dict[str, Any] = {f"{part}_seconds": seconds for part, seconds in times.items()}
    return result | {"errors": errors} | ({"wrong": wrong} if wrong else {})


def errors_of(name: str, shape: Shape, device: str) -> tuple[dict[str, tuple[float, float]], str]:
    """Errors with their bounds, by the rule of tests/gpu, and what is wrong, if anything."""
    with _exact_products():
        cu_seqlens = offsets_of(tuple(LENGTHS), device)
        left, right = (None if side is None else min(side, 200) for side in (shape.left, shape.right))
        masks = {"": AttentionMask(cu_seqlens, cu_seqlens, left=left, right=right)}
        if right == 0:
            prefixes = torch.tensor([length // 2 for length in LENGTHS], dtype=torch.int32, device=device)
            masks["with prefixes, "] = prefix_lm(cu_seqlens, prefixes, left)
        rows, group = sum(LENGTHS) + 23, shape.heads // shape.key_heads
        heads = (2 * group, 2) if shape.key_heads > 1 else (group, 1)
        errors: dict[str, tuple[float, float]] = {}
        for kind, mask in masks.items():
            inputs = make_inputs(mask, rows, rows, heads, shape.channels, getattr(torch, shape.dtype))
            ours, again = (out_and_gradients(partial(attention, kernel=name), inputs) for _ in range(2))
            errors |= {f"{kind}{part}": pair for part, pair in errors_and_bounds(ours, inputs).items()}
            problem = problem_of_results(ours, inputs)
            changed = [part for part in ours if not torch.equal(ours[part], again[part])]
            if problem or changed:
                return errors, kind + (problem or f"{changed[0]}: other bits in a second run")
    return errors, ""


@contextmanager
def _exact_products() -> Iterator[None]:
    """Plain torch, which gives the bounds, without TF32 and without sums in 16 bits."""
    switches, names = torch.backends.cuda.matmul, ("allow_tf32", *REDUCED)
    before = [getattr(switches, name) for name in names]
    for name in names:
        setattr(switches, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(switches, name, value)


def rows_of(name: str, result: dict[str, Any], case: Case) -> Iterator[Row]:
    for part, factor in (("forward", 1.0), ("backward", 2.5)):
        row: Row = {"case": f"{part}, {case.name}", "contender": name}
        if problem := problem_of(result):
            row["not_run"] = f"wrong: {problem}" if "wrong" in result else problem
        if seconds := result.get(f"{part}_seconds"):
            row |= {"ms": seconds * 1e3, "tflops": factor * case.flops / seconds / 1e12}
            row["share_of_bound"] = max(error / bound for error, bound in result["errors"].values())
        yield row


def _require_sound(name: str, device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"{name} has broken this process's GPU ({reason}); the same command measures the rest"
        ) from None
