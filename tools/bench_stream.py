"""Benchmark of the data stream: packing efficiency, balance over ranks, speed.

    python -m tools.bench_stream packing            efficiency at contexts of 2k, 8k and 32k, and balance over ranks
    python -m tools.bench_stream speed              tokens/s on one core from shards to batches, against others
    python -m tools.bench_stream text               tokens/s from text shards, tokenized while they stream

Each writes benchmarks/stream_<name>.json (packing also a plot) and prints the table for benchmarks/README.md.
Lengths are lognormal, mean 740 tokens, median 403; tokens are random.

- packing: `pad each`: one document or chunk per row; `next-fit`: in order, a new packed sequence when a chunk does not
  fit; `ours`: the order of training, without the chunks carried to the next buffer.
- speed: each method runs in its own process, forked after the imports, for one epoch; they alternate. Tokens over
  CPU seconds of the process, and the ratios of each round: median, least, most. `iterate, concatenate` and `iterate,
  bin-pack` are StreamingDataset.__iter__ with a collator that joins and cuts, and one that packs groups of 256
  documents first-fit decreasing and drops nothing. `--others` adds loaders of other systems, where they are installed:
  see tools/stream_contenders.py.
- text: the embedded corpus, prepared as text and as tokens with a vocabulary of 8,192, through the same stream.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import DataSettings
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.sharing import Place, attention_work, deal_contiguously, deal_evenly, imbalance
from bigmodel.data.prepare.encoding import save_array
from bigmodel.data.randomness import make_key, words
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import Manifest, describe_files
from bigmodel.data.store.shards import ShardStore, measure_shard
from tools.stream_contenders import OTHERS, copies

ROOT = Path(__file__).parents[1]
CONTEXT = 2048


def lognormal(key: int, count: int) -> np.ndarray:
    """Stored tokens of documents: lognormal, from random words of a key, so equal on every machine."""
    uniform = ((words(key, 2 * count) >> np.uint64(11)).astype(float) + 1) / 2**53
    normal = np.sqrt(-2 * np.log(uniform[:count])) * np.cos(2 * np.pi * uniform[count:])
    return (np.exp(6.0 + 1.1 * normal).astype(np.int64) + 2).astype(np.uint32)


def write_manifest(folder: Path, shards: list[list[int]], files: dict[str, Any]) -> None:
    """Write the manifest of one source, `web`, with these shards."""
    (folder / "tokenizer.json").write_text("{}")
    documents, positions, _ = (sum(column) for column in zip(*shards, strict=True))
    counts = {"documents": documents, "tokens": positions + documents, "text_bytes": 0}
    nothing = dict.fromkeys(counts, 0)
    Manifest(
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        vocabulary=50_000,
        bos=0,
        eos=1,
        dtype="uint16",
        counts={"web": {"train": counts, "validation": nothing}},
        shards={"web": {"train": shards, "validation": []}},
        rows={},
        row_bytes={},
        statistics={},
        files=files,
        recipe={},
        corpus_sha256="",
        encoder="none",
        python=platform.python_version(),
    ).write(folder)


# ---- speed ----------------------------------------------------------------------------------------------------


def write_shards(folder: Path, num_tokens: int) -> None:
    """Write train/web in shards of 8 million tokens."""
    source = folder / "train" / "web"
    source.mkdir(parents=True)
    lengths = lognormal(5, num_tokens // 740)
    entries, sizes, per_shard = [], [], 8_000_000 // 740
    for number, first in enumerate(range(0, len(lengths), per_shard)):
        mine = lengths[first : first + per_shard]
        tokens = (words(make_key("tokens", number), int(mine.sum())) % np.uint64(50_000)).astype(np.uint16)
        documents = np.split(tokens, np.cumsum(mine)[:-1])
        (source / mds.shard_name(number)).write_bytes(mds.encode_shard({"tokens": documents}))
        save_array(source / f"lengths.{number:05}.npy", mine)
        entries.append(mds.shard_entry(number, {"tokens": mine}, np.dtype(np.uint16)))
        sizes.append(measure_shard(mine))
    (source / "index.json").write_bytes(mds.encode_index(entries))
    write_manifest(folder, sizes, describe_files(folder))


def ours(folder: Path) -> Iterator[int]:
    """Tokens of each step's batches, from the stream as in training, with verification."""
    from bigmodel.data.load.stream import Stream

    data = DataSettings(max_document_length=CONTEXT, sequence_length=CONTEXT)
    store = ShardStore(folder, "train")
    stream = Stream(store, Order(store, data, 64, 1), data, 8, Place(0, 1), seed=1)
    for step in stream:
        yield step.num_tokens


