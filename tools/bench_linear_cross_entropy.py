"""Benchmark of the loss of the output head: all contenders in one process.

    python -m tools.bench_linear_cross_entropy                        # all cases on the GPU
    python -m tools.bench_linear_cross_entropy --device cpu --quick   # small sizes on the CPU

A row is one contender on one case of T tokens, hidden size H and vocabulary V:
- milliseconds of the forward alone (evaluation) and of forward and backward: median, inputs rotated, random normal
  data, 2% of the labels ignored;
- TFLOP/s of forward and backward, counted as 6 * T * H * V for every contender, without recomputation;
- peak memory above the inputs, with the gradients of hidden states and weight;
- error of both gradients against float64 on a smaller case.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigmodel.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from tools.measure import (
    INPUT_SETS,
    REPEATS,
    Record,
    Row,
    check_device,
    milliseconds,
    peak_bytes,
    relative_error,
    sizes,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, H), weight (V, H), labels (T,) -> sum of the losses
CHUNK = 4_096


@dataclass(frozen=True)
class Case:
    positions: int
    width: int
    vocabulary: int

    @property
    def name(self) -> str:
        return f"T {self.positions:,}, H {self.width:,}, V {self.vocabulary:,}"

    @property
    def flops(self) -> int:
        return 6 * self.positions * self.width * self.vocabulary


CASES = {  # most important first, in case the run is cut short
    "gpu": [Case(8_192, 4_096, 131_072), Case(32_768, 4_096, 131_072), Case(16_384, 2_048, 50_304)],
    "cpu": [Case(1_024, 256, 8_192), Case(512, 128, 16_000)],
    "quick": [Case(256, 64, 2_000), Case(192, 32, 5_003)],
}


ERROR_CASE = Case(512, 256, 4_099)


def all_logits(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    logits_TV = (hidden_TH @ weight_VH.T).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")


@cache
def compiled_all_logits(compiler: str) -> Loss:
    return torch.compile(all_logits, backend=compiler, dynamic=False)


def chunked(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """A loss per chunk of tokens; the backward pass recomputes its logits."""
    chunks = zip(hidden_TH.split(CHUNK), labels_T.split(CHUNK), strict=True)
    losses = [checkpoint(all_logits, hidden, weight_VH, labels, use_reentrant=False) for hidden, labels in chunks]
    return torch.stack(losses).sum()


def liger(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")(weight_VH, hidden_TH, labels_T)


def ours(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_TH, weight_VH, labels_T).loss_sum


def contenders(device: str, compiler: str) -> dict[str, Loss | str]:
    """Name -> contender, or the reason why it does not run here."""
    found: dict[str, Loss | str] = {
        "ours": ours,
        "all logits": all_logits,
        "all logits, torch.compile": compiled_all_logits(compiler),
        f"chunks of {CHUNK:,}, torch": chunked,
        "Liger": liger,
    }
    if importlib.util.find_spec("liger_kernel") is None:
        found["Liger"] = "liger-kernel is not installed"
    elif device == "cpu":
        found["Liger"] = "needs a GPU"
    return found


def inputs_of(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a weight that give logits of about 1; 2% of the labels are ignored."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden_TH = torch.randn(case.positions, case.width, generator=generator, device=device)
    weight_VH = torch.randn(case.vocabulary, case.width, generator=generator, device=device) * case.width**-0.5
    labels_T = torch.randint(case.vocabulary, (case.positions,), generator=generator, device=device)
    labels_T[torch.rand(case.positions, generator=generator, device=device) < 0.02] = IGNORED
    return hidden_TH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_(), labels_T


def measure(loss: Loss, case: Case, dtype: torch.dtype, device: str, repeats: int) -> Row:
    """The row of one contender on one case."""
    try:
        return times(loss, case, dtype, device, repeats) | {"gradient_error": gradient_error(loss, dtype, device)}
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:  # of a contender: recorded in its row; the others go on
        return {"not_run": f"refuses: {str(error).strip().splitlines()[0][:90]}"}


def times(loss: Loss, case: Case, dtype: torch.dtype, device: str, repeats: int) -> Row:
    weight_VH = inputs_of(case, dtype, device, 0)[1]  # a model has one weight
    sets = [inputs_of(case, dtype, device, seed) for seed in range(INPUT_SETS)]
    sets = [(hidden_TH, weight_VH, labels_T) for hidden_TH, _, labels_T in sets]

    def forward(number: int) -> Tensor:
        hidden_TH, weight_VH, labels_T = sets[number]
        with torch.no_grad():  # detached too: Liger computes gradients for inputs that require them
            return loss(hidden_TH.detach(), weight_VH.detach(), labels_T)

    def both(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*sets[number]) / case.positions, sets[number][:2])

    row: Row = {
        "forward_ms": milliseconds(forward, device, repeats),
        "both_ms": milliseconds(both, device, repeats),
    }
    peak = peak_bytes(lambda: both(0), device)
    return row | {
        "both_tflops": case.flops / row["both_ms"] / 1e9,
        "peak_gb": None if peak is None else peak / 1e9,
    }


def gradient_error(loss: Loss, dtype: torch.dtype, device: str) -> float:
    """The larger relative L2 error of the two gradients against float64."""
    hidden_TH, weight_VH, labels_T = inputs_of(ERROR_CASE, dtype, device, seed=9)
    wide: list[Any] = [rows.detach().double().requires_grad_() for rows in (hidden_TH, weight_VH)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, labels_T, ignore_index=IGNORED, reduction="sum")
    gradients = torch.autograd.grad(loss(hidden_TH, weight_VH, labels_T), (hidden_TH, weight_VH))
    return relative_error(gradients, torch.autograd.grad(exact, wide))


COLUMNS = ["case", "contender", "forward_ms", "both_ms", "both_tflops", "peak_gb", "gradient_error"]


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    quick: Annotated[bool, typer.Option(help="small sizes and few repeats, as a smoke test")] = False,
    compiler: Annotated[str, typer.Option(help="backend of torch.compile: inductor or aot_eager")] = "inductor",
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the plot")] = Path("benchmarks"),
) -> None:
    """Time every contender on every case; each row is written at once."""
    check_device(device)
    started = time.monotonic()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bench_linear_cross_entropy" if device == "cuda" else "bench_linear_cross_entropy_cpu"
    record = Record(out, name, device)
    for case in CASES[sizes(device, quick)]:
        for contender, loss in contenders(device, compiler).items():
            row: Row = {"case": case.name, "contender": contender, "dtype": str(dtype).removeprefix("torch.")}
            if isinstance(loss, str):
                record.add(row | {"not_run": loss})
            elif time.monotonic() - started > seconds:
                record.add(row | {"not_run": f"out of time ({seconds:.0f} s)"})
            else:
                record.add(row | measure(loss, case, dtype, device, repeats=REPEATS[sizes(device, quick)]))
    record.show(COLUMNS)
    plot = record.plot({"both_ms": "milliseconds, forward and backward", "peak_gb": "peak memory, GB"}, "")
    print(f"{record.path} and {plot}")


if __name__ == "__main__":
    typer.run(main)
