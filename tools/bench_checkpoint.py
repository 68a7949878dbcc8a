"""A save and a load of a checkpoint beside torch.distributed.checkpoint (DCP), asynchronous, in turn.

    python -m tools.bench_checkpoint [--pairs 10] [--millions 100]      writes benchmarks/bench_checkpoint.json, minutes

The state: weight, exp_avg and exp_avg_sq of so many million parameters, fp32, one rank. Each side saves it twice in a
process of its own, and loads it. Stall: what the training thread waits, in seconds and in CPU seconds. Peak: memory
above that before the save. Ours is read back and verified by a checksum, and verified again at the load; DCP's is not.
The memory of our copies is made by a thread before the first save, as in a run, where steps come before it; its CPU
seconds are those of the first save. Files are in the page cache at the load.
"""

import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import Settings
from bigmodel.distributed.world import ALONE
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.saver import Saver
from tools.measure import ROOT, Record

COLUMNS = 2000
KEYS = ("weight", "exp_avg", "exp_avg_sq")
MIB = 1 << 20
DEADLINE_SECONDS = 600.0
State = dict[str, Tensor]
Facts = dict[str, float]


class Weights:
    """In place of an engine: one rank's tensors."""

    updates = 1

    def __init__(self, state: State) -> None:
        self.state = state

    def names(self) -> list[str]:
        return sorted({name.partition(".")[2] for name in self.state})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[f"weight.{name}"].shape)

    def keys(self, name: str) -> list[str]:
        return list(KEYS)

    def owned(self, name: str) -> dict[str, tuple[int, Tensor]]:
        return {key: (0, self.state[f"{key}.{name}"].view(-1)) for key in KEYS}

    def scaler_state(self) -> dict[str, float]:
        return {}

    def write(self, read: Callable[[str, str, int, int], Tensor], updates: int, scaler: dict[str, float]) -> None:
        for place, tensor in self.state.items():
            key, _, name = place.partition(".")
            tensor.view(-1).copy_(read(name, key, 0, tensor.numel()))


def main(
    pairs: Annotated[int, typer.Option(help="measurements of each side")] = 10,
    millions: Annotated[int, typer.Option(help="parameters, in millions")] = 100,
    output: Annotated[Path, typer.Option(help="folder of the result")] = ROOT / "benchmarks",
) -> None:
    """Measure, write bench_checkpoint.json and print the medians of the paired ratios."""
    record = Record(output, "bench_checkpoint", "cpu")
    found: dict[str, list[Facts]] = {name: [] for name in SIDES}
    for _ in range(pairs):
        for name in SIDES:
            with scratch_folder() as folder:
                found[name].append(measured(name, millions, folder))
    case = f"{millions} M parameters, {len(KEYS)} x fp32"
    for name, all_facts in found.items():
        record.add(
            {"case": case, "contender": name, **{key: spread([f[key] for f in all_facts]) for key in all_facts[0]}}
        )
    ours, theirs = found.values()
    ratios = {key: spread([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]) for key in ours[0]}
    record.add({"case": case, "contender": "ours / DCP, pair by pair", **ratios})
    for row in record.rows:
        print(row["contender"], *(f"\n  {key}: {row[key]}" for key in ours[0]))


def spread(values: Sequence[float]) -> str:
    """Median, least, greatest and number."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


def measured(name: str, millions: int, folder: Path) -> Facts:
    """One side in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, name, millions, folder))
    process.start()
    theirs.close()
    facts = ours.recv()
    process.join()
    assert isinstance(facts, dict)
    return facts


def _report(pipe: Any, name: str, millions: int, folder: Path) -> None:
    torch.set_num_threads(1)
    pipe.send(SIDES[name](state_of(millions), folder))


def state_of(millions: int) -> State:
    """Random tensors of at most 4 million elements, by "KEY.NAME"."""
    generator = torch.Generator().manual_seed(0)
    sizes = [min(4, millions - first) for first in range(0, millions, 4)]
    return {
        f"{key}.layer{number:04d}": torch.randn((size * 1_000_000 // COLUMNS, COLUMNS), generator=generator)
        for number, size in enumerate(sizes)
        for key in KEYS
    }


def ours(state: State, folder: Path) -> Facts:
    settings, engine = Settings(), Weights(state)
    saver = Saver(folder / "checkpoints", settings, ALONE)

    def save(step: int) -> Callable[[], Any]:
        saver.begin(engine, {"step": step})
        return lambda: saver.written

    def load() -> None:
        found = checkpoint.newest(folder / "checkpoints", ALONE)
        assert found is not None
        checkpoint.load(found, engine, settings, ALONE)

    def prepare() -> None:
        saver.prepare(engine)
        while any(thread.name == "checkpoint memory" for thread in threading.enumerate()):
            time.sleep(0.05)

    return facts_of(state, save, saver.finish, load, prepare)


def dcp(state: State, folder: Path) -> Facts:
    import torch.distributed as dist
    import torch.distributed.checkpoint as library

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)

    def save(step: int) -> Callable[[], bool]:
        return library.async_save(state, checkpoint_id=str(folder / f"step-{step}")).done

    facts = facts_of(state, save, lambda: None, lambda: library.load(state, checkpoint_id=str(folder / "step-2")))
    dist.destroy_process_group()
    return facts


SIDES: dict[str, Callable[[State, Path], Facts]] = {"bigmodel": ours, "DCP, async": dcp}


def facts_of(
    state: State,
    save: Callable[[int], Callable[[], Any]],
    publish: Callable[[], Any],
    load: Callable[[], Any],
    prepare: Callable[[], Any] = lambda: None,
) -> Facts:
    """save: begins the save of a step, and gives the function that says whether it is written. prepare: what a run does
    beside the steps before the first save."""
    size = sum(tensor.nbytes for tensor in state.values())
    facts: Facts = {}
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    for step, label in ((1, "first"), (2, "next")):
        cpu = _cpu_seconds()
        if label == "first":
            prepare()
        stall, stall_cpu, is_written = _timed(partial(save, step))
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_written():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        more, more_cpu, _ = _timed(publish)
        facts[f"{label}_save_stall_s"] = stall + more
        facts[f"{label}_save_stall_cpu_s"] = stall_cpu + more_cpu
        facts[f"{label}_save_cpu_s"] = _cpu_seconds() - cpu
    facts["save_peak_of_state"] = (_status("VmHWM") - before) / size
    expected = {name: tensor[0, 0].item() for name, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    cpu, started = _cpu_seconds(), time.perf_counter()
    load()
    facts["load_cpu_s"], facts["load_s"] = _cpu_seconds() - cpu, time.perf_counter() - started
    assert all(state[name][0, 0].item() == value for name, value in expected.items())
    return facts


def _timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, CPU seconds of this thread, result."""
    started, cpu = time.perf_counter(), time.thread_time()
    result = call()
    return time.perf_counter() - started, time.thread_time() - cpu, result


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _status(name: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    typer.run(main)