def next_fit_of_our_reader(folder: Path) -> Iterator[int]:
    """Documents in shuffled order through our reader and our batches, packed next-fit."""
    from bigmodel.data.load.batch import build_batch, make_dropout_seeds
    from bigmodel.data.load.stream import reader
    from bigmodel.data.plan.shuffle import Chunk, SourceCursor, SourceStream, read_shards

    data = DataSettings(max_document_length=CONTEXT, sequence_length=CONTEXT)
    store = ShardStore(folder, "train")
    stream = SourceStream(store, "web", read_shards(store, "web"), CONTEXT, key=1)
    table, _ = stream.ahead(SourceCursor(), stream.positions)
    packs: list[list[Chunk]] = [[]]
    room = CONTEXT
    for row in table.tolist():
        chunk = Chunk(*row)
        if chunk.length > room:
            packs.append([])
            room = CONTEXT
        packs[-1].append(chunk)
        room -= chunk.length
        if len(packs) == 9:
            keys = make_dropout_seeds(1, 0, range(8), CONTEXT)
            yield build_batch([tuple(pack) for pack in packs[:8]], reader(store), data, keys).num_tokens
            packs = packs[8:]


def streamed(folder: Path) -> Iterator[np.ndarray]:
    """Documents in the order of StreamingDataset, with its default shuffle."""
    from tools.torchvision_operators import define_missing_torchvision_operators

    define_missing_torchvision_operators()
    from streaming import StreamingDataset

    local = str(folder / "train" / "web")
    dataset = StreamingDataset(local=local, shuffle=True, batch_size=8, predownload=100_000)
    for sample in dataset:
        yield sample["tokens"]


def concatenated(folder: Path) -> Iterator[int]:
    """Batches of 8 rows, cut from documents laid end to end."""
    import torch

    kept: list[np.ndarray] = []
    held = 0
    for tokens in streamed(folder):
        kept.append(tokens)
        held += len(tokens)
        if held > 8 * CONTEXT:
            joined = np.concatenate(kept).astype(np.int64)
            ends = np.cumsum([len(part) for part in kept])
            rows = torch.from_numpy(joined[: 8 * CONTEXT].reshape(8, CONTEXT))
            owners = np.searchsorted(ends, np.arange(8 * CONTEXT), side="right").reshape(8, CONTEXT)
            make_rows(rows, torch.from_numpy(owners))
            kept, held = [joined[8 * CONTEXT :].astype(np.uint16)], held - 8 * CONTEXT
            yield 8 * CONTEXT


def bin_packed(folder: Path) -> Iterator[int]:
    """Groups of 256 documents, cut at the context, packed into rows first-fit decreasing, padded."""
    import torch

    waiting: list[np.ndarray] = []
    for tokens in streamed(folder):
        waiting += [tokens[start : start + CONTEXT] for start in range(0, len(tokens), CONTEXT)]
        if len(waiting) < 256:
            continue
        bins: list[list[np.ndarray]] = []
        rooms: list[int] = []
        for chunk in sorted(waiting, key=len, reverse=True):
            place = next((number for number, room in enumerate(rooms) if room >= len(chunk)), len(rooms))
            if place == len(rooms):
                bins.append([])
                rooms.append(CONTEXT)
            bins[place].append(chunk)
            rooms[place] -= len(chunk)
        rows_T = np.zeros((len(bins), CONTEXT), np.int64)
        owners = np.full((len(bins), CONTEXT), -1)
        for number, chunks in enumerate(bins):
            joined = np.concatenate(chunks)
            rows_T[number, : len(joined)] = joined
            owners[number, : len(joined)] = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        make_rows(torch.from_numpy(rows_T), torch.from_numpy(owners))
        yield sum(map(len, waiting))
        waiting = []


def make_rows(tokens: Any, owners: Any) -> dict[str, Any]:
    """Output of a packing collator: tokens, shifted labels that stop at the ends of documents, sequence ids."""
    labels = tokens.roll(-1, 1)
    labels[owners != owners.roll(-1, 1)] = -100
    return {"input_ids": tokens, "labels": labels, "sequence_id": owners}


