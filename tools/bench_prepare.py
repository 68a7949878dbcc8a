"""Speed of `prepare`, compared with its tokenizer alone and with the usual one-process conversion.

    python -m tools.bench_prepare --megabytes 32 --repeats 3

    python -m tools.bench_prepare --exact --megabytes 6 --repeats 10

    python -m tools.bench_prepare --memory --megabytes 400

Text: Python's standard library as Parquet, repeated with shuffled lines, so no document is a duplicate. All methods
use the same tokenizer.json, trained before. Each runs in its own process; they alternate, and the median counts.
Writes benchmarks/prepare.json and prepare.png and prints the table for benchmarks/README.md.

- `tokenizers alone`: encode_batch_fast on all cores, text in memory; nothing is read or written.
- `tiktoken alone`: the same ids by our fast path, one process per core, text in memory.
- `one process`: like llm-foundry's converter: read a row, tokenize it, give it to MDSWriter.
- `prepare`: the whole command, from the start of Python to the renamed folder: hash, scan, deduplicate, tokenize,
  shards, length index, manifest.
- `prepare, exact`: the same without the fast path: the tokenizers library does the work.

`--exact`: tokenizers that the fast path does not serve, WordPiece and Unigram of 8,000 tokens, with the text as JSONL
in documents of lognormal length. CPU seconds of whole processes, from the start of Python: the library alone (reads the
lines, encodes 64 at a time, keeps nothing), `datasets.map` to a cache of its own, and `prepare`; with `--datatrove`,
where it is installed, its `JsonlReader` and `DocumentTokenizer` without shuffle too. They alternate. Adds `exact` to
benchmarks/prepare.json and prints a table with the median, least and most of the ratios of each round.

`--memory`: peak resident memory of `prepare` in one process, with the text as one file of each kind that cannot be
split or has one row group. Prints a table.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bigmodel.checks.scratch import scratch_folder

ROOT = Path(__file__).parents[1]
VOCABULARY = 32_000
ROW_GROUP = 64  # documents: about 1 MB


# ---- the text -------------------------------------------------------------------------------------------------


def write_text(folder: Path, megabytes: int) -> int:
    """Write text.parquet of about `megabytes`; return its bytes of text."""
    import pyarrow
    import pyarrow.parquet

    from bigmodel.data.prepare.embedded import standard_library

    modules = [content.decode("utf-8", "replace") for _, content in standard_library()]
    draw = random.Random(1)
    texts: list[str] = []
    size = 0
    while size < megabytes * 1_000_000:
        lines = modules[len(texts) % len(modules)].splitlines(keepends=True)
        if len(texts) >= len(modules):
            draw.shuffle(lines)
        texts.append("".join(lines))
        size += len(texts[-1].encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet", row_group_size=ROW_GROUP)
    return size


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, and exact.json: the same ids in a form that tiktoken does not support."""
    from bigmodel.data.store.tokenizer import train

    text = train(read_texts(folder)[:3000], VOCABULARY)
    (folder / "tokenizer.json").write_text(text)
    description = json.loads(text)
    description["model"]["byte_fallback"] = True  # has no effect if every byte is a token
    (folder / "exact.json").write_text(json.dumps(description))


def read_texts(folder: Path) -> list[str]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(folder / "text.parquet")["text"].to_pylist()


# ---- the methods -------------------------------------------------------------------------------------------------


def tokenizers_alone(folder: Path) -> dict[str, float]:
    import tokenizers

    texts = read_texts(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    clock = Clock()
    for start in range(0, len(texts), 1000):
        tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    return clock.read()


def tiktoken_alone(folder: Path) -> dict[str, float]:
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_tiktoken_share, [(folder, number, cores) for number in range(cores)]))
    return {"wall": max(part["wall"] for part in parts), "cpu": sum(part["cpu"] for part in parts)}


def _tiktoken_share(task: tuple[Path, int, int]) -> dict[str, float]:
    from bigmodel.data.store.tokenizer import Tokenizer

    folder, number, cores = task
    texts = read_texts(folder)[number::cores]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert tokenizer.is_fast
    clock = Clock()
    for text in texts:
        tokenizer.encode(text)
    return clock.read()


def one_process(folder: Path) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    import pyarrow.parquet
    import tokenizers

    from tools.torchvision_operators import define_missing_torchvision_operators

    define_missing_torchvision_operators()
    from streaming import MDSWriter

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with scratch_folder(parent=folder) as out:
        clock = Clock()
        with MDSWriter(columns={"tokens": "ndarray:uint16"}, out=f"{out}/shards") as writer:
            for batch in pyarrow.parquet.ParquetFile(folder / "text.parquet").iter_batches(1000):
                for text in batch.column("text").to_pylist():
                    writer.write({"tokens": np.array([0, *tokenizer.encode(text).ids, 1], np.uint16)})
        return clock.read()


