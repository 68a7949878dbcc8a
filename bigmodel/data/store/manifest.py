"""The manifest: content of a prepared folder, with size and SHA-256 of its files.

In: a folder on this machine or in a store. Out: its `Manifest`.

Guarantees: the manifest is written last, so a folder that has one is whole. It lists every file but itself and
`lengths.png`, a picture that earlier versions drew.

Costs: comparing a file reads it, about 1 GB/s.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.store import files
from bigmodel.run_directory import write_json

MANIFEST = "manifest.json"
PICTURE = "lengths.png"
SCHEMA_VERSION = 3
OTHER_CONTENT = "its content differs from the manifest (same size, other SHA-256)"
SPLITS = ("train", "validation")
OPTIONAL = {"without_token", "labels"}  # missing in manifests of earlier versions, the second also without labels
Labels = dict[str, dict[str, dict[str, int]]]  # documents by source, split and class
EXACT, PROVEN, UNPROVEN = "tokenizers", "tiktoken+tokenizers", "tiktoken"  # encoders; the last: of earlier versions
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # the second: where a given tokenizer named begin and end
CHAT_FILES = ("chat_template.jinja", "special_tokens_map.json")  # of a folder with chats
PREPARE_AGAIN = "delete the folder and run `bigmodel prepare RUN.toml`, or copy the file again"


class FileTable(Mapping[str, dict[str, Any]]):
    """Size and SHA-256 of files by path, sorted. Takes 100 bytes a file; dicts would take 25 MB in every rank for the
    files of a billion documents."""

    def __init__(self, files: Mapping[str, tuple[int, str]]) -> None:
        names = sorted(files)
        self._names = np.array([name.encode() for name in names], dtype=bytes)
        self._bytes = np.array([files[name][0] for name in names], dtype=np.int64)
        self._sha256 = np.array([files[name][1].encode() for name in names], dtype=bytes)

    def __getitem__(self, name: str) -> dict[str, Any]:
        place = int(np.searchsorted(self._names, name.encode()))
        if place == len(self._names) or self._names[place] != name.encode():
            raise KeyError(name)
        return {"bytes": int(self._bytes[place]), "sha256": self._sha256[place].decode()}

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names)

    def __len__(self) -> int:
        return len(self._names)


def pass_name(number: int, what: str, shard: int) -> str:
    """File of the lengths of a shard's documents in one pass of random segmentations.

    >>> pass_name(2, "target_lengths", 7)
    'pass_002.target_lengths.00007.npy'
    """
    return f"pass_{number:03}.{what}.{shard:05}.npy"


def in_words(counts: Mapping[str, int]) -> str:
    """
    >>> in_words({"duplicate": 1200, "too_short": 1})
    '1,200 duplicate, 1 too short'
    """
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())


@dataclass(frozen=True)
class Manifest:
    """Content of a prepared folder.

    - `counts[source][split]`: documents, tokens (stored ones), text_bytes
    - `shards[source][split]`: `shards.measure_shard` of each shard, in order. The plan deals shards to lanes by these
      numbers, so no rank opens the lengths of shards that others read.
    - `files[path]`: bytes and sha256; the path is relative to the folder
    - `recipe`: the user's settings
    - `statistics`: over all splits and sources
    - `encoder`: the libraries that made the ids
    - `without_token[source]`: unknown_tokens, ids of the tokenizer's unknown token in the documents, and
      dropped_characters, of documents and not in any id; empty for adopted ids and in earlier versions

    A source of pairs (`target_column`) has both texts of a pair in one sample, so that they stay together:

        shard.00000.mds           columns `tokens` (the source text) and `target_tokens`, each [bos] text [eos]; in
                                  shards of text `text` and `target_text`
        lengths.00000.npy         (samples,) uint32 stored tokens of the source text
        target_lengths.00000.npy  (samples,) uint32 stored tokens of the target text
        counts[source][split]     target_tokens, target_text_bytes; tokens and text_bytes count the source text
        shards[source][split]     the source text alone
        statistics["target"]      all target texts; absent if no source has any
        rows, row_bytes           a pair is one row; its bytes count both texts; a pair with one empty text is `empty`

    A labelled source (`label_column`) is stored as pairs whose target text is the class of the document;
    `labels[source][split]` counts the documents of each class.

    With random segmentations (`prepare.segmentation`) a shard of training text has, beside lengths.00000.npy of the
    tokenizer's own ids, pass_000.lengths.00000.npy ... with the lengths in each pass; of pairs also
    pass_000.target_lengths.00000.npy ... All other numbers are those of the tokenizer's own ids.

    A supervised source (`messages_column` or `prompt_column`) has one document per chat, or per prompt with its
    response, with the ids that the chat template gives, or [bos] prompt response [eos]:

        spans.00000.npy           (k, 4) uint32: row, first token, end, weight in units of 1/65,536; what is trained
        counts[source][split]     trained_tokens, and trained_weight: the sum of their weights in these units
        text_bytes, row_bytes     of the records as JSON: see `bigmodel.data.prepare.records`

    Beside tokenizer.json lie chat_template.jinja, and special_tokens_map.json for a tokenizer that came with names.

    The tokens of both texts together count towards the size of a shard. A source has pairs if its counts have
    target_tokens.
    """

    tokenizer_sha256: str
    vocabulary: int
    bos: int
    eos: int
    dtype: str
    counts: dict[str, dict[str, dict[str, int]]]
    shards: dict[str, dict[str, list[list[int]]]]
    rows: dict[str, dict[str, int]]  # per source: documents read, kept, and dropped by reason
    row_bytes: dict[str, dict[str, int]]  # the same in bytes of UTF-8; `cleaned`: removed from kept documents
    statistics: dict[str, Any]
    files: Mapping[str, dict[str, Any]]
    recipe: dict[str, Any]
    corpus_sha256: str
    encoder: str
    python: str
    without_token: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    document: str = "[bos] text [eos]"
    schema_version: int = SCHEMA_VERSION

    @property
    def sources(self) -> list[str]:
        return sorted(self.counts)

    def total(self, split: str, what: str) -> int:
        """Sum over sources of `what`: documents, tokens or text_bytes."""
        return sum(counts[split][what] for counts in self.counts.values())

    def dropped(self, source: str) -> dict[str, int]:
        """Dropped rows of a source by reason, without reasons of count 0."""
        return {name: count for name, count in self.rows[source].items() if count and name not in ("read", "kept")}

    @property
    def unknown_share(self) -> float:
        """Share of the stored tokens that are the tokenizer's unknown token."""
        unknown = sum(counts["unknown_tokens"] for counts in self.without_token.values())
        splits = [of_split for of_source in self.counts.values() for of_split in of_source.values()]
        return unknown / max(1, sum(stored_amount(of_split, "tokens") for of_split in splits))

    def write(self, directory: Path) -> None:
        table = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "labels" or self.labels}
        write_json(directory / MANIFEST, table | {"files": dict(self.files)})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises `UserError` without a folder or manifest, and for a manifest that this version cannot read."""
        path = Path(directory) / MANIFEST
        if not Path(directory).is_dir():
            raise UserError(f"data.directory = {directory}: no such folder; run `bigmodel prepare RUN.toml` first")
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"data.directory = {directory}: has no {MANIFEST}, so it is not a folder of prepared shards; "
                "run `bigmodel prepare RUN.toml` with another data.directory, or delete this one first"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; {PREPARE_AGAIN}") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, name: str) -> "Manifest":
        """`name`: of the file, for errors."""
        try:
            table = json.loads(content, object_hook=_shortened)
        except ValueError as error:
            raise UserError(f"{name}: damaged: {error}; {PREPARE_AGAIN}") from None
        expected = {one.name for one in fields(cls)}
        version = table.get("schema_version") if isinstance(table, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{name}: schema version {version}, this program reads {SCHEMA_VERSION}; {PREPARE_AGAIN}")
        if wrong := (set(table) ^ expected) - (OPTIONAL - set(table)):
            raise UserError(f"{name}: damaged: {', '.join(sorted(wrong))}; {PREPARE_AGAIN}")
        try:
            outside = [path for path in table["files"] if not files.is_inside(path)]
            outside += [source for source in table["counts"] if "/" in source or not files.is_inside(source)]
            listed = FileTable({} if outside else table["files"])
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: damaged: files; {PREPARE_AGAIN}") from None
        if outside:
            raise UserError(
                f"{name}: names {outside[0]!r}, which is no file or source inside its folder; {PREPARE_AGAIN}"
            )
        return cls(**table | {"files": listed})


def _shortened(table: dict[str, Any]) -> Any:
    """A file's entry as a tuple for `FileTable`: a dict for each would double the memory of reading."""
    is_file = table.keys() == {"bytes", "sha256"} and isinstance(table["sha256"], str)  # no sources of these names
    return (table["bytes"], table["sha256"]) if is_file else table


