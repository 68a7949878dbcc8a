"""Whether two tokenizer.json give the same ids: for a teacher, which reads the ids of the student's data.

In: two files or folders. Out: what differs, in words; empty if a text has the same ids in both. The other may have more
tokens, beyond ours: an export names sentinels. What only `encode` adds around a text, padding and BPE dropout are not
compared: data have none of them.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from bigmodel.data.store.tokenizer import Tokenizer, read_tokenizer, tokenizer_file


def difference(ours: Path, theirs: Path) -> str:
    """Raises `UserError` for what is no tokenizer."""
    here, there = (Tokenizer.load(path, fast=False) for path in (ours, theirs))
    for number in range(here.vocabulary):
        names = [one.token_of(number) if number < one.vocabulary else None for one in (here, there)]
        if names[0] != names[1]:
            return f"token {number} is {names[0]!r} in the data and {names[1]!r} there"
    for role, mine, its in (("begins", here.bos, there.bos), ("ends", here.eos, there.eos)):
        if mine != its:
            return f"a text {role} with {here.token_of(mine)!r} in the data and with {there.token_of(its)!r} there"
    first, second = (_parts(path) for path in (ours, theirs))
    return next((f"its {name} is another one" for name in first if first[name] != second[name]), "")


def _parts(path: Path) -> dict[str, Any]:
    """What decides the ids of a text, in the form that the library writes today."""
    table = json.loads(tokenizers.Tokenizer.from_str(read_tokenizer(tokenizer_file(path)).decode()).to_str())
    model = {name: value for name, value in table["model"].items() if name not in ("dropout", "vocab")}
    scores = table["model"].get("vocab") if isinstance(table["model"].get("vocab"), list) else None  # of Unigram
    return {name: table[name] for name in ("normalizer", "pre_tokenizer")} | {"model": (model, scores)}
