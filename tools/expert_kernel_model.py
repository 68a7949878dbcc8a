"""Ceilings of the kernels of experts by arithmetic, and registers of their compiled code: nothing runs on a GPU.

    python -m tools.expert_kernel_model            # tables, and benchmarks/expert_kernel_model.json
    python -m tools.expert_kernel_model --compile  # also registers, shared memory and spills for sm_80, sm_90, sm_100

One layer of published models, bf16, all experts on one GPU; gate and up joined as in `bigmodel.model.experts`. Loads:
`equal`; `drawn`, each choice any expert alike, with seed 0; `uneven`, from none to twice the mean, in equal steps.

    computed = rows filled up to whole tiles (dW: to whole steps) * columns filled up to whole tiles * inner places
    tensor   = FLOPs of a tile / (peak / SMs) * rounds of programs; dW: the mean of an SM, or the longest program
    memory   = bytes that no cache saves, each operand and result once / bandwidth
    share    = useful FLOPs / peak / max(tensor, memory)

`tile bytes` are read by tiles, from L2 at best. How quickly is not known here, so shares are upper bounds, and compare
tiles only beside these bytes. Launches, clocks, starts and ends of programs are not modelled. One program an SM: what
registers of the compiled code allow. Peaks and bandwidths: `bigmodel.metrics.flops` and `bigmodel.planning.devices`.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bigmodel.kernels import grouped_matmul, permute
from bigmodel.kernels.triton_import import HAS_TRITON, triton
from bigmodel.metrics.flops import DEVICE_PEAK_FLOPS
from bigmodel.planning.devices import DEVICES

BF16_BYTES = 2
# Streaming multiprocessors (NVIDIA data sheets; B200: of both dies), and compute capability.
SMS = {"A100 80GB": (108, 80), "H100 SXM": (132, 90), "B200": (148, 100)}
TOKENS = (4_096, 32_768)
LOADS = ("equal", "drawn", "uneven")


@dataclass(frozen=True)
class Layer:
    """Experts of a layer, from the config.json that was published with the weights."""

    hidden: int
    width: int
    experts: int
    choices: int  # of a token


LAYERS = {
    "Mixtral 8x7B": Layer(4_096, 14_336, 8, 2),
    "OLMoE": Layer(2_048, 1_024, 64, 8),
    "Qwen3-30B-A3B": Layer(2_048, 768, 128, 8),
    "DeepSeek-V3": Layer(7_168, 2_048, 256, 8),
}


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    step: int


@dataclass(frozen=True)
class Count:
    """Of one kernel on one GPU: operations, bytes and seconds."""

    useful_flops: float
    computed_flops: float
    memory_bytes: float
    tile_bytes: float
    tensor_seconds: float
    memory_seconds: float

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Gpu:
    sms: int
    capability: int
    peak_flops: float
    bytes_per_second: float


def gpu(name: str) -> Gpu:
    device = DEVICES[name]
    return Gpu(*SMS[name], DEVICE_PEAK_FLOPS[device.torch_name], device.memory_gigabytes_per_second * 1e9)


def loads(kind: str, num_rows: int, experts: int) -> list[int]:
    """The rows of each expert; their sum is num_rows."""
    if kind == "drawn":
        drawn = Counter(random.Random(0).choices(range(experts), k=num_rows))
        return [drawn[expert] for expert in range(experts)]
    steps = [1] * experts if kind == "equal" else [2 * expert + 1 for expert in range(experts)]
    ends = [num_rows * sum(steps[: expert + 1]) // sum(steps) for expert in range(experts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def up_to(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def product(rows_of: list[int], inner: int, outer: int, tile: Tile, on: Gpu) -> Count:
    """y = x W of each expert: forward, or dX with inner and outer exchanged."""
    num_rows = sum(rows_of)
    programs = sum(math.ceil(rows / tile.rows) for rows in rows_of) * math.ceil(outer / tile.columns)
    flops_of_program = 2.0 * tile.rows * tile.columns * up_to(inner, tile.step)
    matrices = sum(rows > 0 for rows in rows_of) * inner * outer
    memory_bytes = BF16_BYTES * (num_rows * (inner + outer) + matrices)
    return Count(
        2.0 * num_rows * inner * outer,
        programs * flops_of_program,
        memory_bytes,
        programs * BF16_BYTES * (tile.rows + tile.columns) * up_to(inner, tile.step),
        math.ceil(programs / on.sms) * flops_of_program / (on.peak_flops / on.sms),
        memory_bytes / on.bytes_per_second,
    )


def weight_gradient(rows_of: list[int], inner: int, outer: int, tile: Tile, on: Gpu) -> Count:
    """dW of each expert: a program adds up all rows of its expert; experts without rows write zeros."""
    num_rows = sum(rows_of)
    tiles = math.ceil(outer / tile.rows) * math.ceil(inner / tile.columns)
    steps = [up_to(rows, tile.step) for rows in rows_of]
    computed = 2.0 * tile.rows * tile.columns * tiles * sum(steps)
    longest = 2.0 * tile.rows * tile.columns * max(steps)
    memory_bytes = BF16_BYTES * (num_rows * (inner + outer) + len(rows_of) * inner * outer)
    return Count(
        2.0 * num_rows * inner * outer,
        computed,
        memory_bytes,
        tiles * BF16_BYTES * (tile.rows + tile.columns) * sum(steps),
        max(computed / on.sms, longest) / (on.peak_flops / on.sms),
        memory_bytes / on.bytes_per_second,
    )


def moves(layer: Layer, tokens: int) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes) of the kernels that move rows; places of 8 bytes, weights and their gradients of 4."""
    rows = tokens * layer.choices
    few, many = (BF16_BYTES * layer.hidden * count for count in (tokens, rows))
    return {
        "permute": (0, few + many + 8 * rows),
        "unpermute": (2 * rows * layer.hidden, many + few + 12 * rows),
        "unpermute backward": (3 * rows * layer.hidden, few + 2 * many + 16 * rows),
        "permute backward": (rows * layer.hidden, many + few + 8 * rows),
    }


