"""Random segmentations: by key, of the same text, with the probabilities of the papers."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from scipy import stats
from tokenizers import decoders, models, pre_tokenizers

from bigmodel.config.settings import UserError
from bigmodel.data.store.segmentation import BpeDropout, Segmenter, UnigramSampling
from bigmodel.data.store.tokenizer import Tokenizer, train
from tests.support.tiny_corpus import LETTERS, NEWS
from tools.train_unigram import train_unigram

DROPOUT = {"kind": "bpe_dropout", "dropout": 0.3, "alpha": 0.2, "passes": 4, "seed": 1}
SAMPLING = DROPOUT | {"kind": "unigram_sampling"}
WORD = "unrelated"
MERGES = ["u n", "r e", "a t", "l at", "re lat", "e d", "un relat", "unrelat ed", "at ed"]
SCORES = {"▁": -2.0, "a": -3.0, "b": -3.1, "ab": -3.9, "▁a": -3.5, "ba": -4.2, "aba": -5.0, "▁ab": -4.4}


@cache
def bpe() -> Tokenizer:
    return Tokenizer(train([*NEWS, *LETTERS] * 3, 320))


@cache
def letters() -> models.BPE:
    """A BPE of the merges above, as `tokenizers` has it in its own words."""
    symbols = dict.fromkeys([*"unrelatd", *(merge.replace(" ", "") for merge in MERGES)])
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES])


@cache
def unigram() -> Tokenizer:
    """Metaspace words, an unknown token, and control tokens as pieces, as SentencePiece's are converted."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *SCORES.items(), ("☃", -9.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(made.to_str())


def model_of(model: models.Model) -> dict:
    return json.loads(tokenizers.Tokenizer(model).to_str())["model"]


def drawn(sampler: BpeDropout | UnigramSampling, ids: list[int], count: int, names: list[str], first: str) -> Counter:
    """How often each segmentation of one word comes, in a text of `count` such words."""
    text, words_of = np.tile(ids, count), np.repeat(np.arange(count), len(ids))
    found = sampler.sample(text, words_of, 1)
    starts = np.flatnonzero([names[one].startswith(first) for one in found.tolist()])
    return Counter(tuple(part.tolist()) for part in np.split(found, starts)[1:])


def fits(seen: Counter, expected: dict[tuple[int, ...], float]) -> bool:
    """Whether counts agree with probabilities: a chi-square test; rare segmentations together."""
    assert seen.keys() <= expected.keys()
    count = seen.total()
    often = [one for one, share in expected.items() if share * count >= 10]
    rest = max(0.0, 1 - sum(expected[one] for one in often))
    found = [*(seen[one] for one in often), count - sum(seen[one] for one in often)]
    wanted = [*(expected[one] * count for one in often), rest * count]
    if rest * count < 1:
        assert found[-1] <= 8
        found, wanted = found[:-1], (np.array(wanted[:-1]) * sum(found[:-1]) / sum(wanted[:-1])).tolist()
    return stats.chisquare(found, wanted).pvalue > 1e-4


def probabilities(symbols: tuple[str, ...], dropout: float) -> dict[tuple[str, ...], float]:
    """Algorithm 1 of Provilkov et al., exactly: which merge comes first, then what may follow."""
    order = {tuple(merge.split()): rank for rank, merge in enumerate(MERGES)}
    pairs = enumerate(pairwise(symbols))
    able = sorted((order[pair], place) for place, pair in pairs if pair in order)
    found: Counter = Counter({symbols: dropout ** len(able)})
    for before, (_, place) in enumerate(able):
        merged = (*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :])
        for one, share in probabilities(merged, dropout).items():
            found[one] += dropout**before * (1 - dropout) * share
    return dict(found)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_bpe_dropout_has_the_probabilities_of_its_paper(dropout: float) -> None:
    model = letters()
    vocabulary = model_of(model)["vocab"]
    expected, wrong = (
        {tuple(vocabulary[one] for one in parts): share for parts, share in probabilities(tuple(WORD), p).items()}
        for p in (dropout, dropout + 0.05)
    )
    assert sum(expected.values()) == pytest.approx(1)
    sampler = BpeDropout(model_of(model), set(), len(vocabulary), dropout)
    seen = drawn(sampler, [token.id for token in model.tokenize(WORD)], 6000, list(vocabulary), "u")
    assert fits(seen, expected)
    assert not fits(seen, wrong)
    word = np.array([token.id for token in model.tokenize(WORD)])
    alone = Counter(tuple(sampler.sample(word, np.zeros_like(word), key).tolist()) for key in range(600))
    assert fits(alone, expected)  # draws of one merge tell nothing about those of the next


def test_and_those_of_the_librarys_own_dropout() -> None:
    """Which cannot be seeded, so that its draws are compared in their counts."""
    model = letters()
    whole = [token.id for token in model.tokenize(WORD)]
    sampler = BpeDropout(model_of(model), set(), len(model_of(model)["vocab"]), 0.4)
    model.dropout = 0.4
    theirs = Counter(tuple(token.id for token in model.tokenize(WORD)) for _ in range(3000))
    model.dropout = None
    ours = drawn(sampler, whole, 3000, list(model_of(model)["vocab"]), "u")
    often = [one for one in theirs | ours if theirs[one] + ours[one] > 20]
    assert len(often) > 10
    assert stats.chi2_contingency([[some[one] for one in often] for some in (theirs, ours)]).pvalue > 1e-4


