"""Costs of a billion documents on one node: start, resume, memory and steps.

    python -m tools.bench_stream_scale       writes benchmarks/stream_scale.json

A prepared folder of 1e9 documents in 23,256 shards: manifest, index and length files are real and are read, verified
and mapped as in training. The length files are links to sixteen files; the shards have no tokens. 64 lanes, 8 nodes
of 8 ranks; node 3 is run: 8 processes, each with the imports of a training process, plan the node's lanes and keep
the steps of a packing buffer, as `Stream` does. They run at the same time, so seconds are those of 8 processes on
this machine's cores. Two runs: from the beginning, and from a hand-written cursor half-way through the second epoch,
just before a block ends.

Memory is the resident memory of the node: the sum of PSS over its processes (/proc/PID/smaps_rollup; a page shared by
n processes counts 1/n in each), sampled all the time; the peak counts. `after_imports` is before planning.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import DataSettings
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.shuffle import BLOCK_DOCUMENTS
from bigmodel.data.prepare.encoding import save_array
from bigmodel.data.randomness import make_key
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import describe_files
from bigmodel.data.store.shards import ShardStore, measure_shard
from tools.bench_stream import CONTEXT, ROOT, lognormal, record, write_manifest

DOCUMENTS, SHARD_DOCUMENTS, LANES, NODES, RANKS, NODE = 10**9, 43_000, 64, 8, 8, 3
NUM_LISTS = 16  # different length files
PACKS_PER_STEP = NODES * RANKS * 16
STEPS = 300
DATA = DataSettings(max_document_length=CONTEXT, sequence_length=CONTEXT, lanes=LANES)


def write_folder(folder: Path, num_shards: int) -> int:
    """Write the prepared folder without tokens; return its number of documents."""
    source = folder / "train" / "web"
    source.mkdir(parents=True)
    lists = [lognormal(make_key("list", number), SHARD_DOCUMENTS) for number in range(NUM_LISTS)]
    kinds = [number % NUM_LISTS for number in range(num_shards)]
    for number, kind in enumerate(kinds):
        path = source / f"lengths.{number:05}.npy"
        if number == kind:
            save_array(path, lists[kind])
        else:
            path.hardlink_to(source / f"lengths.{kind:05}.npy")
    entries = [mds.shard_entry(0, {"tokens": lengths}, np.dtype(np.uint16)) for lengths in lists]
    raw = [entry["raw_data"] for entry in entries]
    index = [
        {**entries[kind], "raw_data": {**raw[kind], "basename": mds.shard_name(number)}}
        for number, kind in enumerate(kinds)
    ]
    (source / "index.json").write_bytes(mds.encode_index(index))
    files = describe_files(folder)
    nothing = {"sha256": "0" * 64}
    files |= {f"train/web/{mds.shard_name(n)}": {"bytes": raw[kind]["bytes"]} | nothing for n, kind in enumerate(kinds)}
    sizes = [measure_shard(lengths) for lengths in lists]
    write_manifest(folder, [sizes[kind] for kind in kinds], files)
    return num_shards * SHARD_DOCUMENTS


# ---- one rank -------------------------------------------------------------------------------------------------


def rank(folder: Path, number: int, resumes: bool) -> None:
    """Import, start or resume, take steps. Each phase starts on a line of input and ends with a line of output."""
    import bigmodel.training.loop  # noqa: F401 - imports of a training process
    from bigmodel.data.load.stream import take_share
    from bigmodel.data.store.shards import import_mds

    import_mds()
    place = Place(number, NODES * RANKS, RANKS)
    answer({})
    clock, processor = time.perf_counter(), time.process_time()
    store = ShardStore(folder, "train")
    order = Order(store, DATA, PACKS_PER_STEP, 1, lanes=place.lanes(LANES))
    if resumes:
        order.restore(deep_cursor(order))
    first = take_share(order, LANES, place, 1)
    store.file("train/web/index.json")  # verified before the first document is read
    took = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    answer({**took, "packs": len(first.packs)})
    answer(step_milliseconds(order, place))


def answer(result: dict[str, Any]) -> None:
    """Print the result, and wait for the next line of input."""
    print(json.dumps(result), flush=True)
    sys.stdin.readline()


def deep_cursor(order: Order) -> dict[str, Any]:
    """A cursor half-way through the second epoch, before the end of a block."""
    positions = order.plan.source_positions["web"]
    block = DOCUMENTS // LANES // BLOCK_DOCUMENTS // 2
    deep = {"epoch": 1, "block": block, "fragment": BLOCK_DOCUMENTS, "positions": 3 * positions // 2 // LANES}
    lane = {"window": 10**5, "packs_given": 0, "sources": {"web": deep}, "carried": []}
    plan = {"fingerprint": order.fingerprint, "identity": order.plan.identity}
    return {**plan, "step": 10**6, "lanes": [lane] * LANES}


def step_milliseconds(order: Order, place: Place) -> dict[str, float]:
    from bigmodel.data.load.stream import take_share

    milliseconds = []
    ahead: deque[Any] = deque(maxlen=DATA.packing_buffer * LANES // order.packs_at(0) + 1)  # as `Stream` keeps them
    for _ in range(STEPS):
        clock = time.process_time()
        ahead.append((take_share(order, LANES, place, 1), order.position()))
        milliseconds.append(1000 * (time.process_time() - clock))
    return {"mean": statistics.mean(milliseconds), "median": statistics.median(milliseconds), "max": max(milliseconds)}


# ---- the node -------------------------------------------------------------------------------------------------


class Watch:
    """Samples the memory of processes in a thread."""

    def __init__(self, processes: list["subprocess.Popen[str]"]) -> None:
        self._processes, self._ended, self.most = processes, threading.Event(), 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            self.most = max(self.most, resident_bytes(self._processes))

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.most


def resident_bytes(processes: list["subprocess.Popen[str]"], what: str = "Pss") -> int:
    """The sum of a line of smaps_rollup over the processes."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        total += next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))
    return 1024 * total


