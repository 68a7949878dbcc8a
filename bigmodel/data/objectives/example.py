"""Objectives: from a piece of a document to what the model reads and what it has to say.

Takes a piece of a stored document (`[BOS] text [EOS]`), the objective's settings and the key of a random stream; gives
an `Example`: a source, which is read as a whole, and inputs with their targets. Every function is pure. Guarantees that
the lengths of an example follow from those of the piece alone, so that packs are planned exactly before any token is
read; the lengths of each `Rule` compute them, for many pieces at a time. Each objective has a file beside this one,
the table of all is in bigmodel/data/objectives/table.py.

    causal              x1 x2 x3 ...: each token from those before it; `ahead` = k: the one k further on
    prefix              the first part of the piece is the source, the rest is predicted (prefix-LM: Raffel et al. 2020)
    fill_in_the_middle  [PRE] a [SUF] c [MID] b or [PRE] [SUF] c [MID] a b, causal (Bavarian et al. 2022: PSM and SPM)
    span_corruption     spans are hidden and predicted (T5: Raffel et al. 2020); with a mode token, UL2's R and X
    masked              some tokens are hidden, each is predicted in its place (BERT: Devlin et al. 2019)
    pairs               a source text and its target

Conventions. A piece's own tokens are those after its first input, so pieces overlap in nothing. A source of pairs or of
span corruption ends with EOS, also where the piece is not the end of its document, and so do their targets; a prefix
has no EOS, for the text goes on. Span corruption is that of T5's paper: the text begins with a visible span and ends
with a hidden one; span n is replaced by sentinel n; the target is each sentinel with what it stands for, then one more
sentinel, then EOS; sentinel 0 has the highest id of all and the others count down. The first decoder input is BOS,
where T5 takes its padding token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.table import OBJECTIVES

IGNORED = -100  # the target of a position without one: torch's default ignore_index
NO_TOKENS = np.empty(0, dtype=np.int64)
NUM_MARKS = 7  # ids above the tokenizer's, before the sentinels


def num_tokens(num_tokens: np.ndarray | int) -> np.ndarray:
    """Positions of a document of `num_tokens` stored tokens: int64, of the shape given.

    Every token but the first is asked for. A document of 0 or 1 tokens has no position, so it is in no pack. Of a pair,
    it is the positions of the source text that are counted.
    """
    return np.maximum(np.asarray(num_tokens, dtype=np.int64) - 1, 0)


class SpecialTokens(NamedTuple):
    """The ids of special tokens: two of the tokenizer's, the others from its vocabulary on."""

    bos: int
    eos: int
    vocabulary: int
    sentinels: int

    @property
    def mask(self) -> int:
        return self.vocabulary

    def mode(self, name: str) -> int:
        """UL2's mode tokens: R, S or X."""
        return self.vocabulary + 1 + "RSX".index(name)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The special_tokens of prefix, suffix and middle."""
        return self.vocabulary + 4, self.vocabulary + 5, self.vocabulary + 6

    def sentinel(self, number: np.ndarray | int) -> np.ndarray:
        return np.asarray(self.vocabulary + NUM_MARKS + self.sentinels - 1 - np.asarray(number))


class ChunkText(NamedTuple):
    """Positions [start, start + length) of a stored document: the tokens asked for, and what stands around them."""

    before: int  # the token before the first
    tokens: np.ndarray  # (length,)
    after: np.ndarray  # the rest of the document; empty: the last of `tokens` is its EOS

    @property
    def text(self) -> np.ndarray:
        """The tokens without the document's EOS."""
        return self.tokens if len(self.after) else self.tokens[:-1]


class Example(NamedTuple):
    """`tokens` (D,) are the inputs of `targets` (D,); both follow on `source` (E,), which may be empty.

    Where some of the inputs were left out, `places` (D,) are those that the others have; None: 0 to D - 1.
    """

    source: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    places: np.ndarray | None = None


def piece_of(document: np.ndarray, start: int, length: int) -> ChunkText:
    end = check_piece(document, start, length)
    return ChunkText(int(document[start]), document[start + 1 : end + 1], document[end + 1 :])


def check_piece(document: np.ndarray, start: int, length: int) -> int:
    """The end of a piece, which its document must have."""
    end = start + length
    assert 0 <= start < end, f"positions [{start}, {end}) are none of a document's"
    assert end < len(document), (
        f"the plan wants positions [{start}, {end}) of a document of {len(document)} stored tokens: "
        "the length index does not belong to these shards"
    )
    return end


def teacher_forced(source: np.ndarray, start: int, targets: np.ndarray) -> Example:
    """The inputs are the targets moved by one, after a start token."""
    return Example(source, np.concatenate([[start], targets[:-1]]), targets)


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


class Denoiser(NamedTuple):
    """One of the objectives that a kind stands for."""

    name: str  # in metrics
    settings: ObjectiveSettings
    mode: str = ""  # UL2's, in front of the source


def _itself(settings: ObjectiveSettings) -> list[Denoiser]:
    return [Denoiser(settings.kind, settings)]


@dataclass(frozen=True)
class Rule:
    """How an objective makes examples of pieces. All are pure functions, `settings` is the objective's.

    lengths(settings, mode, lengths, remaining): (source, decoder positions, targets) of pieces of so many tokens;
    `remaining`: those that its document has after it; all (n,). make(settings, mode, piece, key, special_tokens): the
    example, of these lengths; key: of its random stream. num_sentinels(settings, longest): how many a piece of so many
    tokens needs. is_plain(settings): whether its examples are the pieces themselves, in causal order. denoisers: the
    objectives that it stands for, with equal shares.
    """

    lengths: Callable[[ObjectiveSettings, str, np.ndarray, np.ndarray], Columns]
    make: Callable[[ObjectiveSettings, str, ChunkText, int, SpecialTokens], Example]
    num_sentinels: Callable[[ObjectiveSettings, int], int] = lambda settings, longest: 0
    is_plain: Callable[[ObjectiveSettings], bool] = lambda settings: False
    denoisers: Callable[[ObjectiveSettings], list[Denoiser]] = _itself


def rule_of(kind: str) -> Rule:
    return resolve_name(OBJECTIVES[kind].rule)


def num_texts(lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Tokens of pieces without the EOS of their documents, which the last piece of each has."""
    return lengths - (remaining == 0)
