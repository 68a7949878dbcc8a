"""Peak memory of an export, and of a start from a Hugging Face folder (`model.from`), above that after the imports.

    python -m tools.bench_export --work /tmp/bench_export    # 6 GB of disk, 8 GB of memory, minutes

A decoder of 0.9 GB in fp32 is trained for a step on two ranks, at ZeRO stages 1 and 3; its checkpoint has a file per
rank. A process each then reports its peak (VmHWM) above its memory before: an export in files of 5 GiB, one in files of
0.25 GiB, and `load_start`, which fills a model that is there already. `allowed` is 1.2 times the largest file that is
read plus the largest weight.
"""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open

from tests.support.ranks import command, run_ranks
from tests.support.tiny_corpus import prepared
from tests.support.tiny_run import write_run
from tools.measure import ROOT, Record

ROWS = 32_768  # of the vocabulary
MODEL = {
    "num_layers": 12, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 8, "intermediate_size": 4096,
    "min_vocabulary": ROWS, "tied_embeddings": "true", "qk_norm": "false", "dropout": 0.0,
}  # fmt: skip
MIB = 1 << 20


def main(
    work: Annotated[Path, typer.Option(help="folder of checkpoints; made, and removed at the end")],
    output: Annotated[Path, typer.Option(help="folder of the result")] = ROOT / "benchmarks",
) -> None:
    """Measure, write bench_export.json and print a table."""
    record = Record(output, "bench_export", "cpu")
    shards = prepared(work / "text")
    for stage in (1, 3):
        run = train(work, shards, stage)
        read = run / "checkpoints" / "step-00000001"
        for gib in (5.0, 0.25):
            peak = measured(export, run, work / f"out-{gib}", gib)
            record.add(row(stage, f"export, files of {gib} GiB", peak, read, work / f"out-{gib}"))
        peak = measured(start, work / "out-0.25")
        record.add(row(stage, "model.from, files of 0.25 GiB", peak, work / "out-0.25", work / "out-0.25"))
        for folder in (run, work / "out-5.0", work / "out-0.25"):
            shutil.rmtree(folder)
    record.show(["case", "contender", "peak_mib", "largest_file_mib", "largest_weight_mib", "allowed_mib"])
    shutil.rmtree(work)


def train(work: Path, shards: Path, stage: int) -> Path:
    """One step on two ranks; gives the run directory."""
    run_file = write_run(work, shards, "bf16", stage, f"stage-{stage}")
    changes = {f"model.{name}": value for name, value in MODEL.items()} | {
        "training.steps": 1, "training.global_batch_size": 2, "schedule.warmup_steps": 0, "checkpoint.every_steps": 1,
        "checkpoint.asynchronous": "false", "data.packing_buffer": 2,
    }  # fmt: skip
    overrides = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    run_ranks(2, command, ["train", str(run_file), *overrides], work / "printed", timeout_seconds=900)
    return work / f"stage-{stage}"


def measured(call: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes above those before, at most, of a call in a process of its own. `call` prepares it: imports, a model."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, call, arguments))
    process.start()
    theirs.close()
    peak = ours.recv()
    process.join()
    assert isinstance(peak, int)
    return peak


def _report(pipe: Any, call: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    ready = call(*arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    ready()
    pipe.send(_status("VmHWM") - before)


def export(run: Path, folder: Path, gib: float) -> Callable[[], Any]:
    """An export in files of that size."""
    from bigmodel.exchange import export as module

    return lambda: module.export(run, folder, max_bytes=int(gib * (1 << 30)))


def start(folder: Path) -> Callable[[], Any]:
    """The weights of a folder into a model of the same size."""
    import torch

    from bigmodel.model.huggingface.start import load_start, read_settings
    from bigmodel.model.transformer import Transformer

    settings = read_settings(folder).model_copy(update={"from": folder})
    model = Transformer(settings, ROWS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)  # every page is there
    return lambda: load_start(model, 1)


def row(stage: int, what: str, peak: int, read: Path, weights: Path) -> dict[str, Any]:
    """The result of one process: `read` is the folder that it read, `weights` has the exported ones."""
    file = max(path.stat().st_size for path in read.glob("*.safetensors"))
    largest = 0
    for path in weights.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            largest = max(largest, *(opened.get_tensor(name).nbytes for name in opened.keys()))  # noqa: SIM118
    allowed = 1.2 * file + largest
    values = {"peak": peak, "largest_file": file, "largest_weight": largest, "allowed": allowed}
    in_mib = {f"{name}_mib": round(value / MIB, 1) for name, value in values.items()}
    return {"case": f"ZeRO stage {stage}, 2 ranks", "contender": what, **in_mib}


def _status(name: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    typer.run(main)
