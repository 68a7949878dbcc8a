"""Compiles the shipped softmax kernel for Ampere, Hopper and Blackwell without a GPU, and prints its resources.

    architecture  gradient  vocabulary  options  order | registers  stack bytes  shared bytes

A kernel that spills registers to memory has a stack. `order` is "ordered" if the machine code of a 16-bit gradient
reads a block, waits for all threads, and only then writes. Run by test_linear_cross_entropy.py and
`python -m tests.support.compile_linear_cross_entropy`.
"""

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigmodel.kernels.linear_cross_entropy import IGNORED, Options, launch_options, softmax_kernel
from tests.support.compile_kernels import usage

POINTERS = {"logits": "*fp32", "labels": "*i64", "weights": "*fp32", "losses": "*fp32", "zs": "*fp32"}
VOCABULARIES = {"128k": 131_072, "odd": 50_257}


def compiled(architecture: int, gradient: str, vocabulary: int, options: Options):
    """The kernel, compiled as for a launch; `gradient` is a type, or none for evaluation."""
    launch = launch_options(vocabulary)
    constants = {
        "Z_LOSS": options.z_loss, "SMOOTHING": options.label_smoothing, "SOFTCAP": options.logit_softcap,
        "IGNORED": IGNORED, "WITH_WEIGHTS": options != Options(),
        "WITH_GRADIENT": gradient != "none", "BLOCK": launch["BLOCK"],
    }  # fmt: skip
    pointers = POINTERS | {"gradients": f"*{gradient}" if gradient != "none" else "*fp32"}
    signature, aligned = {}, {}
    for place, argument in enumerate(softmax_kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = pointers.get(argument, "i32")
        if argument in pointers or vocabulary % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(softmax_kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": launch["num_warps"]})


def order(ptx: str) -> str:
    """Whether loads, a barrier and stores follow each other directly, in this order."""
    marks = {"ld.global": "L", "bar.sync": "B", "st.global": "S"}
    sequence = "".join(marks[found] for found in re.findall(r"ld\.global|bar\.sync|st\.global", ptx))
    return "ordered" if re.search("L{2,}BS{2,}", sequence) else "unordered"


def main() -> None:
    for architecture in (80, 90, 100):
        for gradient in ("bf16", "none"):
            for name, vocabulary in VOCABULARIES.items():
                for label, options in (("plain", Options()), ("all", Options(1e-4, 0.1, 30.0))):
                    kernel = compiled(architecture, gradient, vocabulary, options)
                    registers, stack = usage(kernel.asm["cubin"])
                    place = order(kernel.asm["ptx"]) if gradient == "bf16" else "-"
                    row = f"sm_{architecture} {gradient:4} {name:4} {label:5} {place} | {registers:4} {stack:4}"
                    print(row, f"{kernel.metadata.shared:7}", flush=True)


if __name__ == "__main__":
    main()
