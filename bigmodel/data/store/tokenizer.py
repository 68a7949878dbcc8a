"""The tokenizer, trained here or given: text to token ids and back.

In: text. Out: ids of a byte-level BPE (or of whatever a given tokenizer.json describes), and whole stored documents
`[bos] + text + [eos]`. Example, trained with a vocabulary of 258 (the 256 bytes, no merges):

    tokenizer.encode("Hi")               # [41, 74]
    tokenizer.encode_document("Hi")      # [0, 41, 74, 1]

Guarantees: training is deterministic. The text of a special token inside a document stays plain text and never becomes
that token, so no document can fake the end of another. Both paths below gave the same ids on every text compared.

Costs: the fast path is tiktoken, built from our own tokenizer.json without a download: 10 to 13 MB/s a core. The exact
path is the `tokenizers` library: 2 to 3 MB/s. The fast path serves byte-level BPE with ids in merge order, and is used
only after an equality check; otherwise `slow_reason` has the reason.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from bigmodel.config.settings import UserError
from bigmodel.run_directory import read_json

BOS, EOS = "<|bos|>", "<|eos|>"
# Names of (begin, end) in given tokenizers, in order of preference.
BOUNDARY_NAMES = (
    (BOS, EOS),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("[BOS]", "[EOS]"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
# Where a text may be cut before merging: contractions, words with the space before them, up to three digits,
# runs of punctuation with the line ends after them, line ends with the blank space before them, other space.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The `tokenizers` library's pattern where ByteLevel has use_regex (that of GPT-2).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATHOLOGICAL = (
    "",
    " ",
    "\n",
    "a" * 2000,
    " " * 2000,
    "\n \n\t\n" * 50,
    "    if x:\n\t\treturn 1\r\n\r\n",
    "don't we'll I'VE they're 'S'tis",
    "1234567890 3.14159 0xdeadbeef 1e-5",
    "!?!?...--==>>{}[]()##@@",
    "ÄÖÜß naïve façade e\u0301 Ελλάδα Привет שלום مرحبا नमस्ते",
    "漢字かな交じり文한국어" * 20,
    "👩‍👩‍👧‍👦🏳️‍🌈🇺🇳",
    "\u00a0\u2003\u3000\u200b\ufeff\u0085\u2028\x00\x01\x1c\x7f",
    f"{BOS}{EOS} <|endoftext|><s></s><unk><pad>[CLS][MASK]",
)


def train(texts: Iterable[str], vocabulary: int) -> str:
    """Train a byte-level BPE of `vocabulary` tokens: begin (id 0), end (id 1), 256 bytes, then merges.

    Returns the content of tokenizer.json. Raises `UserError` if the text has too few repeated pairs.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocabulary:
        raise UserError(
            f"prepare.vocabulary = {vocabulary}: the training text has repeated pairs for only {reached} tokens; "
            f"set prepare.vocabulary to {reached} or less, or add text"
        )
    return tokenizer.to_str(pretty=True) + "\n"


