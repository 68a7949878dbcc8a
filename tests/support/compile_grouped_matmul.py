"""Compiles the shipped kernels of grouped matrix products for Ampere, Hopper and Blackwell without a GPU, and prints
their resources.

    kernel  architecture  type  sizes | registers  stack bytes  shared bytes  asynchronous copies

A kernel that spills registers to memory has a stack. Run by test_grouped_matmul.py and
`python -m tests.support.compile_grouped_matmul`. Numbers choose architectures: `compile_grouped_matmul 90`.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigmodel.kernels.grouped_matmul import TOGETHER, launch_options, product_kernel, weight_gradient_kernel
from tests.support.compile_kernels import usage

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"even": (4_096, 1_536), "odd": (2_056, 1_000)}  # inputs, outputs
EXPERTS = 128


def compiled(name: str, architecture: int, dtype: str, sizes: str) -> Any:
    """The kernel, compiled as for a launch with aligned tensors. `turned`: the product of the forward pass."""
    kernel = weight_gradient_kernel if name == "weight_gradient" else product_kernel
    options = launch_options("weight_gradient" if name == "weight_gradient" else "product", TYPES[dtype], architecture)
    inner, outer = SIZES[sizes]
    constants = {"INNER": inner, "OUTER": outer} | {key: options[key] for key in ("ROWS", "COLUMNS", "STEP")}
    if kernel is product_kernel:
        constants |= {"TURNED": name == "turned", "EXPERTS": EXPERTS, "SLOTS": EXPERTS, "TOGETHER": TOGETHER}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "num_rows":
            signature[argument] = "i32"
        else:
            signature[argument] = "*i32" if argument == "offsets" else f"*{dtype}"
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    shape = {key: options[key] for key in ("num_warps", "num_stages")}
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options=shape)


def main() -> None:
    cases = [("bf16", "even"), ("bf16", "odd"), ("fp32", "even")]
    for architecture in map(int, sys.argv[1:] or ("80", "90", "100")):
        for name in ("turned", "product", "weight_gradient"):
            for dtype, sizes in cases if name != "product" else cases[:1]:
                kernel = compiled(name, architecture, dtype, sizes)
                registers, stack = usage(kernel.asm["cubin"])
                copies = kernel.asm["ptx"].count("cp.async.cg") + kernel.asm["ptx"].count("cp.async.ca")
                row = f"{name:15} sm_{architecture:<3} {dtype} {sizes:4} | {registers:4} {stack:4}"
                print(f"{row} {kernel.metadata.shared:7} {copies:4}", flush=True)


if __name__ == "__main__":
    main()
