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
        mine, its = (one.token_of(number) if number < one.vocabulary else None for one in (here, there))
        if mine != its:
            return f"token {number} is {mine!r} in the data and {its!r} there"
    for role, mine, its in (("begins", here.bos, there.bos), ("ends", here.eos, there.eos)):
        if mine != its:
            return f"a text {role} with {here.token_of(mine)!r} in the data and with {there.token_of(its)!r} there"
    parts = zip(*(_parts(path) for path in (ours, theirs)), strict=True)
    return next((f"its {name} is another one" for (name, mine), (_, its) in parts if mine != its), "")


def _parts(path: Path) -> list[tuple[str, Any]]:
    """What decides the ids of a text, in the form that the library writes today."""
    table = json.loads(tokenizers.Tokenizer.from_str(read_tokenizer(tokenizer_file(path)).decode()).to_str())
    model = {name: value for name, value in table["model"].items() if name not in ("dropout", "vocab")}
    scores = table["model"].get("vocab") if isinstance(table["model"].get("vocab"), list) else None  # of Unigram
    return [("normalizer", table["normalizer"]), ("pre_tokenizer", table["pre_tokenizer"]), ("model", (model, scores))]