class Tokenizer:
    """Text to ids and back. Safe in several threads; each process loads its own.

    `json_text`: content of a tokenizer.json. `sample`: documents for the comparison of the two paths, beside a list of
    awkward strings. `name`: of the file, for errors. `boundaries`: names of the begin and end tokens, if the
    tokenizer's maker states them; else well-known names are tried. `fast`: result of the comparison in another
    process; None: compare now.
    """

    def __init__(
        self,
        json_text: str,
        sample: Sequence[str] = (),
        name: str = "tokenizer.json",
        boundaries: tuple[str, str] | None = None,
        fast: bool | None = None,
    ) -> None:
        try:
            self._exact = _exact(json_text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a tokenizer.json of the `tokenizers` library: {error}") from None
        if not self._exact.get_vocab(with_added_tokens=True):
            raise UserError(f"{name}: its vocabulary is empty; train it, or choose another")
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self.vocabulary: int = max(self._exact.get_vocab(with_added_tokens=True).values()) + 1
        self.bos, self.eos = _boundaries(self._exact, name, boundaries)
        description = json.loads(json_text)
        if _hide_boundaries(description, {self._exact.id_to_token(token) for token in (self.bos, self.eos)}):
            self._exact = _exact(json.dumps(description))
        self._name = name
        self._spelled = {token: _spell(self._exact, token, {self.bos, self.eos}) for token in (self.bos, self.eos)}
        for token in (self.bos, self.eos):
            content = self._exact.id_to_token(token)
            for text in (content, f" {content} ", f"a{content}b"):
                self._as_text(self._exact.encode(text, add_special_tokens=False).ids)
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)
        self.slow_reason = ""
        self._fast: tiktoken.Encoding | None = None
        if fast is False:
            self.slow_reason = "chosen by an earlier comparison"
            return
        try:
            encoding = _build_fast(description)
            if fast is None:
                self.compare_with(encoding, [*PATHOLOGICAL, *sample])
            self._fast = encoding
        except _NotFast as reason:
            self.slow_reason = str(reason)

    @classmethod
    def load(cls, path: Path, sample: Sequence[str] = (), fast: bool | None = None) -> "Tokenizer":
        """Read a tokenizer.json or a Hugging Face tokenizer folder; a file beside it may name begin and end.

        Raises `UserError` if it is missing, is no tokenizer, or lacks begin and end tokens.
        """
        path = tokenizer_file(path)
        try:
            json_text = read_tokenizer(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None
        return cls(json_text, sample, str(path), named_boundaries(path.parent), fast)

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def use_exact(self) -> None:
        """Give up the fast path, for instance because another process found a difference."""
        self._fast, self.slow_reason = None, "chosen by the caller"

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint32 ids of the text alone, without begin and end."""
        if self._fast is not None:
            try:
                return self._as_text(self._fast.encode_to_numpy(text, disallowed_special=()))
            except ValueError:  # the pattern's backtracking limit, at about a million spaces in a row
                pass
        return self._as_text(self._exact.encode(text, add_special_tokens=False).ids)

    def encode_document(self, text: str) -> np.ndarray:
        """(n,) ids as stored: begin, text, end; n >= 2; uint16 if the vocabulary fits, else uint32."""
        return self._stored(self.encode(text))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Several at once: the exact path is twice as fast without character offsets."""
        if self._fast is not None:
            return [self.encode_document(text) for text in texts]
        encodings = self._exact.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._stored(self._as_text(encoding.ids)) for encoding in encodings]

    def _as_text(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """(n,) ids of a text, with boundary tokens that the model finds in it (Unigram does) spelled out as text."""
        ids = np.asarray(ids, np.uint32)
        for boundary, spelled in self._spelled.items():
            if (ids == boundary).any():
                if not spelled:
                    raise UserError(
                        f"{self._name}: reads {self._exact.id_to_token(boundary)!r} inside a text as its begin or end "
                        "token, and has no other tokens for these characters; use another tokenizer"
                    )
                parts = [spelled if one == boundary else [one] for one in ids.tolist()]
                ids = np.array([one for part in parts for one in part], np.uint32)
        return ids

    def _stored(self, ids: np.ndarray) -> np.ndarray:
        stored = np.empty(len(ids) + 2, self.dtype)
        stored[0], stored[1:-1], stored[-1] = self.bos, ids, self.eos
        return stored

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without begin and end; bytes that are not UTF-8 become U+FFFD."""
        return self._exact.decode([int(i) for i in ids], skip_special_tokens=True)

    def compare_with(self, fast: tiktoken.Encoding, texts: Sequence[str]) -> None:
        exact = self._exact.encode_batch_fast(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, exact, strict=True):
            try:
                equal = fast.encode(text, disallowed_special=()) == encoding.ids
            except ValueError as error:
                raise _NotFast(f"tiktoken cannot encode {text[:40]!r}: {error}") from None
            if not equal:
                raise _NotFast(f"tiktoken and tokenizers differ on {text[:40]!r}")


class _NotFast(Exception):
    """The reason why tiktoken cannot replace a tokenizer."""


def read_tokenizer(file: Path) -> bytes:
    """The JSON of a tokenizer.json, without a byte order mark, which `tokenizers` does not accept."""
    return file.read_bytes().removeprefix(codecs.BOM_UTF8)


def tokenizer_file(path: Path) -> Path:
    """The path itself, or the tokenizer.json in the folder that it names."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def named_boundaries(folder: Path) -> tuple[str, str] | None:
    """Names of the begin and end tokens in the files that Hugging Face puts beside a tokenizer.json, or None.

    If only an end token is named, documents begin with it too, as for GPT-2.
    """
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).exists():
            table = read_json(folder / file)
            for role in ("bos_token", "eos_token"):
                token = table.get(role) if isinstance(table, dict) else None
                content = token.get("content") if isinstance(token, dict) else token
                named |= {role: content} if isinstance(content, str) else {}
    end = named.get("eos_token")
    return (named.get("bos_token", end), end) if end else None


