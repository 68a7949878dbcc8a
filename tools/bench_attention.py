"""Benchmark of attention over packed documents: all contenders in one process.

    python -m tools.bench_attention                        # all cases on the GPU
    python -m tools.bench_attention --device cpu --quick   # small sizes on the CPU, with the contenders that run there

A row is one contender on one case:
- milliseconds of forward, backward and both: median, inputs rotated, random normal data;
- TFLOP/s on visible pairs: 4 * pairs * channels per query head forward, 2.5 times that backward;
- time to prepare a batch (our tile metadata, FlexAttention's BlockMask); for ours also without the launches by
  Python (`preparation_device_ms`, from a CUDA graph); `forward_prepared_ms` is preparation plus forward;
- peak memory of forward and backward;
- error against float64 on a smaller case of the same kind.
Padded contenders get their inputs already padded, which is in their favour.
"""

import inspect
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigmodel.kernels.attention import attention
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, dense
from bigmodel.kernels.tiles import make_tile_metadata
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


@dataclass(frozen=True)
class Case:
    """Documents packed end to end. key_lengths None: self-attention, at most `left` keys back, and as many ahead if it
    goes both ways, else none."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (16, 16)
    channels: int = 128
    left: int | None = None
    key_lengths: tuple[int, ...] | None = None
    both_ways: bool = False

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths if self.key_lengths is None else self.key_lengths

    @property
    def is_cross(self) -> bool:
        return self.key_lengths is not None

    @property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        if self.is_cross:
            return sum(queries * keys for queries, keys in zip(self.lengths, self.keys, strict=True))
        back = [causal_pairs(length, self.left) for length in self.lengths]
        return 2 * sum(back) - sum(self.lengths) if self.both_ways else sum(back)

    @property
    def flops(self) -> int:
        """FLOPs of the forward pass: two products, a multiplication and an addition per channel and pair."""
        return 4 * self.pairs * self.channels * self.heads[0]

    def smaller(self) -> "Case":
        """A batch of the same kind, small enough for float64 with all scores in memory."""
        count = max(1, min(len(self.lengths), 12))
        shrink = max(1, sum(self.lengths[:count]) // 600, sum(self.keys[:count]) // 600)
        queries, keys = (tuple(-(-one // shrink) for one in side[:count]) for side in (self.lengths, self.keys))
        left = None if self.left is None else max(1, self.left // shrink)
        heads = (2, 2 * self.heads[1] // self.heads[0]) if self.heads[0] <= 2 * self.heads[1] else (4, 1)
        keys_of = keys if self.is_cross else None
        return Case(self.name, queries, heads, self.channels, left, keys_of, self.both_ways)

    def mask(self, device: str) -> AttentionMask:
        queries, keys = (offsets_of(side, device) for side in (self.lengths, self.keys))
        if self.both_ways:
            return bidirectional(queries, self.left)
        return cross(queries, keys) if self.is_cross else causal(queries, left=self.left)


def causal_pairs(length: int, left: int | None) -> int:
    """Pairs of one causal document: row i attends to i + 1 keys, at most left + 1."""
    most = length if left is None else min(length, left + 1)
    return most * (most + 1) // 2 + (length - most) * most


def offsets_of(lengths: tuple[int, ...], device: str) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device, torch.int32)


def lognormal_lengths(total: int, mean: int, seed: int) -> tuple[int, ...]:
    """Lengths with this mean, lognormal with sigma 1, that fill `total` tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(total // mean).log_normal_(0.0, 1.0, generator=generator)
    lengths = (drawn / drawn.sum() * total).int().clamp(min=1)
    lengths[lengths.argmax()] += total - lengths.sum()
    return tuple(lengths.tolist())


def cross_lengths(total: int, mean: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Decoder documents that fill `total`, and encoder documents with four times their mean length."""
    return lognormal_lengths(total, mean, seed=1), lognormal_lengths(4 * total, 4 * mean, seed=2)


def tiny_lengths(count: int) -> tuple[int, ...]:
    return tuple(1 + 5 * number % 8 for number in range(count))


def cases(size: str) -> list[Case]:
    """Cases, most important first, in case the run is cut short. `size` is one of `tools.measure.sizes`."""
    scale = {"gpu": 1, "cpu": 32, "quick": 64}[size]
    whole, grouped, channels = ((16, 16), (32, 8), 128) if size == "gpu" else ((2, 2), (4, 1), 32)
    mean = max(16, 1_000 // scale)
    decoder, encoder = cross_lengths(8_192 // scale, 128 // min(scale, 8))
    long, short, window = 32_768 // scale, max(8, 64 // scale), 1_024 // scale
    equal = (4_096 // scale,) * 4
    return [
        Case(f"lognormal, {16_384 // scale:,}", lognormal_lengths(16_384 // scale, mean, 1), grouped, channels),
        Case(f"lognormal, {65_536 // scale:,}", lognormal_lengths(65_536 // scale, mean, 2), grouped, channels),
        Case(f"one of {8_192 // scale:,}", (8_192 // scale,), whole, channels),
        Case(f"cross, {sum(decoder):,} on {sum(encoder):,}", decoder, whole, channels, key_lengths=encoder),
        Case(f"equal, 4 of {equal[0]:,}", equal, whole, channels),
        Case(f"window {window:,}, one of {long:,}", (long,), whole, channels, left=window),
        Case(f"one of {long // 2:,}, 64 of {short}", (long // 2, *[short] * 64), grouped, channels),
        Case(f"tiny, {4_096 // scale:,} of 1 to 8", tiny_lengths(4_096 // scale), whole, channels),
        Case(f"equal, 4 of {equal[0]:,}, {channels // 2} channels", equal, (2 * whole[0], 2 * whole[1]), channels // 2),
    ]


# Contenders. Each converts packed (T, H, K) tensors to its own layout, prepares a batch once, and attends.


@dataclass(frozen=True)
class Contender:
    """layout: from packed rows and their lengths to its own layout; packed: the inverse, for the output."""

    name: str
    prepare: Callable[[Case, str], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    layout: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda rows_THK, _lengths: rows_THK
    packed: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda rows_THK, _lengths: rows_THK
    refusal: Callable[[Case, str], str | None] = lambda _case, _device: None


def only_cuda(_case: Case, device: str) -> str | None:
    return None if device == "cuda" else "needs a GPU"


def padded(rows_THK: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, H, longest, K), zeros after each document."""
    documents = rows_THK.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True).transpose(1, 2).contiguous()


def unpadded(rows_BHSK: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([rows_BHSK[number, :, :length].transpose(0, 1) for number, length in enumerate(lengths)])


def prepare_ours(case: Case, device: str) -> tuple[AttentionMask, Any]:
    mask = offsets_on_device(case, device)
    return mask, make_tile_metadata(mask, sum(case.lengths), sum(case.keys))


@cache
def offsets_on_device(case: Case, device: str) -> AttentionMask:
    """The cu_seqlens come with the batch, so their cost does not count as preparation."""
    return case.mask(device)


def attend_ours(q: Tensor, k: Tensor, v: Tensor, prepared: tuple[AttentionMask, Any]) -> Tensor:
    return attention(q, k, v, *prepared)


def prepare_padded(case: Case, device: str) -> Tensor | None:
    """The mask over padded documents, or None if a causal mask already hides the padding."""
    if not case.is_cross and case.left is None:
        return None
    masks = torch.zeros(len(case.lengths), 1, max(case.lengths), max(case.keys), dtype=torch.bool, device=device)
    for number, (queries, keys) in enumerate(zip(case.lengths, case.keys, strict=True)):
        one = Case("", (queries,), left=case.left, key_lengths=(keys,) if case.is_cross else None)
        masks[number, 0, :queries, :keys] = dense(one.mask(device), queries, keys)
    return masks


def padded_contender(name: str, backend: SDPBackend, refusal: Callable[[Case, str], str | None]) -> Contender:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )

    return Contender(name, prepare_padded, attend, padded, unpadded, refusal)


def no_mask_on_gpu(case: Case, device: str) -> str | None:
    masked = case.is_cross or case.left is not None
    return only_cuda(case, device) or ("takes no mask; padding needs one here" if masked else None)


def prepare_varlen(case: Case, device: str) -> tuple[Any, ...]:
    mask = offsets_on_device(case, device)
    window = (-1, -1) if case.is_cross else (-1 if case.left is None else case.left, 0)
    return mask.cu_seqlens_q, mask.cu_seqlens_k, max(case.lengths), max(case.keys), window


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Any, ...]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    *places, window = prepared
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, *places, window_size=window, **grouped)


