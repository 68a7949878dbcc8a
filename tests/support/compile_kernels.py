"""Compiles the shipped kernels of attention and tile metadata for Ampere, Hopper and Blackwell without a GPU, and
prints their resources.

    kernel  architecture  type  channels  score | registers  stack bytes  shared bytes

A kernel that spills registers to memory has a stack. Run by test_attention.py and `python -m
tests.support.compile_kernels`. Numbers choose architectures: `compile_kernels 90`. With the argument `variants` it
prints, for each kernel, the number of compilations on a GPU for very different batches."""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bigmodel.kernels import attention
from bigmodel.kernels import tiles as tile_metadata
from bigmodel.kernels.mask import causal, prefix_lm
from bigmodel.kernels.tiles import tile_tables_reference
from tests.kernels.test_mask import int32, offsets_of

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSORS = {"q", "k", "v", "out", "d_out", "dq", "dk", "dv"}
POINTERS = {"lse": "*fp32", "largest": "*fp32", "delta": "*fp32", "bias": "*fp32", "d_bias": "*fp32", "tiles": "*i32"}
POINTERS |= {"query_words": "*i32", "key_words": "*i32"}
# A bias with a reach of 128 positions, as in T5. Cap or bias alone takes fewer registers than both.
# "all" also has dropout. "measured" writes the largest products.
SCORES = {
    "plain": {"REACH": -1, "CAPPED": False},
    "windowed": {"REACH": -1, "CAPPED": False},
    "measured": {"REACH": -1, "CAPPED": False},
    "both": {"REACH": 128, "CAPPED": True},
    "drops": {"REACH": -1, "CAPPED": False},
    "all": {"REACH": 128, "CAPPED": True},
}
WITH_DROPOUT = ("drops", "all")
PLAIN = ("forward", "query_gradient", "key_gradient")
SCHEDULE = ("plan", "order")
KERNELS = ("forward", "delta", "query_gradient", "key_gradient", "bias_gradient")
ARCHITECTURES = (80, 90, 100)
# Every kernel in every shape for bf16, some for the other types. The argument `all` adds the rest.
CONFIGURATIONS = [
    *product((100, 90, 80), ("bf16",), (64, 128, 256), ("plain",), PLAIN),
    *product((100, 90, 80), ("bf16",), (64, 128, 256), ("both",), (*PLAIN, "bias_gradient")),
    *product((100, 90, 80), ("bf16",), (128,), ("windowed", "drops"), PLAIN),
    *product((100, 90, 80), ("bf16",), (64, 128), ("measured",), ("forward",)),
    *product((100, 80), ("bf16",), (64,), ("drops",), PLAIN),
    *product((100, 90, 80), ("bf16",), (64,), ("all",), (*PLAIN, "bias_gradient")),
    *product((100, 80), ("bf16",), (128,), ("all",), PLAIN),
    *product(ARCHITECTURES, ("bf16",), (64, 128, 256), ("plain",), ("delta",)),
    *product(ARCHITECTURES, ("int32",), (0,), ("prefixes",), SCHEDULE),
    *product((80,), ("fp16",), (128,), ("plain",), PLAIN),
    *product((80,), ("fp32",), (64,), ("plain",), ("key_gradient",)),
]
OTHERS = [
    *product(ARCHITECTURES, ("bf16",), (256,), ("drops",), PLAIN),
    *product(ARCHITECTURES, ("bf16",), (256,), ("all",), (*PLAIN, "bias_gradient")),
    *product(ARCHITECTURES, ("fp16",), (64, 128, 256), ("plain",), PLAIN),
    *product(ARCHITECTURES, ("int32",), (0,), ("plain",), SCHEDULE),
    *product((80, 90), ("fp32",), (64, 128, 256), ("plain",), PLAIN),
    *product((90,), ("fp32",), (64, 128, 256), ("both",), (*PLAIN, "bias_gradient")),
]


def compiled_schedule(name: str, architecture: int, score: str):
    """The compiled kernel of the tile metadata, with or without prefixes."""
    kernel = getattr(tile_metadata, f"{name}_kernel")
    constants: dict[str, Any] = {
        "BLOCK": tile_metadata.TILE_ROWS,
        "SLOTS": tile_metadata.SLOTS,
        "AT_ONCE": tile_metadata.AT_ONCE,
    }
    if score == "plain":
        constants |= {"query_prefix": None, "key_prefix": None}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    numbers = ("left", "right", "num_queries", "num_keys", "num_documents", "query_tiles", "key_tiles")
    signature = {argument: "i32" if argument in numbers else "*i32" for argument in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, {})
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": tile_metadata.NUM_WARPS})