def _boundaries(tokenizer: tokenizers.Tokenizer, name: str, wanted: tuple[str, str] | None = None) -> tuple[int, int]:
    if wanted:
        for token in wanted:
            if tokenizer.token_to_id(token) is None:
                raise UserError(f"{name}: lacks {token!r}, which the files beside it name as begin or end of a text")
        return tokenizer.token_to_id(wanted[0]), tokenizer.token_to_id(wanted[1])
    for begin, end in BOUNDARY_NAMES:
        bos, eos = tokenizer.token_to_id(begin), tokenizer.token_to_id(end)
        if bos is not None and eos is not None:
            return bos, eos
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise UserError(
        f"{name}: has no tokens that begin and end a document; its special tokens are "
        f"{', '.join(special) or 'none'}; add {BOS} and {EOS} (also known: "
        f"{'; '.join(f'{begin} with {end}' for begin, end in BOUNDARY_NAMES[1:])})"
    )


def _exact(json_text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json_text)
    tokenizer.encode_special_tokens = True  # their text inside a document stays text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _hide_boundaries(description: dict[str, Any], names: set[str]) -> bool:
    """Mark begin and end tokens that were added as plain text as special: else any document could contain them. Returns
    whether any was marked."""
    plain = [token for token in description.get("added_tokens", []) if token["content"] in names]
    plain = [token for token in plain if not token["special"]]
    for token in plain:
        token["special"] = True
    return bool(plain)


def _spell(tokenizer: tokenizers.Tokenizer, boundary: int, boundaries: set[int]) -> list[int]:
    """Ids of a boundary's name as text, its first character apart; empty if the model cannot spell it."""
    name = tokenizer.id_to_token(boundary)
    try:
        tokens = [token for piece in (name[:1], name[1:]) for token in tokenizer.model.tokenize(piece)]
    except Exception:  # the library raises bare Exception
        return []
    ids = [token.id for token in tokens]
    return ids if "".join(token.value for token in tokens) == name and not boundaries.intersection(ids) else []


def _build_fast(description: dict[str, Any]) -> tiktoken.Encoding:
    """tiktoken's encoding of a tokenizer.json; raises `_NotFast` if the two cannot be equal.

    tiktoken merges the pair whose result has the lowest id, so ids must be in merge order.
    """
    model = description["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise _NotFast("it is not a plain byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _NotFast("its tokens carry prefixes or suffixes")
    if description.get("normalizer"):
        raise _NotFast("it has a normalizer")
    if any(not token["special"] for token in description.get("added_tokens", [])):
        raise _NotFast("it has added tokens that are plain text")
    pattern = _split_pattern(description.get("pre_tokenizer") or {})
    special = {token["content"] for token in description.get("added_tokens", [])}
    byte_of = _bytes_by_character()
    try:
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in model["vocab"].items()
            if token not in special
        }
    except KeyError as error:
        raise _NotFast(f"a token contains {error}, which is no byte's character") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise _NotFast("it lacks tokens for single bytes")
    if len(set(ranks.values())) < len(ranks):  # tiktoken panics, which is no Exception
        raise _NotFast("two of its tokens have one id")
    try:
        return tiktoken.Encoding("bigmodel", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise _NotFast(f"tiktoken cannot read its pattern: {error}") from None


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise _NotFast("its pre-tokenizer is not ByteLevel without a prefix space")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) == 2 and plain and not byte_level.get("use_regex", True) and "Regex" in split["pattern"]:
        return split["pattern"]["Regex"]
    raise _NotFast("its pre-tokenizer is more than one pattern and ByteLevel")


def _bytes_by_character() -> dict[str, int]:
    """Byte of each character in a byte-level vocabulary: printable Latin-1 characters are their own bytes; from U+0100
    come the 68 other bytes in order (the map of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
