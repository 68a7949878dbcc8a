"""Work items: tasks run by processes of this machine or by workers of a Dask cluster.

In: a function and its tasks. Out: the results in the order of the tasks, whatever the order of completion.

Guarantees: a task writes its result atomically to a file, so any process may be killed, and a task may run twice.
Ctrl-C, an error in one task or the death of the parent end all processes of this machine at once. A killed process is
an error here; on a cluster its tasks go to another worker.

The cluster must already run: `dask scheduler` and `dask worker`, or under SLURM dask-jobqueue:

    from dask_jobqueue import SLURMCluster
    cluster = SLURMCluster(cores=1, processes=1, memory="8GB", walltime="08:00:00")
    cluster.scale(jobs=64)
    print(cluster.scheduler_address)      # prepare.scheduler, or --scheduler

Its workers need this package, the same versions, and the sources and data.directory under the same paths. One thread
per worker is best, because tokenizing holds Python's global interpreter lock.
"""

import contextlib
import os
import platform
import signal
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.sizes import byte_size

LOG_SECONDS = 10.0  # between lines of progress where the output is not a terminal
CONNECT_SECONDS = 20  # to a Dask scheduler
INLINE_BYTES = 8 << 20  # below this, starting processes costs more than it saves


class Interrupted(UserError):
    """The work ended for a reason other than text or settings: the same command continues from the finished units."""


class Team:
    """Runs functions over tasks; without an executor, in this process."""

    def __init__(self, executor: Executor | None, progress: Progress, size: int = 1, elsewhere: bool = False) -> None:
        """`size`: approximate number of tasks at once. `elsewhere`: other installations, whose versions are checked."""
        self._executor, self._progress, self._elsewhere = executor, progress, elsewhere
        self.size = size

    def run(
        self,
        title: str,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        weights: Sequence[int],
        look: Callable[[Any], None] = lambda _: None,
    ) -> list[Any]:
        """Results in the order of the tasks. `weights`: bytes of each task, for the display. `look` gets each result
        when it arrives and may raise to stop all tasks."""
        shown = _Shown(self._progress, title, sum(weights))
        results: list[Any] = [None] * len(tasks)
        for number, result in self._results(function, tasks):
            look(result)
            results[number] = result
            shown.advance(weights[number])
        shown.finish()
        return results

    def _results(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        if self._executor is None:
            yield from ((number, function(*task)) for number, task in enumerate(tasks))
            return
        try:
            if self._elsewhere:
                function = partial(_with_versions, versions(), function)
            numbers = {self._executor.submit(function, *task): number for number, task in enumerate(tasks)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool:
            raise Interrupted("a process was killed, most likely out of memory; lower prepare.workers") from None


class _Shown:
    """Progress of a stage: a bar on a terminal, a line every 10 seconds in a log."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._title, self._total = progress, title, total
        self._task = progress.add_task(title, total=total)
        self._done = 0
        self._started = self._last_line = time.monotonic()

    def advance(self, weight: int) -> None:
        self._done += weight
        self._progress.advance(self._task, weight)
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._last_line >= LOG_SECONDS:
            self._last_line = now
            rate = max(1, self._done) / (now - self._started)
            left = (self._total - self._done) / rate
            share = f"{self._done / max(1, self._total):.0%}"
            self._progress.console.print(
                f"{self._title}: {share}, {byte_size(rate)}/s, {left:.0f} s left", markup=False
            )

    def finish(self) -> None:
        self._progress.update(self._task, total=max(1, self._total), completed=max(1, self._total))


@contextlib.contextmanager
def processes(number: int, progress: Progress) -> Iterator[Team]:
    """A team of `number` processes of this machine; with 1, this process.

    Processes are spawned, not forked: the caller may hold torch and its threads.
    """
    if number <= 1:
        yield Team(None, progress)
        return
    context = get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_start_process, initargs=(theirs,))
    try:
        yield Team(pool, progress, number)
    except BaseException:
        ours.close()  # ends the processes at once; unfinished files do not appear
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(parents_end: Connection) -> None:
    """Ignore Ctrl-C, limit the tokenizer library to one thread, and end when the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None, "a process of a pool has a parent"

    def follow() -> None:
        connection.wait([parent.sentinel, parents_end])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def cluster(scheduler: str, progress: Progress) -> Iterator[Team]:
    """The workers of a Dask cluster as a team. Raises `UserError` if it is missing or lost."""
    try:
        import distributed
    except ImportError:
        raise UserError(
            f"prepare.scheduler = {scheduler!r}: needs the package distributed; pip install 'bigmodel[dask]'"
        ) from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise Interrupted(
            f"prepare.scheduler = {scheduler!r}: cannot be reached: {error}; check that it runs"
        ) from None
    try:
        _wait_for_worker(client, scheduler)
        yield Team(client.get_executor(pure=False), progress, sum(client.nthreads().values()), elsewhere=True)
    except distributed.KilledWorker as error:
        raise Interrupted(f"a unit killed every worker that took it: {error}; give the workers more memory") from None
    except CancelledError:
        raise Interrupted(f"prepare.scheduler = {scheduler!r}: was lost; check that it runs") from None
    finally:
        client.close(timeout=CONNECT_SECONDS)


@lru_cache
def versions() -> tuple[tuple[str, str], ...]:
    """Versions in this process of everything that determines the bytes of the result."""
    found = [(name, version(name)) for name in ("numpy", "pyarrow", "tiktoken", "tokenizers")]
    return (("python", platform.python_version()), ("unicode", unicodedata.unidata_version), *found)


def _with_versions(ours: tuple[tuple[str, str], ...], function: Callable[..., Any], *task: Any) -> Any:
    """Run a task on a worker if its versions are those of the caller; workers may join at any time."""
    differences = [
        f"{name} {theirs} for {mine}"
        for (name, mine), (_, theirs) in zip(ours, versions(), strict=True)
        if mine != theirs
    ]
    if differences:
        raise UserError(
            f"a worker on {socket.gethostname()} has {', '.join(differences)}, so the result would depend on the "
            "worker; install the same versions there"
        )
    return function(*task)


def _wait_for_worker(client: Any, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise Interrupted(f"prepare.scheduler = {scheduler!r}: has no workers; start some") from None
