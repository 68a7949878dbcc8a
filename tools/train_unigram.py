"""A byte-level Unigram tokenizer (Kudo 2018): `python -m tools.train_unigram DATA OUT.json [--vocabulary 1024]`.

In: a prepared folder (the texts of its train split). Out: a tokenizer.json for `prepare.tokenizer`, whose segmentations
`prepare.segmentation` can sample. Words are cut as for the trained BPE, and every text has tokens. By the library
tokenizers, whose scores differ in their last digits from one training to the next, also in one thread: keep the file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from bigmodel.config.user_error import UserError
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import BOS, EOS, WORD_PATTERN, Tokenizer
from bigmodel.run_directory import write_atomically


def train_unigram(data: Path, out: Path, vocabulary: int) -> int:
    """Write the file; returns the number of tokens. Raises `UserError` for data without plain text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    store, given = ShardStore(data, "train"), Tokenizer.load(data, fast=False)
    places = [
        (source, shard, row)
        for source in store.sources
        for shard in range(store.num_shards(source))
        for row in range(len(store.lengths(source, shard)))
    ]
    if store.pair_sources or store.supervised_sources or not places:
        raise UserError(f"{data}: give a folder of plain text")
    tokenizer = Trained(models.Unigram())
    cut = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = (given.decode(np.asarray(store.document(*place))[1:-1].tolist()) for place in places)
    tokenizer.train_from_iterator(texts, trainer, length=len(places))
    write_atomically(out, tokenizer.to_str() + "\n")
    return int(tokenizer.get_vocab_size())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared folder")
    parser.add_argument("out", type=Path, help="tokenizer.json to write")
    parser.add_argument("--vocabulary", type=int, default=1024)
    options = parser.parse_args()
    try:
        count = train_unigram(options.data, options.out, options.vocabulary)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f'{options.out}: {count:,} tokens; set prepare.tokenizer = "{options.out}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