def shipped(kernel: str, capability: int) -> Tile:
    options = grouped_matmul.launch_options(kernel, torch.bfloat16, capability)
    return Tile(options["ROWS"], options["COLUMNS"], options["STEP"])


def counts(layer: Layer, rows_of: list[int], on: Gpu, tile_rows: int | None = None) -> dict[str, list[Count]]:
    """By kernel, the counts of both matrices of the layer; tile_rows in place of the shipped number of a product."""
    tile, of_weight = shipped("product", on.capability), shipped("weight_gradient", on.capability)
    tile = Tile(tile_rows or tile.rows, tile.columns, tile.step)
    matrices = [(layer.hidden, 2 * layer.width), (layer.width, layer.hidden)]  # inputs, outputs
    return {
        "forward": [product(rows_of, inner, outer, tile, on) for inner, outer in matrices],
        "dX": [product(rows_of, outer, inner, tile, on) for inner, outer in matrices],
        "dW": [weight_gradient(rows_of, inner, outer, of_weight, on) for inner, outer in matrices],
    }


def row_of(parts: list[Count], on: Gpu) -> dict[str, Any]:
    """The ceiling of a kernel over both matrices, one after the other."""
    total = sum(parts[1:], parts[0])
    seconds = sum(max(part.tensor_seconds, part.memory_seconds) for part in parts)
    return {
        "gflops": round(total.useful_flops / 1e9, 1),
        "computed_by_useful": round(total.computed_flops / total.useful_flops, 3),
        "megabytes": round(total.memory_bytes / 1e6, 1),
        "tile_megabytes": round(total.tile_bytes / 1e6, 1),
        "bound": "memory" if total.memory_seconds > total.tensor_seconds else "tensor",
        "milliseconds": round(seconds * 1e3, 4),
        "share_of_peak": round(total.useful_flops / on.peak_flops / seconds, 3),
    }


