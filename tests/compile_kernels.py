"""Compiles every attention kernel, as shipped, for Hopper and Ampere without a GPU, and prints what it takes.

    kernel  architecture  type  channels | registers  stack bytes  shared bytes

A kernel that spills registers to memory has a stack. Run by test_attention.py; `python -m tests.compile_kernels`.
"""

import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention

KERNELS = ("forward", "delta", "query_gradient", "key_gradient")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = {"q", "k", "v", "out", "d_out", "dq", "dk", "dv"}
POINTERS = {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32"}


def compiled(name: str, architecture: int, dtype: str, channels: int):
    """The kernel for a group of 2 query heads, compiled as a launch with aligned tensors would."""
    kernel = getattr(attention, f"{name}_kernel")
    shape = attention.launch_options(name.replace("delta", "query_gradient"), channels, TYPES[dtype], 128, architecture)
    constants = {"GROUP": 2} | shape
    options = {} if name == "delta" else {key: shape[key] for key in ("num_warps", "num_stages")}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = f"*{dtype}" if argument in TENSORS else POINTERS.get(argument)
        signature[argument] = pointer or ("fp32" if argument.startswith("scale") else "i32")
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


def main() -> None:
    for architecture, dtypes in ((90, ("bf16", "fp16")), (80, ("bf16",))):
        for dtype in dtypes:
            for channels in (64, 128):
                for name in KERNELS:
                    kernel = compiled(name, architecture, dtype, channels)
                    registers, stack = usage(kernel.asm["cubin"])
                    row = f"{name:15} sm_{architecture} {dtype} {channels:4} | {registers:4} {stack:4}"
                    print(row, f"{kernel.metadata.shared:7}", flush=True)


if __name__ == "__main__":
    main()