def path_of(encoder: str) -> tuple[bool, bool]:
    """The arguments `fast` and `proven` of a `Tokenizer` that makes the ids of a manifest's `encoder`."""
    return encoder in (PROVEN, UNPROVEN), encoder != UNPROVEN


def stored_amount(counts: dict[str, int], what: str) -> int:
    """Documents, tokens or text_bytes of a source and split; both sides of pairs together."""
    return counts[what] + counts.get(f"target_{what}", 0)


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder that its manifest lists, by relative path, sorted."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    paths = [path for path in paths if path not in (directory / MANIFEST, directory / PICTURE)]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(sha256_of, map(str, paths))
        return {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, hashes, strict=True)
        }


def find_damage(folder: Path | str, name: str, recorded: dict[str, Any] | None) -> str:
    """How one file of a folder, local or in a store, differs from its entry in the manifest; empty if it does not."""
    location = files.join(str(folder), name)
    if recorded is None:
        return f"{location}: not in the manifest"
    try:
        if not files.is_remote(location) and not Path(location).exists():
            return f"{location}: missing"
        damage = find_wrong_size(location, recorded, files.size(location))
        if not damage and sha256_of(location) != recorded["sha256"]:
            damage = f"{location}: {OTHER_CONTENT}"
        return damage
    except UserError as error:
        return str(error)


def find_wrong_size(location: str, recorded: dict[str, Any], size: int) -> str:
    return "" if size == recorded["bytes"] else f"{location}: has {size} bytes, the manifest says {recorded['bytes']}"


def sha256_of(location: str) -> str:
    digest = hashlib.sha256()
    for chunk in files.chunks(location):
        digest.update(chunk)
    return digest.hexdigest()
