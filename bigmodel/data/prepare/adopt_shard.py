"""One portion that `adopt` imports: its documents as stored here, by split, with what the folder's manifest needs.

In: an MDS shard of others with a column of token ids, or the documents of a portion of other files. Out: in the staging
folder a shard per split, linked if it is stored as here and rewritten otherwise, and last `taken/<number>.npz`, the
record that it is done.

Guarantees: a pure function of the documents, the tokenizer and the adoption. Killed, it is done again from its start.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.cleaning import is_validation, is_whole, write_arrays
from bigmodel.data.prepare.id_types import TYPES, fitting_types, id_type
from bigmodel.data.store import files, mds
from bigmodel.data.store.manifest import SPLITS
from bigmodel.data.store.mds_index import Listed
from bigmodel.data.store.shards import decode_value
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun


@dataclass(frozen=True)
class Adoption:
    """The settings of an import. `dtype`: of the ids in a column of bytes. `validation`: a folder of shards for the
    validation split; without one, documents go to it by their hash."""

    folder: str
    into: Path
    tokenizer: Path
    column: str = ""
    dtype: str = ""
    name: str = "adopted"
    validation: str = ""
    validation_share: float = 0.02


@dataclass(frozen=True)
class Portion:
    """What one process imports. `split`: of all its documents; empty: of each document by its hash."""

    number: int
    split: str
    work: Path
    adoption: Adoption

    @property
    def taken(self) -> Path:
        return self.work / "taken" / f"{self.number:05}.npz"


@dataclass(frozen=True)
class Shard(Portion):
    """A shard of mosaicml-streaming."""

    listed: Listed

    @property
    def file(self) -> str:
        return self.listed.file


@dataclass
class Taken:
    """An imported portion. By split: the index entry (none: no document), lengths and bytes of text."""

    sha256: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    text_bytes: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    begins_added: int = 0
    ends_added: int = 0
    linked: int = 0
    unknown: int = 0  # ids of the unknown token

    def write(self, path: Path, validation_text: bytes) -> None:
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "lengths"}
        write_arrays(
            path,
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            validation_text=np.frombuffer(validation_text, np.uint8),
            **self.lengths,
        )

    @classmethod
    def read(cls, path: Path) -> "Taken":
        with np.load(path) as arrays:
            lengths = {split: arrays[split] for split in SPLITS if split in arrays}
            return cls(**json.loads(arrays["facts"].tobytes()), lengths=lengths)


def take_shard(shard: Shard) -> None:
    """Store a shard's documents by split, under the shard's own number, and last its `Taken`; nothing if it exists."""
    if is_whole(shard.taken):
        return
    content = b"".join(files.chunks(shard.file))
    parsed = _parse(shard.file, content)
    tokenizer = Tokenizer.load(shard.work / "tokenizer.json", fast=False)
    taken = Taken(hashlib.sha256(content).hexdigest())
    named = ((f"{shard.file}: document {number}", ids) for number, ids in enumerate(_read_ids(parsed, shard)))
    documents, validation_text = sort_documents(shard, named, tokenizer, taken)
    for split, mine in documents.items():
        unchanged = len(mine) == len(parsed.bounds) - 1 and not taken.begins_added + taken.ends_added
        ours = parsed.description["column_names"], parsed.description["column_encodings"]
        if unchanged and parsed.content is content and ours == (["tokens"], [f"ndarray:{tokenizer.dtype.name}"]):
            taken.entries[split] = _link(shard, parsed, shard.work / split)
            taken.linked += 1
        else:
            write_documents(shard, split, mine, taken)
    taken.write(shard.taken, validation_text)


def sort_documents(
    portion: Portion, documents: Iterable[tuple[str, np.ndarray]], tokenizer: Tokenizer, taken: Taken
) -> tuple[dict[str, list[np.ndarray]], bytes]:
    """The documents as stored, by split (absent: none), and the text of those for validation; counts them in `taken`.
    `documents`: (place for errors, (n,) ids)."""
    by_split: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    validation_text = []
    for where, ids in documents:
        document = _with_ends(ids, tokenizer, where, taken)
        if len(document) <= 2:
            taken.empty += 1
            continue
        split = portion.split or SPLITS[_falls_to_validation(document, portion.adoption)]
        if tokenizer.unknown is not None:
            taken.unknown += int((document[1:-1] == tokenizer.unknown).sum())
        text = tokenizer.decode(document).encode()
        taken.text_bytes[split] = taken.text_bytes.get(split, 0) + len(text)
        validation_text += [text] if split == "validation" else []
        by_split[split].append(document)
    found = {split: mine for split, mine in by_split.items() if mine}
    for split, mine in found.items():
        taken.lengths[split] = np.array([len(document) for document in mine], np.uint32)
    return found, b"".join(validation_text)


def write_documents(portion: Portion, split: str, documents: list[np.ndarray], taken: Taken) -> None:
    """Write the shard of a portion's documents of one split."""
    target = portion.work / split / mds.shard_name(portion.number)
    write_atomically(target, mds.encode_shard({"tokens": documents}))
    columns = {"tokens": taken.lengths[split]}
    taken.entries[split] = mds.shard_entry(portion.number, columns, documents[0].dtype)


