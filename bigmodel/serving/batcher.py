"""Continuous batching: one thread steps the engine; requests join and leave between two steps.

In: groups of requests, from the event loop. Out: their steps on a queue per group. Guarantees: the engine is used by
one thread alone; at most `max_sequences` run and `max_queue` wait, first come first served; a cancelled group leaves
before the next step; a failure of the engine ends what runs with an error, and a new engine goes on. Costs: one wake-up
of the event loop per step, whatever the number of sequences.
"""

import asyncio
import collections
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from bigmodel.config.user_error import UserError
from bigmodel.generation.engine import Engine, Request, Step
from bigmodel.serving.errors import ApiError, broken, overloaded, shutting_down, timed_out
from bigmodel.serving.measures import Measures


@dataclass(eq=False)
class Group:
    """The sequences of one HTTP request. `steps` gets (place in the group, step), or the error that ends all of it."""

    requests: Sequence[Request]
    arrived: float = field(default_factory=time.monotonic)
    steps: asyncio.Queue[tuple[int, Step] | ApiError] = field(default_factory=asyncio.Queue)


@dataclass(eq=False)
class Running:
    """A sequence in the engine."""

    group: Group
    place: int
    last_time: float = 0.0  # of its latest token; 0: none yet


class Batcher:
    """`start` it in the event loop. `submit`, `steps` and `cancel` belong to that loop."""

    def __init__(self, make_engine: Callable[[], Engine], max_sequences: int, max_queue: int) -> None:
        self._make_engine, self._max_sequences, self._max_queue = make_engine, max_sequences, max_queue
        self._engine = make_engine()
        self.measures = Measures()
        self._changed = threading.Condition()  # guards the next four
        self._joining: list[Group] = []
        self._leaving: list[Group] = []
        self._open = 0  # sequences that run, wait or join
        self._end: ApiError | None = None
        self._waiting: collections.deque[tuple[Group, int]] = collections.deque()  # this and the next: of the thread
        self._running: dict[int, Running] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return max(0, self._open - len(self._running))

    @property
    def positions(self) -> int:
        """Positions that the running sequences hold in the cache."""
        return self._engine.used_positions

    def submit(self, requests: Sequence[Request]) -> Group:
        """Raises `ApiError`: 429 where they do not fit into the queue, 503 at the end."""
        with self._changed:
            if self._end is not None:
                raise self._end
            if self._open + len(requests) > self._max_sequences + self._max_queue:
                raise overloaded(self._open)
            group = Group(requests)
            self._joining.append(group)
            self._open += len(requests)
            self._changed.notify()
        return group

    def cancel(self, group: Group) -> None:
        """Without effect on a group that is done."""
        with self._changed:
            self._leaving.append(group)
            self._changed.notify()

    async def steps(self, group: Group, deadline: float, seconds: float) -> AsyncIterator[tuple[int, Step]]:
        """All steps of a group. Raises `ApiError`, also at the deadline (time of the event loop)."""
        left = len(group.requests)
        while left:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await group.steps.get()
            except TimeoutError:
                raise timed_out(seconds) from None
            if isinstance(item, ApiError):
                raise item
            left -= item[1].finished is not None
            yield item

    def close(self) -> None:
        """End the thread; what runs or waits ends with the error 503."""
        with self._changed:
            self._end = shutting_down()
            self._changed.notify()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._take():
                self._admit()
                self._step()
        finally:
            self.close()
            self._fail_all(shutting_down())

    def _take(self) -> bool:
        """Wait for something to do, and take what joins and leaves. False at the end."""
        with self._changed:
            while not (self._joining or self._leaving or self._waiting or self._running or self._end):
                self._changed.wait()
            joining, self._joining = self._joining, []
            leaving, self._leaving = self._leaving, []
        self._waiting.extend((group, place) for group in joining for place in range(len(group.requests)))
        for group in leaving:
            self._drop(group)
        return self._end is None

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            group, place = self._waiting.popleft()
            request = group.requests[place]
            try:
                number = self._engine.add(request)
            except UserError as error:
                self._refuse(group, ApiError(400, f"{error}.", None, "invalid_value"))
            except Exception:
                traceback.print_exc()
                self._refuse(group, broken())
            else:
                self._running[number] = Running(group, place)
                self.measures.count_prompt(len(request.ids if request.source is None else request.source))

    def _refuse(self, group: Group, error: ApiError) -> None:
        self._closed(1)
        self._drop(group)
        self._send([(group, error)])

    def _step(self) -> None:
        if not self._running:
            return
        try:
            steps = self._engine.step()
        except Exception:
            traceback.print_exc()
            print("bigmodel: the engine failed; its requests end with an error, a new engine goes on", file=sys.stderr)
            self._fail_running()
            return
        now = time.monotonic()
        self._send([(self._running[step.number].group, self._noted(step, now)) for step in steps])
        for step in steps:
            if step.finished:
                del self._running[step.number]
        self._closed(sum(step.finished is not None for step in steps))

    def _noted(self, step: Step, now: float) -> tuple[int, Step]:
        one = self._running[step.number]
        if one.last_time:
            self.measures.count_token(now - one.last_time)
        else:
            self.measures.count_first_token(now - one.group.arrived)
        one.last_time = now
        return one.place, step

    def _drop(self, group: Group) -> None:
        kept = [entry for entry in self._waiting if entry[0] is not group]
        numbers = [number for number, one in self._running.items() if one.group is group]
        for number in numbers:
            self._engine.cancel(number)
            del self._running[number]
        self._closed(len(self._waiting) - len(kept) + len(numbers))
        self._waiting = collections.deque(kept)

    def _fail_running(self) -> None:
        groups = {one.group for one in self._running.values()}
        self._closed(len(self._running))
        self._running = {}
        self._engine = self._make_engine()
        for group in groups:
            self._drop(group)
        self._send([(group, broken()) for group in groups])

    def _fail_all(self, error: ApiError) -> None:
        groups = {one.group for one in self._running.values()} | {group for group, _ in self._waiting}
        for group in groups:
            self._drop(group)
        self._send([(group, error) for group in groups])

    def _closed(self, number: int) -> None:
        with self._changed:
            self._open -= number

    def _send(self, items: list[tuple[Group, tuple[int, Step] | ApiError]]) -> None:
        def put() -> None:
            for group, item in items:
                group.steps.put_nowait(item)

        if items and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