def whole_prepare(folder: Path, tokenizer: str, file: str = "text.parquet", more: str = "") -> dict[str, float]:
    with scratch_folder(parent=folder) as out:
        run_file = out / "run.toml"
        run_file.write_text(
            f'[data]\ndirectory = "{out}/data"\n[prepare]\ntokenizer = "{folder}/{tokenizer}"\n{more}'
            f'[[prepare.sources]]\nname = "text"\nfiles = ["{folder}/{file}"]\n'
        )
        clock = Clock()
        subprocess.run([sys.executable, "-m", "bigmodel", "prepare", run_file], cwd=ROOT, check=True, stdout=sys.stderr)
        return clock.read()


class Clock:
    """Wall seconds, and CPU seconds of this process and its ended children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _processor_seconds()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "cpu": _processor_seconds() - self._cpu}


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


WAYS = {
    "tokenizers alone": tokenizers_alone,
    "tiktoken alone": tiktoken_alone,
    "one process": one_process,
    "prepare": lambda folder: whole_prepare(folder, "tokenizer.json"),
    "prepare, exact": lambda folder: whole_prepare(folder, "exact.json"),
}


# ---- the comparison -------------------------------------------------------------------------------------------


def compare(megabytes: int, repeats: int) -> dict[str, Any]:
    with scratch_folder() as folder:
        size = write_text(folder, megabytes)
        write_tokenizer(folder)
        load = os.getloadavg()[0]
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                command = [sys.executable, "-m", "tools.bench_prepare", "--way", way, "--folder", str(folder)]
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{way}: {runs[way][-1]['wall']:.1f} s", file=sys.stderr)
    medians = {way: {key: statistics.median(run[key] for run in mine) for key in mine[0]} for way, mine in runs.items()}
    return {
        "bytes": size,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "python": platform.python_version(),
        "commit": _commit(),
        "runs": runs,
        "median_seconds": medians,
        "megabytes_per_second": {way: size / 1e6 / value["wall"] for way, value in medians.items()},
    }


# ---- without the fast path ------------------------------------------------------------------------------------


def write_lines(folder: Path, megabytes: int) -> list[str]:
    """Write text.jsonl: the standard library end to end, cut into documents of lognormal length, median 735."""
    from bigmodel.data.prepare.embedded import standard_library

    whole = "".join(content.decode("utf-8", "replace") for _, content in standard_library())
    draw, texts, at, size = random.Random(1), [], 0, 0
    while size < megabytes * 1_000_000:
        length = int(draw.lognormvariate(6.6, 1.1)) + 20
        at = draw.randrange(1000) if at + length > len(whole) else at
        texts.append(whole[at : at + length])
        at, size = at + length, size + length
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def write_exact_tokenizers(folder: Path, texts: list[str]) -> None:
    """Write WordPiece.json and Unigram.json, trained on some of the texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special = {"vocab_size": 8000, "show_progress": False}
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=False),
        pre_tokenizers.BertPreTokenizer(),
    )
    words.train_from_iterator(
        texts[:3000], trainers.WordPieceTrainer(special_tokens=["[UNK]", "<s>", "</s>"], **special)
    )
    words.save(str(folder / "WordPiece.json"))
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    named = {"special_tokens": ["<unk>", "<s>", "</s>"], "unk_token": "<unk>"}
    pieces.train_from_iterator(texts[:1500], trainers.UnigramTrainer(**named, **special))
    pieces.save(str(folder / "Unigram.json"))


def library_only(folder: Path, model: str) -> None:
    import tokenizers

    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / f"{model}.json"))
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)


def datasets_map(folder: Path, model: str) -> None:
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / f"{model}.json"))
    with scratch_folder(parent=folder) as cache:
        read = datasets.load_dataset("json", data_files=f"{folder}/text.jsonl", split="train", cache_dir=str(cache))
        read.map(
            lambda rows: {
                "ids": [one.ids for one in tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)]
            },
            batched=True,
            remove_columns=["text"],
        )


