"""Speed of exporting a run's data order: `bigmodel seen RUN --export`.

    python -m tools.bench_seen              writes benchmarks/stream_seen_export.json

A prepared folder as in tools.bench_stream_scale (real manifest, index and length files, no tokens), and the records of
a run over it, without weights. In turn: the walk with an object per chunk, as training plans; the export; the digests.
CPU seconds of this process, with the first use of the length files. `--documents` of the folder; `--share` of them is
exported.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import Settings, to_toml_table
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.provenance.digests import digest
from bigmodel.provenance.export import export
from bigmodel.provenance.trained import DIGESTS, Run
from bigmodel.run_directory import write_json
from tools.bench_stream import CONTEXT, record
from tools.bench_stream_scale import LANES, PACKS_PER_STEP, SHARD_DOCUMENTS, write_folder


def write_run(folder: Path, data: Path, share: float) -> Run:
    """The records of a run over a share of the documents, to the chain of digests; no weights."""
    settings = Settings.model_validate(
        {
            "run": {"directory": str(folder), "seed": 1},
            "data": {"directory": str(data), "max_document_length": CONTEXT, "sequence_length": CONTEXT}
            | {"lanes": LANES},
            "training": {"global_batch_size": PACKS_PER_STEP},
        }
    )
    folder.mkdir()
    write_json(folder / "settings.json", to_toml_table(settings))
    order = Order.of_run(ShardStore(data, "train"), settings)
    positions = sum(order.plan.source_positions.values())
    steps = max(1, int(share * positions / CONTEXT / PACKS_PER_STEP))
    head = {"format": 1, "segments": [{"first_step": 0, "identity": order.plan.identity}]}
    (folder / DIGESTS).write_text(f"{json.dumps(head)}\n{json.dumps({'last': steps, 'without_update': {}})}\n")
    return Run.open(folder)


def objects(run: Run) -> int:
    order = Order.of_run(run.store(0), run.settings)
    return sum(len(pack) for _ in range(run.reached) for pack in order.next_step())


def timed(name: str, work: Callable[[], Any]) -> tuple[str, float, Any]:
    clock = time.process_time()
    result = work()
    return name, time.process_time() - clock, result


def measure(documents: int, share: float, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    with scratch_folder() as scratch:
        held = write_folder(scratch / "data", max(LANES, documents // SHARD_DOCUMENTS))
        run = write_run(scratch / "run", scratch / "data", share)
        out = scratch / "order.parquet"
        for _ in range(repeats):
            run.folders, run.store(0)  # open
            ways: dict[str, Callable[[], Any]] = {
                "objects": lambda: objects(run),
                "export": lambda: export(run, out),
                "digests": lambda: list(digest(run)),
            }
            found = [timed(name, work) for name, work in ways.items()]
            chunks = found[1][2]
            assert found[0][2] == chunks, "the export and training's plan have the same chunks"
            for name, spent, _ in found:
                seconds.setdefault(name, []).append(spent)
        file_bytes = out.stat().st_size
    microseconds = {name: 1e6 * statistics.median(spent) / chunks for name, spent in seconds.items()}
    return {
        "documents_in_folder": held,
        "chunks_exported": chunks,
        "steps": run.reached,
        "parquet_bytes_per_chunk": file_bytes / chunks,
        "cpu_seconds": seconds,
        "microseconds_per_chunk": microseconds,
        "million_chunks_per_core_minute": {name: 60 / each for name, each in microseconds.items()},
        "export_over_objects": microseconds["export"] / microseconds["objects"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    result = measure(arguments.documents, arguments.share, arguments.repeats)
    record("seen_export", result, load)


if __name__ == "__main__":
    main()
