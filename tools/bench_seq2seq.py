"""Benchmark of encoder-decoder training: packed pairs against padded batches of the same pairs, same weights.

    python -m tools.bench_seq2seq                        # on the GPU
    python -m tools.bench_seq2seq --device cpu           # a small model on the CPU
    python -m tools.bench_seq2seq --device cpu --quick

Lengths of pairs are like those of translations, summaries and instructions (lognormal, means below). A row is one way
to batch the same pairs: time of forward and backward of all pairs, and tokens per second (source and target, without
padding). `loss_error` is the relative difference of the summed loss from that of packed pairs: all contenders compute
the same loss. Padded batches hold as many pairs as a packed sequence does on average, are right-padded and use torch's
scaled_dot_product_attention, with a mask if it needs one. Sorted batches hold pairs of similar length, as bucketing
does, so batches are not random. Batches with a quarter of the pairs have less padding and smaller matrix products.
On the CPU, seconds are CPU seconds of one thread.

`real_share` is the share of positions without padding. If time is linear in positions, the speedup of packing is the
ratio of two shares; it is larger if attention, which is quadratic, dominates. `real_share_of_many` is the share on all
POOL pairs of the case; there sorting finds far more pairs of similar length than among the few timed pairs.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.data.load.batch import IGNORED, Batch, build_batch, make_dropout_seeds
from bigmodel.data.objectives.examples import Examples, Pair
from bigmodel.data.plan.packing import fullest, pack_two_sides
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.data.randomness import words
from bigmodel.model.init import init_weights
from bigmodel.model.rotary import rotary_table
from bigmodel.model.transformer import AttentionInputs, Transformer
from tools.measure import Record, Row, check_device, milliseconds, peak_bytes, sizes

MODELS = {  # layers of each side, hidden size, vocabulary
    "gpu": (12, 1024, 32_000),
    "cpu": (2, 128, 1_000),
    "quick": (1, 32, 100),
}
PACKS = {"gpu": 8, "cpu": 2, "quick": 1}
REPEATS = {"gpu": 10, "cpu": 3, "quick": 1}
POOL = 4_000  # pairs in the plan
LONGEST, SORTED = "padded to the longest in the batch", "the same, sorted by length"
QUARTER, ALLOWED = "sorted by length, a quarter of the pairs a batch", "padded to the longest allowed"


# ---- lengths ----------------------------------------------------------------------------------------------------


def lognormal(seed: int, count: int, mean: float, deviation: float, least: int, most: int) -> np.ndarray:
    """Lengths with this mean, by inverse transform of random words."""
    normal = NormalDist(float(np.log(mean)) - deviation**2 / 2, deviation)
    uniform = (words(seed, count) >> np.uint64(11)).astype(float) / 2**53
    drawn = [np.exp(normal.inv_cdf(min(max(value, 1e-9), 1 - 1e-9))) for value in uniform.tolist()]
    return np.clip(np.array(drawn).astype(np.int64), least, most)


def translations(count: int) -> np.ndarray:
    """(n, 2) target and source lengths of translated sentences, about equal; source mean 30."""
    source = lognormal(1, count, 30, 0.7, 2, 256)
    return np.stack([np.clip(source * lognormal(2, count, 100, 0.2, 50, 200) // 95, 2, 256), source], axis=1)


def summaries(count: int) -> np.ndarray:
    """(n, 2) lengths of articles of 780 tokens and their summaries of 60, on average."""
    return np.stack([lognormal(3, count, 60, 0.5, 2, 256), lognormal(4, count, 780, 0.5, 2, 2048)], axis=1)


def instructions(count: int) -> np.ndarray:
    """(n, 2) lengths of instructions of 120 tokens and answers of 200 on average, both with a large spread."""
    return np.stack([lognormal(5, count, 200, 1.0, 2, 2048), lognormal(6, count, 120, 1.2, 2, 2048)], axis=1)


@dataclass(frozen=True)
class Case:
    name: str
    lengths: Callable[[int], np.ndarray]
    budgets: tuple[int, int]  # target, source: in the ratio of the data
    longest: tuple[int, int]


CASES = (
    Case("translations", translations, (1024, 992), (256, 256)),
    Case("summaries", summaries, (256, 3328), (256, 2048)),
    Case("instructions", instructions, (3456, 2048), (2048, 2048)),
)


# ---- contenders -------------------------------------------------------------------------------------------------


def make_pairs(case: Case, num_packs: int, vocabulary: int) -> tuple[list[list[Pair]], DataSettings]:
    """Pairs of some packed sequences from a plan of POOL pairs, packed as in training, with the case's budgets."""
    data = DataSettings(
        max_document_length=case.longest[0],
        sequence_length=max(case.budgets[0], case.longest[0]),
        source_sequence_length=max(case.budgets[1], case.longest[1]),
        max_source_length=case.longest[1],
    )
    lengths = case.lengths(POOL)
    packing = pack_two_sides(lengths, (data.sequence_length, data.source_sequence_length), data.max_documents)
    random = np.random.default_rng(1)
    chosen = random.permutation(fullest(packing, lengths, data))[:num_packs]

    def text(length: int) -> np.ndarray:
        return np.concatenate([[1], random.integers(3, vocabulary, length - 1), [2]])

    return [
        [Pair(text(int(lengths[i, 1])), text(int(lengths[i, 0]))) for i in packing.packs[number]] for number in chosen
    ], data