def text(seconds: float) -> dict[str, Any]:
    """Tokens per wall second and per CPU second from token shards and text shards, with 1 and 2 workers."""
    from bigmodel.config.settings import Settings
    from bigmodel.data.load.stream import Stream
    from bigmodel.data.prepare.pipeline import prepare, quiet
    from bigmodel.data.store import shards

    shards.RECENT_TOKENS = 0  # the corpus is small: the cache would serve its next epoch
    rates = {}
    with scratch_folder() as folder:
        for content in ("tokens", "text"):
            section = {"vocabulary": 8192, "content": content, "shard_tokens": 1_000_000}
            made = {"prepare": section, "data": {"directory": f"{folder}/{content}"}}
            prepare(Settings.model_validate(made), quiet())
            for workers in (1, 2):
                data = DataSettings(max_document_length=CONTEXT, sequence_length=CONTEXT, workers=workers)
                store = ShardStore(folder / content, "train")
                stream = Stream(store, Order(store, data, 64, 1), data, 8, Place(0, 1), seed=1)
                next(stream)
                wall, processor, tokens = time.perf_counter(), time.process_time(), 0
                while time.perf_counter() - wall < seconds:
                    tokens += next(stream).num_tokens
                rates[f"{content}, {workers} worker(s)"] = {
                    "tokens_per_second": tokens / (time.perf_counter() - wall),
                    "tokens_per_core_second": tokens / (time.process_time() - processor),
                }
                stream.close()
    return rates


WAYS: dict[str, Callable[[Path], Iterator[int]]] = {
    "ours": ours,
    "our reader, next-fit": next_fit_of_our_reader,
    "iterate, concatenate": concatenated,
    "iterate, bin-pack": bin_packed,
}


def one_way(way: str, folder: Path, num_tokens: int) -> dict[str, float]:
    """Tokens and CPU seconds of an epoch of `num_tokens`, after the first batch."""
    batches = (WAYS | OTHERS)[way](folder)
    next(batches)
    processor, tokens = time.process_time(), 0
    for count in batches:
        tokens += count
        if tokens >= num_tokens:
            break
    return {"tokens": tokens, "processor": time.process_time() - processor}


