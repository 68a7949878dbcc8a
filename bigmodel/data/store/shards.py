"""Shards: tokenized documents on disk, in the format of mosaicml-streaming (no other file imports it).

    DIR/manifest.json   DIR/tokenizer.json   DIR/text/validation.txt   DIR/corpus/*.parquet (embedded corpus only)
    DIR/tokenizer_config.json (begin and end tokens named by a given tokenizer)   DIR/malformed.jsonl (if any)
    DIR/<split>/<source>/index.json   shard.00000.mds ...   lengths.00000.npy ...

In: (source, shard, row). Out: the stored document, `[bos] + text + [eos]`, from the MDS column `tokens`. Beside each
shard lies a uint32 array of its documents' lengths; planning reads nothing else. A source of pairs has a second column,
`target_tokens`, and target_lengths.00000.npy ... Example, a document of two tokens:

    store = ShardStore(directory, "train")
    store.lengths("news", 0)[3]      # 4
    store.document("news", 0, 3)     # array([0, 812, 77, 1], dtype=uint16)

Shards may hold text instead (`prepare.content = "text"`, columns `text` and `target_text`), tokenized when read. Their
lengths still count tokens: `prepare` counts them once. So the plan is known exactly before any text is tokenized, it
equals the plan of token shards of the same documents (chunks, lanes, packing buffers, packs), and a resumed run
tokenizes only the documents of the steps to come. Lengths found while streaming would be too late to deal shards to
lanes or to know a source's share. Random segmentations (`prepare.segmentation`) have lengths of their own in each of
some passes, also counted by `prepare`. A document's tokens are counted when it is read: another tokenizer, or another
version of its library, is an error.

Guarantees: size and SHA-256 of a file are compared with the manifest before its first use in a process, so a cut,
altered or missing file is an error and never other data. A folder without a manifest is not prepared data. With a
remote, a file that is missing or damaged is fetched, so a node holds only the shards that it reads.

Costs: the first use of a shard reads it once (1 GB/s). After that a document of tokens costs one open and one read, 6
microseconds by `mds.TokenShard`, a third of streaming's reader, which reads the others; a document of text costs its
tokenization (3 M tokens/s in a thread), unless it was read shortly before. A shard's layout is
read from its own head: the index.json of a billion documents would take 35 MB in every rank. Only the MDS reader of
streaming is imported. Its StreamingDataset is not used: its iteration ends silently at a missing shard (version
0.13.0).
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.objectives.examples import Document, Pair
from bigmodel.data.objectives.supervised import UNITS, Supervised
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import (
    CHAT_FILES,
    PREPARE_AGAIN,
    SPLITS,
    TOKENIZER_FILES,
    Manifest,
    find_damage,
    pass_name,
    path_of,
    sha256_of,
)
from bigmodel.data.store.remote import Remote
from bigmodel.data.store.segmentation import Segmenter
from bigmodel.data.store.tokenizer import Tokenizer

MOST_LABELS = 10_000  # as `prepare` allows
RECENT_TOKENS = 1 << 22  # of the documents tokenized last, kept for the next chunk of a long one
_ARRAY_HEADS = threading.Lock()  # held while one is parsed


class ShardStore:
    """One split of a prepared folder, all its sources. Opens a file at its first use, fetched from `remote` if given:
    the URL of the same folder in a store.

    Construction reads the manifest and tokenizer.json; raises `UserError` if they do not belong together.
    """

    def __init__(self, directory: Path, split: str, remote: str = "", cache_bytes: int = 0) -> None:
        """`cache_bytes`: limit of fetched shards in the folder; 0: no limit."""
        self.directory = Path(directory)
        self.split = split
        if split not in SPLITS:
            raise UserError(f"no split {split!r}; a prepared folder has {' and '.join(SPLITS)}")
        self.remote = Remote(remote, self.directory, cache_bytes) if remote else None
        if self.remote:
            self.remote.fetch_manifest()
        self.manifest = Manifest.read(self.directory)
        if self.remote:
            self.remote.begin(self.manifest)
        counts = self.manifest.counts
        self.sources = [name for name in self.manifest.sources if counts[name][split]["documents"]]
        self.pair_sources = frozenset(name for name in self.sources if "target_tokens" in counts[name][split])
        self.supervised_sources = frozenset(name for name in self.sources if "trained_tokens" in counts[name][split])
        segmentation = self.manifest.recipe.get("segmentation") if split == SPLITS[0] else None
        self.passes: int = segmentation["passes"] if segmentation else 0  # with their own segmentations
        self._checked: set[str] = set()
        self._readers: dict[tuple[str, int], Any] = {}
        self._recent: OrderedDict[tuple[str, int, int, str, int | None], np.ndarray] = OrderedDict()
        self._recent_tokens, self._recent_lock = 0, threading.Lock()
        self._labels: dict[tuple[str, int], tuple[np.ndarray, list[np.ndarray]]] = {}
        self._check_tokenizer()

    @classmethod
    def of_run(cls, data: DataSettings, split: str) -> "ShardStore":
        """The store that a run file's [data] names."""
        return cls(data.directory, split, data.remote, data.cache_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the split's files and the tokenizer: equal if and only if the data is equal."""
        files = self.manifest.files
        fixing = [name for name in files if name.startswith(f"{self.split}/")]
        if self.manifest.recipe.get("content") == "text" and TOKENIZER_FILES[1] in files:
            fixing.append(TOKENIZER_FILES[1])  # names the begin and end of each text
        digest = hashlib.sha256(
            f"[{json.dumps(self.manifest.tokenizer_sha256)}, {{".encode()
        )  # JSON, never whole in memory
        for number, name in enumerate(sorted(fixing)):
            entry = f"{json.dumps(name)}: {json.dumps(files[name], sort_keys=True)}"
            digest.update(f"{', ' if number else ''}{entry}".encode())
        digest.update(b"}]")
        if self.passes:
            digest.update(json.dumps(self.manifest.recipe["segmentation"], sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the predicted text: the split's documents; of pairs, the target texts."""
        return sum(self._asked_for(source, "text_bytes") for source in self.sources)

    @property
    def num_documents(self) -> int:
        return self.manifest.total(self.split, "documents")

    @property
    def num_labels(self) -> int:
        """Labels of a causal model in one epoch: a stored text of n tokens has n - 1, a supervised document as many as
        it trains."""
        counts = self.manifest.counts
        trained = [counts[source][self.split]["trained_tokens"] for source in self.supervised_sources]
        others = [source for source in self.sources if source not in self.supervised_sources]
        documents = sum(counts[source][self.split]["documents"] for source in others)
        return sum(trained) + sum(self._asked_for(source, "tokens") for source in others) - documents

    @property
    def has_weights(self) -> bool:
        """Whether any label has another weight than 1."""
        counts = [self.manifest.counts[source][self.split] for source in self.supervised_sources]
        return any(one["trained_weight"] != UNITS * one["trained_tokens"] for one in counts)

    def _asked_for(self, source: str, what: str) -> int:
        side = "target_" if source in self.pair_sources else ""
        return self.manifest.counts[source][self.split][side + what]

    def num_shards(self, source: str) -> int:
        return len(self.manifest.shards[source][self.split])

    def shard_sizes(self, source: str) -> np.ndarray:
        """(shards, 3) int64: `measure_shard` of each shard, from the manifest alone."""
        return np.array(self.manifest.shards[source][self.split], dtype=np.int64).reshape(-1, 3)

    def shard_digests(self, source: str) -> np.ndarray:
        """(shards,) int64: equal for shards with equal documents, from the manifest's hashes of their files."""
        digests = [hashlib.sha256(self._text_identity) for _ in range(self.num_shards(source))]
        start = f"{self.split}/{source}/"
        for name in sorted(self.manifest.files):
            if name.startswith(start) and (number := re.search(r"\.(\d{5,})\.", name)):
                what = name.removeprefix(start).replace(number[1], "")
                digests[int(number[1])].update(f"{what} {self.manifest.files[name]['sha256']}\n".encode())
        return np.array([int.from_bytes(digest.digest()[:8], "little", signed=True) for digest in digests], np.int64)

    @property
    def _text_identity(self) -> bytes:
        """What the tokens of text shards depend on besides the text."""
        if self.manifest.recipe.get("content") != "text":
            return b""
        files = {name: self.manifest.files[name]["sha256"] for name in TOKENIZER_FILES if name in self.manifest.files}
        return json.dumps([self.manifest.tokenizer_sha256, files, self.manifest.recipe.get("segmentation")]).encode()

    def lengths(self, source: str, shard: int) -> np.ndarray:
        """(documents in the shard,) uint32 memory map: stored tokens of each document.

        A new map at each call, closed when dropped: each map that is kept would hold a file descriptor.
        """
        return _open_array(self.file(f"{self.split}/{source}/lengths.{shard:05}.npy"))

    def target_lengths(self, source: str, shard: int) -> np.ndarray:
        """As `lengths`, of the target texts of a source of pairs."""
        return _open_array(self.file(f"{self.split}/{source}/target_lengths.{shard:05}.npy"))

    def lengths_of_pass(self, source: str, shard: int, number: int, side: str = "") -> np.ndarray:
        """As `lengths`, with the segmentations of pass `number`; `side` "target_": of the target texts. Classes have
        the same in all passes."""
        name = f"{self.split}/{source}/{pass_name(number % self.passes, f'{side}lengths', shard)}"
        if name not in self.manifest.files:
            return self.target_lengths(source, shard)
        return _open_array(self.file(name))

    def spans(self, source: str, shard: int) -> np.ndarray:
        """(k, 4) uint32 memory map: what the supervised documents of a shard train: row, first token, end, weight in
        units of 1/65,536; sorted."""
        return _open_array(self.file(f"{self.split}/{source}/spans.{shard:05}.npy"))

    def labels(self, source: str, shard: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The labels of a shard of a labelled source, kept in memory: the number of each document's label, (documents,)
        uint16, 2 bytes each, and the labels as stored tokens. The first call reads the whole shard (1 GB/s)."""
        if (source, shard) not in self._labels:
            path, content = self.file(self._shard_name(source, shard)), self.content(source, shard)
            is_text = self.is_text(source)
            column = "target_text" if is_text else "target_tokens"
            found: dict[bytes, int] = {}
            numbers = [found.setdefault(value, len(found)) for value in content.values(column)]
            if len(found) > MOST_LABELS:
                raise UserError(
                    f"{path}: {len(found):,} different targets, more than {MOST_LABELS:,} classes; prepare with "
                    "label_column, a column of classes"
                )
            dtype = np.dtype(content.encoding(column).removeprefix("ndarray:")) if not is_text else np.dtype(np.uint32)
            tokens = [self.encode(one.decode()) if is_text else mds.decode_array(one, dtype) for one in found]
            self._labels[source, shard] = np.array(numbers, np.uint16), tokens
        return self._labels[source, shard]

    def content(self, source: str, shard: int) -> mds.ShardContent:
        """A whole shard in memory (1 GB/s)."""
        return mds.ShardContent.parse(self.file(self._shard_name(source, shard)).read_bytes())

    def label_counts(self, source: str) -> dict[str, int]:
        """Documents of each class; empty: not counted by `prepare`."""
        return self.manifest.labels.get(source, {}).get(self.split, {})

    def document(self, source: str, shard: int, row: int, number: int | None = None) -> Document:
        """(n,) stored tokens of a document, uint16 or uint32, read-only; of a pair, those of both texts; of a
        supervised document, also its spans. `number`: of the pass, for its segmentations; None: the tokenizer's."""
        sample = self._sample(source, shard, row)
        if source in self.supervised_sources:
            table = self._recent_spans(source, shard)
            first, end = np.searchsorted(table[:, 0], [row, row + 1])
            return Supervised(self._tokens_of(sample, source, shard, row, ""), np.array(table[first:end, 1:]))
        if source not in self.pair_sources:
            return self._tokens_of(sample, source, shard, row, "", number)
        return Pair(*(self._tokens_of(sample, source, shard, row, side, number) for side in ("", "target_")))

    def _tokens_of(
        self, sample: Mapping[str, Any], source: str, shard: int, row: int, side: str, number: int | None = None
    ) -> np.ndarray:
        name = f"{side}tokens"
        if name in sample:
            return sample[name]
        text, is_label = sample[f"{side}text"], side and source in self.manifest.labels
        of_pass = None if number is None or is_label or not self.passes else number % self.passes
        return self._tokenized(source, shard, row, text, side, of_pass)

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids of a text as they are stored, with begin and end."""
        return self.tokenizer.encode_document(text)

    def decode(self, ids: np.ndarray) -> str:
        """The text of stored ids, without begin and end."""
        return self.tokenizer.decode_all(ids[1:-1])

    def token_of(self, number: int) -> str:
        """The name of a token in the tokenizer."""
        return self.tokenizer.token_of(number)

    @cached_property
    def pieces(self) -> list[str]:
        """The text that each id stands for, with the white space around it; empty for special tokens."""
        return [self.tokenizer.piece_of(number) for number in range(self.tokenizer.vocabulary)]

    def is_text(self, source: str) -> bool:
        """Whether the source's shards hold text, tokenized at reading."""
        return source in self.sources and self.manifest.recipe.get("content") == "text"

    def open_shard(self, source: str, shard: int) -> Any:
        """The reader of a shard that is on this node, compared with the manifest and open; marks it as used now."""
        name, opened = self._shard_name(source, shard), self._readers.get((source, shard))
        if opened is None:
            self.file(f"{self.split}/{source}/index.json")
            path = self.file(name)
            entry = mds.read_entry(path)
            if mds.has_tokens_only(entry):
                opened = mds.TokenShard(path)
            else:
                with _importing:  # several read-ahead threads may arrive here first
                    reader, _ = import_mds()
                opened = reader.MDSReader.from_json(str(path.parent), None, entry)
            self._readers[source, shard] = opened
        self.file(name)
        if self.remote and self.remote.cache_bytes:
            with contextlib.suppress(OSError):  # the file of another user, or just deleted
                os.utime(self.directory / name)
        return opened

    def _sample(self, source: str, shard: int, row: int) -> dict[str, Any]:
        while True:
            try:
                opened = self._readers.get((source, shard))  # another thread may forget it meanwhile
                return (self.open_shard(source, shard) if opened is None else opened)[row]
            except FileNotFoundError:  # deleted, for room or by a user
                self._forget(source, shard)
            except UserError:
                raise
            except (LookupError, ValueError):  # cut or overwritten after the comparison?
                name = self._shard_name(source, shard)
                if not find_damage(self.directory, name, self.manifest.files[name]):
                    raise
                self._forget(source, shard)

    def _forget(self, source: str, shard: int) -> None:
        """At the next read, compare or fetch the shard and open it again."""
        self._checked.discard(self._shard_name(source, shard))
        self._readers.pop((source, shard), None)

    def _tokenized(
        self, source: str, shard: int, row: int, text: str, side: str, number: int | None = None
    ) -> np.ndarray:
        document = (source, shard, row, side, number)
        with self._recent_lock:
            if document in self._recent:
                return self._recent[document]
        tokens = self.tokenizer.encode_document(text) if number is None else self._segmenter.document(text, number)
        if len(tokens) != (expected := int(self._text_lengths(source, shard, side, number)[row])):
            raise UserError(
                f"{self.directory / self._shard_name(source, shard)}: document {row} is {len(tokens)} tokens, its "
                f"length file says {expected}: this version of the tokenizer library gives other tokens than the one "
                f"that prepared the data; install that version, or {PREPARE_AGAIN}"
            )
        with self._recent_lock:
            self._recent_tokens += len(tokens) if document not in self._recent else 0
            self._recent[document] = tokens
            while self._recent_tokens > RECENT_TOKENS:
                self._recent_tokens -= len(self._recent.popitem(last=False)[1])
        return tokens

    @cached_property
    def _segmenter(self) -> Segmenter:
        return Segmenter(self.tokenizer, self.manifest.recipe["segmentation"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        fast, proven = path_of(self.manifest.encoder)
        return Tokenizer.load(self.directory / "tokenizer.json", fast=fast, proven=proven)

    @cached_property
    def _text_lengths(self) -> Any:
        of_side = {"": self.lengths, "target_": self.target_lengths}

        def lengths(source: str, shard: int, side: str, number: int | None) -> np.ndarray:
            if number is None:
                return np.array(of_side[side](source, shard))
            return np.array(self.lengths_of_pass(source, shard, number, side))

        return lru_cache(maxsize=64)(lengths)

    @cached_property
    def _recent_spans(self) -> Any:
        """`spans` in memory: a map would be opened for each document."""
        return lru_cache(maxsize=16)(lambda source, shard: np.array(self.spans(source, shard)))

    def _shard_name(self, source: str, shard: int) -> str:
        return f"{self.split}/{source}/{mds.shard_name(shard)}"

    def file(self, name: str) -> Path:
        """A file of the folder by relative path, compared with the manifest. Raises `UserError` if neither folder nor
        remote has it."""
        recorded = self.manifest.files.get(name)
        if name not in self._checked or not (self.directory / name).exists():  # deleted since, for room or by a user
            damage = find_damage(self.directory, name, recorded)
            if damage and recorded and self.remote:
                self.remote.fetch(name, recorded)
            elif damage:
                raise UserError(f"{damage}; {PREPARE_AGAIN}")
            self._checked.add(name)
        return self.directory / name

    def _check_tokenizer(self) -> None:
        path = self.directory / "tokenizer.json"
        if self.remote:
            self.file("tokenizer.json")
        for name in (TOKENIZER_FILES[1], *CHAT_FILES):  # the first names the tokens that begin and end a text
            if name in self.manifest.files:
                self.file(name)
        if not path.exists():
            raise UserError(f"{path}: missing; {PREPARE_AGAIN}")
        if sha256_of(str(path)) != self.manifest.tokenizer_sha256:
            raise UserError(
                f"{path}: is not the tokenizer that made these shards (its SHA-256 differs from the manifest's); "
                "restore the right tokenizer.json, or delete the folder and prepare again"
            )


# ---- sizes and lengths ---------------------------------------------------------------------------------------


def _open_array(path: Path) -> np.ndarray:
    """A memory map, for the reading threads too.

    numpy parses the file's head with `ast`. In CPython 3.11 two threads at once can end that with `SystemError: AST
    constructor recursion depth mismatch`.
    """
    with _ARRAY_HEADS:
        found: np.ndarray = np.load(path, mmap_mode="r")
    return found


def measure_shard(lengths: np.ndarray) -> list[int]:
    """Documents of a shard, the tokens that they train, and the number of documents that train none (0 or 1 token)."""
    positions = num_tokens(lengths)
    return [len(lengths), int(positions.sum()), len(lengths) - int(np.count_nonzero(positions))]


def measure_shards(directory: Path, source: str, split: str) -> list[list[int]]:
    """`measure_shard` of every shard of a source, in order, from its length files."""
    files = sorted((directory / split / source).glob("lengths.*.npy"), key=lambda path: int(path.name.split(".")[1]))
    return [measure_shard(np.load(path, mmap_mode="r")) for path in files]


def length_statistics(lengths: Sequence[np.ndarray], text_bytes: int) -> dict[str, Any]:
    """Mean, median, 90th percentile and maximum of the stored documents' lengths (tokens), bytes per text token, and a
    histogram: documents of at most 2, 4, 8 ... tokens, but more than half of that."""
    all_lengths = np.concatenate([*lengths, np.zeros(0, np.uint32)]).astype(np.int64)
    bins = np.bincount(np.ceil(np.log2(all_lengths)).astype(np.int64))
    return {
        "mean_tokens": float(all_lengths.mean()),
        "median_tokens": float(np.median(all_lengths)),
        "p90_tokens": float(np.percentile(all_lengths, 90)),
        "max_tokens": int(all_lengths.max()),
        "bytes_per_token": text_bytes / max(1, int(all_lengths.sum()) - 2 * len(all_lengths)),
        "histogram": {str(2**exponent): int(count) for exponent, count in enumerate(bins) if count},
    }


def all_statistics(
    lengths: Mapping[str, Sequence[np.ndarray]], counts: Mapping[str, Mapping[str, Mapping[str, int]]]
) -> dict[str, Any]:
    """`length_statistics` of the stored texts; of the target texts of pairs under "target". `lengths`: by column."""
    found = {}
    for prefix in ("", "target_"):
        if any(map(len, lengths.get(f"{prefix}tokens", ()))):
            text_bytes = sum(split.get(f"{prefix}text_bytes", 0) for of in counts.values() for split in of.values())
            found[prefix] = length_statistics(lengths[f"{prefix}tokens"], text_bytes)
    return found[""] | ({"target": found["target_"]} if "target_" in found else {})


# ---- the import -----------------------------------------------------------------------------------------------

_importing = threading.Lock()
_PACKAGES = ("streaming", "streaming.base", "streaming.base.format", "streaming.base.format.base")


@lru_cache(maxsize=1)
def import_mds() -> tuple[Any, Any]:
    """streaming's modules `mds.reader` and `mds.encodings`, without the packages around them.

    These packages import torchvision, transformers and the clients of all stores: 4 seconds and 100 MB in every rank.
    `sys.modules` is restored afterwards, so a later `import streaming` imports the whole package.
    """
    found = importlib.util.find_spec("streaming")
    assert found is not None, "mosaicml-streaming is not installed"
    assert found.submodule_search_locations, f"{found} is no package"
    root = Path(found.submodule_search_locations[0]).parent
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "streaming"}
    if not before:
        for name in (*_PACKAGES, f"{_PACKAGES[2]}.mds"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
    try:
        from streaming.base.format.mds import encodings, reader
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "streaming" and name not in before]:
            del sys.modules[name]
    return reader, encodings


def decode_value(encoding: str, value: bytes) -> Any:
    """A value decoded by streaming, of any MDS encoding that cannot run code."""
    with _importing:
        _, encodings = import_mds()
    assert encodings.is_mds_encoding_safe(encoding), f"{encoding} is not decoded: it may run code"
    return encodings.mds_decode(encoding, value)
