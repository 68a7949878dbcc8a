"""Read-ahead: threads fetch, verify, open and tokenize the documents of planned steps.

In: the documents of planned steps, up to one packing buffer ahead of the step under construction. Out: each document on
request. A missing shard is fetched while earlier steps train. A document of a text shard is tokenized once, however
many of its chunks the planned steps hold, and dropped after its last chunk.

Guarantees: no influence on what is read. An error in a thread is raised where the document or shard is read. The
threads are daemons, so a hang in a file system or library keeps no process alive.
Memory: for text shards the tokens of one packing buffer of this rank; for token shards nothing.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.examples import Document

REOPEN_SECONDS = 5.0  # how often a shard in use is marked as used, and fetched again if it was deleted for room

Place = tuple[Any, ...]  # source, shard, row; also the pass, if the texts of each have their own tokens


class Store(Protocol):
    """The part of `ShardStore` that reading uses. A store without `open_shard`, in memory, is not read ahead."""

    def document(self, source: str, shard: int, row: int) -> Document: ...


class _Awaited:
    """A document of planned steps: the number of its chunks still to be read, and its tokens or error."""

    def __init__(self) -> None:
        self.chunks = 0
        self.begun = threading.Lock()  # taken by the thread that tokenizes it, never released
        self.done = threading.Event()
        self.tokens: Document | None = None
        self.error: BaseException | None = None


class ReadAhead:
    """`expect` documents, then read them with `document`; `close` stops the threads after their current task."""

    def __init__(self, store: Store, workers: int) -> None:
        self._store = store
        self._open: Callable[[str, int], None] | None = getattr(store, "open_shard", None)  # a store in memory has none
        self._closed = False
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._opened: dict[tuple[str, int], float] = {}  # time of opening
        self._awaited: dict[Place, _Awaited] = {}  # used by the reading thread only
        self._threads = [
            threading.Thread(target=self._work, name=f"bigmodel-read-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, shards: Iterable[tuple[str, int]], documents: Iterable[Place]) -> None:
        """Announce chunks by the shards that hold them, and by their documents: one `document` call for each will
        follow, in about this order. `documents` is used only where a shard holds text."""
        if self._open is None:
            return
        now, shards = time.monotonic(), list(shards)
        for shard in shards:
            if now - self._opened.get(shard, float("-inf")) > REOPEN_SECONDS:
                self._opened[shard] = now
                self._tasks.put(shard)
        texts = {source: self._is_text(source) for source in {source for source, _ in shards}}
        for document in documents if any(texts.values()) else ():
            if texts[document[0]]:
                if document not in self._awaited:
                    self._awaited[document] = _Awaited()
                    self._tasks.put((document, self._awaited[document]))
                self._awaited[document].chunks += 1

    def _is_text(self, source: str) -> bool:
        try:
            return bool(self._store.is_text(source))  # type: ignore[attr-defined]
        except (UserError, OSError):  # occurs again, and is raised, when the source is read
            return False

    def document(self, *place: Any) -> Document:
        """The stored tokens of the document at a `Place`. Raises what reading it raised."""
        awaited = self._awaited.get(place)
        if awaited is None:
            return self._store.document(*place)
        awaited.chunks -= 1
        if not awaited.chunks:
            del self._awaited[place]
        self._read(place, awaited)  # here, if no thread has begun it
        awaited.done.wait()
        if awaited.error is not None:
            raise awaited.error
        assert awaited.tokens is not None
        return awaited.tokens

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            if isinstance(task[1], _Awaited):
                self._read(*task)
                continue
            try:
                assert self._open is not None, "a store without files has no shard to open"
                self._open(*task)
            except BaseException:  # occurs again, and is raised, when the shard is read
                self._opened.pop(task, None)

    def _read(self, document: Place, awaited: _Awaited) -> None:
        if not awaited.begun.acquire(blocking=False):
            return
        try:
            awaited.tokens = self._store.document(*document)
        except BaseException as error:  # the thread's boundary: raised where the document is read
            awaited.error = error
        awaited.done.set()