def packed(pairs: list[list[Pair]], data: DataSettings) -> list[Batch]:
    examples, batches = Examples(data, 1), []
    for pack in pairs:
        sides = (np.array([len(pair[side]) - 1 for pair in pack]) for side in (0, 1))
        table = examples.measure_pairs(*sides).tolist()
        plan = tuple(Chunk(0, 0, row, 0, len(pack[row].source) - 1, 0, *columns) for row, columns in enumerate(table))
        keys, source_seeds = (
            make_dropout_seeds(1, 0, [0], size) for size in (data.sequence_length, data.source_sequence_length)
        )
        batches.append(build_batch([plan], partial(_read, pack), data, keys, examples, source_seeds))
    return batches


def _read(pack: list[Pair], chunk: Chunk) -> Pair:
    return pack[chunk.row]


@dataclass(frozen=True)
class PaddedBatch:
    """Rows right-padded to (T, S) positions."""

    tokens_BT: Tensor
    targets_BT: Tensor
    sources_BS: Tensor
    source_lengths_B: Tensor

    def to(self, device: str) -> "PaddedBatch":
        return PaddedBatch(*(tensor.to(device) for tensor in vars(self).values()))


def padded(pairs: Sequence[Pair], size: int, longest: tuple[int, int] | None = None) -> list[PaddedBatch]:
    """Batches of `size` pairs, each padded to its longest, or to `longest`."""
    batches = []
    for first in range(0, len(pairs), size):
        some = pairs[first : first + size]
        width_T, width_S = longest or (max(len(pair[side]) - 1 for pair in some) for side in (1, 0))
        tokens, targets, sources = (np.zeros((len(some), width), np.int64) for width in (width_T, width_T, width_S))
        targets += IGNORED
        for row, (source, target) in enumerate(some):
            tokens[row, : len(target) - 1], targets[row, : len(target) - 1] = target[:-1], target[1:]
            sources[row, : len(source) - 1] = source[1:]
        source_lengths = torch.tensor([len(pair.source) - 1 for pair in some])
        tokens_BT, targets_BT, sources_BS = map(torch.from_numpy, (tokens, targets, sources))
        batches.append(PaddedBatch(tokens_BT, targets_BT, sources_BS, source_lengths))
    return batches