def compiled(name: str, architecture: int, dtype: str, channels: int, score: str):
    """The kernel for 32 query heads on 16, compiled as for a launch with aligned tensors."""
    if name in SCHEDULE:
        return compiled_schedule(name, architecture, score)
    kernel = getattr(attention, f"{name}_kernel")
    shape = attention.launch_options(
        name.replace("delta", "query_gradient"),
        channels,
        TYPES[dtype],
        128,
        architecture,
        bool(SCORES[score]["REACH"] >= 0 or SCORES[score]["CAPPED"]),
        score in WITH_DROPOUT,
    )
    if name == "delta":
        shape["ROWS"] = min(shape["ROWS"], attention.DELTA_ROWS)
    strides = {"q_stride": 32, "k_stride": 16, "v_stride": 16, "d_out_stride": 32} if name != "delta" else {}
    constants = (
        {"GROUP": 2, "WINDOWED": score == "windowed"}
        | {key: heads * channels for key, heads in strides.items()}
        | SCORES[score]
        | shape
    )
    if SCORES[score]["REACH"] < 0:
        constants["bias"] = None
    if score != "measured":
        constants["largest"] = None
    if score not in WITH_DROPOUT:
        constants |= {"query_words": None, "key_words": None}
    if name == "bias_gradient":
        constants["LANES"] = triton.next_power_of_2(2 * (triton.cdiv(128, shape["ROWS"]) + 1) + 1)
    options = {} if name == "delta" else {key: shape[key] for key in ("num_warps", "num_stages")}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = f"*{dtype}" if argument in TENSORS else POINTERS.get(argument)
        signature[argument] = pointer or ("fp32" if argument.startswith(("scale", "cap", "factor")) else "i32")
        if pointer or argument.endswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found.group(1)), int(found.group(2))


def row(architecture: int, dtype: str, channels: int, score: str, name: str) -> str:
    kernel = compiled(name, architecture, dtype, channels, score)
    registers, stack = usage(kernel.asm["cubin"])
    configuration = f"{name:15} sm_{architecture:<4} {dtype:5} {channels:4} {score:8}"
    return f"{configuration} | {registers:4} {stack:4} {kernel.metadata.shared:7}"


def print_usage(configurations: list[tuple]) -> None:
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("fork")) as pool:  # there are no threads yet
        for line in pool.map(row, *zip(*configurations, strict=True)):
            print(line, flush=True)


class Launches:
    """In place of a kernel: runs nothing and records the cache keys that a launch on a GPU would look up."""

    def __init__(self, kernel: Any) -> None:
        self.specialize = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        self.keys: set[str] = set()

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.keys.add(str(self.specialize(*arguments, **options)[1:]))


def print_variants() -> None:
    kernels = {f"{name}_kernel": Launches(getattr(attention, f"{name}_kernel")) for name in KERNELS}
    vars(attention).update(kernels)
    of_schedule = {f"{name}_kernel": Launches(getattr(tile_metadata, f"{name}_kernel")) for name in SCHEDULE}
    vars(tile_metadata).update(of_schedule)
    one_long, many_short, windowed = offsets_of([64]), offsets_of([1] * 63), offsets_of([5, 1, 30])
    for mask, num_rows in ((causal(one_long), 64), (causal(many_short), 63), (causal(windowed, left=1), 37),
                                 (prefix_lm(windowed, int32([1, 0, 9]), left=16), 36)):  # fmt: skip
        tables = tile_tables_reference(mask, num_rows, num_rows, 128)
        no_prefix = torch.zeros(mask.num_documents, dtype=torch.int32)
        prefixes = no_prefix, no_prefix if mask.key_prefix is None else mask.key_prefix
        with suppress(RuntimeError):  # no kernel wrote whether the cu_seqlens fit
            tile_metadata.tile_tables(mask.cu_seqlens_q, mask.cu_seqlens_k, *prefixes, *mask.window,
                                 num_rows, num_rows, 128)  # fmt: skip
        fused = torch.zeros(num_rows, 4, 64, dtype=torch.bfloat16)
        rows = [part.requires_grad_() for part in fused.split([2, 1, 1], dim=1)]
        bias_HR = torch.zeros(2, 9, requires_grad=True)
        out_THK, _ = attention.attention_op(*rows, bias_HR, None, None, *tables, *mask.window, 0.125, None, 128)
        out_THK.sum().backward()
    for name, launches in (kernels | of_schedule).items():
        print(name, len(launches.keys))


if __name__ == "__main__":
    if sys.argv[1:] == ["variants"]:
        print_variants()
    else:
        chosen = [int(word) for word in sys.argv[1:] if word.isdecimal()] or ARCHITECTURES
        print_usage([one for one in CONFIGURATIONS + OTHERS * ("all" in sys.argv) if one[0] in chosen])
