"""Fault injection for checkpoints: thousands of kills, power cuts and flipped bits, on real files.

    make torture        (python -m tools.torture --kills 200 --flips 1000)

- kills: two processes save a small checkpoint as two ranks; SIGKILL kills one at a named point of the save, or both
  at a random time. Every second kill is also a power cut: data that was not synced is lost.
- flips: one random bit of a checkpoint is flipped, and it is loaded.

After each fault: every published checkpoint verifies, the newest is at least as new as the last one reported saved,
and it loads exactly the saved tensors. `--defect` plants a defect; the program must then fail. Exit code 0 if every
guarantee held, else 1.
"""

import json
import os
import pickle
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch import Tensor

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.training.checkpoint import checksum
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.checkpoint.folder import remove_partials
from bigmodel.training.checkpoint.snapshot import Snapshot

SHAPES = {"embedding.weight": (40, 8), "block.weight": (8, 8), "norm.weight": (8,), "odd": (3, 5)}
SETTINGS = Settings.model_validate({"checkpoint": {"keep": 2}})
POINTS = [f"rank-{rank}-{point}" for rank in (0, 1) for point in ("starts", "half", "wrote")]
POINTS += ["before-manifest", "before-rename-of-manifest", "before-rename", "after-rename"]
POINTS += ["before-removal", "in-removal", "at random"]
RANDOM_SECONDS = 0.02  # about the time of a save here


