"""The example of a chunk: its types, its conventions, and the `Rule` of an objective.

In: a chunk of a stored document (`[BOS] text [EOS]`), the objective's settings, a random key. Out: an `Example`: a
source, and decoder inputs with labels. Every function is pure. Guarantee: the lengths of an example depend only on
those of its chunk, so packs are planned exactly before any token is read; `Rule.lengths` computes them for many chunks
at once. Each objective has a file in this folder; bigmodel/data/objectives/table.py lists them.

    causal              predict the next token; with `ahead` = k the token k positions ahead
    prefix              the first part of the chunk is the source, the rest is predicted (prefix-LM: Raffel et al. 2020)
    fill_in_the_middle  [PRE] a [SUF] c [MID] b or [PRE] [SUF] c [MID] a b, causal (Bavarian et al. 2022: PSM and SPM)
    denoising           the text from its noised form (BART: Lewis et al. 2020)
    span_corruption     hidden spans are predicted (T5: Raffel et al. 2020); with a mode token, UL2's R and X
    masked              some tokens are hidden, each is predicted in its place (BERT: Devlin et al. 2019)
    pairs               a source text and its target

Conventions:
- A chunk's own tokens are those after its first input, so chunks do not overlap.
- Source and target of pairs, of span corruption and of denoising end with EOS, even where the chunk is not the end of
  its document. A prefix has no EOS, because the text continues.
- Span corruption follows T5's paper. The text begins with a visible span and ends with a hidden one. Sentinel n
  replaces span n. The target is each sentinel with its span, then one more sentinel, then EOS. Sentinel 0 has the
  highest id, the others count down.
- The first decoder input is BOS; T5 uses its padding token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.table import OBJECTIVES

IGNORED = -100  # label of a position without a label: torch's default ignore_index
NO_TOKENS = np.empty(0, dtype=np.int64)
NUM_MARKS = 7  # special tokens above the tokenizer's ids, before the sentinels: mask, R, S, X, prefix, suffix, middle


def num_tokens(num_tokens: np.ndarray | int) -> np.ndarray:
    """Positions of a document of `num_tokens` stored tokens: int64, of the shape given.

    Every token but the first is a label. A document of 0 or 1 tokens has no position and is in no pack. For a pair,
    the positions of the source text count.
    """
    return np.maximum(np.asarray(num_tokens, dtype=np.int64) - 1, 0)


class SpecialTokens(NamedTuple):
    """Ids of special tokens: begin and end of the tokenizer; the others are above its vocabulary, unless the tokenizer
    has a mask token or sentinels of its own."""

    bos: int
    eos: int
    vocabulary: int
    sentinels: int
    first_sentinel: int = 0  # 0: above the vocabulary
    mask_token: int = 0  # 0: above the vocabulary
    kinds: np.ndarray | None = None  # (vocabulary,) of `sentences.kinds_of`; None: no noise needs them

    @property
    def mask(self) -> int:
        return self.mask_token or self.vocabulary

    def mode(self, name: str) -> int:
        """UL2's mode tokens: R, S or X."""
        return self.vocabulary + 1 + "RSX".index(name)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The special tokens of prefix, suffix and middle."""
        return self.vocabulary + 4, self.vocabulary + 5, self.vocabulary + 6

    def sentinel(self, number: np.ndarray | int) -> np.ndarray:
        first = self.first_sentinel or self.vocabulary + NUM_MARKS + self.sentinels - 1
        return np.asarray(first - np.asarray(number))


class ChunkText(NamedTuple):
    """Positions [start, start + length) of a stored document: their labels, and the tokens around them."""

    before: int  # the token before the first
    tokens: np.ndarray  # (length,)
    after: np.ndarray  # the rest of the document; empty: `tokens` ends with EOS

    @property
    def text(self) -> np.ndarray:
        """The tokens without the document's EOS."""
        return self.tokens if len(self.after) else self.tokens[:-1]


class Example(NamedTuple):
    """Decoder inputs `tokens` (D,) with `labels` (D,), after a `source` (E,), which may be empty.

    `places` (D,): the position numbers of the inputs where some were dropped; None: 0 to D - 1.
    `weights` (D,) float32: of the labels in the loss; None: all 1.
    """

    source: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    places: np.ndarray | None = None
    weights: np.ndarray | None = None


def chunk_text_of(document: np.ndarray, start: int, length: int) -> ChunkText:
    end = check_chunk(document, start, length)
    return ChunkText(int(document[start]), document[start + 1 : end + 1], document[end + 1 :])


def check_chunk(document: np.ndarray, start: int, length: int) -> int:
    """The end of a chunk. Asserts that the document holds it."""
    end = start + length
    assert 0 <= start < end, f"positions [{start}, {end}) are no range of a document"
    assert end < len(document), (
        f"the plan wants positions [{start}, {end}) of a document of {len(document)} stored tokens: "
        "the length index does not belong to these shards"
    )
    return end


def teacher_forced(source: np.ndarray, start: int, targets: np.ndarray) -> Example:
    """An example whose inputs are a start token and the labels but the last."""
    return Example(source, np.concatenate([[start], targets[:-1]]), targets)


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


class Denoiser(NamedTuple):
    """One objective of a kind: ul2 has several."""

    name: str  # in metrics
    settings: ObjectiveSettings
    mode: str = ""  # UL2's mode token before the source: R, S or X


def _itself(settings: ObjectiveSettings) -> list[Denoiser]:
    return [Denoiser(settings.kind, settings)]


@dataclass(frozen=True)
class Rule:
    """How an objective makes examples of chunks: pure functions, `settings` are the objective's.

    lengths(settings, mode, lengths, remaining): (source tokens, decoder tokens, labels) of chunks of `lengths` tokens;
    `remaining`: tokens of their documents after them; all (n,).
    make(settings, mode, chunk, key, special_tokens): the example of a chunk, of these lengths; `key`: for its draws.
    num_sentinels(settings, longest): sentinels that a chunk of `longest` tokens needs.
    is_plain(settings): whether its examples are the chunks themselves, in causal order.
    denoisers(settings): the objectives of the kind, with equal shares.
    """

    lengths: Callable[[ObjectiveSettings, str, np.ndarray, np.ndarray], Columns]
    make: Callable[[ObjectiveSettings, str, ChunkText, int, SpecialTokens], Example]
    num_sentinels: Callable[[ObjectiveSettings, int], int] = lambda settings, longest: 0
    is_plain: Callable[[ObjectiveSettings], bool] = lambda settings: False
    denoisers: Callable[[ObjectiveSettings], list[Denoiser]] = _itself


def rule_of(kind: str) -> Rule:
    return resolve_name(OBJECTIVES[kind].rule)


def num_texts(lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Tokens of chunks without the document's EOS, which only its last chunk has."""
    return lengths - (remaining == 0)
