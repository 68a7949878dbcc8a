"""Balance of attention work over ranks that share packed sequences by keys: contiguous, zigzag, by work.

    python -m tools.bench_position_sharing     # the embedded corpus, sequences of 4,096 to 65,536 tokens, 2 to 8 ranks

Work is what a rank's queries attend to: (query, key) pairs over all layers. A rank that has finished waits for the
others in every layer, so the ratio of the most to the mean is what balance can cost attention. The packed sequences are
those of a run on the prepared data; documents longer than a packed sequence are split into chunks of its length.
`contiguous`: rank r has the r-th part of the positions. `zigzag`: of 2n chunks chunk r and chunk 2n - 1 - r, which is
even for one causal document (Llama 3, ring attention). `by work`: `bigmodel.data.plan.position_sharing`.

`needed`: of the keys that a rank gathers from the others, by work, the share that some query of it attends to.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bigmodel.config.layer_kinds import kinds_of
from bigmodel.config.settings import ModelSettings, Settings, load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.position_sharing import chunks_per_rank, share_positions, work_of_positions
from bigmodel.data.store.shards import ShardStore
from tools.measure import Record

Shares = list[list[range]]


def contiguous(cu_seqlens: np.ndarray, _model: ModelSettings, ranks: int) -> Shares:
    each = int(cu_seqlens[-1]) // ranks
    return [[range(rank * each, (rank + 1) * each)] for rank in range(ranks)]


def zigzag(cu_seqlens: np.ndarray, _model: ModelSettings, ranks: int) -> Shares:
    size, last = int(cu_seqlens[-1]) // (2 * ranks), 2 * ranks - 1
    return [[range(one * size, (one + 1) * size) for one in (rank, last - rank)] for rank in range(ranks)]


WAYS: dict[str, Callable[[np.ndarray, ModelSettings, int], Shares]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "by work": share_positions,
}


def packed(settings: Settings, count: int) -> list[np.ndarray]:
    """cu_seqlens of packed sequences as the run trains on them, padding as the last document."""
    order, length = Order.of_run(ShardStore(settings.data.directory, "train"), settings), settings.data.sequence_length
    found: list[np.ndarray] = []
    while len(found) < count:
        for pack in order.next_step():
            ends = np.cumsum([chunk.num_tokens for chunk in pack])
            found.append(np.unique(np.concatenate([[0], ends, [length]])))
    return found[:count]


def largest_over_mean(cu_seqlens: np.ndarray, model: ModelSettings, shares: Shares) -> float:
    work = work_of_positions(cu_seqlens, model)
    of_ranks = [sum(int(work[run.start : run.stop].sum()) for run in runs) for runs in shares]
    return max(of_ranks) * len(of_ranks) / sum(of_ranks)


def needed(cu_seqlens: np.ndarray, model: ModelSettings, shares: Shares) -> float:
    """Of gathered keys; mean of the ranks."""
    starts, total, used = cu_seqlens[:-1], int(cu_seqlens[-1]), 0
    reach = total if "full" in kinds_of(model) else model.sliding_window - 1
    for runs in shares:
        is_used = np.zeros(total, dtype=bool)
        for run in runs:
            begin = int(starts[np.searchsorted(starts, run.start, side="right") - 1])
            is_used[max(begin, run.start - reach) : run.stop] = True
        for run in runs:
            is_used[run.start : run.stop] = False
        used += int(is_used.sum())
    return used / (total * (len(shares) - 1))


def main(
    run: Annotated[Path, typer.Option(help="a run file with prepared data")] = Path("configs/tiny.toml"),
    lengths: Annotated[list[int], typer.Option("--length", help="of packed sequences")] = [4_096, 16_384, 65_536],  # noqa: B006
    ranks: Annotated[list[int], typer.Option("--ranks")] = [2, 4, 8],  # noqa: B006
    packs: Annotated[int, typer.Option(help="packed sequences of each length")] = 40,
    window: Annotated[int, typer.Option(help="model.sliding_window of all layers; 0: none")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks"),
) -> None:
    """Balance of the three ways on the same packed sequences."""
    record = Record(out, "bench_position_sharing", "cpu")
    for length in lengths:
        sizes = [f"data.sequence_length={length}", f"data.max_document_length={length}", "data.max_documents=1024"]
        window_of = [f"model.sliding_window={window}"] if window else []
        settings = load_settings(run, [*sizes, *window_of, "data.packing_buffer=40"])
        sequences = packed(settings, packs)
        documents = statistics.mean(len(one) - 1 for one in sequences)
        for count in ranks:
            row = {"case": f"{length:,} tokens, {count} ranks", "contender": "by work", "documents": documents}
            row |= {"chunks": count * chunks_per_rank(length // count), "packs": packs, "window": window}
            for name, way in WAYS.items():
                found = [largest_over_mean(one, settings.model, way(one, settings.model, count)) for one in sequences]
                row |= {name: statistics.mean(found), f"{name}_most": max(found)}
            by_work = [needed(one, settings.model, share_positions(one, settings.model, count)) for one in sequences]
            record.add(row | {"needed": statistics.mean(by_work), "needed_most": max(by_work)})
    record.show(["case", "documents", *(key for name in WAYS for key in (name, f"{name}_most")), "needed"])


if __name__ == "__main__":
    typer.run(main)
