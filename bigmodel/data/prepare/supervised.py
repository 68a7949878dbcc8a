"""Supervised sources: records to ids with spans, what of them is trained.

In: a record's text (`bigmodel.data.prepare.records`), the chat template, the tokenizer. Out: (n,) ids and (k, 3) spans:
first token, end, weight in units of 1/65,536. Example, the prompt "2 + 2 = " with the response "4":

    <|bos|> 2 + 2 =  4 <|eos|>        span: the last two

A chat has the ids that its template gives, without further begin and end. Neighbouring tokens of one weight are one
span. The first token has no weight, because nothing comes before it.

Costs: a chat is rendered once while it is judged and once while it is encoded, at about 2 MB/s a core.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import PrepareSettings, UserError
from bigmodel.data.store.chat_template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    ChatTemplate,
    added_tokens,
    encode_marked,
    read_chat_template,
)
from bigmodel.data.store.special_names import read_special_names
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer, tokenizer_file
from bigmodel.run_directory import read_json, write_atomically, write_json

UNITS = 1 << 16  # of a weight; `bigmodel.data.objectives.supervised` has the same
NAMES_FILE = "special_tokens_map.json"


def find_template(settings: PrepareSettings) -> ChatTemplate | None:
    """The template of the chats, None without any. Raises `UserError` if it cannot be read or is no Jinja."""
    if not settings.has_chats:
        return None
    where, text = "the chat template", None
    names, added = {"bos_token": BOS, "eos_token": EOS}, (frozenset((BOS, EOS)),) * 2
    if settings.tokenizer:
        tokenizer = Tokenizer.load(settings.tokenizer, fast=False)
        names, added = tokenizer.special_names, added_tokens(tokenizer)
        text = read_chat_template(tokenizer_file(settings.tokenizer).parent)
        where = f"prepare.tokenizer = {settings.tokenizer}"
    if settings.chat_template:
        where = f"prepare.chat_template = {settings.chat_template}"
        try:
            text = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {error}; name a text file with a Jinja template") from None
    template = ChatTemplate(DEFAULT_TEMPLATE if text is None else text, names, *added)
    if fault := template.syntax_error():
        raise UserError(f"{where}: the chat template is no Jinja: {fault}; correct it")
    return template


def write_template(template: ChatTemplate, path: Path) -> None:
    write_json(path, asdict(template) | {"special": sorted(template.special), "added": sorted(template.added)})


@lru_cache(maxsize=2)
def read_template(path: Path) -> ChatTemplate | None:
    """What `write_template` wrote; None without a file."""
    if not path.exists():
        return None
    table = read_json(path)
    return ChatTemplate(table["text"], table["names"], frozenset(table["special"]), frozenset(table["added"]))


def keep_template(template: ChatTemplate, given: Path | None, result: Path) -> None:
    """Write the template, and the names of special tokens of the given tokenizer, beside tokenizer.json."""
    write_atomically(result / TEMPLATE_FILE, template.text)
    if given and (names := read_special_names(tokenizer_file(given).parent)):
        write_json(result / NAMES_FILE, names)


@dataclass(frozen=True)
class Encoded:
    """Of a record: (n,) ids and (k, 3) spans."""

    tokens: np.ndarray
    spans: np.ndarray


def encode_record(text: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> Encoded:
    table = json.loads(text)
    if "messages" in table:
        assert template is not None, "chats need a template"
        ids, weights = encode_marked(template.mark(table["messages"]), tokenizer)
    else:
        ids, weights = _prompt_and_response(table, tokenizer)
    weighted = np.array(weights) * float(table.get("weight", 1.0))
    units = np.where(weighted > 0, np.maximum(np.rint(weighted * UNITS), 1), 0).astype(np.int64)
    return Encoded(np.array(ids, tokenizer.dtype), spans_of(units))


def _prompt_and_response(table: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    prompt = [tokenizer.bos, *tokenizer.encode(table["prompt"]).tolist()]
    response = [*tokenizer.encode(table["response"]).tolist(), tokenizer.eos]
    return [*prompt, *response], [0.0] * len(prompt) + [1.0] * len(response)


def spans_of(units: np.ndarray) -> np.ndarray:
    """(k, 3) runs of equal units above 0, without the first token.

    >>> spans_of(np.array([5, 5, 5, 0, 7, 9])).tolist()
    [[1, 3, 5], [4, 5, 7], [5, 6, 9]]
    """
    units = units.copy()
    units[:1] = 0
    edges = np.flatnonzero(np.diff(units, prepend=0, append=0))
    runs = [(first, end, int(units[first])) for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    return np.array([run for run in runs if run[2]], np.int64).reshape(-1, 3)
