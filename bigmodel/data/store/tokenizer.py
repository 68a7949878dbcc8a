"""The tokenizer, trained here or given: text to token ids and back.

In: text. Out: ids of a byte-level BPE (or of whatever a given tokenizer.json describes), and whole stored documents
`[bos] + text + [eos]`. Example, trained with a vocabulary of 258 (the 256 bytes, no merges):

    tokenizer.encode("Hi")               # [41, 74]
    tokenizer.encode_document("Hi")      # [0, 41, 74, 1]

Guarantees: training is deterministic. The name of the begin or end token inside a document stays plain text and never
becomes that token, so no document can fake the end of another. Other special tokens are found in a text only where they
are pieces of the model itself, as in Unigram. Both paths give the same ids. BPE dropout is never applied.

Costs: the fast path is tiktoken, built from our own tokenizer.json without a download: 10 to 13 MB/s a core. The exact
path is the `tokenizers` library: 2 to 3 MB/s. The fast path serves byte-level BPE with ids in merge order, and is used
only where `fast_tokenizer.py` proves it equal and a comparison on texts finds it so; otherwise `slow_reason` has the
reason.
"""

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bigmodel.config.settings import UserError
from bigmodel.data.store import foreign_tokenizers, unknown_text
from bigmodel.data.store.fast_tokenizer import WORD_PATTERN, FastPath, NotFast, bytes_of_token, gives_back_text
from bigmodel.data.store.special_names import read_special_names
from bigmodel.data.store.unknown_text import in_code_points
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
GIVE = "give a tokenizer.json of the `tokenizers` library, or the Hugging Face folder that holds it"
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

    `json_text`: content of a tokenizer.json. `name`: of the file, for errors. `boundaries`: names of the begin and end
    tokens, if the tokenizer's maker states them; else well-known names are tried. `fast`: result of the comparison in
    another process; None: compare now, on a list of awkward strings. `proven`: see `FastPath`.

    `special_names`: of special tokens by their role (bos_token ...), for chat templates.
    `unknown`: id of the unknown token, None without one. `dropout`: of BPE in the file, which is never applied here.
    `drops_text`: whether characters without a token vanish: see `find_dropped`. `gives_back_text`: whether `decode`
    restores every text from its ids.
    """

    def __init__(
        self,
        json_text: str,
        name: str = "tokenizer.json",
        boundaries: tuple[str, str] | None = None,
        fast: bool | None = None,
        proven: bool = True,
    ) -> None:
        try:
            self._exact = _exact(json_text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a tokenizer.json: {error}; {GIVE}") from None
        if not self._exact.get_vocab(with_added_tokens=True):
            raise UserError(f"{name}: its vocabulary is empty; train it, or choose another")
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self.vocabulary: int = max(self._exact.get_vocab(with_added_tokens=True).values()) + 1
        self.bos, self.eos = _boundaries(self._exact, name, boundaries)
        description = json.loads(json_text)
        description["model"].setdefault("type", type(self._exact.model).__name__)  # old files lack it
        self.dropout = float(description["model"].get("dropout") or 0)
        hidden = _hide_boundaries(description, {self._exact.id_to_token(token) for token in (self.bos, self.eos)})
        if hidden or self.dropout:
            description["model"]["dropout"] = None
            self._exact = _exact(json.dumps(description))
        self._name = name
        self.gives_back_text = gives_back_text(description)
        self._decoder: dict[str, Any] = description.get("decoder") or {"type": "joined by spaces"}
        self.unknown = unknown_text.unknown_id(description["model"])
        self._lacking = description if unknown_text.lacks_tokens(description) else None
        self.drops_text = self._lacking is not None and unknown_text.drops(description["model"])
        self._spelled = {token: _spell(self._exact, token, {self.bos, self.eos}) for token in (self.bos, self.eos)}
        self._check_spelling()
        names = (self._exact.id_to_token(token) for token in (self.bos, self.eos))
        self.special_names = dict(zip(("bos_token", "eos_token"), names, strict=True))
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)
        self.slow_reason = ""
        self._fast: FastPath | None = None
        if fast is False:
            self.slow_reason = "chosen by an earlier comparison"
            return
        try:
            path = FastPath(description, proven)
            if fast is None:
                self._compare(path, PATHOLOGICAL)
            self._fast = path
        except NotFast as reason:
            self.slow_reason = str(reason)

    @classmethod
    def load(
        cls,
        path: Path,
        fast: bool | None = None,
        proven: bool = True,
        name: str = "",
    ) -> "Tokenizer":
        """Read a tokenizer.json or a Hugging Face tokenizer folder; a file beside it may name begin and end. `name`:
        for errors about texts, instead of the path.

        Raises `UserError` if it is missing, is no tokenizer, or lacks begin and end tokens.
        """
        given, path = Path(path), tokenizer_file(path)
        try:
            content = read_tokenizer(path)
            if not content.lstrip().startswith(b"{") and (it := foreign_tokenizers.what_it_is(path, content)):
                raise UserError(f"{path}: {it}")
            json_text = content.decode("utf-8")
        except OSError as error:
            it = foreign_tokenizers.what_is_there(given) if isinstance(error, FileNotFoundError) else ""
            raise UserError(f"{path}: {it or f'cannot be read as a tokenizer: {error.strerror}; {GIVE}'}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: cannot be read as a tokenizer: it is no text in UTF-8; {GIVE}") from None
        made = cls(json_text, name or str(path), named_boundaries(path.parent), fast, proven)
        made.special_names = read_special_names(path.parent) or made.special_names
        return made

    def _check_spelling(self) -> None:
        """Raise `UserError` if the names of the boundaries, written in a text, become boundaries. A boundary that is
        the unknown token too is left to each text."""
        if self.unknown in (self.bos, self.eos):
            return
        for content in map(self._exact.id_to_token, (self.bos, self.eos)):
            for text in (content, f" {content} ", f"a{content}b"):
                try:
                    ids = self._exact.encode(text, add_special_tokens=False).ids
                except Exception:  # bare, of the library: no token for a part of the name
                    continue
                self._as_text(ids, text)

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def compare(self, texts: Sequence[str]) -> None:
        """Give up the fast path if the two paths differ on one of these texts."""
        try:
            if self._fast is not None:
                self._compare(self._fast, texts)
        except NotFast as reason:
            self._fast, self.slow_reason = None, str(reason)

    def use_exact(self) -> None:
        """Give up the fast path, for instance because another process found a difference."""
        self._fast, self.slow_reason = None, "chosen by the caller"

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint32 ids of the text alone, without begin and end."""
        ids = self._fast.encode(text) if self._fast is not None else None
        return self._as_text(self._encode_exactly([text])[0] if ids is None else ids, text)

    def encode_document(self, text: str) -> np.ndarray:
        """(n,) ids as stored: begin, text, end; n >= 2; uint16 if the vocabulary fits, else uint32."""
        return self.stored(self.encode(text))

    def encode_words(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(n,) ids of the text alone, and the number of the word of each; None instead if a boundary's name in the text
        is spelled out. Words are what the library's pre-tokenizer cuts, and each added token."""
        try:
            encoding = self._exact.encode_batch([text], add_special_tokens=False)[0]
        except Exception:  # bare, of the library: `encode` says why
            return self.encode(text), None
        ids = self._as_text(encoding.ids, text)
        if len(ids) != len(encoding.ids):
            return ids, None
        numbers = np.array([-1 if one is None else one for one in encoding.word_ids], np.int64)
        return ids, np.concatenate([[0], np.cumsum(numbers[1:] != numbers[:-1])])[: len(ids)]

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids."""
        return self._exact.to_str()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Several at once: the exact path is twice as fast without character offsets."""
        if self._fast is not None:
            return [self.encode_document(text) for text in texts]
        encoded = self._encode_exactly(texts)
        joined, ends = array("I"), []
        for ids in encoded:
            joined.append(self.bos)
            joined.fromlist(ids)
            joined.append(self.eos)
            ends.append(len(joined))
        all_ids = np.frombuffer(joined, np.uint32)
        if np.count_nonzero((all_ids == self.bos) | (all_ids == self.eos)) > 2 * len(texts):  # inside a text
            return [self.stored(self._as_text(ids, text)) for ids, text in zip(encoded, texts, strict=True)]
        stored = all_ids.astype(self.dtype)
        return [stored[start:end] for start, end in pairwise([0, *ends])]

    def count_unknown(self, documents: Sequence[np.ndarray]) -> int:
        """Unknown tokens in stored documents, without begin and end."""
        if self.unknown is None or not len(documents):
            return 0
        ends = (self.unknown == self.bos) + (self.unknown == self.eos)
        return int(np.count_nonzero(np.concatenate(documents) == self.unknown)) - ends * len(documents)

    def _encode_exactly(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids by the library. Raises `UserError` for half of a surrogate pair, and for a text with a piece that has no
        token, if the model has no unknown token."""
        try:
            return [one.ids for one in self._exact.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exception
            unknown_text.check_surrogates(texts)
            if self._lacking is None or self.drops_text:
                raise
            pieces = [piece for text in texts for piece in self._find_tokenless(text)]
            pieces = pieces or [piece for text in texts for piece in unknown_text.find_refused(self._exact, text)]
            reason, remedy = unknown_text.reason_and_remedy(self._lacking)
            raise UserError(
                f"{self._name}: has no token for {in_code_points(pieces[0])}, and {reason} ({error}); {remedy}, or use "
                "another tokenizer"
            ) from None

    @cached_property
    def templated(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for a text in which the names of special tokens stand for them: a rendered chat."""
        found = _exact(self._exact.to_str())
        found.encode_special_tokens = False
        return found

    def find_dropped(self, text: str) -> list[str]:
        """The characters of a text that the model has no token for and drops; `drops_text` says whether there can be
        any."""
        return self._find_tokenless(text) if self.drops_text else []

    def loses(self, text: str) -> bool:
        """Whether a part of the text has no token of its own: it is dropped, or becomes the unknown token."""
        return bool(self.find_dropped(text)) or bool((self.encode(text) == self.unknown).any())

    def _find_tokenless(self, text: str) -> list[str]:
        return unknown_text.find_tokenless(*self._with_unknown_token, text)

    @cached_property
    def _with_unknown_token(self) -> tuple[tokenizers.Tokenizer, str]:
        assert self._lacking is not None, "every text has tokens"
        description, name = unknown_text.with_unknown_token(self._lacking)
        return _exact(json.dumps(description)), name

    def _as_text(self, ids: np.ndarray | list[int], text: str) -> np.ndarray:
        """(n,) ids of a text, with boundary tokens that the model finds in it (Unigram does) spelled out as text."""
        ids = np.asarray(ids, np.uint32)
        for boundary, spelled in self._spelled.items():
            if (ids == boundary).any():
                if boundary == self.unknown:
                    raise self._is_unknown_too(boundary, text)
                if not spelled:
                    raise UserError(
                        f"{self._name}: reads {self._exact.id_to_token(boundary)!r} inside a text as its begin or end "
                        "token, and has no other tokens for these characters; use another tokenizer"
                    )
                parts = [spelled if one == boundary else [one] for one in ids.tolist()]
                ids = np.array([one for part in parts for one in part], np.uint32)
        return ids

    def _is_unknown_too(self, boundary: int, text: str) -> UserError:
        encoding = self._exact.encode(text, add_special_tokens=False)
        start, end = encoding.offsets[encoding.ids.index(boundary)]
        name = self._exact.id_to_token(boundary)
        return UserError(
            f"{self._name}: gives its unknown token {name!r} for {in_code_points(text[start:end])}, and begins or ends "
            "each text with this token; give its model an unknown token of its own, or use another tokenizer"
        )

    def stored(self, ids: np.ndarray) -> np.ndarray:
        """(n + 2,) ids as stored, of those of a text alone."""
        stored = np.empty(len(ids) + 2, self.dtype)
        stored[0], stored[1:-1], stored[-1] = self.bos, ids, self.eos
        return stored

    def number_of(self, token: str) -> int | None:
        """The id of a token, also of a special one; None if there is none."""
        return self._exact.token_to_id(token)

    def token_of(self, number: int) -> str:
        return self._exact.id_to_token(number)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._exact.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def piece_of(self, number: int) -> str:
        """The text of a token, with the white space around it; empty for special tokens and ids without a token. A
        tokenizer that drops white space has it before each word, and not before punctuation marks."""
        token, kind = self._exact.id_to_token(number), self._decoder["type"]
        if token is None or number in self._special:
            return ""
        if kind == "ByteLevel":
            return bytes_of_token(token).decode(errors="replace")
        if kind == "WordPiece" and token.startswith(self._decoder["prefix"]):
            return token.removeprefix(self._decoder["prefix"])
        if kind in ("joined by spaces", "WordPiece"):
            return f" {token}" if any(map(str.isalnum, token)) else token
        if kind == "BPEDecoder":
            return token.replace(self._decoder["suffix"], " ")
        return token.replace("▁", " ")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; joined they are what `decode_all` decodes. Empty if the decoder is not byte-level."""
        if self._decoder["type"] != "ByteLevel":
            return []
        tokens = [self._exact.id_to_token(number) or "" for number in range(self.vocabulary)]
        return [bytes_of_token(token) or token.encode() for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without begin and end; bytes that are not UTF-8 become U+FFFD."""
        return self._exact.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_all(self, ids: Iterable[int]) -> str:
        """Text of ids without begin and end, special tokens included: a word of a text can be one."""
        return self._exact.decode([int(i) for i in ids], skip_special_tokens=False)

    def _compare(self, fast: FastPath, texts: Sequence[str]) -> None:
        """Raises `NotFast` for a text on which the two paths differ."""
        exact = self._exact.encode_batch_fast(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, exact, strict=True):
            ids = fast.encode(text)
            if ids is not None and ids.tolist() != encoding.ids:
                raise NotFast(f"tiktoken and tokenizers differ on {text[:40]!r}")


def read_tokenizer(file: Path) -> bytes:
    """The JSON of a tokenizer.json, without a byte order mark, which `tokenizers` does not accept."""
    return file.read_bytes().removeprefix(codecs.BOM_UTF8)


def tokenizer_file(path: Path) -> Path:
    """The path itself, or the tokenizer.json in the folder that it names."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def named_boundaries(folder: Path) -> tuple[str, str] | None:
    """Names of the begin and end tokens in the files that Hugging Face puts beside a tokenizer.json, or None.

    BERT's cls_token and sep_token are begin and end where no others are named. If only an end token is named, documents
    begin with it too, as for GPT-2, or with the token that config.json makes a decoder start with, as for T5.
    """
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        table = _object(folder / file)
        for role in ("bos_token", "eos_token", "cls_token", "sep_token"):
            token = table.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            named |= {role: content} if isinstance(content, str) else {}
    end = named.get("eos_token") or named.get("sep_token")
    if end is None:
        return None
    begin = named.get("bos_token") or _first_of_a_decoder(folder)
    return begin or (named.get("cls_token", end) if "eos_token" not in named else end), end


def _first_of_a_decoder(folder: Path) -> str | None:
    """Name of decoder_start_token_id."""
    start = _object(folder / "config.json").get("decoder_start_token_id")
    if start is None or not (folder / "tokenizer.json").exists():
        return None
    added = _object(folder / "tokenizer.json").get("added_tokens", [])
    return next((token["content"] for token in added if token.get("id") == start), None)


def _object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if it is missing or holds anything else."""
    table = read_json(file) if file.exists() else {}
    return table if isinstance(table, dict) else {}


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
