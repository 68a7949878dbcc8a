"""The index.json of MDS shards, as MDSWriter writes it: what it says of each shard, and whether that is true.

    {"version": 2, "shards": [{"format": "mds", "samples": 60, "compression": "zstd:3", "hashes": ["sha1"],
      "column_names": ["tokens"], "column_encodings": ["ndarray:uint16"], "column_sizes": [null],
      "raw_data": {"basename": "shard.00000.mds", "bytes": 9000, "hashes": {"sha1": "7e2..."}},
      "zip_data": {"basename": "shard.00000.mds.zstd", "bytes": 4000, "hashes": {"sha1": "f03..."}}}]}

In: a folder or files, local or in a store. Out: the listed shards; how a shard differs from its entry.

Guarantees: whatever an entry states is compared: samples; names, encodings and sizes of the columns; bytes and hashes
of the file, as stored and decompressed. No name leads outside the folder.

Costs: a comparison holds one shard in memory and reads about 0.5 GB/s for each hash.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash
from pydantic import BaseModel, ValidationError

from bigmodel.config.settings import UserError
from bigmodel.data.store import files, mds

INDEX = "index.json"
SHARD_NAME = re.compile(r"\.mds(\.[a-z0-9]+)?$")
SHOWN = 20  # lines of a message
RESTORE = "restore the shards and the index.json that belong together, or write both again"


class StoredFile(BaseModel, frozen=True):
    basename: str
    bytes: int | None = None
    hashes: dict[str, str] = {}


class Entry(BaseModel, frozen=True):
    """What an index says of one shard. `raw_data`: the uncompressed file, `zip_data`: the compressed one."""

    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None] | None = None
    samples: int | None = None
    raw_data: StoredFile
    zip_data: StoredFile | None = None

    @property
    def names(self) -> list[str]:
        return [stored.basename for stored in (self.raw_data, self.zip_data) if stored]

    def encoding(self, column: str) -> str:
        """Of a column; empty without that column."""
        return dict(zip(self.column_names, self.column_encodings, strict=True)).get(column, "")


@dataclass(frozen=True)
class Listed:
    """A shard: its file that is there, and what an index says of it."""

    file: str
    entry: Entry

    @property
    def is_compressed(self) -> bool:
        stored = self.entry.zip_data
        return stored is not None and f"/{files.without_settings(self.file)}".endswith(f"/{stored.basename}")


@dataclass(frozen=True)
class Comparison:
    """How a shard differs from its entry, and the algorithms of hashes that are not known here."""

    differences: list[str]
    unknown: set[str]


# ---- finding shards -------------------------------------------------------------------------------------------


def list_shards(folder: str) -> list[Listed]:
    """The shards of a folder's index, in order; of a shard with two files the uncompressed one. Raises `UserError` for
    a missing or damaged index, for missing files, and for names and links that lead outside."""
    there = files.sizes(folder)
    if not there:
        raise UserError(f"{folder}: there is no such folder or file, or nothing is in it; correct the path")
    if INDEX not in there:
        raise UserError(
            f"{folder}: has no index.json of mosaicml-streaming, and no file of ids (.bin, .npy); name a folder or "
            "files that do"
        )
    entries = read_index(files.inside(folder, INDEX))
    missing = [entry.names[0] for entry in entries if not set(entry.names) & there.keys()]
    if missing:
        named = in_lines([files.join(folder, name) for name in missing])
        raise UserError(f"{named}: missing, but index.json lists {'it' if len(missing) == 1 else 'them'}; {RESTORE}")
    chosen = [next(name for name in entry.names if name in there) for entry in entries]
    return [Listed(files.inside(folder, name), entry) for name, entry in zip(chosen, entries, strict=True)]


def unlisted(folder: str) -> list[str]:
    """Files of a folder that are named like shards, but that its index does not list."""
    listed = {name for entry in read_index(files.inside(folder, INDEX)) for name in entry.names}
    return [name for name in files.sizes(folder) if SHARD_NAME.search(name) and name not in listed]


def listed_beside(shards: Sequence[str]) -> list[Listed]:
    """Of these files those that have an index.json beside them. Raises `UserError` for a file that it does not list."""
    indexes: dict[str, dict[str, Entry]] = {}
    for folder in dict.fromkeys(map(files.parent, shards)):
        if files.find(files.join(folder, INDEX)):
            entries = read_index(files.join(folder, INDEX))
            indexes[folder] = {files.join(folder, name): entry for entry in entries for name in entry.names}
    with_index = [file for file in shards if files.parent(file) in indexes]
    if strange := [file for file in with_index if file not in indexes[files.parent(file)]]:
        raise UserError(
            f"{in_lines(strange)}: not in the index.json beside it; leave it out of the source, or {RESTORE}"
        )
    return [Listed(file, indexes[files.parent(file)][file]) for file in with_index]


def absent_beside(shards: Sequence[Listed]) -> list[str]:
    """Shards that the indexes beside these list, and that are not there."""
    absent = []
    for folder in dict.fromkeys(files.parent(shard.file) for shard in shards):
        there = files.sizes(folder)
        names = [entry.names for entry in read_index(files.join(folder, INDEX))]
        absent += [files.join(folder, of_one[0]) for of_one in names if not set(of_one) & there.keys()]
    return absent


def read_index(index: str) -> list[Entry]:
    """The entries of an index. Raises `UserError` if it is damaged, lists other formats, or names files outside."""
    try:
        listed = json.loads(b"".join(files.chunks(index)))["shards"]
        kinds = {str(entry["format"]) for entry in listed}
        entries = [Entry.model_validate(entry) for entry in listed] if kinds == {"mds"} else []
        if not all(0 < len(entry.column_names) == len(entry.column_encodings) for entry in entries):
            raise ValueError
    except (ValidationError, ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{index}: damaged; it is not an index of mosaicml-streaming; {RESTORE}") from None
    if not entries:
        raise UserError(f"{index}: lists {', '.join(sorted(kinds)) or 'no'} shards; only MDS shards can be read")
    names = Counter(name for entry in entries for name in entry.names)
    if wrong := [name for name in names if not files.is_inside(name)]:
        raise UserError(f"{index}: lists {wrong[0]!r}, which is no file inside its folder; {RESTORE}")
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"{index}: lists {twice[0]} twice; {RESTORE}")
    return entries


def in_lines(problems: Sequence[str]) -> str:
    """Problems as lines; of many the first ones and the number of others."""
    left = len(problems) - SHOWN
    return "\n  ".join([*problems[:SHOWN], *([f"and {left:,} more"] if left > 0 else [])])


# ---- comparing ------------------------------------------------------------------------------------------------


def compare(shard: Listed) -> Comparison:
    """Read a shard and compare it with its entry. A file that cannot be read is a difference."""
    entry = shard.entry
    stored = entry.zip_data if shard.is_compressed else entry.raw_data
    assert stored is not None
    unknown = {name for one in (stored, entry.raw_data) for name in one.hashes if not _is_known(name)}
    try:
        content = b"".join(files.chunks(shard.file))
        found = list(_compare_bytes(content, stored, "the file"))
        content = mds.decompress(mds.compression(files.without_settings(shard.file)), content)
        if shard.is_compressed:
            found += _compare_bytes(content, entry.raw_data, "its decompressed content")
        found += _compare_content(mds.ShardContent.parse(content), entry)
    except UserError as error:
        return Comparison([str(error)], unknown)
    except ValueError as error:
        found.append(f"cannot be read: {error}")
    return Comparison([f"{shard.file}: {difference}" for difference in found], unknown)


def _compare_bytes(content: bytes, said: StoredFile, what: str) -> Iterator[str]:
    if said.bytes not in (None, len(content)):
        yield f"index.json says {said.bytes:,} bytes, {what} has {len(content):,}"
    for algorithm, digest in said.hashes.items():
        if _is_known(algorithm) and (found := _hash(algorithm, content)) != digest.lower():
            yield f"index.json says {algorithm} {digest}, {what} has {found}"


def _compare_content(content: mds.ShardContent, entry: Entry) -> Iterator[str]:
    samples = len(content.bounds) - 1
    if entry.samples not in (None, samples):
        yield f"index.json says {entry.samples:,} samples, the shard has {samples:,}"
    for what in ("column_names", "column_encodings", "column_sizes"):
        said, found = getattr(entry, what), content.description[what]
        if said not in (None, found):
            yield f"index.json says {what} {said}, the shard has {found}"


def _is_known(algorithm: str) -> bool:
    """Whether a hash can be computed; MDSWriter offers those of hashlib, but no shake_*, and of xxhash."""
    if algorithm.startswith("shake_"):
        return False
    return algorithm in hashlib.algorithms_available or algorithm in xxhash.algorithms_available


def _hash(algorithm: str, content: bytes) -> str:
    """In hexadecimal."""
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)(content).hexdigest()
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
