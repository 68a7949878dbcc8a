"""Objectives: from a piece of a document to what the model reads and what it has to say.

Takes a piece of a stored document (`[BOS] text [EOS]`), the objective's settings and the key of a random stream; gives
an `Example`: a source, which is read as a whole, and inputs with their targets. Every function is pure. Guarantees that
the lengths of an example follow from those of the piece alone, so that packs are planned exactly before any token is
read; the `..._lengths` beside each objective compute them, for many pieces at a time.

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

from typing import NamedTuple

import numpy as np

from bigmodel.data.randomness import make_key, permutation, words

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


# ---- causal ---------------------------------------------------------------------------------------------------


def causal(document: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (length,) each, of the positions [start, start + length) of a stored document. Views.

    The target of a position is the token after it. Where a long document was cut, the last target of a piece
    is the first input of the next piece: nothing is lost and nothing comes from another document.

    >>> causal(np.array([1, 11, 12, 13, 2]), 0, 4)
    (array([ 1, 11, 12, 13]), array([11, 12, 13,  2]))
    """
    end = check_piece(document, start, length)
    return document[start:end], document[start + 1 : end + 1]


def ahead_targets(lengths: np.ndarray, remaining: np.ndarray, ahead: int) -> np.ndarray:
    """How many positions of a piece have a token `ahead` of them in the document; `remaining`: positions after it."""
    return np.clip(lengths + remaining - (ahead - 1), 0, lengths)


def causal_ahead(piece: ChunkText, ahead: int) -> Example:
    """Each position's target is the token `ahead` of it; IGNORED where the document has none.

    >>> causal_ahead(piece_of(np.array([1, 11, 12, 13, 2]), 0, 4), 2)[1:3]
    (array([ 1, 11, 12, 13]), array([  12,   13,    2, -100]))
    """
    length = len(piece.tokens)
    targets = np.full(length, IGNORED, dtype=np.int64)
    found = np.concatenate([piece.tokens, piece.after[: ahead - 1]])[ahead - 1 :]
    targets[: len(found)] = found
    return teacher_forced(NO_TOKENS, piece.before, piece.tokens)._replace(labels=targets)


# ---- prefix ---------------------------------------------------------------------------------------------------


