"""Where a text stands in the training data, and which stored tokens cover it.

In: prepared data with its shards. Out: `Hit`s: documents with the text, and the range of their tokens. A document is
searched as one text, decoded from its tokens, so the text is found across the bounds of tokens; shards of text are
searched as they are. Of pairs, both texts. A text that the tokenizer changes, as to lower case, is searched in both
forms.

Guarantees: no miss and no false hit. Costs: one pass over the split; about 1 MB/s of decoding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.examples import Document, Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store.shards import ShardStore

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


def find(store: ShardStore, text: str, advance: Callable[[int], None] = lambda documents: None) -> Iterator[Hit]:
    """Every occurrence, in the order of the data. Raises `UserError` for an empty text, and for shards that are gone.

    advance: called with a number of documents that are done."""
    if not text:
        raise UserError("--text: is empty; give a text to look for")
    forms = list(dict.fromkeys([text, store.decode(store.encode(text))]))
    for source in store.sources:
        for shard in range(store.num_shards(source)):
            for row in range(int(store.shard_sizes(source)[shard][0])):
                for side, ids in sides(store.document(source, shard, row)):
                    yield from _in_document(store, Hit(source, shard, row, 0, 0, "", side), ids, forms)
                advance(1)


def sides(document: Document) -> list[tuple[str, np.ndarray]]:
    if isinstance(document, Pair):
        return [("", document.source), ("target_", document.target)]
    return [("", document.tokens if isinstance(document, Supervised) else document)]


def shown(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _in_document(store: ShardStore, place: Hit, ids: np.ndarray, forms: list[str]) -> Iterator[Hit]:
    whole = store.decode(ids)
    for form in forms:
        start = whole.find(form) if form else -1
        while start >= 0:
            end = start + len(form)
            first, last = covering(store, ids, whole, start, end)
            around = shown(whole[max(0, start - CONTEXT) : end + CONTEXT])
            yield Hit(place.source, place.shard, place.row, first, last, around, place.side)
            start = whole.find(form, start + 1)
        if whole.find(form) >= 0:
            return


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
