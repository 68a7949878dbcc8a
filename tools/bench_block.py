"""Benchmark of RMSNorm, RoPE, SwiGLU and the feed-forward half of a block: eager against torch.compile.

    python -m tools.bench_block                        # on the GPU
    python -m tools.bench_block --device cpu --quick   # small sizes on the CPU

None of these has a Triton kernel of ours; the numbers say whether one would pay. A row is one operation, eager or
compiled: milliseconds of forward and of forward and backward (median, inputs rotated, random normal data), the bytes
of inputs, outputs and gradients, read or written once, over that time, and the peak memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bigmodel.config.settings import ModelSettings
from bigmodel.model.layers import FeedForward, RMSNorm
from bigmodel.model.rotary import rotary_table, rotate
from tools.measure import INPUT_SETS, REPEATS, Record, Row, check_device, milliseconds, peak_bytes, sizes

SIZES = {"gpu": [(16_384, 2_048), (16_384, 4_096)], "cpu": [(1_024, 512)], "quick": [(256, 64)]}  # (T, H)


@dataclass(frozen=True)
class Piece:
    """An operation. call: the function; inputs(seed): its tensors; parameters: further tensors with a gradient."""

    name: str
    call: Callable[..., Tensor]
    inputs: Callable[[int], list[Tensor]]
    parameters: tuple[Tensor, ...] = ()


def swiglu(gate_up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


class HalfBlock(nn.Module):
    """x + feed_forward(norm(x)): the half of a block without attention."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.norm = RMSNorm(settings.hidden_size, settings.norm_epsilon)
        self.feed_forward = FeedForward(settings)

    def forward(self, x_TH: Tensor) -> Tensor:
        return x_TH + self.feed_forward(self.norm(x_TH))


def pieces(positions: int, settings: ModelSettings, dtype: torch.dtype, device: str) -> list[Piece]:
    """The operations at one size: RMSNorm, RoPE on all query heads, SwiGLU without its products, half a block."""

    def random(*shape: int) -> Callable[[int], list[Tensor]]:
        def make(seed: int) -> list[Tensor]:
            generator = torch.Generator(device).manual_seed(seed)
            return [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()]

        return make

    norm = RMSNorm(settings.hidden_size, settings.norm_epsilon).to(device, dtype)
    half = HalfBlock(settings).to(device, dtype)
    table = rotary_table(torch.arange(positions, device=device), settings)
    return [
        Piece("RMSNorm", norm, random(positions, settings.hidden_size), tuple(norm.parameters())),
        Piece("RoPE", lambda x: rotate(x, table), random(positions, settings.num_heads, settings.resolved_head_dim)),
        Piece("SwiGLU", swiglu, random(positions, 2 * settings.intermediate_size)),
        Piece("norm, SwiGLU, residual", half, random(positions, settings.hidden_size), tuple(half.parameters())),
    ]


def measure(piece: Piece, call: Callable[..., Tensor], device: str, repeats: int) -> Row:
    sets = [piece.inputs(seed) for seed in range(INPUT_SETS)]
    out = call(*sets[0])
    d_out = torch.randn_like(out)
    moved = 2 * sum(one.numel() * one.element_size() for one in (*sets[0], out, *piece.parameters))

    def forward(number: int) -> Any:
        with torch.no_grad():
            return call(*sets[number])

    def both(number: int) -> Any:
        return torch.autograd.grad(call(*sets[number]), (*sets[number], *piece.parameters), d_out)

    row: Row = {
        "forward_ms": milliseconds(forward, device, repeats),
        "both_ms": milliseconds(both, device, repeats),
    }
    peak = peak_bytes(lambda: both(0), device)
    return row | {"both_gb_per_s": moved / row["both_ms"] / 1e6, "peak_gb": None if peak is None else peak / 1e9}


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    quick: Annotated[bool, typer.Option(help="small sizes and few repeats, as a smoke test")] = False,
    compiler: Annotated[str, typer.Option(help="backend of torch.compile: inductor or aot_eager")] = "inductor",
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the plot")] = Path("benchmarks"),
) -> None:
    """Time every operation, eager and compiled; each row is written at once."""
    check_device(device)
    started = time.monotonic()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    record = Record(out, "bench_block" if device == "cuda" else "bench_block_cpu", device)
    for positions, width in SIZES[sizes(device, quick)]:
        settings = ModelSettings(
            hidden_size=width,
            num_heads=max(1, width // 128),
            num_kv_heads=1,
            intermediate_size=8 * width // 3 // 64 * 64,
        )
        for piece in pieces(positions, settings, dtype, device):
            for contender in ("as written", "torch.compile"):
                row: Row = {"case": f"{piece.name}, T {positions:,}, H {width:,}", "contender": contender}
                if time.monotonic() - started > seconds:
                    record.add(row | {"not_run": f"out of time ({seconds:.0f} s)"})
                    continue
                compiled = contender == "torch.compile"
                call = torch.compile(piece.call, backend=compiler, dynamic=False) if compiled else piece.call
                record.add(row | measure(piece, call, device, repeats=REPEATS[sizes(device, quick)]))
    record.show(["case", "contender", "forward_ms", "both_ms", "both_gb_per_s", "peak_gb"])
    plot = record.plot({"forward_ms": "forward", "both_ms": "forward and backward"}, "milliseconds")
    print(f"{record.path} and {plot}")


if __name__ == "__main__":
    typer.run(main)
