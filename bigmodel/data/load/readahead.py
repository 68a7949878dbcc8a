"""Read-ahead: threads fetch, compare, open and tokenize what the planned steps will read, before it is asked for.

Takes the documents of steps as they are planned, up to one window ahead of the step that is built; gives each
document when it is asked for. A shard that a node lacks is fetched while earlier steps train; documents of text shards
are tokenized, each once however many of its chunks the planned steps hold, and forgotten after its last chunk.

Guarantees: no influence on what is read. A thread that fails leaves its error to the reader who needs the document or
the shard; the threads are daemons, so that one which hangs in a file system or a library keeps no process alive.
Memory: the tokens of one window of this rank, for text shards; for token shards nothing.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.examples import Document

REOPEN_SECONDS = 5.0  # how often a shard in use is marked as such, and fetched again where it was deleted for room

Place = tuple[str, int, int]  # source, shard, row


class Store(Protocol):
    """What reading needs of a store: see `ShardStore`. One without `open_shard`, in memory, is not read ahead."""

    def document(self, source: str, shard: int, row: int) -> Document: ...


class _Awaited:
    """A document that planned steps hold: how many of its chunks are still to be read, and its tokens or error."""

    def __init__(self) -> None:
        self.chunks = 0
        self.begun = threading.Lock()  # held by whoever tokenizes it, for ever
        self.done = threading.Event()
        self.tokens: Document | None = None
        self.error: BaseException | None = None


class ReadAhead:
    """`expect` what will be read, then read it by `document`; `close` stops the threads after what they are at."""

    def __init__(self, store: Store, workers: int) -> None:
        self._store = store
        self._open: Callable[[str, int], None] | None = getattr(store, "open_shard", None)  # a store in memory has none
        self._text_sources: dict[str, bool] = {}
        self._closed = False
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._opened: dict[tuple[str, int], float] = {}  # when
        self._awaited: dict[Place, _Awaited] = {}  # used by the reader's thread alone
        self._threads = [
            threading.Thread(target=self._work, name=f"bigmodel-read-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, chunks: Iterable[Place]) -> None:
        """These will be read, one `document` call each, in about this order."""
        if self._open is None:
            return
        now = time.monotonic()
        for chunk in chunks:
            if now - self._opened.get(chunk[:2], float("-inf")) > REOPEN_SECONDS:
                self._opened[chunk[:2]] = now
                self._tasks.put(chunk[:2])
            if self._text_sources.get(chunk[0]) or (chunk[0] not in self._text_sources and self._is_text(chunk[0])):
                if chunk not in self._awaited:
                    self._awaited[chunk] = _Awaited()
                    self._tasks.put((chunk, self._awaited[chunk]))
                self._awaited[chunk].chunks += 1

    def _is_text(self, source: str) -> bool:
        try:
            self._text_sources[source] = self._store.is_text(source)  # type: ignore[attr-defined]
        except (UserError, OSError):  # met again, and raised, by whoever reads from the source
            return False
        return self._text_sources[source]

    def document(self, source: str, shard: int, row: int) -> Document:
        """The document's stored tokens. Raises what reading it raised."""
        awaited = self._awaited.get((source, shard, row))
        if awaited is None:
            return self._store.document(source, shard, row)
        awaited.chunks -= 1
        if not awaited.chunks:
            del self._awaited[source, shard, row]
        self._read((source, shard, row), awaited)  # itself, where no thread has begun
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
                assert self._open is not None, "no shard is expected of a store without files"
                self._open(*task)
            except BaseException:  # met again, and raised, by whoever reads from the shard
                self._opened.pop(task, None)

    def _read(self, document: Place, awaited: _Awaited) -> None:
        if not awaited.begun.acquire(blocking=False):
            return
        try:
            awaited.tokens = self._store.document(*document)
        except BaseException as error:  # the thread's boundary: raised where the document is read
            awaited.error = error
        awaited.done.set()
