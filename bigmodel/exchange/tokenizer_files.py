"""The files of a tokenizer, as `AutoTokenizer` of transformers 4 and 5 reads them.

In: tokenizer.json of a prepared folder, and the run's settings. Out: files by name. Guarantee: a text gets the ids that
`prepare` gives it. Begin and end are added as in training, unless the tokenizer's own post-processor adds some: a
decoder's text begins, a source ends, and an encoder's text does both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.config.settings import Settings
from bigmodel.data.objectives.example import NUM_MARKS
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.store.tokenizer import Tokenizer

# Ids above the tokenizer's, in order (`SpecialTokens`); T5's names of sentinels, whose highest id is the first.
MARKS = ("<|mask|>", "<|mode_r|>", "<|mode_s|>", "<|mode_x|>", "<|prefix|>", "<|suffix|>", "<|middle|>")
PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
assert len(MARKS) == NUM_MARKS


def token_ids(settings: Settings, tokenizer: Tokenizer, description: Mapping[str, Any]) -> dict[str, Any]:
    """Begin, end and padding by their keys in config.json. A target begins with the begin token. Without a padding
    token of its own, a text is padded with the end token."""
    added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    padding = next((added[name] for name in PADDING if name in added), tokenizer.eos)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": padding}
    if settings.model.kind == "encoder_decoder":
        ids["decoder_start_token_id"] = tokenizer.bos
    return ids


def tokenizer_files(
    settings: Settings, tokenizer: Tokenizer, description: dict[str, Any], positions: int
) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json. positions: of the longest text."""
    ids = token_ids(settings, tokenizer, description)
    names = {role: tokenizer.token_of(ids[f"{role}_token_id"]) for role in ("bos", "eos", "pad")}
    roles = {f"{role}_token": name for role, name in names.items()}
    if num_special_tokens(settings.data):
        sentinels = 0 if settings.data.first_sentinel else settings.data.sentinels
        description = _with_special_tokens(description, tokenizer.vocabulary, sentinels)
        has_mask = any(token["content"] == MARKS[0] for token in description["added_tokens"])
        roles |= {"mask_token": MARKS[0]} if has_mask else {}
    if settings.data.mask_token:
        roles["mask_token"] = tokenizer.token_of(settings.data.mask_token)
    if settings.model.kind == "encoder":
        roles |= {"cls_token": names["bos"], "sep_token": names["eos"]}
    if not _adds_tokens(description.get("post_processor")):
        before = None if settings.model.kind == "encoder_decoder" else names["bos"]
        after = None if settings.model.kind == "decoder" else names["eos"]
        template = _template(before, after, {names["bos"]: tokenizer.bos, names["eos"]: tokenizer.eos})
        description = {**description, "post_processor": template}
    # Without this key the class also returns token types, which only BERT accepts: `model.generate(**tokenizer(text))`
    # of another model is then an error.
    inputs = ["input_ids", *(["token_type_ids"] if settings.model.num_token_types else []), "attention_mask"]
    for_class = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "model_input_names": inputs,
        **roles,
    }
    return {
        "tokenizer.json": (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": as_json(for_class),
        "special_tokens_map.json": as_json(roles),
    }


def read_description(tokenizer_file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    description = json.loads(tokenizer_file.read_bytes())
    assert isinstance(description, dict), f"{tokenizer_file} was loaded as a tokenizer"
    return description


def as_json(table: Mapping[str, Any]) -> bytes:
    """As transformers writes files beside the weights."""
    return (json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _with_special_tokens(description: dict[str, Any], vocabulary: int, sentinels: int) -> dict[str, Any]:
    """With names for the ids above the vocabulary, unless the tokenizer has one of these names or a gap in its ids."""
    names = [*MARKS, *(f"<extra_id_{number}>" for number in reversed(range(sentinels)))]
    vocab = description["model"].get("vocab", {})
    pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    added = description.get("added_tokens", [])
    known = {*pieces, *(token["content"] for token in added)}
    if len(known) != vocabulary or known.intersection(names):
        return description
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [{"id": vocabulary + number, "content": name, **flags} for number, name in enumerate(names)]
    return {**description, "added_tokens": [*added, *more]}


def _adds_tokens(post_processor: dict[str, Any] | None) -> bool:
    parts = (post_processor or {}).get("processors", [post_processor])
    return any(part and part["type"] != "ByteLevel" for part in parts)


def _template(before: str | None, after: str | None, ids: dict[str, int]) -> dict[str, Any]:
    def special(name: str | None, of: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": of}}] if name else []

    def text(sequence: str, of: int) -> list[dict[str, Any]]:
        return [*special(before, of), {"Sequence": {"id": sequence, "type_id": of}}, *special(after, of)]

    used = {name: ids[name] for name in (before, after) if name}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in used.items()},
    }
