"""Word vectors of a prepared corpus, by gensim's Word2Vec: `python -m tools.train_vectors DATA OUT [--channels 128]`.

In: a prepared folder (its train split) with any tokenizer. Out: a file for `model.vectors`, in Word2Vec's text form, or
its binary form if OUT ends with .bin: a vector for each token that occurs, under the token's name in tokenizer.json. A
document is a sentence; begin and end tokens are left out, and so is the unknown token of a vocabulary of words.

Guarantee: the same data and arguments give the same vectors: one thread, one seed. Costs: one core; the vectors twice
in memory. Needs gensim (`pip install gensim`).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigmodel.config.user_error import UserError
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer

SENTENCE_TOKENS = 10_000  # gensim ignores what follows in a longer sentence


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


def train_vectors(data: Path, out: Path, channels: int = 128, epochs: int = 5, window: int = 5, seed: int = 1) -> int:
    """Write the file; returns the number of vectors. The skip-gram model with negative sampling (Mikolov et al.
    2013). Raises `UserError` for numbers below 1, a folder that is missing, and data without text."""
    for name, value in (("channels", channels), ("epochs", epochs), ("window", window), ("seed", seed)):
        if not 1 <= value < 1 << 32:
            raise UserError(f"--{name} {value}: must be at least 1, and below 2**32")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: must be a file in a folder that exists")
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise UserError("gensim is not installed: pip install gensim") from None
    sentences = Sentences(data)
    if not any(sentences):
        raise UserError(f"{data}: its train split has no text; add text, and prepare it again")
    model = Word2Vec(
        sentences, vector_size=channels, window=window, min_count=1, sg=1, negative=5, epochs=epochs,
        seed=seed, workers=1,
    )  # fmt: skip
    model.wv.save_word2vec_format(str(out), binary=out.suffix == ".bin")
    return len(model.wv)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared folder")
    parser.add_argument("out", type=Path, help="file of vectors; .bin: binary")
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