class Padded(nn.Module):
    """The model's weights and layers on padded batches: (B, T, H) in matrix products, masks in attention."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PaddedBatch) -> Tensor:
        model, rows = self.model, len(batch.tokens_BT)
        width_T, width_S = batch.tokens_BT.shape[1], batch.sources_BS.shape[1]
        place_S = torch.arange(width_S, device=batch.tokens_BT.device)
        seen_B11S = (place_S < batch.source_lengths_B[:, None])[:, None, None]
        x_NH = model.embedding(batch.sources_BS).flatten(0, 1)
        inputs = self._view(rows, width_S, x_NH.device)
        for block in model.encoder.blocks:
            q, k, v = block.attention.project(block.attention_norm(x_NH), inputs)
            x_NH = x_NH + block.attention.output(attend(q, k, v, rows, mask=seen_B11S))
            x_NH = x_NH + block.feed_forward(block.feed_forward_norm(x_NH))
        states_NE = model.encoder.norm(x_NH)
        x_NH = model.embedding(batch.tokens_BT).flatten(0, 1)
        inputs = self._view(rows, width_T, x_NH.device)
        for block in model.blocks:
            q, k, v = block.attention.project(block.attention_norm(x_NH), inputs)
            x_NH = x_NH + block.attention.output(attend(q, k, v, rows, causal=True))
            crossing = block.cross_attention
            q = crossing.query(block.cross_attention_norm(x_NH)).unflatten(-1, (crossing.num_heads, crossing.head_dim))
            shape = 2, crossing.num_kv_heads, crossing.head_dim
            k, v = crossing.key_value(states_NE).unflatten(-1, shape).unbind(1)
            x_NH = x_NH + crossing.output(attend(q, k, v, rows, mask=seen_B11S))
            x_NH = x_NH + block.feed_forward(block.feed_forward_norm(x_NH))
        return model.head(model.norm(x_NH), batch.targets_BT.flatten(), "loss_sum")

    def _view(self, rows: int, width: int, device: torch.device) -> AttentionInputs:
        places = torch.arange(width, device=device).repeat(rows)
        return AttentionInputs(None, None, rotary_table(places, self.model.settings))  # type: ignore[arg-type]


def attend(
    q_NQK: Tensor, k_NGK: Tensor, v_NGK: Tensor, rows: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, k, v = (one.unflatten(0, (rows, -1)).transpose(1, 2) for one in (q_NQK, k_NGK, v_NGK))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


# ---- measuring --------------------------------------------------------------------------------------------------


def measure(forward: nn.Module, batches: Sequence[Batch | PaddedBatch], device: str, repeats: int) -> Row:
    """Milliseconds of forward and backward of all batches, the summed loss, peak memory of the largest batch."""
    moved = [batch.to(device) for batch in batches]

    def one(batch: Batch | PaddedBatch) -> float:
        loss = forward(batch)
        loss.backward()
        return loss.detach()

    def call(_number: int) -> float:
        forward.zero_grad(set_to_none=True)
        return sum(one(batch) for batch in moved)

    loss = float(call(0))
    if device == "cuda":
        spent = milliseconds(call, device, repeats)
    else:
        spent = statistics.median(cpu_milliseconds(call) for _ in range(repeats))
    return {"both_ms": spent, "loss": loss, "peak_bytes": peak_bytes(lambda: call(0), device)}


def cpu_milliseconds(call: Callable[[int], float]) -> float:
    started = time.process_time()
    call(0)
    return (time.process_time() - started) * 1e3


def contenders(case: Case, pairs: list[list[Pair]], data: DataSettings) -> dict[str, list]:
    flat = [pair for pack in pairs for pair in pack]
    flat = [flat[place] for place in np.random.default_rng(2).permutation(len(flat))]
    size = max(1, round(len(flat) / len(pairs)))
    by_length = sorted(flat, key=lambda pair: (len(pair.source), len(pair.target)))
    return {
        "packed": packed(pairs, data),
        LONGEST: padded(flat, size),
        SORTED: padded(by_length, size),
        QUARTER: padded(by_length, max(1, size // 4)),
        ALLOWED: padded(flat, size, case.longest),
    }


# ---- how much is padding ----------------------------------------------------------------------------------------


def positions_of(batches: Sequence[Batch | PaddedBatch]) -> int:
    """Positions on both sides, padding included."""
    count = 0
    for batch in batches:
        if isinstance(batch, PaddedBatch):
            count += batch.tokens_BT.numel() + batch.sources_BS.numel()
        else:
            assert batch.source, "pairs have a source side"
            count += batch.tokens.numel() + batch.source.tokens.numel()
    return count


def real_shares(case: Case, size: int, data: DataSettings) -> dict[str, float]:
    """Contender -> share of positions without padding, over POOL pairs in batches of `size`."""
    lengths = case.lengths(POOL)
    packs = len(pack_two_sides(lengths, (data.sequence_length, data.source_sequence_length), data.max_documents).packs)
    by_length = lengths[np.lexsort((lengths[:, 0], lengths[:, 1]))]

    def padded_to_longest(rows: np.ndarray, size: int) -> int:
        batches = (rows[first : first + size] for first in range(0, len(rows), size))
        return sum(len(batch) * int(batch.max(axis=0).sum()) for batch in batches)

    positions = {
        "packed": packs * (data.sequence_length + data.source_sequence_length),
        LONGEST: padded_to_longest(lengths, size),
        SORTED: padded_to_longest(by_length, size),
        QUARTER: padded_to_longest(by_length, max(1, size // 4)),
        ALLOWED: POOL * sum(case.longest),
    }
    return {name: int(lengths.sum()) / count for name, count in positions.items()}


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    quick: Annotated[bool, typer.Option(help="a tiny model and few pairs, as a smoke test")] = False,
    seconds: Annotated[float, typer.Option(help="start no new row after this time")] = 1e9,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the plot")] = Path("benchmarks"),
) -> None:
    """Train on the same pairs with every contender; each row is written at once."""
    check_device(device)
    if device == "cpu":
        torch.set_num_threads(1)
    started, size = time.monotonic(), sizes(device, quick)
    layers, width, vocabulary = MODELS[size]
    heads = max(1, width // (64 if width > 128 else 32))
    settings = ModelSettings(
        kind="encoder_decoder", num_layers=layers, hidden_size=width, num_heads=heads, num_kv_heads=heads,
        intermediate_size=8 * width // 3 // 32 * 32, tied_embeddings=True,
    )  # fmt: skip
    model = Transformer(settings, vocabulary)
    init_weights(model, seed=1)
    model.embedding.weight.data.mul_(10)  # else every loss is that of a uniform guess, with any attention
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    record = Record(out, "bench_seq2seq" if device == "cuda" else "bench_seq2seq_cpu", device)
    for case in CASES:
        pairs, data = make_pairs(case, PACKS[size], vocabulary)
        tokens = sum(len(source) + len(target) - 2 for pack in pairs for source, target in pack)
        expected, shares = 0.0, real_shares(case, max(1, round(sum(map(len, pairs)) / len(pairs))), data)
        for name, batches in contenders(case, pairs, data).items():
            row: Row = {"case": case.name, "contender": name, "pairs": sum(map(len, pairs)), "tokens": tokens}
            row |= {"real_share": tokens / positions_of(batches), "real_share_of_many": shares[name]}
            if time.monotonic() - started > seconds:
                record.add(row | {"not_run": f"out of time ({seconds:.0f} s)"})
                continue
            forward = model if name == "packed" else Padded(model)
            row |= measure(forward, batches, device, REPEATS[size])
            expected = expected or row["loss"]
            row |= {"tokens_per_s": tokens / row["both_ms"] * 1e3, "loss_error": abs(row["loss"] / expected - 1)}
            record.add(row)
    record.show(["case", "contender", "pairs", "real_share", "both_ms", "tokens_per_s", "loss_error", "peak_bytes"])
    print(f"{record.path} and {record.plot({'tokens_per_s': 'forward and backward'}, 'tokens of pairs a second')}")


if __name__ == "__main__":
    typer.run(main)
