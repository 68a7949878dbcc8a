"""A tokenizer of words, trained: each frequent word is a token, all others are the unknown token.

In: texts. Out: the content of a tokenizer.json with the `tokenizers` library's WordLevel model. Example, words cut at
punctuation marks:

    <unk> 0   the 1   , 2   time 3 ...   <|bos|> n-2   <|eos|> n-1
    "the time, été"  ->  [1, 3, 2, 0]  ->  "the time , <unk>"

Guarantees: training is deterministic: words by falling frequency, equal ones in alphabetical order. No text gives the
begin or end token: they are no words of the model. Their names, and a word <unk> of a text, are the unknown token
where they are whole words.
"""

import json
from collections.abc import Iterable, Sequence

from bigmodel.config.user_error import UserError

UNKNOWN = "<unk>"
NUM_SPECIAL = 3  # begin, end, unknown


def train_words(
    texts: Iterable[str],
    vocabulary: int,
    words: str,
    lowercase: bool,
    min_frequency: int,
    boundaries: Sequence[str],
) -> str:
    """At most `vocabulary` tokens. `words`: "punctuation" or "whitespace". `boundaries`: names of begin and end.

    Raises `UserError` if no word is frequent enough.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps if words == "punctuation" else steps[:1])
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocabulary, min_frequency=min_frequency, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    known = [word for word in sorted(ids, key=ids.__getitem__) if word not in (UNKNOWN, *boundaries)]
    if not known:
        raise UserError(
            f"prepare.min_frequency = {min_frequency}: no word of the training text is that frequent; lower it, or add "
            "text"
        )
    vocab = {word: number for number, word in enumerate([UNKNOWN, *known[: vocabulary - NUM_SPECIAL]])}
    tokenizer.model = models.WordLevel(vocab, unk_token=UNKNOWN)
    tokenizer.add_special_tokens(list(boundaries))
    return json.dumps(json.loads(tokenizer.to_str()), indent=2, ensure_ascii=False) + "\n"