def prefix_lengths(lengths: np.ndarray, prefix_share: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(source, targets): at least one token is predicted."""
    source = np.minimum((lengths * prefix_share).astype(np.int64), lengths - 1)
    return source + bool(mode), lengths - source


def prefix(piece: ChunkText, prefix_share: float, mode: str, special_tokens: SpecialTokens) -> Example:
    """
    >>> prefix(piece_of(np.array([1, 11, 12, 13, 2]), 0, 4), 0.5, "", SpecialTokens(1, 2, 50, 10))[:3]
    (array([11, 12]), array([ 1, 13]), array([13,  2]))
    """
    split = int(prefix_lengths(np.array(len(piece.tokens)), prefix_share, "")[0])
    source = piece.tokens[:split]
    if mode:
        source = np.concatenate([[special_tokens.mode(mode)], source])
    return teacher_forced(source, special_tokens.bos, piece.tokens[split:])


# ---- fill in the middle ---------------------------------------------------------------------------------------


def fill_in_the_middle(piece: ChunkText, spm_share: float, key: int, special_tokens: SpecialTokens) -> Example:
    """Two cuts at random places; text + 4 positions. Of `spm_share` of the pieces the suffix comes first."""
    text, (pre, suf, mid) = piece.text, special_tokens.fill
    first, second, order = words(key, 3).tolist()
    low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    a, b, c = text[:low], text[low:high], text[high:]
    if order < spm_share * 2**64:
        parts: list = [[pre, suf], c, [mid], a, b]
    else:
        parts = [[pre], a, [suf], c, [mid], b]
    return teacher_forced(
        NO_TOKENS, special_tokens.bos, np.concatenate([*parts, [special_tokens.eos]]).astype(np.int64)
    )


# ---- span corruption ------------------------------------------------------------------------------------------


def noise_counts(texts: np.ndarray, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """(hidden tokens, spans) of texts of so many tokens; 0 and 0 below 2 tokens, else at least 1 is visible."""
    several = texts >= 2
    hidden = np.where(several, np.clip(np.rint(texts * density), 1, np.maximum(texts - 1, 1)), 0).astype(np.int64)
    spans = np.clip(np.rint(hidden / mean_span), 1, np.maximum(np.minimum(hidden, texts - hidden), 1))
    return hidden, np.where(several, spans, 0).astype(np.int64)


def span_corruption_lengths(
    texts: np.ndarray, density: float, mean_span: float, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """(source, targets)."""
    hidden, spans = noise_counts(texts, density, mean_span)
    return texts - hidden + spans + 1 + bool(mode), hidden + spans + 2


def span_corruption(
    piece: ChunkText, density: float, mean_span: float, mode: str, key: int, special_tokens: SpecialTokens
) -> Example:
    """Hidden and visible spans take turns; their lengths are drawn evenly from all that add up, as in T5.

    >>> document = np.array([1, 11, 12, 13, 14, 2])
    >>> example = span_corruption(piece_of(document, 0, 5), 0.5, 1.0, "", 0, SpecialTokens(1, 2, 50, 10))
    >>> example.source.tolist(), example.labels.tolist()
    ([11, 66, 13, 65, 2], [66, 12, 65, 14, 64, 2])
    """
    text = piece.text
    hidden, spans = (int(count) for count in noise_counts(np.array(len(text)), density, mean_span))
    visible_spans = _random_lengths(make_key("visible", key), len(text) - hidden, spans)
    hidden_spans = _random_lengths(make_key("hidden", key), hidden, spans)
    turns = np.stack([visible_spans, hidden_spans], axis=1).reshape(-1)
    is_hidden = np.repeat(np.arange(2 * spans) % 2 == 1, turns) if spans else np.zeros(len(text), dtype=bool)
    sentinels = special_tokens.sentinel(np.arange(spans + 1))
    source = np.insert(text[~is_hidden].astype(np.int64), np.cumsum(visible_spans), sentinels[:-1])
    targets = np.insert(text[is_hidden].astype(np.int64), np.cumsum(hidden_spans) - hidden_spans, sentinels[:-1])
    front = [special_tokens.mode(mode)] if mode else []
    return teacher_forced(
        np.concatenate([front, source, [special_tokens.eos]]).astype(np.int64),
        special_tokens.bos,
        np.concatenate([targets, sentinels[-1:], [special_tokens.eos]]),
    )


def restore(source: np.ndarray, targets: np.ndarray, special_tokens: SpecialTokens) -> np.ndarray:
    """The text that `span_corruption` made these of, without a mode token.

    >>> restore(np.array([11, 66, 13, 65, 2]), np.array([66, 12, 65, 14, 64, 2]), SpecialTokens(1, 2, 50, 10)).tolist()
    [11, 12, 13, 14]
    """
    first = special_tokens.vocabulary + NUM_MARKS
    source, targets = source[:-1], targets[:-1]
    if len(source) and special_tokens.vocabulary < source[0] <= special_tokens.vocabulary + 3:
        source = source[1:]
    visible, hidden = (np.split(side, np.flatnonzero(side >= first)) for side in (source, targets))
    parts = [visible[0]]
    for hole, answer in zip(visible[1:], hidden[1:], strict=False):
        assert hole[0] == answer[0], f"sentinel {hole[0]} is answered by {answer[0]}"
        parts += [answer[1:], hole[1:]]
    return np.concatenate(parts)


def _random_lengths(key: int, total: int, parts: int) -> np.ndarray:
    """`parts` lengths of at least 1 that add up to `total`."""
    if parts == 0:
        return np.zeros(0, dtype=np.int64)
    cuts = np.sort(permutation(key, total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


# ---- masked ---------------------------------------------------------------------------------------------------


def masked_targets(texts: np.ndarray, density: float) -> np.ndarray:
    return np.where(texts >= 1, np.clip(np.rint(texts * density), 1, np.maximum(texts, 1)), 0).astype(np.int64)


def masked(piece: ChunkText, density: float, key: int, special_tokens: SpecialTokens) -> Example:
    """BOS and the piece, with some of the text's tokens hidden: 80% by the mask token, 10% by any token, 10% not."""
    tokens = np.concatenate([[special_tokens.bos], piece.tokens]).astype(np.int64)
    count = int(masked_targets(np.array(len(piece.text)), density))
    places = permutation(make_key("places", key), len(piece.text))[:count] + 1
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[places] = tokens[places]
    how = words(make_key("how", key), count) % np.uint64(10)
    any_token = (words(make_key("token", key), count) % np.uint64(special_tokens.vocabulary)).astype(np.int64)
    tokens[places] = np.where(how < 8, special_tokens.mask, np.where(how == 8, any_token, tokens[places]))
    return Example(NO_TOKENS, tokens, targets)


# ---- pairs ----------------------------------------------------------------------------------------------------


def pair_lengths(
    sources: np.ndarray, targets: np.ndarray, longest_source: int, longest_target: int
) -> tuple[np.ndarray, np.ndarray]:
    """(source, targets) of pairs whose texts, each with its EOS, have so many tokens.

    longest_source 0: both go into `longest_target` positions; a target may take half of them, or what its source
    leaves, and the source has the rest.
    """
    if longest_source:
        return np.minimum(sources, longest_source), np.minimum(targets, longest_target)
    kept = np.minimum(targets, np.maximum(longest_target // 2, longest_target - sources))
    return np.minimum(sources, longest_target - kept), kept


def pair(source: np.ndarray, target: np.ndarray, source_length: int, target_length: int, bos: int) -> Example:
    """A stored pair, cut to these lengths: a source keeps its beginning and its EOS, a target its beginning only.

    >>> pair(np.array([1, 11, 12, 13, 2]), np.array([1, 21, 22, 2]), 3, 2, bos=1)[:3]
    (array([11, 12,  2]), array([ 1, 21]), array([21, 22]))
    """
    read = np.concatenate([source[1:source_length], source[-1:]])
    return teacher_forced(read, bos, target[1 : target_length + 1])


# ---- what the decoder reads -----------------------------------------------------------------------------------


def one_side(example: Example) -> Example:
    """The same for a decoder alone: start token, source, targets, one after the other; only the targets are asked for.

    >>> one_side(Example(np.array([11, 2]), np.array([1, 21]), np.array([21, 2])))[1:3]
    (array([ 1, 11,  2, 21]), array([-100, -100,   21,    2]))
    """
    source, tokens, targets, _ = example
    if not len(source):
        return example
    return Example(
        NO_TOKENS,
        np.concatenate([tokens[:1], source, tokens[1:]]),
        np.concatenate([np.full(len(source), IGNORED), targets]),
    )


def fixed(example: Example, length: int) -> Example:
    """Targets cut or padded to `length`; padding is read as token 0 and not asked for."""
    missing = max(0, length - len(example.labels))
    tokens, targets = (
        np.concatenate([side[:length], np.full(missing, filling)])
        for side, filling in ((example.tokens, 0), (example.labels, IGNORED))
    )
    places = example.places
    if places is not None:
        places = np.concatenate([places[:length], places[-1] + 1 + np.arange(missing)])
    return example._replace(tokens=tokens, labels=targets, places=places)


def mask_inputs(example: Example, share: float, key: int, mask: int) -> Example:
    """Replace this share of the decoder inputs, but never the start token (word dropout: Bowman et al. 2016)."""
    others = len(example.tokens) - 1
    places = permutation(make_key("masked inputs", key), others)[: round(share * others)] + 1
    tokens = example.tokens.astype(np.int64)
    tokens[places] = mask
    return example._replace(tokens=tokens)


def num_kept(targets: np.ndarray, share: float) -> np.ndarray:
    """Positions left after `drop_positions`."""
    return targets - np.rint(share * (targets - 1)).astype(np.int64)


def drop_positions(example: Example, share: float, key: int) -> Example:
    """Leave this share of the decoder positions out, but never the first. The others keep their places."""
    count = len(example.tokens)
    kept = int(num_kept(np.array(count), share)) - 1
    places = np.sort(np.concatenate([[0], permutation(make_key("kept", key), count - 1)[:kept] + 1]))
    return Example(example.source, example.tokens[places], example.labels[places], places)
