"""Failed allocations, of the system itself: what the run says, its exit code; and too many open files."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from bigmodel.system_errors import is_out_of_memory, line_of, remedy_for
from tests.support.ranks import command, finish, start_ranks
from tests.support.tiny_run import write_run

ROOM_BYTES = 4 << 30  # of address space, beyond what the process has
TOO_WIDE = 100_000_000  # rows of 32 numbers: 12.8 GB a matrix


def train_with_little_memory(arguments: list[str], output: Path) -> int:
    """On a rank: the command, where the system refuses what goes beyond ROOM_BYTES."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, resource.RLIM_INFINITY))
    return command(arguments, output)


def test_a_rank_without_memory_says_what_was_asked_for_the_plan_and_what_would_help(
    tmp_path: Path, shards: Path
) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "printed"
    arguments = ["train", str(run_file), "--set", f"model.intermediate_size={TOO_WIDE}"]
    assert finish(start_ranks(2, train_with_little_memory, arguments, output), 100) == [1, 1]
    for rank, name in ((0, "bigmodel"), (1, "bigmodel (rank 1)")):
        said = Path(f"{output}.{rank}").read_text()
        assert "Traceback" not in said
        asked, plan, help_ = said[said.index(f"{name}: rank {rank}: out of memory: ") :].splitlines()
        assert "you tried to allocate" in asked
        assert "alloc_cpu.cpp" not in asked
        assert plan.startswith(
            "  plan (bigmodel show memory RUN.toml --ranks 2), ZeRO 1: weights 71.53, gradients 71.53,"
        )
        assert plan.endswith("GiB on the device of each rank")
        assert help_.startswith("  would help: ")
        for remedy in ('"stage": 2}', 'activation_checkpointing = "full" (now "none")', "more ranks (now 2)"):
            assert remedy in help_, remedy


def test_each_way_to_run_out_of_memory_is_known_with_what_was_asked_for() -> None:
    for allocate, asked in (
        (lambda: torch.empty(10**13), "can't allocate memory: you tried to allocate 40000000000000 bytes"),
        (lambda: np.empty(10**13), "Unable to allocate 72.8 TiB for an array with shape (10000000000000,)"),
        (lambda: bytearray(10**16), "Python's own memory"),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
        assert line_of(caught.value).startswith(f"out of memory: {asked}")
    gpu = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
        "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
    )
    assert line_of(torch.OutOfMemoryError(gpu)) == f"out of memory: {gpu[20 : gpu.index(' If')]}"
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(5, "Input/output error")):
        assert not is_out_of_memory(other)
        assert remedy_for(other) == ""


def test_too_many_open_files_is_known_with_its_remedy(tmp_path: Path) -> None:
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    tensor = torch.ones(100_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as of_python:
            held.extend(iter(lambda: open(tmp_path / "file", "w"), None))  # noqa: SIM115
        with pytest.raises(RuntimeError) as of_torch:
            tensor.share_memory_()
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for error in (of_python.value, of_torch.value):
        assert "Too many open files" in line_of(error)
        assert "raise the limit of open files (ulimit -n 65536" in line_of(error)
    assert line_of(of_python.value).startswith(f"{tmp_path}/file: ")