def forked(way: str, folder: Path, num_tokens: int) -> dict[str, float]:
    """`one_way` in a process of its own with the imports of this one."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(one_way(way, folder, num_tokens)).encode())
        os._exit(0)  # the resource tracker cleans up streaming's threads and shared memory
    os.close(write)
    with open(read) as pipe:
        found: dict[str, float] = json.loads(pipe.readline())
    os.waitpid(child, 0)
    return found


def speed(num_tokens: int, repeats: int, ways: list[str]) -> dict[str, Any]:
    """`ways`: names in WAYS and OTHERS, the first is ours."""
    from tools.torchvision_operators import define_missing_torchvision_operators

    define_missing_torchvision_operators()
    for module in ("streaming", "bigmodel.data.load.stream"):
        importlib.import_module(module)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with scratch_folder() as folder:
        write_shards(folder, num_tokens)
        copies(folder, ways)
        gc.collect()
        gc.freeze()  # as training does after its imports
        for _ in range(repeats):
            for way in ways:
                runs[way].append(forked(way, folder, num_tokens))
                print(way, runs[way][-1], file=sys.stderr)
    rates = {way: [run["tokens"] / run["processor"] for run in mine] for way, mine in runs.items()}
    ratios = {}
    for way in ways[1:]:
        found = [our / other for our, other in zip(rates["ours"], rates[way], strict=True)]
        ratios[way] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    medians = {way: statistics.median(mine) for way, mine in rates.items()}
    return {"tokens_in_shards": num_tokens, "runs": runs, "tokens_per_core_second": medians, "ours_over": ratios}


# ---- packing and balance --------------------------------------------------------------------------------------


class InMemory:
    """A store with lengths only, in shards of 10,000 documents."""

    sources = ["web"]
    fingerprint = "lognormal"

    def __init__(self, documents: int) -> None:
        self._shards = np.split(lognormal(9, documents), range(10_000, documents, 10_000))

    def shard_sizes(self, source: str) -> np.ndarray:
        return np.array([measure_shard(lengths) for lengths in self._shards])

    def lengths(self, source: str, shard: int) -> np.ndarray:
        return self._shards[shard]

    def chunks(self, context: int) -> np.ndarray:
        positions = np.concatenate(self._shards).astype(np.int64) - 1
        whole = np.full(int((positions // context).sum()), context)
        rest = positions[positions % context > 0] % context
        chunks = np.concatenate([whole, rest])
        return chunks[np.argsort(words(3, len(chunks)))]


def next_fit(chunks: np.ndarray, context: int) -> float:
    packs, room = 1, context
    for chunk in chunks.tolist():
        if chunk > room:
            packs, room = packs + 1, context
        room -= chunk
    return float(chunks.sum()) / (packs * context)


def packing(documents: int) -> dict[str, Any]:
    store = InMemory(documents)
    efficiency: dict[str, dict[int, float]] = {"pad each": {}, "next-fit": {}, "ours": {}}
    limited, balance, rate = {}, {}, {}
    for context in (2048, 8192, 32_768):
        chunks = store.chunks(context)
        efficiency["pad each"][context] = float(chunks.mean()) / context
        efficiency["next-fit"][context] = next_fit(chunks, context)
        data = DataSettings(max_document_length=context, sequence_length=context)
        documents_limit = data.max_documents
        order = Order(store, data, 100, 1)
        steps, clock = max(5, int(chunks.sum()) // context // 100), time.process_time()
        taken = [order.next_step() for _ in range(steps)]
        packs = [pack for step in taken for pack in step]
        filled = [sum(chunk.length for chunk in pack) for pack in packs]
        rate[context] = sum(map(len, packs)) / (time.process_time() - clock)
        efficiency["ours"][context] = sum(filled) / (len(packs) * context)
        limited[context] = sum(
            len(pack) == documents_limit and fill < context for pack, fill in zip(packs, filled, strict=True)
        )
        for size in (1, 4):
            balance[f"{context}, {size} pack(s) a micro-batch"] = balance_of(packs, size)
    return {
        "documents": documents,
        "efficiency": efficiency,
        "packs_limited_by_documents": limited,
        "documents_planned_per_second": rate,
        "imbalance_8_ranks_4_rounds": balance,
    }


def balance_of(packs: list[Any], size: int, ranks: int = 8, rounds: int = 4) -> dict[str, float]:
    """Mean imbalance of steps: 1 is even."""
    in_order, dealt = [], []
    for first in range(0, min(len(packs), 20 * ranks * rounds * size), ranks * rounds * size):
        work = attention_work(PackTable.of_packs(packs[first : first + ranks * rounds * size]))
        if len(work) == ranks * rounds * size:
            in_order.append(imbalance(work, deal_contiguously(len(work), ranks, rounds, size)))
            dealt.append(imbalance(work, deal_evenly(work, ranks, rounds, size)))
    return {"in canonical order": statistics.mean(in_order), "dealt": statistics.mean(dealt)} if dealt else {}


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for way, marker in (("pad each", "s"), ("next-fit", "^"), ("ours", "o")):
        points = result["efficiency"][way]
        axes.plot(list(points), [100 * value for value in points.values()], marker=marker, label=way)
        axes.annotate(f"{100 * list(points.values())[-1]:.2f}", (list(points)[-1], 100 * list(points.values())[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks([2048, 8192, 32768], ["2k", "8k", "32k"])
    axes.set(xlabel="context, tokens", ylabel="% of positions without padding", ylim=(0, 105))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path, dpi=120)


def record(name: str, result: dict[str, Any], load: float) -> None:
    """Write benchmarks/stream_<name>.json with the hardware, and print it. `load`: system load before the run."""
    result |= {"load_before": load, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    result["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    written = json.dumps(result, indent=1)
    (ROOT / "benchmarks" / f"stream_{name}.json").write_text(written + "\n")
    print(written)


# ---- the command line -----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("packing", "speed", "text"))
    parser.add_argument("--documents", type=int, default=300_000, help="packing: documents")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="speed: tokens in the shards")
    parser.add_argument("--seconds", type=float, default=4.0, help="text: length of one run")
    parser.add_argument("--repeats", type=int, default=10, help="speed: runs of each method")
    theirs = list(WAYS)[1:]
    parser.add_argument("--ways", nargs="*", choices=theirs, default=theirs, help="speed: beside ours")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=[], help="speed: loaders of other systems")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    runs = {
        "packing": lambda: packing(arguments.documents),
        "speed": lambda: speed(arguments.tokens, arguments.repeats, ["ours", *arguments.ways, *arguments.others]),
        "text": lambda: text(arguments.seconds),
    }
    result = runs[arguments.what]()
    record(arguments.what, result, load)
    if arguments.what == "packing":
        draw(result, ROOT / "benchmarks" / "stream_packing.png")


if __name__ == "__main__":
    main()