@cache
def compiled_flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def prepare_flex(case: Case, device: str) -> Any:
    """A BlockMask of the rule from the compiled create_block_mask."""
    mask = offsets_on_device(case, device)
    query_document, query_place = places_of(mask.cu_seqlens_q, sum(case.lengths))
    key_document, key_place = places_of(mask.cu_seqlens_k, sum(case.keys))
    left = case.left

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = query_document[query] == key_document[key]
        if case.is_cross:
            return same
        distance = query_place[query] - key_place[key]
        return same & (distance >= 0) if left is None else same & (distance >= 0) & (distance <= left)

    return compiled_flex()[1](sees, None, None, sum(case.lengths), sum(case.keys), device=device)


def places_of(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The document of each row, and its position there."""
    row_T = torch.arange(num_rows, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens, row_T, right=True) - 1
    return document_T, row_T - cu_seqlens[document_T]


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return compiled_flex()[0](q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@cache
def autotuned_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")


def attend_autotuned_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """The compiler chooses tile shapes by timing them; loads through TMA if the GPU has it."""
    options = {"USE_TMA": True} if torch.cuda.get_device_capability()[0] >= 9 else {}
    return autotuned_flex()(
        q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options or None
    )


def prepare_dense(case: Case, device: str) -> Tensor:
    return dense(case.mask(device), sum(case.lengths), sum(case.keys))


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flat(rows_THK: Tensor, _lengths: tuple[int, ...]) -> Tensor:
    """(1, H, T, K)."""
    return rows_THK.transpose(0, 1)[None].contiguous()


def unflat(rows_1HTK: Tensor, _lengths: tuple[int, ...]) -> Tensor:
    return rows_1HTK[0].transpose(0, 1)


CONTENDERS = [
    Contender("ours", prepare_ours, attend_ours),
    Contender("varlen_attn", prepare_varlen, attend_varlen, refusal=only_cuda),
    Contender("FlexAttention", prepare_flex, attend_flex, flat, unflat, only_cuda),
    padded_contender("SDPA padded, flash", SDPBackend.FLASH_ATTENTION, no_mask_on_gpu),
    padded_contender("SDPA padded, cuDNN", SDPBackend.CUDNN_ATTENTION, only_cuda),
    padded_contender("SDPA padded, efficient", SDPBackend.EFFICIENT_ATTENTION, only_cuda),
    padded_contender(
        "SDPA padded, math", SDPBackend.MATH, lambda _case, device: "for CPUs" if device == "cuda" else None
    ),
    Contender(
        "SDPA, dense mask", prepare_dense, attend_dense, flat, unflat,
        lambda _case, device: "for CPUs" if device == "cuda" else None,
    ),
]  # fmt: skip

# Its tuning takes a minute per case and cannot be interrupted: it runs last, on the cases with a target only.
AUTOTUNED = Contender("FlexAttention, autotuned", prepare_flex, attend_autotuned_flex, flat, unflat, only_cuda)
AUTOTUNED_CASES = 3


def order_of(all_cases: list[Case]) -> list[tuple[Case, Contender]]:
    """(case, contender) pairs in the order of measurement."""
    first = [(case, contender) for case in all_cases for contender in CONTENDERS]
    return first + [(case, AUTOTUNED) for case in all_cases[:AUTOTUNED_CASES]]


# Measuring.


def packed_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, random normal."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(sum(case.lengths), case.heads[0])] + 2 * [(sum(case.keys), case.heads[1])]
    return [
        torch.randn(*shape, case.channels, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for shape in (*shapes, shapes[0])
    ]


def in_layout(contender: Contender, case: Case, packed: list[Tensor]) -> list[Tensor]:
    lengths = (case.lengths, case.keys, case.keys, case.lengths)
    q, k, v, d_out = (contender.layout(rows, side) for rows, side in zip(packed, lengths, strict=True))
    return [*(rows.detach().requires_grad_() for rows in (q, k, v)), d_out]


def measure(contender: Contender, case: Case, dtype: torch.dtype, device: str, repeats: int) -> Row:
    """The row of one contender on one case."""
    reason = contender.refusal(case, device)
    if reason:
        return {"not_run": reason}
    try:
        forward_error, backward_error = errors(contender, case.smaller(), dtype, device)
        return {
            **times(contender, case, dtype, device, repeats),
            "forward_error": forward_error,
            "backward_error": backward_error,
        }
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:  # of a contender: recorded in its row; the others go on
        return {"not_run": f"refuses: {str(error).strip().splitlines()[0][:90]}"}


def times(contender: Contender, case: Case, dtype: torch.dtype, device: str, repeats: int) -> Row:
    sets = [in_layout(contender, case, packed_inputs(case, dtype, device, seed)) for seed in range(INPUT_SETS)]
    prepared = contender.prepare(case, device)

    def forward(number: int, batch: Any = prepared) -> Tensor:
        q, k, v, _ = sets[number]
        return contender.attend(q, k, v, batch)

    def both(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(number), sets[number][:3], sets[number][3])

    outs = [forward(number) for number in range(INPUT_SETS)]

    def backward(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs[number], sets[number][:3], sets[number][3], retain_graph=True)

    row: Row = {"preparation_ms": milliseconds(lambda _: contender.prepare(case, device), device, repeats)}
    if contender.name == "ours" and device == "cuda":
        graph = graph_of(lambda: contender.prepare(case, device))
        row["preparation_device_ms"] = milliseconds(lambda _: graph.replay(), device, repeats)
    with torch.no_grad():
        row["forward_ms"] = milliseconds(forward, device, repeats)
        row["forward_prepared_ms"] = milliseconds(
            lambda number: forward(number, contender.prepare(case, device)), device, repeats
        )
    row["backward_ms"] = milliseconds(backward, device, repeats)
    outs.clear()
    row["both_ms"] = milliseconds(both, device, repeats)
    peak = peak_bytes(lambda: both(0), device)
    work = {"forward": case.flops, "backward": 2.5 * case.flops, "both": 3.5 * case.flops}
    row |= {f"{name}_tflops": flops / row[f"{name}_ms"] / 1e9 for name, flops in work.items()}
    return row | {"peak_gb": None if peak is None else peak / 1e9}


def graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def errors(contender: Contender, case: Case, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Relative L2 error against float64: of the output, and the worst of the three gradients."""
    packed = packed_inputs(case, dtype, device, seed=9)
    q, k, v, d_out = in_layout(contender, case, packed)
    out = contender.attend(q, k, v, contender.prepare(case, device))
    gradients = torch.autograd.grad(out, (q, k, v), d_out)

    wide_q, wide_k, wide_v, wide_d_out = (rows.double().requires_grad_() for rows in packed)
    mask = dense(case.mask(device), sum(case.lengths), sum(case.keys))
    exact = exact_attention(wide_q, wide_k, wide_v, mask)
    exact_gradients = torch.autograd.grad(exact, (wide_q, wide_k, wide_v), wide_d_out)
    sides = (case.lengths, case.keys, case.keys)
    ours = [contender.packed(rows, side) for rows, side in zip(gradients, sides, strict=True)]
    return relative_error([contender.packed(out, case.lengths)], [exact]), relative_error(ours, exact_gradients)


def exact_attention(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask_TS: Tensor) -> Tensor:
    """The formula; a row without visible keys is 0."""
    group = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = (rows.repeat_interleave(group, 1) for rows in (k_SGK, v_SGK))
    score_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * q_THK.shape[2] ** -0.5
    p_HTS = score_HTS.masked_fill(~mask_TS, -torch.inf).softmax(-1).masked_fill(~mask_TS, 0.0)
    return torch.einsum("hts,shk->thk", p_HTS, v_SHK)


COLUMNS = [
    "case", "contender", "forward_ms", "backward_ms", "both_ms", "forward_tflops", "backward_tflops", "both_tflops",
    "preparation_ms", "preparation_device_ms", "peak_gb", "forward_error", "backward_error",
]  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    quick: Annotated[bool, typer.Option(help="small sizes and few repeats, as a smoke test")] = False,
    only: Annotated[str, typer.Option(help="only cases or contenders whose name contains this")] = "",
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the plot")] = Path("benchmarks"),
) -> None:
    """Time every contender on every case; each row is written at once."""
    check_device(device)
    started = time.monotonic()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    record = Record(out, "bench_attention" if device == "cuda" else "bench_attention_cpu", device)
    before: Case | None = None
    for case, contender in order_of(cases(sizes(device, quick))):
        if only.lower() not in f"{case.name}, {contender.name}".lower():
            continue
        if case != before:
            torch.compiler.reset()
            before = case
        row: Row = {"case": case.name, "contender": contender.name, "dtype": str(dtype).removeprefix("torch.")}
        if time.monotonic() - started > seconds:
            record.add(row | {"not_run": f"out of time ({seconds:.0f} s)"})
            continue
        record.add(row | measure(contender, case, dtype, device, repeats=REPEATS[sizes(device, quick)]))
    record.show(COLUMNS)
    panels = {"forward_tflops": "forward", "backward_tflops": "backward", "both_tflops": "forward and backward"}
    print(f"{record.path} and {record.plot(panels, 'TFLOP/s on visible pairs')}")


if __name__ == "__main__":
    typer.run(main)
