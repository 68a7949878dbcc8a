"""Text that a tokenizer has no tokens for.

In: the description in a tokenizer.json. Out: the id of its unknown token, or the characters of a text that have no
token. What the `tokenizers` library does with such characters:

    the model names an unknown token that its vocabulary has    gives its id
    a BPE that names none                                       drops the character, and merges over the gap
    any other model                                             raises, at the first text that needs the token

Guarantees: `find_tokenless` is the library's own verdict, that of a copy of the model with one more token, which is its
unknown token. Costs: 1 to 2 MB/s.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import tokenizers

from bigmodel.config.user_error import UserError
from bigmodel.data.store.fast_tokenizer import has_all_bytes

# Characters that no text should hold, one of which names the added token.
SURROGATE = re.compile("[\ud800-\udfff]")
NONCHARACTERS = tuple(map(chr, (*range(0xFDD0, 0xFDF0), 0x10FFFE, 0x10FFFF)))


def unknown_id(model: Mapping[str, Any]) -> int | None:
    """The id of the model's unknown token, or None if it has none or names one that is not in its vocabulary."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def lacks_tokens(description: Mapping[str, Any]) -> bool:
    """Whether there are characters for which the library gives no id: it drops them, or raises."""
    model, steps = description["model"], description.get("pre_tokenizer") or {}
    if unknown_id(model) is not None:
        return False
    if model["type"] != "BPE":
        return True
    if model.get("byte_fallback"):
        return any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256))
    byte_level = any(step.get("type") == "ByteLevel" for step in steps.get("pretokenizers", [steps]))
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return not byte_level or bool(affixes) or not has_all_bytes(model["vocab"])


def drops(model: Mapping[str, Any]) -> bool:
    """Whether the library drops characters without an id, instead of raising."""
    return model["type"] == "BPE" and model.get("unk_token") is None


def reason_and_remedy(description: Mapping[str, Any]) -> tuple[str, str]:
    """Why the library raises, and what to change in the file."""
    model = description["model"]
    if model["type"] == "Unigram":
        return "its model has no unk_id", "set model.unk_id in the file to the place of an unknown token in model.vocab"
    name = repr(model.get("unk_token"))
    return f"its unknown token {name} is not in the vocabulary of its model", f"add {name} to model.vocab in the file"


def check_surrogates(texts: Iterable[str]) -> None:
    """Raises `UserError` for half of a surrogate pair: an argument's bytes that are no UTF-8, or an escape in JSON."""
    for text in texts:
        if found := SURROGATE.search(text):
            raise UserError(
                f"the text {text[: found.start()][-10:] + found[0]!r} ends with half of a surrogate pair, which has no "
                "tokens; give text in UTF-8"
            )


def in_code_points(piece: str) -> str:
    """
    >>> in_code_points("né")
    "'né' (U+006E U+00E9)"
    """
    shown = piece[:10]
    return f"{shown!r} ({' '.join(f'U+{ord(character):04X}' for character in shown)})"


def with_unknown_token(description: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The description with one more token, its unknown token, and the name of that token."""
    changed = deepcopy(dict(description))
    model = changed["model"]
    if model["type"] == "Unigram":
        known = {piece for piece, _ in model["vocab"]}
    else:
        known = model["vocab"]
    name = next(character for character in NONCHARACTERS if character not in known)
    if model["type"] == "Unigram":
        model["unk_id"] = len(model["vocab"])
        model["vocab"].append([name, 0.0])
    else:
        added = changed.get("added_tokens", [])  # the library gives them new ids behind the vocabulary
        others = [len(model["vocab"]), *model["vocab"].values(), *(token["id"] for token in added)]
        model["vocab"][name] = max(others) + len(added) + 2
        model["unk_token"] = name
    if model["type"] == "BPE":
        model["fuse_unk"] = False
    return changed, name


def find_tokenless(tokenizer: tokenizers.Tokenizer, name: str, text: str) -> list[str]:
    """The pieces of a text without a token, each place once. `tokenizer`, `name`: of `with_unknown_token`."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.token_to_id(name)
    places = {place for one, place in zip(encoding.ids, encoding.offsets, strict=True) if one == unknown}
    return [text[start:end] for start, end in sorted(places)]


def find_refused(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """The first character of a text for which the library raises, else the text; nothing if it encodes the text."""
    if not _is_refused(tokenizer, text):
        return []
    return [next((character for character in text if _is_refused(tokenizer, character)), text)]


def _is_refused(tokenizer: tokenizers.Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # bare, of the library
        return True
    return False
