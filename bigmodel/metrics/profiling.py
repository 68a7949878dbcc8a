"""Profiles on demand: `bigmodel profile RUN_DIR trace|memory|stacks` during the run.

A request is a file in the run directory. The exporter of each node passes it to the node's ranks: for stacks by
SIGUSR2, which faulthandler handles in C, so it also works for a rank that hangs in a collective or holds the GIL; for
trace and memory by a file in the node's memory, which each rank checks once per step.
Cost per step: one `stat`, a microsecond.
An odd request (bigmodel/metrics/profile_request.py) is refused with a line in refused.txt and in the terminal. An error
in a profile is written beside it and never ends the run. Only ranks import torch.

    RUN_DIR/profile/request.json                   the last request
    RUN_DIR/profile/refused.txt                    why the last refused one was refused
    RUN_DIR/profile/ID/rank-N.trace.json.gz        kernels and operators of a few steps, for Perfetto (ui.perfetto.dev)
    RUN_DIR/profile/ID/rank-N.memory.pickle        GPU: each allocation with its stack (pytorch.org/memory_viz)
    RUN_DIR/profile/ID/rank-N.memory.txt           CPU: memory by operator
    RUN_DIR/profile/ID/rank-N.stacks.txt           all Python threads
"""

import contextlib
import faulthandler
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STACKS_SIGNAL = signal.SIGUSR2
KINDS = ("trace", "memory", "stacks")
DUMP_SECONDS = 0.3  # from the signal to the complete dump


def request(run_directory: Path, kind: str, ranks: Sequence[int], steps: int) -> Path:
    """Request a profile; returns the folder in which the files of the ranks will appear."""
    number = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    folder = Path(run_directory) / "profile" / number
    folder.mkdir(parents=True)
    part = folder.parent / f".{number}.part"
    part.write_text(json.dumps({"id": number, "kind": kind, "ranks": list(ranks), "steps": steps}))
    os.replace(part, folder.parent / "request.json")
    return folder


def wait(folder: Path, ranks: Sequence[int], seconds: float) -> dict[int, Path]:
    """Wait for the file of each rank; returns those that came in time."""
    found: dict[int, Path] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(ranks) and time.monotonic() < deadline:
        found = {rank: path for rank in ranks for path in folder.glob(f"rank-{rank}.*")}
        time.sleep(0.1)
    return found


