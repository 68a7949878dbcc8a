"""Random segmentations: the tokens of a text, drawn anew in each pass (BPE-dropout, Unigram sampling).

In: a text, the number of the pass. Out: the text's stored ids, `[bos] + text + [eos]`, another way to write the same
text. Example, a BPE of the merges u+n, un+r: "unr" is 1 token, with dropout also un r, or u n r.

    bpe_dropout       Provilkov et al. 2020, algorithm 1: before each merge of a word, each possible merge is left out
                      with probability `dropout`; the first of the others is done; the word ends where none is left
    unigram_sampling  Kudo 2018 with l infinite: a segmentation of a word has a probability in proportion to
                      P(segmentation) ** alpha, by forward filtering and backward sampling

Guarantees: the ids depend on (seed, pass, text, tokenizer, settings) only, so rank, packing and restarts do not matter.
They decode to what the tokenizer's own ids decode to. Special tokens, tokens of single bytes and unknown tokens stay.
The libraries' own dropout and sampling draw from generators that cannot be seeded for a text.

Costs: BPE-dropout about 1 MB of text a second and core, Unigram sampling 0.1 MB; `prepare` draws every pass once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.randomness import make_key, words
from bigmodel.data.store.tokenizer import Tokenizer

LONGEST_WORD = 256  # symbols; a longer run without a cut is no word and keeps its tokens
CACHED_WORDS, CACHED_CHARACTERS = 1 << 16, 40
NO_MERGE = np.iinfo(np.int64).max


class Sampler(Protocol):
    """Draws another segmentation: (n,) ids with the number of the word of each -> (m,) ids."""

    def sample(self, ids: np.ndarray, words_of: np.ndarray, key: int) -> np.ndarray: ...


class Segmenter:
    """The random segmentations of a prepared folder. `recipe`: `prepare.segmentation` as plain values."""

    def __init__(self, tokenizer: Tokenizer, recipe: Mapping[str, Any]) -> None:
        """Raises `UserError` if the tokenizer is of another kind."""
        self._tokenizer, self._seed = tokenizer, recipe["seed"]
        self.passes: int = recipe["passes"]
        description = json.loads(tokenizer.to_json())
        wanted = "BPE" if recipe["kind"] == "bpe_dropout" else "Unigram"
        if (kind := description["model"]["type"]) != wanted:
            fitting = {"BPE": ' or kind = "bpe_dropout"', "Unigram": ' or kind = "unigram_sampling"'}.get(kind, "")
            raise UserError(
                f'prepare.segmentation: kind = "{recipe["kind"]}" needs a tokenizer whose model is {wanted}, and that '
                f"of this data is {kind}; use another prepare.tokenizer{fitting}, or leave segmentation out"
            )
        fixed = {token["id"] for token in description.get("added_tokens", [])} | {tokenizer.bos, tokenizer.eos}
        if tokenizer.unknown is not None:
            fixed.add(tokenizer.unknown)
        if wanted == "BPE":
            self._sampler: Sampler = BpeDropout(description["model"], fixed, tokenizer.vocabulary, recipe["dropout"])
        else:
            self._sampler = UnigramSampling(description["model"], fixed, recipe["alpha"])

    def document(self, text: str, number: int) -> np.ndarray:
        """(n,) stored ids of a text in pass `number`; passes repeat after `passes`."""
        return self._tokenizer.stored(self._draw(text, *self._tokenizer.encode_words(text), number % self.passes))

    def lengths(self, text: str) -> list[int]:
        """Stored ids of a text in each pass."""
        ids, words_of = self._tokenizer.encode_words(text)
        return [len(self._draw(text, ids, words_of, number)) + 2 for number in range(self.passes)]

    def _draw(self, text: str, ids: np.ndarray, words_of: np.ndarray | None, number: int) -> np.ndarray:
        if words_of is None or not len(ids):
            return ids
        return self._sampler.sample(ids, words_of, make_key("segmentation", self._seed, number, text))


class BpeDropout:
    """All words of a text at once, a merge in each word at a time."""

    def __init__(self, model: Mapping[str, Any], fixed: set[int], vocabulary: int, dropout: float) -> None:
        """`fixed`: ids that stay, and that no merge may form. Raises `UserError` for tokens with prefixes or
        suffixes."""
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise UserError(
                'prepare.segmentation: kind = "bpe_dropout" does not read a BPE whose tokens carry prefixes or '
                "suffixes of words; use another prepare.tokenizer, or leave segmentation out"
            )
        ids: dict[str, int] = model["vocab"]
        self._base, self._dropout = vocabulary, dropout
        self._symbols, self._ends = _symbols_of_tokens(ids, fixed, vocabulary)
        pairs = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
        codes, ranks, results = [], [], []
        for rank, (left, right) in enumerate(pairs):
            if (result := ids[left + right]) not in fixed:
                codes.append(ids[left] * vocabulary + ids[right])
                ranks.append(rank)
                results.append(result)
        order = np.argsort(np.array(codes, np.int64), kind="stable")
        self._codes, self._ranks, self._results = (
            np.array(column, np.int64)[order] for column in (codes, ranks, results)
        )

    def sample(self, ids: np.ndarray, words_of: np.ndarray, key: int) -> np.ndarray:
        symbols, owners = self._split(ids, words_of)
        is_long = np.bincount(owners)[owners] > LONGEST_WORD
        if is_long.any():
            long = np.unique(owners[is_long])
            kept = np.isin(words_of, long)
            done = [(ids[kept].astype(np.int64), words_of[kept])]
            symbols, owners = symbols[~is_long], owners[~is_long]
        else:
            done = []
        turn = 0
        while len(symbols):
            symbols, owners, finished = self._merge_once(symbols, owners, make_key("merges", key, turn))
            done.append(finished)
            turn += 1
        found, places = (np.concatenate(parts) for parts in zip(*done, strict=True))
        return found[np.argsort(places, kind="stable")]

    def _split(self, ids: np.ndarray, words_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The symbols that the tokens consist of, and their words."""
        counts = self._ends[ids + 1] - self._ends[ids]
        firsts = np.repeat(self._ends[ids] - (np.cumsum(counts) - counts), counts)
        return self._symbols[firsts + np.arange(len(firsts))], np.repeat(words_of, counts)

    def _merge_once(
        self, symbols: np.ndarray, owners: np.ndarray, key: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """One merge in each word; the words without one are finished and leave."""
        count = len(symbols)
        codes = symbols[:-1] * self._base + symbols[1:]
        at = np.minimum(np.searchsorted(self._codes, codes), max(0, len(self._codes) - 1))
        able = owners[:-1] == owners[1:]
        able &= self._codes[at] == codes if len(self._codes) else False
        able &= words(key, count - 1) >= np.uint64(min(int(self._dropout * 2.0**64), 2**64 - 1))
        first_best = np.full(count, NO_MERGE)  # the lowest rank, and of equal ones the leftmost
        first_best[:-1][able] = self._ranks[at[able]] * count + np.flatnonzero(able)
        starts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        best = np.minimum.reduceat(first_best, starts)
        merges = best != NO_MERGE
        goes_on = np.repeat(merges, np.diff(np.append(starts, count)))
        finished = symbols[~goes_on], owners[~goes_on]
        merged = best[merges] % count
        symbols = symbols.copy()
        symbols[merged] = self._results[at[merged]]
        goes_on[merged + 1] = False
        return symbols[goes_on], owners[goes_on], finished


def _symbols_of_tokens(ids: Mapping[str, int], fixed: set[int], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The symbols of all tokens end to end, and the (vocabulary + 1,) ends of each token's. A token stays itself if it
    is fixed, the token of a byte, or has a character that is no token."""
    symbols: list[list[int]] = [[number] for number in range(vocabulary)]
    for token, number in ids.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if number not in fixed and not is_byte and all(character in ids for character in token):
            symbols[number] = [ids[character] for character in token]
    ends = np.concatenate([[0], np.cumsum([len(one) for one in symbols])])
    return np.array([one for of_token in symbols for one in of_token], np.int64), ends


Choices = list[tuple[list[int], list[int], list[float]]]  # by end in a word: starts, ids, cumulative probabilities


class UnigramSampling:
    """Word by word; the choices of common words are kept."""

    def __init__(self, model: Mapping[str, Any], fixed: set[int], alpha: float) -> None:
        """`fixed`: ids that stay."""
        pieces = enumerate(model["vocab"])
        self._pieces = {piece: (number, alpha * score) for number, (piece, score) in pieces if number not in fixed}
        self._names = {number: piece for piece, (number, _) in self._pieces.items()}
        if model.get("byte_fallback"):
            self._names = {n: piece for n, piece in self._names.items() if not piece.startswith("<0x")}
        self._longest = max(map(len, self._pieces), default=0)
        self._choices_of_common = lru_cache(maxsize=CACHED_WORDS)(self.choices)

    def sample(self, ids: np.ndarray, words_of: np.ndarray, key: int) -> np.ndarray:
        found: list[int] = []
        parts = [[one for _, one in group] for _, group in groupby(zip(words_of, ids.tolist(), strict=True), _first)]
        texts = ["".join(self._names[one] for one in part) if self._knows(part) else "" for part in parts]
        draws = (words(key, sum(map(len, texts)) + 1) / 2.0**64).tolist()
        for part, word in zip(parts, texts, strict=True):
            if not word:
                found += part
                continue
            choices = (self.choices if len(word) > CACHED_CHARACTERS else self._choices_of_common)(word)
            drawn, end = [], len(word)
            while end:
                starts, numbers, cumulative = choices[end]
                draw = draws[end]
                chosen = next((n for n, bound in enumerate(cumulative) if draw < bound), len(cumulative) - 1)
                drawn.append(numbers[chosen])
                end = starts[chosen]
            found += reversed(drawn)
            del draws[: len(word)]
        return np.array(found, np.int64)

    def _knows(self, part: Sequence[int]) -> bool:
        return all(one in self._names for one in part)

    def choices(self, word: str) -> Choices:
        """By end of a piece: the pieces that may end there, with the probabilities of backward sampling."""
        totals = [0.0]  # the logarithm of the sum over all segmentations up to each place
        found: Choices = [([], [], [])]
        for end in range(1, len(word) + 1):
            starts, numbers, scores = [], [], []
            for start in range(max(0, end - self._longest), end):
                piece = self._pieces.get(word[start:end])
                if piece is not None and totals[start] > -math.inf:
                    starts.append(start)
                    numbers.append(piece[0])
                    scores.append(totals[start] + piece[1])
            highest = max(scores, default=-math.inf)
            weights = [math.exp(score - highest) for score in scores]
            totals.append(highest + math.log(sum(weights)) if weights else -math.inf)
            cumulative = (np.cumsum(weights) / sum(weights)).tolist() if weights else []
            found.append((starts, numbers, cumulative))
        return found


def _first(pair: tuple[int, int]) -> int:
    return pair[0]