class Weights:
    """In place of an engine: tensors that depend on the step; each rank owns a share."""

    def __init__(self, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES, world: World = checkpoint.ALONE) -> None:
        self.updates, self._shapes, self._world = step, shapes, world
        self.state = {
            name: {
                key: torch.randn(shape, generator=torch.Generator().manual_seed(step * 100 + len(name) + number))
                for number, key in enumerate(("weight", "exp_avg", "exp_avg_sq"))
            }
            for name, shape in shapes.items()
        }

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def keys(self, name: str) -> list[str]:
        return list(self.state[name])

    def owned(self, name: str) -> dict[str, tuple[int, Tensor]]:
        numel = torch.Size(self._shapes[name]).numel()
        first, end = (numel * rank // self._world.size for rank in (self._world.rank, self._world.rank + 1))
        return {key: (first, tensor.flatten()[first:end]) for key, tensor in self.state[name].items()}

    def write(self, read: checkpoint.Read, updates: int, scaler: dict[str, float]) -> None:
        for name, shape in self._shapes.items():
            numel = torch.Size(shape).numel()
            self.state[name] = {key: read(name, key, 0, numel).view(shape) for key in self.state[name]}
        self.updates = updates

    def scaler_state(self) -> dict[str, float]:
        return {}

    def same_as(self, other: "Weights") -> bool:
        pairs = [(self.state[name][key], other.state[name][key]) for name in self._shapes for key in self.state[name]]
        return self.updates == other.updates and all(torch.equal(one, two) for one, two in pairs)


@dataclass(frozen=True)
class Pair(World):
    """Two ranks connected by a socket: they start in milliseconds. A dead peer ends this process too."""

    link: socket.socket

    def gather_objects(self, value: Any) -> list[Any]:
        content = pickle.dumps(value)
        try:
            self.link.sendall(struct.pack("<q", len(content)) + content)
            (size,) = struct.unpack("<q", self._receive(8))
            other = pickle.loads(self._receive(size))
        except OSError:
            os._exit(1)
        return [value, other] if self.rank == 0 else [other, value]

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def _receive(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            part = self.link.recv(size - len(content))
            if not part:
                os._exit(1)
            content += part
        return content


@dataclass
class Bench:
    """A folder of checkpoints under fault injection; methods return broken guarantees as sentences."""

    folder: Path
    defect: str = ""
    saved_step: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.folder / "checkpoints"
        self.journal = self.folder / "journal"
        self.step = 0
        defect, self.defect = self.defect, ""
        for _ in range(2):  # older checkpoints to fall back on
            self.kill("", lose_power=False)
        self.defect = defect

    def kill(self, point: str, lose_power: bool) -> list[str]:
        """Save the next step, killed at a point ("": not killed); return broken guarantees."""
        self.step += 1
        ends = socket.socketpair()
        ranks = [self._fork(rank, ends, point) for rank in (0, 1)]
        for end in ends:
            end.close()
        if point == "at random":
            time.sleep(random.uniform(0, RANDOM_SECONDS))
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        if codes == [0, 0]:
            self.saved_step = self.step
        if lose_power:
            self._lose_power()
        wrong = self.wrong()
        remove_partials(self.checkpoints)
        if not point and codes != [0, 0]:
            wrong.append(f"an undisturbed save ended with {codes}")
        if point and point != "at random" and -signal.SIGKILL not in codes:
            wrong.append(f"no rank was killed at {point}: {codes}")
        return [f"step {self.step}, killed {point or 'never'}: {line}" for line in wrong]

    def wrong(self) -> list[str]:
        """Broken guarantees of the folder now."""
        alone = checkpoint.ALONE
        found = [
            f"{path.name} is published and broken: {problems[0]}"
            for step in checkpoint.steps(self.checkpoints)
            if (problems := checkpoint.verify(path := checkpoint.path_of(self.checkpoints, step), alone))
        ]
        try:
            newest = checkpoint.newest(self.checkpoints, report=lambda text: None)
        except UserError as error:
            return [*found, str(error)]
        if newest is None or newest.state["step"] < self.saved_step:
            return [*found, f"step {self.saved_step} was saved and is not found"]
        weights = Weights(0)
        checkpoint.load(newest, weights, SETTINGS, alone)
        if not weights.same_as(Weights(newest.state["step"])):
            found.append(f"step {newest.state['step']} does not load the saved content")
        return found

    def flip(self) -> list[str]:
        """Flip one random bit of the newest checkpoint, load, flip it back."""
        path = checkpoint.path_of(self.checkpoints, checkpoint.steps(self.checkpoints)[-1])
        files = [file for file in sorted(path.iterdir()) if file.stat().st_size]
        if not files:
            return [f"{path.name} is published and empty"]
        file = random.choices(files, [file.stat().st_size for file in files])[0]
        content = file.read_bytes()
        bit = random.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(flipped)
        told: list[str] = []
        try:
            found = checkpoint.newest(self.checkpoints, report=told.append)
            silent = found is None or found.path == path or not any(file.name in line for line in told)
        except Exception:  # any error will do: the damage was noticed
            silent = False
        finally:
            file.write_bytes(content)
        return [f"bit {bit} of {file.name} was flipped without an error"] if silent else []

    def _fork(self, rank: int, ends: tuple[socket.socket, socket.socket], point: str) -> int:
        sys.stdout.flush()
        if child := os.fork():
            return child
        try:
            ends[1 - rank].close()  # else the death of the other rank would not close the socket
            os.environ[saving.FAULT_VARIABLE] = f"{point}@{self.step}"
            _journal_syncs(self.journal)
            DEFECTS[self.defect](rank)
            world = Pair(rank, 2, rank, 2, torch.device("cpu"), ends[rank])
            saver = saving.Saver(self.checkpoints, SETTINGS, world)
            saver.save(Weights(self.step, world=world), {"step": self.step})
            os._exit(0)
        except BaseException as error:
            print(f"rank {rank}: {error!r}", file=sys.stderr)
        os._exit(3)

    def _lose_power(self) -> None:
        """Empty all unsynced files; remove names that were not in their folder at its last sync."""
        entries = [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []
        synced = {entry["inode"] for entry in entries}
        names = {(entry["inode"], name) for entry in entries for name in entry["names"]}
        for folder in [path for path in self.checkpoints.iterdir() if path.is_dir()]:
            for file in list(folder.iterdir()):
                if (folder.stat().st_ino, file.name) not in names:
                    file.unlink()
                elif file.stat().st_ino not in synced:
                    os.truncate(file, 0)


def _journal_syncs(journal: Path) -> None:
    """Log every fsync of this process: the inode, and the names if it is a folder."""
    real = os.fsync

    def fsync(descriptor: Any) -> None:
        real(descriptor)
        status = os.fstat(descriptor)
        names = os.listdir(descriptor) if os.path.isdir(f"/proc/self/fd/{descriptor}") else []
        with open(journal, "ab") as file:
            file.write(json.dumps({"inode": status.st_ino, "names": names}).encode() + b"\n")

    os.fsync = fsync  # type: ignore[assignment]


def publish_before_the_last_rank(rank: int, seconds: float = 0.05) -> None:
    """Rank 1 reports its write this long before it happens."""
    if rank == 1:
        real = saving.write_share

        def early(path: Path, snapshot: Snapshot, rank: int, step: int) -> Any:
            def write() -> None:
                time.sleep(seconds)
                real(path, snapshot, rank, step)

            threading.Thread(target=write, daemon=True).start()
            return saving._Report(path.name, len(snapshot.content), checksum.of_bytes(snapshot.content))

        saving.write_share = early


def _no_sync(rank: int) -> None:
    os.fsync = lambda fd: None


def _hash_unchecked(rank: int) -> None:
    """Has its effect in the loading process: see `planted`."""


DEFECTS: dict[str, Callable[[int], None]] = {
    "": lambda rank: None,
    "publish before the last rank": publish_before_the_last_rank,
    "no sync": _no_sync,
    "hash unchecked": _hash_unchecked,
}


@contextmanager
def planted(defect: str) -> Any:
    """The defect in the loading process."""
    real = checkpoint._check_file
    if defect == "hash unchecked":
        checkpoint._check_file = lambda path, facts: []
    try:
        yield
    finally:
        checkpoint._check_file = real


def torture(folder: Path, kills: int, flips: int, defect: str = "", progress: Progress | None = None) -> list[str]:
    """`kills` at each point of a save and `flips` flipped bits; return broken guarantees."""
    bench, wrong = Bench(folder / "bench", defect), []
    bar = progress.add_task("kills and flips", total=kills * len(POINTS) + flips) if progress else None
    with planted(defect):
        for number in range(kills):
            for point in POINTS:
                wrong += bench.kill(point, lose_power=number % 2 == 1)
                if progress and bar is not None:
                    progress.advance(bar)
            wrong += bench.kill("", lose_power=number % 2 == 1)
        for _ in range(flips):
            wrong += bench.flip()
            if progress and bar is not None:
                progress.advance(bar)
    return wrong


def main(
    kills: Annotated[int, typer.Option(help="at each point of a save")] = 200,
    flips: Annotated[int, typer.Option(help="flipped bits")] = 1000,
    defect: Annotated[str, typer.Option(help=f"plant one of: {', '.join(list(DEFECTS)[1:])}")] = "",
) -> None:
    with scratch_folder("torture-") as folder:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, console=Console(markup=False, emoji=False)) as progress:
            wrong = torture(folder, kills, flips, defect, progress)
    done = f"{kills} kills at each of {len(POINTS)} points, {flips} flipped bits"
    print("\n".join(wrong[:20]))
    print(f"{done}: {f'{len(wrong)} broken guarantees' if wrong else 'every guarantee held'}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
