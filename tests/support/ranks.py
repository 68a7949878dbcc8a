"""Real ranks for tests: processes forked from a server that has already imported torch and DeepSpeed.

Imports cost 8 s per process. The server pays them once; then ranks start in under a second.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bigmodel.launcher.network import free_port
from bigmodel.rank_log import ARRANGED

GRACE_SECONDS = 30.0  # for the other ranks after a failure: on a busy machine a rank may be seconds behind

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "tests.support.preload"])


def start_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, ranks_per_node: int = 0
) -> list[BaseProcess]:
    """Run `function(*arguments)`, importable, on `world_size` ranks with a launcher's environment.

    `ranks_per_node`: number of ranks on each simulated node; 0: all on one.
    """
    ranks_per_node = ranks_per_node or world_size
    port = free_port()
    ranks: list[BaseProcess] = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % ranks_per_node),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **ARRANGED,
        }
        ranks.append(_context.Process(target=_enter, args=(environment, function, arguments)))
        ranks[-1].start()
    return ranks


def finish(ranks: list[BaseProcess], timeout_seconds: float = 120.0) -> list[int]:
    """Exit codes. Ranks alive after the timeout are killed; after a failure the others have `GRACE_SECONDS`."""
    deadline, failed = time.monotonic() + timeout_seconds, False
    try:
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            if not failed and any(rank.exitcode for rank in ranks):  # the others end by themselves, or hang
                deadline, failed = min(deadline, time.monotonic() + GRACE_SECONDS), True
            time.sleep(0.01)
    finally:  # also on Ctrl-C
        kill(ranks)
    return [rank.exitcode or 0 for rank in ranks]


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = 120.0,
    ranks_per_node: int = 0,
) -> None:
    """Run to the end; asserts exit code 0 of every rank."""
    codes = finish(start_ranks(world_size, function, *arguments, ranks_per_node=ranks_per_node), timeout_seconds)
    assert codes == [0] * world_size, f"exit codes of the ranks: {codes}"


def kill(ranks: list[BaseProcess]) -> None:
    """SIGKILL all live ranks."""
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    for rank in ranks:
        rank.join()


def _enter(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    result = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result if isinstance(result, int) else 0)


def command(arguments: list[str], output: Path) -> int:
    """On a rank: `python -m bigmodel ARGUMENTS` with output into `output`.0, `output`.1 ...; returns the exit code."""
    from bigmodel.__main__ import main

    descriptor = os.open(f"{output}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["bigmodel", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