def _read_ids(parsed: mds.ShardContent, shard: Shard) -> list[np.ndarray]:
    """(n,) integer ids of every sample."""
    column, dtype = shard.adoption.column, shard.adoption.dtype
    values, encoding = _values(parsed, shard), parsed.encoding(column)
    if encoding == "bytes":
        _check_sizes(values, shard)
    try:
        arrays = [np.frombuffer(v, dtype) if encoding == "bytes" else decode_value(encoding, v) for v in values]
    except (ValueError, TypeError) as error:
        raise UserError(f"{shard.file}: column {column!r}: {error}; check --dtype and the shard") from None
    wrong = next((array for array in arrays if array.ndim != 1 or array.dtype.kind not in "iu"), None)
    if wrong is not None:
        raise UserError(
            f"{shard.file}: column {column!r} holds arrays of {wrong.dtype} with {wrong.ndim} axes; "
            "token ids need one axis of integers"
        )
    return arrays


def _check_sizes(values: list[bytes], shard: Shard) -> None:
    """Raise `UserError` for a sample that is no whole number of ids of --dtype."""
    dtype, sizes = shard.adoption.dtype, [len(value) for value in values]
    wrong = next((number for number, size in enumerate(sizes) if size % id_type(dtype).itemsize), None)
    if wrong is not None:
        widest = math.gcd(*sizes) & -math.gcd(*sizes)  # the largest power of two that divides all
        raise UserError(
            f"{shard.file}: document {wrong} has {counted_noun(sizes[wrong], 'byte')}, no whole number of ids of "
            f"--dtype {dtype}; an id has at most {counted_noun(widest, 'byte')} here: set --dtype uint{8 * widest}"
        )


def _values(parsed: mds.ShardContent, shard: Shard) -> list[bytes]:
    """The column of ids as stored."""
    column, dtype = shard.adoption.column, shard.adoption.dtype
    if column not in parsed.description["column_names"]:
        raise UserError(f"{shard.file}: has no column {column!r}, which the first shard has")
    encoding = parsed.encoding(column)
    if encoding == "bytes" and not dtype:
        raise UserError(f"{shard.file}: column {column!r} holds bytes; name the type of its ids, as --dtype int64")
    if encoding != "bytes" and not encoding.startswith("ndarray"):
        raise UserError(f"{shard.file}: column {column!r} holds {encoding}; token ids are ndarray or bytes")
    try:
        return list(parsed.values(column))
    except ValueError as error:
        raise UserError(f"{shard.file}: column {column!r}: {error}; restore the file or leave it out") from None


def _with_ends(ids: np.ndarray, tokenizer: Tokenizer, where: str, taken: Taken) -> np.ndarray:
    """The document as stored here. Counts added begin and end tokens in `taken`."""
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocabulary):
        raise UserError(
            f"{where}: holds token {ids.min() if ids.min() < 0 else ids.max()}, the tokenizer has "
            f"{tokenizer.vocabulary}; give the tokenizer that made these ids"
        )
    has_end = len(ids) > 0 and ids[-1] == tokenizer.eos
    inner = ids[:-1] if has_end else ids
    has_begin = len(inner) > 0 and inner[0] == tokenizer.bos
    inner = inner[1:] if has_begin else inner
    if len(inner) and np.isin(inner, (tokenizer.bos, tokenizer.eos)).any():
        raise UserError(
            f"{where}: has a begin or end token in its middle, so it is several documents in one sample, which would "
            "be trained as one document; write the shards with one document per sample, or prepare from the text"
        )
    if len(inner):
        taken.begins_added += not has_begin
        taken.ends_added += not has_end
    return np.concatenate([[tokenizer.bos], inner, [tokenizer.eos]]).astype(tokenizer.dtype)


def _falls_to_validation(document: np.ndarray, adoption: Adoption) -> bool:
    digest = hashlib.sha256(document.astype("<u4").tobytes()).digest()
    return is_validation(None, digest, adoption.validation_share)


def _link(shard: Shard, parsed: mds.ShardContent, folder: Path) -> dict[str, Any]:
    """Link the file into the folder, or write its bytes there; returns its index entry."""
    target = folder / mds.shard_name(shard.number)
    target.unlink(missing_ok=True)  # left by a killed process
    try:
        os.link(os.path.realpath(shard.file), target)  # the file, where that is a symbolic link
    except OSError:  # another disk, or a store
        write_atomically(target, parsed.content)
    raw = {"basename": target.name, "bytes": len(parsed.content), "hashes": {}}
    stored = {**parsed.description, "hashes": []}
    return {**stored, "samples": len(parsed.bounds) - 1, "raw_data": raw, "zip_data": None}


def fitting_types_of(shard: Shard, vocabulary: int) -> tuple[set[str], int]:
    """`fitting_types` of a column of bytes, and its size; arrays, which say their type, fit all."""
    parsed = _parse(shard.file, b"".join(files.chunks(shard.file)))
    values = _values(parsed, shard)
    if parsed.encoding(shard.adoption.column) != "bytes":
        return set(TYPES), 0
    return fitting_types(values, vocabulary), sum(map(len, values))


def _parse(file: str, content: bytes) -> mds.ShardContent:
    try:
        return mds.ShardContent.of_file(files.without_settings(file), content)
    except ValueError as error:
        raise UserError(f"{file}: cannot be read: {error}; restore the file or leave it out") from None