def group_stacks(texts: dict[int, str]) -> list[tuple[list[int], str]]:
    """Groups of ranks with the same stack of the main thread, largest first; the smallest is usually the cause."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault("\n".join(main_stack(text)), []).append(rank)
    return sorted(((ranks, stack) for stack, ranks in groups.items()), key=lambda group: (-len(group[0]), group[0]))


def main_stack(dump: str) -> list[str]:
    """The frames of the main thread, the last in a dump of faulthandler, innermost first."""
    _, _, main = dump.rpartition("hread 0x")
    return [line for line in main.splitlines()[1:] if line.strip()]


class Relay:
    """The exporter's part: pass new requests to the ranks of this node."""

    def __init__(self, folder: Path, run_directory: Path) -> None:
        self._folder, self._requests = folder, run_directory / "profile"
        self._seen = _changed_at(self._requests / "request.json")

    def look(self, records: Iterable[dict[str, Any]]) -> None:
        """Pass on a new request, if any. `records`: of the ranks that live. Never raises."""
        changed = _changed_at(self._requests / "request.json")
        if changed == self._seen:
            return
        self._seen = changed
        living = list(records)
        try:
            self._pass_on(living)
        except Exception as error:  # a boundary: a request must not end the exporter
            self._refuse(
                f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error), living
            )

    def _pass_on(self, records: list[dict[str, Any]]) -> None:
        from bigmodel.metrics.profile_request import Passed, read_request

        asked = read_request(self._requests / "request.json", self._world_size())
        mine, folder = [record for record in records if record["rank"] in asked.ranks], self._requests / asked.id
        if mine:
            folder.mkdir(exist_ok=True)
        if asked.kind == "stacks":
            self._dump_stacks(mine, folder)
        elif mine:
            self._tell_ranks(Passed(asked=asked, folder=str(folder)).model_dump_json())

    def _world_size(self) -> int:
        try:
            return len(json.loads((self._requests.parent / "world.json").read_text())["ranks"])
        except (OSError, ValueError, KeyError):
            return 0

    def _refuse(self, why: str, records: list[dict[str, Any]]) -> None:
        """Say why, in the exporter's log; on rank 0's node also in refused.txt and, by rank 0, in the terminal."""
        print(f"profile: {why}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if any(record["rank"] == 0 for record in records):
                (self._requests / "refused.txt").write_text(why + "\n")
                self._tell_ranks(json.dumps({"refused": why}))

    def _tell_ranks(self, text: str) -> None:
        part = self._folder / ".profile.json"
        part.write_text(text)
        os.replace(part, self._folder / "profile.json")

    def _dump_stacks(self, records: list[dict[str, Any]], into: Path) -> None:
        files = {record["rank"]: self._folder / f"stacks-{record['rank']}" for record in records}
        for record in records:
            if files[record["rank"]].exists():  # else the rank has no handler and the signal would kill it
                os.truncate(files[record["rank"]], 0)
                os.kill(record["pid"], STACKS_SIGNAL)
        time.sleep(DUMP_SECONDS)
        for rank, file in files.items():
            if file.exists() and file.stat().st_size:
                shutil.copy(file, into / f".rank-{rank}.part")
                os.replace(into / f".rank-{rank}.part", into / f"rank-{rank}.stacks.txt")


class Profiler:
    """A rank's part. Call `step` once per step, `close` at the end."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank, self._request = rank, folder / "profile.json"
        self._seen = _changed_at(self._request)
        self._left = 0  # remaining steps of the current profile
        self._asked: Any = None  # ProfileRequest
        self._into = folder  # the folder of its files
        self._recorder: Any = None
        self._stacks_file = folder / f"stacks-{rank}"  # while it exists, the exporter may send the signal
        part = folder / f".stacks-{rank}"
        self._stacks = open(part, "a")  # noqa: SIM115 - open as long as a signal may come
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        os.replace(part, self._stacks_file)

    def step(self) -> None:
        """Between two steps: begin a requested profile, end a finished one."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._safely(self._end)
        changed = _changed_at(self._request)
        if changed != self._seen and not self._left:
            self._seen = changed
            self._safely(self._begin)

    def close(self) -> None:
        if self._left:
            self._left = 0
            self._safely(self._end)
        self._stacks_file.unlink(missing_ok=True)
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # a signal already sent must not kill this process
        self._stacks.close()

    def _begin(self) -> None:
        import torch

        from bigmodel.metrics.profile_request import Passed

        self._into = self._request.parent
        passed = Passed.model_validate_json(self._request.read_bytes())
        if passed.refused and self._rank == 0:
            print(f"bigmodel: profile: {passed.refused}", file=sys.stderr, flush=True)
        if passed.asked is None or self._rank not in passed.asked.ranks:
            return
        self._asked, self._into = passed.asked, Path(passed.folder)
        if self._asked.kind == "memory" and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        else:
            self._recorder = torch.profiler.profile(profile_memory=self._asked.kind == "memory")
            self._recorder.start()
        self._left = self._asked.steps

    def _end(self) -> None:
        import torch

        part = self._into / f".rank-{self._rank}.part.gz"
        if self._recorder is None:
            try:
                torch.cuda.memory._dump_snapshot(str(part))
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
            self._publish(part, "memory.pickle")
            return
        recorder, self._recorder = self._recorder, None
        recorder.stop()
        if self._asked.kind == "trace":
            recorder.export_chrome_trace(str(part))
            self._publish(part, "trace.json.gz")
        else:
            part.write_text(recorder.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=40))
            self._publish(part, "memory.txt")

    def _publish(self, part: Path, ending: str) -> None:
        os.replace(part, part.with_name(f"rank-{self._rank}.{ending}"))

    def _safely(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a boundary: an error in a profile must not end the run
            self._left = 0
            text = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the log's disk is full
                print(f"bigmodel: rank {self._rank}: the profile failed: {text}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                (self._into / f"rank-{self._rank}.error.txt").write_text(text + "\n")
            with contextlib.suppress(Exception):  # else the next profile finds this one running
                recorder, self._recorder = self._recorder, None
                if recorder is not None:
                    recorder.stop()


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