def datatrove_tokens(folder: Path, model: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    with scratch_folder(parent=folder) as out:
        steps = [
            JsonlReader(str(folder), glob_pattern="text.jsonl", doc_progress=False),
            DocumentTokenizer(f"{out}/tokens", f"{folder}/{model}.json", eos_token="</s>", shuffle_documents=False),
        ]
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{out}/logs").run()


DATATROVE = "datatrove"
EXACT = {
    "library": library_only,
    "datasets.map": datasets_map,
    DATATROVE: datatrove_tokens,
    "prepare": lambda folder, model: whole_prepare(folder, f"{model}.json", "text.jsonl", "workers = 1\n"),
}


def compare_exact(megabytes: int, repeats: int, models: list[str], has_datatrove: bool = False) -> dict[str, Any]:
    """CPU seconds of each way in each round, by model; and of `prepare` with a few documents, which is its start."""
    with scratch_folder() as folder:
        write_exact_tokenizers(folder, write_lines(folder, megabytes))
        ways = [way for way in EXACT if has_datatrove or way != DATATROVE]
        runs: dict[str, dict[str, list[float]]] = {model: {way: [] for way in ways} for model in models}
        for _ in range(repeats):
            for model in models:
                for way, mine in runs[model].items():
                    mine.append(_seconds_of(f"{way} {model}", folder))
                print(model, {way: round(mine[-1], 2) for way, mine in runs[model].items()}, file=sys.stderr)
        lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
        (folder / "text.jsonl").write_text("".join(lines[:200]))
        start = [_seconds_of("prepare WordPiece", folder) for _ in range(repeats)]
    return {"megabytes": megabytes, "cpu_seconds": runs, "start_cpu_seconds": start, "commit": _commit()}


def _seconds_of(way: str, folder: Path) -> float:
    """CPU seconds of the process of a way; those of `prepare` without those of the Python that starts it."""
    command = [sys.executable, "-m", "tools.bench_prepare", "--way", way, "--folder", str(folder)]
    clock = Clock()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["cpu"] if found else clock.read()["cpu"]


def exact_table(result: dict[str, Any]) -> str:
    lines = [
        "| | library, CPU s | prepare, CPU s | library / prepare | datasets.map / prepare | datatrove / prepare |",
        "|---|---|---|---|---|---|",
    ]
    for model, runs in result["cpu_seconds"].items():
        cells = [f"{statistics.median(runs[way]):.2f}" for way in ("library", "prepare")]
        for way in ("library", "datasets.map", DATATROVE):
            if way not in runs:
                cells.append("not measured")
                continue
            ratios = [theirs / ours for theirs, ours in zip(runs[way], runs["prepare"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    start = result["start_cpu_seconds"]
    lines.append(
        f"\n`prepare` of 200 documents: {statistics.median(start):.2f} s ({min(start):.2f} to {max(start):.2f})"
    )
    return "\n".join(lines)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


# ---- memory ---------------------------------------------------------------------------------------------------


def measure_memory(megabytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    print("| one file | most resident MB | CPU s |\n|---|---|---|")
    with scratch_folder() as folder:
        write_text(folder, megabytes)
        write_tokenizer(folder)
        text = pyarrow.parquet.read_table(folder / "text.parquet")
        for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "arrow", "parquet"):
            file = folder / f"text.{kind}"
            if kind == "parquet":
                pyarrow.parquet.write_table(text, file, row_group_size=len(text))
            elif kind == "arrow":
                with pyarrow.ipc.new_stream(str(file), text.schema) as writer:
                    writer.write_table(text, max_chunksize=1000)
            else:
                compression = {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}.get(kind)
                with pyarrow.output_stream(str(file), compression=compression) as stream:
                    for one in text["text"]:
                        stream.write(json.dumps({"text": one.as_py()}).encode() + b"\n")
            way = f"prepare, {kind}"
            command = [sys.executable, "-m", "tools.bench_prepare", "--way", way, "--folder", str(folder)]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"| {kind}, {file.stat().st_size / 1e6:.0f} MB | {found['resident']:.0f} | {found['cpu']:.0f} |")


def prepare_one_file(folder: Path, kind: str) -> dict[str, float]:
    found = whole_prepare(folder, "tokenizer.json", f"text.{kind}", "workers = 1\n")
    return found | {"resident": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def table(result: dict[str, Any]) -> str:
    speeds = result["megabytes_per_second"]
    lines = ["| | wall s | CPU s | MB/s | of tokenizers alone |", "|---|---|---|---|---|"]
    for way, seconds in result["median_seconds"].items():
        share = speeds[way] / speeds["tokenizers alone"]
        lines.append(f"| {way} | {seconds['wall']:.1f} | {seconds['cpu']:.1f} | {speeds[way]:.1f} | {share:.2f} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = result["megabytes_per_second"]
    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    colours = ["#2a6f97" if way.startswith("prepare") else "#a9b4bd" for way in speeds]
    bars = axes.barh(list(speeds), list(speeds.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"MB of text per second, {result['cores']} cores; median of {len(result['runs']['prepare'])}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--models", nargs="+", default=["WordPiece", "Unigram"], help="with --exact")
    parser.add_argument("--datatrove", action="store_true", help="with --exact: measure it too")
    parser.add_argument("--way", help="run one method and print its seconds")
    parser.add_argument("--folder", type=Path, help="with --way: folder of the text")
    arguments = parser.parse_args()
    if arguments.way and (exact := EXACT.get(arguments.way.partition(" ")[0])) and " " in arguments.way:
        print(json.dumps(exact(arguments.folder, arguments.way.partition(" ")[2])))
        return
    if arguments.way:
        kind = arguments.way.removeprefix("prepare, ")
        way = WAYS.get(arguments.way) or (lambda folder: prepare_one_file(folder, kind))
        print(json.dumps(way(arguments.folder)))
        return
    if arguments.memory:
        measure_memory(arguments.megabytes)
        return
    file = ROOT / "benchmarks" / "prepare.json"
    if arguments.exact:
        result = json.loads(file.read_text()) | {
            "exact": compare_exact(arguments.megabytes, arguments.repeats, arguments.models, arguments.datatrove)
        }
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(exact_table(result["exact"]))
        return
    result = compare(arguments.megabytes, arguments.repeats)
    file.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "benchmarks" / "prepare.png")
    print(table(result))


if __name__ == "__main__":
    main()