def ceilings() -> Iterator[dict[str, Any]]:
    """A row for each GPU, layer, number of tokens, load, kernel, and number of rows in a tile of a product."""
    for device in SMS:
        on = gpu(device)
        for name, layer in LAYERS.items():
            for tokens in TOKENS:
                head = {"device": device, "layer": name, "tokens": tokens}
                for kernel, (flops, moved) in moves(layer, tokens).items():
                    yield head | {"kernel": kernel, "gflops": round(flops / 1e9, 2), "megabytes": round(moved / 1e6, 1),
                                  "milliseconds": round(moved / on.bytes_per_second * 1e3, 4)}  # fmt: skip
                for load in LOADS:
                    rows_of = loads(load, tokens * layer.choices, layer.experts)
                    for tile_rows in (shipped("product", on.capability).rows, 64):
                        for kernel, parts in counts(layer, rows_of, on, tile_rows).items():
                            if kernel != "dW" or tile_rows != 64:
                                yield (
                                    head | {"load": load, "kernel": kernel, "tile_rows": tile_rows} | row_of(parts, on)
                                )


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> dict[str, int]:
    """Registers, bytes of the stack (spills) and of shared memory, as for a launch with aligned tensors in bf16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.support.compile_kernels import usage

    others = {"num_rows": "i32", "offsets": "*i32", "place": "*i64", "weights": "*fp32", "d_weights": "*fp32"}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else others.get(name, "*bf16")
        if signature[name].startswith("*"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    source = ASTSource(
        kernel, signature, {key: constants[key] for key in kernel.arg_names if key in constants}, aligned
    )
    code = triton.compile(source, GPUTarget("cuda", capability, 32), options=options)
    registers, stack = usage(code.asm["cubin"])
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": code.metadata.shared}


def resources(layer: Layer, capability: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel of the layer, at the shapes of gate and up."""
    experts = {"EXPERTS": layer.experts, "SLOTS": triton.next_power_of_2(layer.experts)}
    experts["TOGETHER"] = grouped_matmul.TOGETHER
    sizes = {"INNER": layer.hidden, "OUTER": 2 * layer.width}
    turned = {"INNER": 2 * layer.width, "OUTER": layer.hidden}
    options = {
        name: grouped_matmul.launch_options(name, torch.bfloat16, capability) for name in grouped_matmul.TILE_SHAPES
    }
    cases = {
        "forward": (grouped_matmul.product_kernel, sizes | experts | options["product"] | {"TURNED": True}),
        "dX": (grouped_matmul.product_kernel, turned | experts | options["product"] | {"TURNED": False}),
        "dW": (grouped_matmul.weight_gradient_kernel, sizes | options["weight_gradient"]),
    }
    columns = {"COLUMNS": layer.hidden, "CHOICES": layer.choices, **permute.launch_options(layer.hidden)}
    for name in ("permute", "unpermute", "unpermute_gradient"):
        cases[name] = getattr(permute, f"{name}_kernel"), columns
    for name, (kernel, constants) in cases.items():
        yield {"kernel": name, "architecture": f"sm_{capability}", **compiled(kernel, constants, capability)}


def main(
    compile_kernels: Annotated[bool, typer.Option("--compile", help="also compile, for registers")] = False,
    layer: Annotated[str, typer.Option(help="the layer whose kernels are compiled")] = "Qwen3-30B-A3B",
    out: Annotated[Path, typer.Option(help="folder for expert_kernel_model.json")] = Path("benchmarks"),
) -> None:
    """Count, print, write; compile where asked."""
    if layer not in LAYERS:
        raise typer.BadParameter(f"{layer} is none of {', '.join(LAYERS)}", param_hint="--layer")
    if compile_kernels and not HAS_TRITON:
        raise SystemExit("expert_kernel_model: --compile needs Triton, which exists for Linux only")
    head = {"command": "python -m tools.expert_kernel_model", "measured": "nothing: arithmetic and compiled code"}
    rows = list(ceilings())
    if compile_kernels:
        head |= {"command": head["command"] + " --compile", "triton": triton.__version__}
        for _, capability in SMS.values():
            for row in resources(LAYERS[layer], capability):
                rows.append({"layer": layer} | row)
    for row in rows:
        print(" | ".join(map(str, row.values())))
    out.mkdir(parents=True, exist_ok=True)
    text = ",\n  ".join(map(json.dumps, rows))
    (out / "expert_kernel_model.json").write_text(json.dumps(head)[:-1] + f',\n "rows": [\n  {text}\n ]}}\n')


if __name__ == "__main__":
    typer.run(main)