def test_without_dropout_the_ids_are_the_tokenizers_and_with_all_of_it_bytes() -> None:
    texts = [*NEWS[:5], "", " ", "naïve 漢字 👩‍👩‍👧 \r\n\n a\t", "x" * 3000 + " end", "<|bos|> is text <|eos|>"]
    for dropout in (0.0, 0.2, 1.0):
        segmenter = Segmenter(bpe(), DROPOUT | {"dropout": dropout})
        for text in texts:
            plain, found = bpe().encode_document(text), segmenter.document(text, 0)
            assert found.dtype == plain.dtype
            assert (found[0], found[-1]) == (bpe().bos, bpe().eos)
            assert bpe().decode(found) == text
            assert dropout or found.tolist() == plain.tolist()
            if dropout == 1.0 and "x" * 300 not in text:  # a run too long for a word keeps its tokens
                assert len(found) == len(text.encode()) + 2


def test_ids_are_drawn_by_text_and_pass_and_passes_repeat() -> None:
    segmenter, again = (Segmenter(bpe(), DROPOUT) for _ in range(2))
    other = Segmenter(bpe(), DROPOUT | {"seed": 2})
    passes = [segmenter.document(NEWS[3], number).tolist() for number in range(4)]
    assert len({tuple(ids) for ids in passes}) == 4
    assert [again.document(NEWS[3], number).tolist() for number in (4, 5, 2)] == [passes[0], passes[1], passes[2]]
    assert other.document(NEWS[3], 0).tolist() != passes[0]
    more = [len(segmenter.document(text, 0)) / len(bpe().encode_document(text)) for text in NEWS]
    assert 1.1 < np.mean(more) < 2.5


def segmentations(word: str) -> Iterator[tuple[str, ...]]:
    if not word:
        yield ()
    for end in range(1, len(word) + 1):
        if word[:end] in SCORES:
            for rest in segmentations(word[end:]):
                yield (word[:end], *rest)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_unigram_sampling_has_the_probabilities_of_its_paper(alpha: float) -> None:
    model = json.loads(unigram().to_json())["model"]
    ids = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    word = "▁ababa"
    scores = {parts: alpha * sum(SCORES[part] for part in parts) for parts in segmentations(word)}
    total = np.logaddexp.reduce(list(scores.values()))
    expected = {tuple(ids[part] for part in parts): float(np.exp(score - total)) for parts, score in scores.items()}
    assert len(expected) > 20
    whole = unigram().encode("ababa").tolist()
    seen, wrong = (
        drawn(UnigramSampling(model, {0, 1, 2}, power), whole, 4000, list(ids), "▁") for power in (alpha, alpha + 0.1)
    )
    assert fits(seen, expected)
    assert not fits(wrong, expected)


def test_unigram_ids_decode_to_the_text_and_a_large_alpha_is_the_best_segmentation() -> None:
    for text in ("abab a bba ababababab", "", "ab ☃☃ a", "aba漢ab b", "a</s>b <s> a", "ab" * 200):
        plain = unigram().encode_document(text)
        best = Segmenter(unigram(), SAMPLING | {"alpha": 1000.0}).document(text, 0)
        assert best.tolist() == plain.tolist(), text
        drawn_ids = [Segmenter(unigram(), SAMPLING).document(text, number) for number in range(4)]
        assert {unigram().decode(ids) for ids in drawn_ids} == {unigram().decode(plain)}
    assert len({tuple(Segmenter(unigram(), SAMPLING).document("abab a bba", n).tolist()) for n in range(4)}) == 4


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r'kind = "unigram_sampling" needs a tokenizer whose model is Unigram.* is BPE'):
        Segmenter(bpe(), SAMPLING)
    with pytest.raises(UserError, match=r'or kind = "unigram_sampling", or leave segmentation out'):
        Segmenter(unigram(), DROPOUT)
    with pytest.raises(UserError, match="whose tokens carry prefixes or suffixes"):
        BpeDropout(model_of(models.BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>")), set(), 1, 0.1)


def test_a_unigram_model_of_a_corpus_has_tokens_for_every_text_and_its_samples_decode_to_it(
    shards: Path, tmp_path: Path
) -> None:
    assert 258 < train_unigram(shards, tmp_path / "unigram.json", 300) <= 300  # the text has no more pieces
    tokenizer = Tokenizer.load(tmp_path / "unigram.json", fast=False)
    for text in ("The committee met on Monday.", "x = [1,\n\t2]", "naïve 日本 \x00 🙂", "  two  spaces "):
        ids = tokenizer.encode_document(text)
        drawn_ids = [Segmenter(tokenizer, SAMPLING).document(text, number) for number in range(4)]
        assert {tokenizer.decode(one[1:-1]) for one in (ids, *drawn_ids)} == {text}
    assert len({tuple(Segmenter(tokenizer, SAMPLING).document("The committee met", n).tolist()) for n in range(8)}) > 1