def run_node(folder: Path, resumes: bool) -> dict[str, Any]:
    """Run eight ranks from their imports to their last step."""
    command = [sys.executable, "-m", "tools.bench_stream_scale", "--folder", str(folder)]
    command += ["--resumes"] if resumes else []
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [
        subprocess.Popen([*command, "--rank", str(number)], cwd=ROOT, text=True, **pipes)
        for number in range(NODE * RANKS, (NODE + 1) * RANKS)
    ]

    def answers(tell: bool = True) -> list[dict[str, Any]]:
        for process in processes if tell else []:
            print(file=process.stdin, flush=True)
        return [json.loads(process.stdout.readline()) for process in processes if process.stdout]

    try:
        answers(tell=False)
        imported = resident_bytes(processes)
        watch = Watch(processes)
        began, steps = answers(), answers()
        most = watch.end()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {
        "seconds": max(one["seconds"] for one in began),
        "processor_seconds_of_a_rank": max(one["processor"] for one in began),
        "packs_per_node_and_step": began[0]["packs"],
        "node_resident_bytes": most,
        "node_resident_bytes_after_imports": imported,
        "step_milliseconds": steps[0],
    }


def node(documents: int) -> dict[str, Any]:
    num_shards = -(-documents // SHARD_DOCUMENTS)
    with scratch_folder() as folder:
        return {
            "documents": write_folder(folder, num_shards),
            "shards": num_shards,
            "manifest_bytes": (folder / "manifest.json").stat().st_size,
            "processes": RANKS,
            "start": run_node(folder, resumes=False),
            "resume": run_node(folder, resumes=True),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--resumes", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder:
        rank(arguments.folder, arguments.rank, arguments.resumes)
        return
    load = os.getloadavg()[0]
    record("scale", node(arguments.documents), load)


if __name__ == "__main__":
    main()
