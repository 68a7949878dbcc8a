"""Classification: a whole document is read, its label is the number of its class.

A labelled document is stored as a pair of text and class (`label_column`). Its example has one label, at the last
token; the classification head reads the states of the document that `classification.pooling` names.

    decoder          BOS text                  a longer document keeps its beginning
    encoder          BOS text EOS              a longer one keeps its beginning and EOS
    encoder-decoder  source: text EOS          the decoder reads BOS alone
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.example import IGNORED, NO_TOKENS, Example


class Labelled(Protocol):
    """The part of `ShardStore` that finds classes."""

    @property
    def directory(self) -> Any: ...
    @property
    def sources(self) -> list[str]: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: np.ndarray) -> str: ...


class ClassNumbers:
    """The number of a document's class by its stored label."""

    def __init__(self, store: Labelled, classes: Sequence[str]) -> None:
        """Raises `UserError` for two classes that the tokenizer does not tell apart."""
        self._store, self._classes = store, classes
        self._numbers: dict[bytes, int] = {}
        for number, name in enumerate(classes):
            key = _key(store.encode(name))
            if key in self._numbers:
                raise UserError(
                    f"classification.classes: {classes[self._numbers[key]]!r} and {name!r} have the same tokens in the "
                    "tokenizer of data.directory; rename one of them in the data"
                )
            self._numbers[key] = number

    def number(self, label: np.ndarray, source: int, shard: int, row: int) -> int:
        """Raises `UserError` for a label that is no class."""
        number = self._numbers.get(_key(label))
        if number is None:
            store = self._store
            raise UserError(
                f"{store.directory}: the label {store.decode(label)!r} of document {row} in shard {shard} of source "
                f"{store.sources[source]!r} is none of classification.classes = {list(self._classes)}; add it, or drop "
                "these documents and prepare again"
            )
        return number


def _key(tokens: np.ndarray) -> bytes:
    return tokens.astype(np.uint32).tobytes()


Find = Callable[[np.ndarray, int, int, int], int]  # `ClassNumbers.number`


def kept_tokens(texts: np.ndarray, longest: int, ends: bool) -> np.ndarray:
    """Tokens of the examples of documents whose texts, with EOS, have `texts` tokens. `ends`: with EOS."""
    return np.minimum(texts + ends, longest)


def classification(text: np.ndarray, number: int, length: int, ends: bool) -> Example:
    """The example of a stored document, of `length` tokens. `ends`: with EOS.

    >>> classification(np.array([1, 11, 12, 13, 2]), 7, 4, ends=False)[1:3]
    (array([ 1, 11, 12, 13]), array([-100, -100, -100,    7]))
    >>> classification(np.array([1, 11, 12, 13, 2]), 7, 4, ends=True)[1]
    array([ 1, 11, 12,  2])
    """
    tokens = np.concatenate([text[: length - 1], text[-1:]]) if ends else text[:length]
    labels = np.full(length, IGNORED, dtype=np.int64)
    labels[-1] = number
    return Example(NO_TOKENS, tokens, labels)


def classification_of_source(text: np.ndarray, number: int, length: int) -> Example:
    """The example for an encoder-decoder; `length`: of its source.

    >>> classification_of_source(np.array([1, 11, 12, 13, 2]), 7, 3)[:3]
    (array([11, 12,  2]), array([1]), array([7]))
    """
    read = np.concatenate([text[1:length], text[-1:]])
    return Example(read, text[:1], np.array([number], dtype=np.int64))


def weighted(example: Example, weights: np.ndarray) -> Example:
    """With the weight of its class; `weights`: (classes,) float32.

    >>> weighted(classification(np.array([1, 11, 2]), 1, 2, ends=False), np.array([0.5, 2.0], np.float32)).weights
    array([0., 2.], dtype=float32)
    """
    weights_T = np.zeros(len(example.labels), dtype=np.float32)
    weights_T[-1] = weights[example.labels[-1]]
    return example._replace(weights=weights_T)
