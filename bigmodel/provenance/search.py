"""Where a text stands in the training data, and which stored tokens cover it.

In: prepared data with its shards. Out: `Hit`s: documents with the text, and the range of their tokens. A document is
searched as one text, so the text is found across the bounds of tokens; of pairs, both texts. A text that the tokenizer
changes, as to lower case, is searched in both forms; what it has no token for is not in the data.

Guarantees: no miss and no false hit. Costs: one pass over the split, a shard in memory. A core reads 50 MB of text a
second from the bytes of byte-level tokens, 1 GB/s from shards of text, and decodes 1 MB/s with other tokenizers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import AnyStr

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.examples import Document, Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store import mds
from bigmodel.data.store.shards import ShardStore
from bigmodel.printed import one_line

CONTEXT = 30  # characters shown on each side


@dataclass(frozen=True)
class Hit:
    """Tokens [first_token, last_token] of a document hold the text; of pairs, `side` "target_" is the target text."""

    source: str
    shard: int
    row: int
    first_token: int
    last_token: int
    shown: str
    side: str = ""

    @property
    def place(self) -> tuple[str, int, int]:
        return self.source, self.shard, self.row


def find(
    store: ShardStore,
    text: str,
    advance: Callable[[int], None] = lambda documents: None,
    known: Callable[[str, int], bool] = lambda source, shard: False,
) -> Iterator[Hit]:
    """Every occurrence, in the order of the data. Raises `UserError` as `forms_of`, and for shards that are gone.

    advance: called with a number of documents that are done. known: shards that need no search."""
    forms = forms_of(store, text)
    for source in store.sources:
        for shard, documents in enumerate(store.shard_sizes(source)[:, 0].tolist()):
            if known(source, shard):
                continue
            for row in _candidates(store, source, shard, forms):
                for side, ids in sides(store.document(source, shard, row)):
                    table = store.tokenizer.token_bytes
                    found = _in_bytes(table, ids, forms) if table else _in_decoded(store, ids, forms)
                    for first, last, around in found:
                        yield Hit(source, shard, row, first, last, one_line(around), side)
            advance(documents)


def forms_of(store: ShardStore, text: str) -> list[str]:
    """The text, and what its tokens stand for if that is another one. Raises `UserError` for an empty text, and for
    half of a surrogate pair."""
    if not text:
        raise UserError("--text: is empty; give a text to look for")
    changed = store.decode(store.encode(text))
    return list(dict.fromkeys([text, changed] if changed and not store.tokenizer.loses(text) else [text]))


def sides(document: Document) -> list[tuple[str, np.ndarray]]:
    if isinstance(document, Pair):
        return [("", document.source), ("target_", document.target)]
    return [("", document.tokens if isinstance(document, Supervised) else document)]


def _candidates(store: ShardStore, source: str, shard: int, forms: list[str]) -> list[int]:
    """The rows that can hold the text: of byte-level tokens and of their texts, those whose bytes hold it; else all."""
    wanted = [form.encode() for form in forms]
    table = store.tokenizer.token_bytes
    if not table or (store.is_text(source) and not store.tokenizer.gives_back_text):
        return list(range(int(store.shard_sizes(source)[shard][0])))
    content, rows, kind = store.content(source, shard), set[int](), "text" if store.is_text(source) else "tokens"
    for column in {kind, f"target_{kind}"}.intersection(content.description["column_names"]):
        values = content.values(column)
        if kind == "tokens":
            dtype = np.dtype(content.encoding(column).removeprefix("ndarray:"))
            ids = (mds.decode_array(value, dtype).tolist() for value in values)
            values = (b"".join(map(table.__getitem__, of_one)) for of_one in ids)
        rows.update(row for row, held in enumerate(values) if any(form in held for form in wanted))
    return sorted(rows)


def _in_bytes(table: list[bytes], ids: np.ndarray, forms: list[str]) -> Iterator[tuple[int, int, str]]:
    """Of each occurrence in a document of byte-level tokens: first and last token, the text around it."""
    pieces = [table[number] for number in ids[1:-1].tolist()]
    whole, ends = b"".join(pieces), np.cumsum(list(map(len, pieces)))
    wanted = next((form.encode() for form in forms if form.encode() in whole), b"")
    for start in _places(whole, wanted):
        end = start + len(wanted)
        first, last = (np.searchsorted(ends, [start, end - 1], side="right") + 1).tolist()
        before = whole[max(0, start - 4 * CONTEXT) : start].decode(errors="ignore")[-CONTEXT:]
        after = whole[end : end + 4 * CONTEXT].decode(errors="ignore")[:CONTEXT]
        yield first, last, before + wanted.decode() + after


def _in_decoded(store: ShardStore, ids: np.ndarray, forms: list[str]) -> Iterator[tuple[int, int, str]]:
    """The same of other tokens."""
    whole = store.decode(ids)
    wanted = next((form for form in forms if form in whole), "")
    for start in _places(whole, wanted):
        end = start + len(wanted)
        yield *covering(store, ids, whole, start, end), whole[max(0, start - CONTEXT) : end + CONTEXT]


def _places(whole: AnyStr, wanted: AnyStr) -> Iterator[int]:
    start = whole.find(wanted) if wanted else -1
    while start >= 0:
        yield start
        start = whole.find(wanted, start + 1)


def covering(store: ShardStore, ids: np.ndarray, whole: str, start: int, end: int) -> tuple[int, int]:
    """The first and last stored token that characters [start, end) of a document come from."""

    def tokens_for(count: int) -> int:
        """The fewest tokens after begin whose text begins with the first `count` characters."""
        low, high = 0, len(ids) - 2
        while low < high:
            middle = (low + high) // 2
            decoded = store.decode(ids[: middle + 2])
            low, high = (low, middle) if decoded.startswith(whole[:count]) else (middle + 1, high)
        return low

    last = tokens_for(end)
    first = min(tokens_for(start) + 1, last)
    while first > 1 and whole[start:end] not in store.decode(ids[first - 1 : last + 2]):
        first -= 1  # a token with the end of the character before, or bytes of the first one
    return first, last
