"""Ranks with a fault, for tests and `make soak`: training that is killed, stopped, starved of data or of room on the
disk, or computes or keeps wrong numbers on one rank, at a given step."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ranks import command

FLIPPED, BROKEN, POISONED, RUINED, LOUD = "flipped", "broken", "poisoned", "ruined", "loud"
KILLED, STOPPED, RAISED, STALLED, NO_ROOM = "killed", "stopped", "raised", "stalled", "no room"


@dataclass(frozen=True)
class Fault:
    """kind:
    flipped: a bit of a weight in this rank's copy, before step `step` is computed;
    broken: the output of `module` is not finite on this rank, `times` times from that step on;
    poisoned: it is not finite on any rank for one in five micro-batches, which their tokens tell;
    ruined: it is not finite on any rank from that step on;
    loud: gradients of data step `step` are 2,000 times as large;
    killed, stopped: SIGKILL or SIGSTOP, `delay` seconds after the first forward pass of that step began;
    raised: an exception before that step is computed;
    stalled: from that step on no document can be read;
    no room: for `steps` steps from that one on no file can become larger than `limit_of` is now, or `room_bytes`.

    backward: the gradient of the output is not finite, and the output is. spoilt: data steps whose loss is not finite
    on any rank; spoilt_in: a file with more of them, which may come later, but before these steps. loud_in: the same
    for steps that are loud. slow_in: while this file is there, each document takes 0.3 s to read. journal: gets the
    Unix time at which the fault happened."""

    kind: str = ""
    rank: int = 1
    step: int = 3
    module: str = "blocks.1.feed_forward"
    times: int = 1
    backward: bool = False
    delay: float = 0.0
    steps: int = 8
    room_bytes: int = 1 << 16
    limit_of: Path | None = None
    spoilt: tuple[int, ...] = ()
    spoilt_in: Path | None = None
    loud_in: Path | None = None
    slow_in: Path | None = None
    journal: Path | None = None

    def spoils(self, step: int) -> bool:
        return step in self.spoilt or is_told(self.spoilt_in, step)

    def is_loud(self, step: int) -> bool:
        return (self.kind == LOUD and step == self.step) or is_told(self.loud_in, step)

    def happens(self) -> None:
        if self.journal:
            self.journal.write_text(repr(time.time()))


def is_told(file: Path | None, step: int) -> bool:
    return bool(file and file.exists() and str(step) in file.read_text().split())


def train(fault: Fault, arguments: list[str], output: Path) -> int:
    """On a rank: `python -m bigmodel ARGUMENTS` with the fault; the exit code of the command."""
    from bigmodel.training import loop

    class Stream(loop.Stream):
        def __next__(self) -> Any:
            step = super().__next__()
            Engine.at = step.number + 1
            return step

    class Engine(loop.Engine):
        at, left = 0, fault.times

        def __init__(self, model: Any, *more: Any) -> None:
            super().__init__(model, *more)
            self.batch: Any = None
            self.model = model
            if fault.kind in (BROKEN, POISONED, RUINED) or fault.spoilt or fault.spoilt_in:
                model.register_forward_pre_hook(self.remember)
                model.get_submodule(fault.module).register_forward_hook(self.spoil)

        def remember(self, module: Any, inputs: Any) -> None:
            self.batch = inputs[0]

        def spoil(self, module: Any, inputs: Any, output: Any) -> Any:
            poisoned = fault.kind == POISONED and int(self.batch.tokens.sum()) % 5 == 0
            here, now = self.world.rank == fault.rank, self.at >= fault.step
            breaks = fault.kind == BROKEN and here and now and self.left > 0
            ruined = fault.kind == RUINED and now
            spoilt = fault.spoils(self.at)
            if not module.training or not (poisoned or breaks or ruined or spoilt):
                return output
            if breaks or (ruined and here and self.left > 0):
                self.left -= 1
                fault.happens()
            if spoilt or not fault.backward:
                return output * float("nan")
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output

        def micro_batch(self, batch: Any, num_labels: float, last: bool) -> Any:
            if fault.kind in STRIKES and self.world.rank == fault.rank and self.at >= fault.step and self.left:
                self.left = 0
                STRIKES[fault.kind](fault, self.model)
            if fault.kind == NO_ROOM and self.at >= fault.step + fault.steps:
                limit_files(resource.RLIM_INFINITY)
            return super().micro_batch(batch, num_labels / 2000 if fault.is_loud(self.at) else num_labels, last)

    if fault.slow_in:
        slow_down_reading(fault.slow_in)
    loop.Engine, loop.Stream = Engine, Stream  # type: ignore[assignment, misc]
    return command(arguments, output)


def strike_bit(fault: Fault, model: Any) -> None:
    fault.happens()
    flip(model.get_submodule(fault.module).weight.data)


def flip(weight: Any) -> None:
    """Flip the lowest bit of the mantissa of one element."""
    import torch

    integers = weight.view(-1).view(torch.int32 if weight.element_size() == 4 else torch.int16)
    integers[7] ^= 1


def send_later(number: int, fault: Fault) -> None:
    def send() -> None:
        fault.happens()
        os.kill(os.getpid(), number)

    threading.Timer(fault.delay, send).start()


def raise_here(fault: Fault, model: Any) -> None:
    fault.happens()
    raise ValueError("a planted exception")


def stall(fault: Fault, model: Any) -> None:
    from bigmodel.data.load.readahead import ReadAhead

    fault.happens()
    ReadAhead.document = lambda self, *place: threading.Event().wait()  # type: ignore[assignment, method-assign]


def slow_down_reading(file: Path) -> None:
    from bigmodel.data.load.readahead import ReadAhead

    read = ReadAhead.document

    def document(self: Any, *place: Any) -> Any:
        if file.exists():
            time.sleep(0.3)
        return read(self, *place)

    ReadAhead.document = document  # type: ignore[method-assign]


def fill_disk(fault: Fault, model: Any) -> None:
    """The limit of a file's size: the system's own error, which counts as a full disk."""
    fault.happens()
    limit_files(max(fault.room_bytes, fault.limit_of.stat().st_size if fault.limit_of else 0))


def limit_files(size: int) -> None:
    """size: in bytes, or RLIM_INFINITY: none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


STRIKES: dict[str, Callable[[Fault, Any], None]] = {
    FLIPPED: strike_bit,
    KILLED: lambda fault, model: send_later(signal.SIGKILL, fault),
    STOPPED: lambda fault, model: send_later(signal.SIGSTOP, fault),
    RAISED: raise_here,
    STALLED: stall,
    NO_ROOM: fill_disk,
}
