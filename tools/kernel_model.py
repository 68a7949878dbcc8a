"""Static model of the attention kernels from their compiled code: what a GPU is asked to do, without one.

    python -m tools.kernel_model                 # table, and benchmarks/kernel_model.json

Kernels are compiled ahead of time for sm_90, in bf16, and disassembled with the cuobjdump that Triton brings. A row is
one loop over tiles: `full`, `masked`, `every` (one loop for both), or of a plain kernel for comparison: one document,
no mask, contiguous tensors.
Counted: warp instructions by class, registers, shared memory, programs per SM. Modelled, not measured:

    tensor   = sum over HGMMA of max(FMA / 2048, bytes read from shared memory / 128), of all warp groups of a program
    issue    = max(instructions * warps / 4, 2 * MUFU * warps)
    share    = FMA / 2048 / (tensor + issue), or / max(tensor, issue) where two programs fit an SM, or
               warps are specialized, and overlap

In cycles of one SM of Hopper (2048 dense bf16 FMA, 4 instructions, 16 exponentials and 128 bytes of shared memory a
cycle; from NVIDIA's tuning guide and data sheet). Memory, barriers, clocks and launches are not modelled, so shares
compare loops with one another; they are no forecast of TFLOP/s. `HGMMA` exists on sm_90 only.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bigmodel.kernels import attention, attention_hopper
from bigmodel.kernels.triton_import import HAS_TRITON, tl, triton

ARCHITECTURE = 90
REGISTERS, SHARED_BYTES = 65_536, 232_448  # of an SM
HEADS, KEY_HEADS = 32, 16
CLASSES = {
    "tensor core": r"HGMMA|WARPGROUP",
    "exponential": r"MUFU",
    "floating point": r"F(FMA|MUL|ADD|MNMX|SEL|SETP)|F2FP",
    "copies": r"LDGSTS|LDGDEPBAR|DEPBAR|UTMA|UBLKCP",
    "global memory": r"LDG|STG|LDL|STL",
    "shared memory": r"LDS|STS|LDSM|STSM",
    "shuffles": r"SHFL",
    "barriers": r"BAR|MEMBAR|FENCE|SYNCS",
}  # and integers: all others


@triton.jit
def plain_forward_kernel(q, k, v, out, scale2, num_rows, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Attention of every row to all rows of one head, without a mask. num_rows: a multiple of ROWS and COLUMNS."""
    channel = tl.arange(0, HEAD)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    q_MH = tl.load(q + row * HEAD + channel)
    top_M = tl.full([ROWS], -float("inf"), tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    acc_MH = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(0, num_rows, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[:, None]
        score_MC = tl.dot(q_MH, tl.trans(tl.load(k + column * HEAD + channel)))
        new_top_M = tl.maximum(top_M, tl.max(score_MC, 1) * scale2)
        p_MC = tl.exp2(score_MC * scale2 - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        total_M = total_M * shrink_M + tl.sum(p_MC, 1)
        v_CH = tl.load(v + column * HEAD + channel)
        acc_MH = tl.dot(p_MC.to(v_CH.dtype), v_CH, acc_MH * shrink_M[:, None])
        top_M = new_top_M
    tl.store(out + row * HEAD + channel, (acc_MH / total_M[:, None]).to(tl.bfloat16))


@triton.jit
def plain_key_gradient_kernel(q, k, v, d_out, dk, dv, lse, delta, scale2, num_rows, HEAD: tl.constexpr,
                              ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The backward pass of the same to dk and dv."""
    channel = tl.arange(0, HEAD)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k_MH, v_MH = tl.load(k + row * HEAD + channel), tl.load(v + row * HEAD + channel)
    dk_MH = tl.zeros([ROWS, HEAD], tl.float32)
    dv_MH = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(0, num_rows, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        q_CH = tl.load(q + column[:, None] * HEAD + channel)
        lse_C = tl.load(lse + column)
        p_MC = tl.exp2(tl.dot(k_MH, tl.trans(q_CH)) * scale2 - lse_C[None, :])
        d_out_CH = tl.load(d_out + column[:, None] * HEAD + channel)
        dv_MH = tl.dot(p_MC.to(d_out_CH.dtype), d_out_CH, dv_MH)
        delta_C = tl.load(delta + column)
        d_raw_MC = p_MC * (tl.dot(v_MH, tl.trans(d_out_CH)) - delta_C[None, :])
        dk_MH = tl.dot(d_raw_MC.to(q_CH.dtype), q_CH, dk_MH)
    tl.store(dk + row * HEAD + channel, dk_MH.to(tl.bfloat16))
    tl.store(dv + row * HEAD + channel, dv_MH.to(tl.bfloat16))


@dataclass(frozen=True)
class Loop:
    """One loop over tiles; instructions of one warp, cycles of one SM."""

    kernel: str
    channels: int
    loop: str
    tile: str  # rows x columns
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    programs_per_sm: int
    instructions: int
    classes: dict[str, int]
    is_specialized: bool  # warps: those that compute; one more group loads
    tensor_cycles: int
    issue_cycles: int
    share_of_peak: float


def compile_kernel(kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int) -> Any:
    """The kernel for sm_90 in bf16, as for a launch with aligned tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fp32, numbers = {"lse", "delta", "bias"}, ("left", "right", "num_", "first_", "threshold")
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("stride") or name.startswith(numbers):
            signature[name] = "i32"
        elif name.startswith(("scale", "cap", "factor")):
            signature[name] = "fp32"
        elif kernel is attention_hopper.hopper_forward_kernel and name in ("k", "v"):
            signature[name] = f"tensordesc<bf16[1,1,1,{constants['COLUMNS']},{constants['HEAD']}]>"
        else:
            signature[name] = "*fp32" if name in fp32 else "*i32" if name == "tiles" else "*bf16"
        if signature[name].startswith("*") or (signature[name] == "i32" and name.endswith("stride")):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {key: constants[key] for key in kernel.arg_names if key in constants}, aligned
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)


def shipped(name: str, channels: int) -> tuple[Any, dict[str, Any]]:
    """(kernel, constants) as shipped, for a causal mask."""
    options = attention.launch_options(name, channels, torch.bfloat16, 128, ARCHITECTURE)
    strides = {"q_stride": HEADS, "d_out_stride": HEADS, "k_stride": KEY_HEADS, "v_stride": KEY_HEADS}
    constants = options | {key: heads * channels for key, heads in strides.items()}
    constants |= dict.fromkeys(("largest", "bias", "query_words", "key_words"))
    constants |= {"GROUP": HEADS // KEY_HEADS, "REACH": -1, "CAPPED": False, "WINDOWED": False}
    return getattr(attention, f"{name}_kernel"), constants


def hopper_case(channels: int) -> tuple[Any, dict[str, Any]]:
    """(kernel, constants) of the forward for Hopper, for a causal mask."""
    options = attention_hopper.launch_options(channels, 128)
    constants = {"q_stride": HEADS * channels, "GROUP": HEADS // KEY_HEADS, "WINDOWED": False}
    return attention_hopper.hopper_forward_kernel, options | constants | {"HIDDEN": float(attention.HIDDEN.value)}


def plain_case(name: str, channels: int) -> tuple[Any, dict[str, Any]]:
    """(kernel, constants) of the plain kernel, in the shipped tile."""
    kernel = {"forward": plain_forward_kernel, "key_gradient": plain_key_gradient_kernel}[name]
    return kernel, attention.launch_options(name, channels, torch.bfloat16, 128, ARCHITECTURE)


def cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loops(sass: str) -> list[list[str]]:
    """The innermost loops with tensor-core instructions, in the order of the code: their instructions."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass, re.MULTILINE)
    place = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    loops = []
    for number, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < int(address, 16):
            loops.append((place[int(target.group(1), 16)], number))
    with_products = [span for span in loops if any("HGMMA" in text for _, text in lines[span[0] : span[1] + 1])]
    inner = [
        (start, end)
        for start, end in with_products
        if not any((start, end) != (a, b) and start <= a and b <= end for a, b in with_products)
    ]
    return [[re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in lines[start : end + 1]] for start, end in inner]


def class_of(instruction: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, instruction)), "integers")


def products(instructions: list[str]) -> tuple[float, float]:
    """(cycles of the FMA alone, cycles with the reads from shared memory) of a warp group."""
    fma_cycles = cycles = 0.0
    for text in instructions:
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+\w+,\s*(\w+)", text)
        if shape:
            m, n, k = (int(shape.group(place)) for place in (1, 2, 3))
            left_bytes = 0 if shape.group(4).startswith("R") else 2 * m * k
            fma = m * n * k / 2048
            fma_cycles += fma
            cycles += max(fma, (left_bytes + 2 * n * k) / 128)
    return fma_cycles, cycles


def model(name: str, channels: int, is_plain: bool) -> list[Loop]:
    """The loops of one kernel."""
    is_hopper = name == "hopper"
    kernel, constants = hopper_case(channels) if is_hopper else (plain_case if is_plain else shipped)(name, channels)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    compiled = compile_kernel(kernel, constants, warps, stages)
    used = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(compiled.asm["cubin"], "--dump-resource-usage"))
    assert used is not None, "cuobjdump printed no registers"
    registers, stack = int(used.group(1)), int(used.group(2))
    sass = cuobjdump(compiled.asm["cubin"], "-sass")
    loops, names = inner_loops(sass), ["plain"] if is_plain else ["full", "masked"]
    is_specialized = "USETMAXREG" in sass
    if is_hopper:  # alike in both groups; spans of jumps between the groups are longer
        loops, names = [min(loops, key=len)], ["every"]
        warps *= 2 if is_specialized else 1
    threads = warps * 32 + 128 * is_specialized
    programs = min(REGISTERS // (registers * threads), SHARED_BYTES // max(compiled.metadata.shared, 1))
    rows = []
    for loop, instructions in zip(names, loops, strict=True):
        classes = Counter(map(class_of, instructions))
        fma, tensor = (warps / 4 * cycles for cycles in products(instructions))
        issue = max(len(instructions) * warps / 4, 2 * classes["exponential"] * warps)
        share = fma / (max(tensor, issue) if programs > 1 or is_specialized else tensor + issue)
        tile = f"{constants['ROWS']}x{constants['COLUMNS']}"
        rows.append(Loop(name, channels, loop, tile, warps, stages, registers, stack, compiled.metadata.shared,
                         programs, len(instructions), dict(sorted(classes.items())), is_specialized, round(tensor),
                         round(issue), round(share, 3)))  # fmt: skip
    return rows


CASES = [
    *((name, channels, False) for name in ("forward", "query_gradient", "key_gradient") for channels in (64, 128)),
    *(("hopper", channels, False) for channels in (64, 128)),
    *((name, channels, True) for name in ("forward", "key_gradient") for channels in (64, 128)),
]


def main(
    only: Annotated[str, typer.Option(help="only kernels whose name contains this")] = "",
    channels: Annotated[int, typer.Option(help="only this width of a head, 64 or 128; 0: both")] = 0,
    plain: Annotated[bool, typer.Option(help="also the plain kernels")] = True,
    out: Annotated[Path, typer.Option(help="folder for kernel_model.json")] = Path("benchmarks"),
) -> None:
    """Compile, count, and print a table."""
    if not HAS_TRITON:
        raise SystemExit("kernel_model: Triton is not installed here; it exists for Linux only")
    rows = [
        row
        for name, width, is_plain in CASES
        if only in name and channels in (0, width) and (plain or not is_plain)
        for row in model(name, width, is_plain)
    ]
    columns = ("kernel", "channels", "loop", "tile", "registers", "stack_bytes", "shared_bytes", "programs_per_sm",
               "instructions", "tensor_cycles", "issue_cycles", "share_of_peak")  # fmt: skip
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(getattr(row, column)) for column in columns))
    out.mkdir(parents=True, exist_ok=True)
    head = {"command": "python -m tools.kernel_model", "architecture": ARCHITECTURE, "triton": triton.__version__}
    text = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    (out / "kernel_model.json").write_text(json.dumps(head)[:-1] + f',\n "rows": [\n  {text}\n ]}}\n')


if __name__ == "__main__":
    typer.run(main)
