"""Sentences in a run of tokens: where one ends, from the pieces of text that the tokens stand for.

In: the piece of text of each id of a tokenizer. Out: what kind of piece each id is; the ends of sentences in tokens. A
sentence ends after . ! ? or an ellipsis, with closing quotes and brackets, where white space follows; after a full
stop of Chinese or Japanese; and at an empty line. Rules of no language: "Dr. Smith" is two sentences.
"""

from collections.abc import Sequence

import numpy as np

TERMINAL, CLOSING, OPENS_BLANK, CLOSES_BLANK, ALWAYS, LINE_FIRST, LINE_LAST = (1 << bit for bit in range(7))
_CLOSERS = "\"')]}»\u201d\u2019"
_WIDE = ("\u3002", "\uff01", "\uff1f")  # full stop, exclamation and question mark of Chinese and Japanese


def kinds_of(pieces: Sequence[str]) -> np.ndarray:
    """(n,) uint8: the bits above of each piece of text."""
    return np.array([_kind(piece) for piece in pieces], dtype=np.uint8)


def _kind(piece: str) -> int:
    bare = piece.strip()
    core = bare.rstrip(_CLOSERS)
    bits = {
        TERMINAL: core.endswith((".", "!", "?", "…")),
        CLOSING: bool(bare) and not core,
        OPENS_BLANK: piece[:1].isspace(),
        CLOSES_BLANK: piece[-1:].isspace(),
        ALWAYS: core.endswith(_WIDE) or "\n\n" in piece.replace("\r", ""),
        LINE_FIRST: piece.startswith("\n"),
        LINE_LAST: piece.endswith("\n"),
    }
    return sum(bit for bit, is_set in bits.items() if is_set)


def sentence_ends(tokens: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Ends of the sentences of some tokens; the last is len(tokens). Ids that `kinds` lacks, as masks, are words.

    >>> pieces = ["a", " b", ".", " C", '."', "\\n\\n"]
    >>> sentence_ends(np.array([0, 2, 3, 1, 4, 3, 5, 0]), kinds_of(pieces))
    array([2, 5, 7, 8])
    """
    known = tokens < len(kinds)
    kind = np.where(known, kinds[np.where(known, tokens, 0)], 0)
    here, following = kind[:-1], kind[1:]
    before = np.concatenate([np.zeros(1, kind.dtype), kind])[: len(here)]
    is_over = (here & TERMINAL > 0) | ((here & CLOSING > 0) & (before & TERMINAL > 0))
    blank = (here & CLOSES_BLANK > 0) | (following & OPENS_BLANK > 0)
    empty_line = (here & LINE_LAST > 0) & (following & LINE_FIRST > 0)
    ends = np.flatnonzero((is_over & blank) | (here & ALWAYS > 0) | empty_line) + 1
    return np.append(ends, len(tokens)) if len(tokens) else np.zeros(1, dtype=np.int64)
