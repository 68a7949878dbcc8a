"""Word vectors of a prepared corpus: `python -m tools.train_vectors DATA OUT [--kind glove] [--channels 128]`.

In: a prepared folder (its train split) with any tokenizer. Out: a file for `model.vectors`: a vector for each token
that occurs, under the token's name in tokenizer.json. A document is a sentence; begin and end tokens are left out, and
so is the unknown token of a vocabulary of words.

    word2vec    skip-gram with negative sampling (Mikolov et al. 2013), by gensim; its text form, or its binary form if
                OUT ends with .bin
    glove       a weighted fit of the logarithm of how often two tokens stand near each other (Pennington et al. 2014);
                GloVe's text form, which has no first line with the numbers

Guarantee: the same data and arguments give the same vectors: one thread, one seed. Costs: one core; the vectors twice
in memory; glove: also the counts of pairs, 16 bytes each. word2vec needs gensim (`pip install gensim`).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmodel.config.user_error import UserError
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.run_directory import write_atomically

SENTENCE_TOKENS = 10_000  # gensim ignores what follows in a longer sentence
BATCH = 512  # pairs of an update of glove


class Sentences:
    """The documents as lists of token names; can be read several times."""

    def __init__(self, folder: Path) -> None:
        self._store = ShardStore(folder, "train")
        tokenizer = Tokenizer.load(folder, fast=False)
        self._names = [tokenizer.token_of(token) for token in range(tokenizer.vocabulary)]
        self._left_out = tokenizer.unknown

    def __iter__(self) -> Iterator[list[str]]:
        for tokens in self._texts():
            names = [self._names[token] for token in tokens[1:-1].tolist() if token != self._left_out]
            for first in range(0, len(names), SENTENCE_TOKENS):
                yield names[first : first + SENTENCE_TOKENS]

    def _texts(self) -> Iterator[Any]:
        for source in self._store.sources:
            for shard in range(self._store.num_shards(source)):
                for row in range(len(self._store.lengths(source, shard))):
                    document: Any = self._store.document(source, shard, row)
                    if isinstance(document, Supervised):
                        yield document.tokens
                    else:
                        yield from document if isinstance(document, Pair) else (document,)


def train_vectors(
    data: Path, out: Path, kind: str = "word2vec", channels: int = 128, epochs: int = 5, window: int = 5, seed: int = 1
) -> int:
    """Write the file; returns the number of vectors. Raises `UserError` for numbers below 1, a folder that is missing,
    and data without text."""
    for name, value in (("channels", channels), ("epochs", epochs), ("window", window), ("seed", seed)):
        if not 1 <= value < 1 << 32:
            raise UserError(f"--{name} {value}: must be at least 1, and below 2**32")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: must be a file in a folder that exists")
    sentences = Sentences(data)
    if not any(sentences):
        raise UserError(f"{data}: its train split has no text; add text, and prepare it again")
    if kind == "glove":
        return _train_glove(sentences, out, channels, epochs, window, seed)
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise UserError("gensim is not installed: pip install gensim") from None
    model = Word2Vec(
        sentences, vector_size=channels, window=window, min_count=1, sg=1, negative=5, epochs=epochs,
        seed=seed, workers=1,
    )  # fmt: skip
    model.wv.save_word2vec_format(str(out), binary=out.suffix == ".bin")
    return len(model.wv)


def near(sentences: Iterable[list[str]], window: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of tokens; pairs (N, 2) of their numbers; how often (N,) they stand near each other, each time counted as
    1 / distance, in both orders.

    >>> names, pairs, counts = near([["a", "b", "a"]], window=2)
    >>> names, pairs.tolist(), counts.tolist()
    (['a', 'b'], [[0, 0], [0, 1], [1, 0]], [1.0, 2.0, 2.0])
    """
    numbers: dict[str, int] = {}
    texts = [np.array([numbers.setdefault(name, len(numbers)) for name in one], dtype=np.int64) for one in sentences]
    keys, weights = [], []
    for distance in range(1, window + 1):
        both = [(one[:-distance], one[distance:]) for one in texts if len(one) > distance]
        found = [first * len(numbers) + second for a, b in both for first, second in ((a, b), (b, a))]
        unique, counts = np.unique(np.concatenate(found or [np.empty(0, np.int64)]), return_counts=True)
        keys.append(unique)
        weights.append(counts / distance)
    joined, place = np.unique(np.concatenate(keys), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate(weights), minlength=len(joined))
    return list(numbers), np.stack([joined // len(numbers), joined % len(numbers)], axis=1), counts


def _train_glove(sentences: Sentences, out: Path, channels: int, epochs: int, window: int, seed: int) -> int:
    """Minimize f(X) (u v + b + c - log X)^2 over the pairs, f(X) = min(1, (X / 100) ** 0.75), by AdaGrad."""
    names, pairs, counts = near(sentences, window)
    torch.manual_seed(seed)
    indices, logs = torch.from_numpy(pairs), torch.from_numpy(np.log(counts)).float()
    weights = torch.from_numpy(np.minimum(1.0, (counts / 100) ** 0.75)).float()
    # Per side a vector and, in the last channel, a bias.
    sides = [torch.nn.Embedding(len(names), channels + 1, sparse=True) for _ in range(2)]
    for side in sides:
        torch.nn.init.uniform_(side.weight, -0.5 / channels, 0.5 / channels)
    optimizer = torch.optim.Adagrad([side.weight for side in sides], lr=0.05, initial_accumulator_value=1.0)
    with torch.sparse.check_sparse_tensor_invariants(False):  # said, or torch warns
        for chosen in chain.from_iterable(torch.randperm(len(logs)).split(BATCH) for _ in range(epochs)):
            first, second = (side(indices[chosen, place]) for place, side in enumerate(sides))
            product = (first[:, :-1] * second[:, :-1]).sum(1) + first[:, -1] + second[:, -1]
            loss = 0.5 * (weights[chosen] * (product - logs[chosen]).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    vectors = (sides[0].weight + sides[1].weight)[:, :-1].detach().tolist()
    lines = (f"{name} {' '.join(f'{value:.6f}' for value in one)}\n" for name, one in zip(names, vectors, strict=True))
    write_atomically(out, "".join(lines))
    return len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared folder")
    parser.add_argument("out", type=Path, help="file of vectors; .bin: binary")
    parser.add_argument("--kind", choices=("word2vec", "glove"), default="word2vec")
    parser.add_argument("--channels", type=int, default=128, help="of a vector: model.hidden_size")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--window", type=int, default=5, help="tokens on each side that a token predicts")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        count = train_vectors(**vars(options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f'{options.out}: {count:,} vectors of {options.channels} channels; set model.vectors = "{options.out}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
