"""Defects that `tools.soak --defect` plants in the ranks; the soak must then fail. The product has no switch for them.

Each takes effect in the process that calls it, before training begins.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tools.torture import publish_before_the_last_rank

LATE_SECONDS = 0.5  # a save is published within a few steps of 25 ms


def publish_early() -> None:
    """A checkpoint has its name while its files are being written."""
    from bigmodel.training.checkpoint import saver

    begin = saver.Saver.begin

    def begin_and_publish(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        if self._world.rank == 0 and self._flight.part:
            with suppress(OSError):
                self._flight.final.symlink_to(self._flight.part, target_is_directory=True)

    saver.Saver.begin = begin_and_publish  # type: ignore[assignment, method-assign]


def leave_out_the_barrier() -> None:
    """A save is published without waiting for the last rank's file."""
    publish_before_the_last_rank(int(os.environ["RANK"]), LATE_SECONDS)


def save_the_loaders_cursor() -> None:
    """A checkpoint has the position of the loader, which is ahead of the step."""
    from bigmodel.data.load.stream import Stream

    following = Stream.__next__

    def ahead(self: Any) -> Any:
        return replace(following(self), position=self._order.position())

    Stream.__next__ = ahead  # type: ignore[method-assign]


def ignore_the_hash() -> None:
    """Replicas are not compared."""
    from bigmodel.training.replicas import Replicas

    Replicas.require = lambda self, done, whole_state=False: None  # type: ignore[method-assign]


DEFECTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "published early": publish_early,
    "barrier missing": leave_out_the_barrier,
    "cursor from the loader": save_the_loaders_cursor,
    "replica hash ignored": ignore_the_hash,
}
