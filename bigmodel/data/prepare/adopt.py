"""Adopt: import shards of mosaicml-streaming, written elsewhere, as a prepared folder.

In: a folder of MDS shards (compressed or not, local or in a store) with a column of token ids or of text, and the
tokenizer that made the ids. Out: the folder described in `bigmodel.data.store.shards`, as `prepare` makes it from text.

A column of text goes to `prepare`, with the shards as its source. The rest of this file imports token ids.

A sample is one document. A missing begin or end token is added, and the number of additions is printed. A document with
one of them in its middle is an error: such a sample is several documents, and their tokens would attend to each other.

Guarantees: every document but empty ones is kept, in stored order, with unchanged ids. An uncompressed shard whose
documents are all stored as here and go to one split is linked (copied between disks); any other is rewritten. The
folder appears whole, by one rename. Killed, the next run continues from the imported shards in `<into>.partial`, if
shards, tokenizer and versions are the same.

Costs: about 1 MB of text a second and core, because documents are decoded to count the bytes of their text.
"""

import hashlib
import io
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from rich.progress import Progress

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.cleaning import is_validation, is_whole, write_arrays
from bigmodel.data.prepare.encoding import read_array, save_array
from bigmodel.data.prepare.lengths import draw_lengths
from bigmodel.data.prepare.pipeline import conclude, keep_boundaries, prepare
from bigmodel.data.prepare.staging import claimed, folders_in, partial_of, put_in_place, stoppable
from bigmodel.data.store import files, mds
from bigmodel.data.store.manifest import PICTURE, SPLITS, Manifest, describe_files
from bigmodel.data.store.shards import decode_value, length_statistics, measure_shards
from bigmodel.data.store.tokenizer import Tokenizer, read_tokenizer, tokenizer_file
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun

TOKEN_COLUMNS = ("tokens", "input_ids")  # likely names, in order
COMPRESSIONS = {".zstd": "zstd", ".gz": "gzip", ".br": "brotli"}
FORMAT = 1  # raise it when the files of a taken shard change
INLINE_BYTES = 8 << 20  # below this, starting processes costs more than it saves


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
class _Shard:
    """One shard to import. `split`: of all its documents; empty: of each document by its hash."""

    file: str
    number: int
    split: str
    work: Path
    adoption: Adoption

    @property
    def taken(self) -> Path:
        return self.work / "taken" / f"{self.number:05}.npz"


@dataclass
class Taken:
    """An imported shard. By split: the index entry (none: no document), lengths and bytes of text."""

    sha256: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    text_bytes: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    begins_added: int = 0
    ends_added: int = 0
    linked: int = 0

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


def find_column(adoption: Adoption) -> tuple[str, str]:
    """Name and encoding of the requested column, or of the likely one."""
    first = list_shards(adoption.folder)[0]
    shard = _parse(first, b"".join(files.chunks(first)))
    names, encodings = (shard.description[f"column_{what}"] for what in ("names", "encodings"))
    likely = [name for name in (adoption.column, *TOKEN_COLUMNS, "text") if name in names]
    column = likely[0] if likely else names[0]
    if not adoption.column and f"target_{column}" in names:
        raise UserError(
            f"{adoption.folder}: holds pairs, {column!r} with 'target_{column}', but only one column can be adopted; "
            "prepare pairs from their texts by prepare.sources with a target_column, or adopt one side by "
            f"--column {column}"
        )
    if (adoption.column and column != adoption.column) or (len(names) > 1 and not likely):
        raise UserError(
            f"{adoption.folder}: no column {adoption.column or ' or '.join(TOKEN_COLUMNS)!r}; it has "
            f"{', '.join(map(repr, names))}: name the column of tokens or text by --column"
        )
    return column, encodings[names.index(column)]


def list_shards(folder: str) -> list[str]:
    """The files of the shards in a folder's index.json, in order. Raises `UserError` if one is missing."""
    index = files.join(folder, "index.json")
    there = files.sizes(folder)
    if "index.json" not in there:
        raise UserError(
            f"{folder}: has no index.json, so it holds no shards of mosaicml-streaming; name a folder with one"
        )
    try:
        entries = json.loads(b"".join(files.chunks(index)))["shards"]
        stored = [[entry[key]["basename"] for key in ("raw_data", "zip_data") if entry[key]] for entry in entries]
        kinds = {entry["format"] for entry in entries}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{index}: damaged; it is not an index of mosaicml-streaming") from None
    if kinds != {"mds"}:
        raise UserError(f"{index}: lists {', '.join(sorted(kinds)) or 'no'} shards; only MDS shards can be adopted")
    for names in stored:
        if not set(names) & set(there):
            raise UserError(f"{files.join(folder, names[0])}: missing, but index.json lists it; restore the file")
    return [files.join(folder, next(name for name in names if name in there)) for names in stored]


def adopt(adoption: Adoption, progress: Progress) -> Path:
    """Make `adoption.into` and return it. Raises `UserError` for shards, columns and documents that do not fit."""
    into = adoption.into.absolute()
    if into.exists():
        raise UserError(f"--into {into}: exists already; choose another folder, or delete this one")
    column, encoding = find_column(adoption)
    adoption = replace(adoption, column=column)
    settings = _settings(adoption)
    if encoding == "str" and adoption.validation:
        raise UserError(
            f"--validation {adoption.validation}: documents of text shards go to validation by their hash; "
            "leave it out, and set --validation-share"
        )
    if encoding == "str":
        return prepare(settings, progress)
    partial = partial_of(into)
    with claimed(partial), stoppable():
        shards = _all_shards(adoption, partial)
        work = shards[0].work
        for leftover in folders_in(partial):
            if leftover != work:
                shutil.rmtree(leftover)
        _make(adoption, shards, progress)
        if _all_shards(adoption, partial) != shards:
            raise UserError(
                f"{adoption.folder}: its shards or the tokenizer changed while they were adopted; run again"
            )
        put_in_place(work / "result", into)
        shutil.rmtree(partial)
    return into


def _all_shards(adoption: Adoption, partial: Path) -> list[_Shard]:
    """The shards to import, with the staging folder for these shards, tokenizer and versions."""
    first = SPLITS[0] if adoption.validation else ""
    places = [(file, first) for file in list_shards(adoption.folder)]
    if adoption.validation:
        places += [(file, SPLITS[1]) for file in list_shards(adoption.validation)]
    given = tokenizer_file(adoption.tokenizer)
    names = [given.parent / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    identities = [files.identity(file) for file, _ in places]
    identities += [files.identity(str(name)) for name in [given, *names] if name.exists()]
    everything = [FORMAT, repr(adoption), places, identities, units.versions()]
    work = partial / hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]
    return [_Shard(file, number, split, work, adoption) for number, (file, split) in enumerate(places)]


def _make(adoption: Adoption, shards: Sequence[_Shard], progress: Progress) -> None:
    tokenizer = Tokenizer.load(adoption.tokenizer, fast=False)
    work = shards[0].work
    for split in SPLITS:
        (work / split).mkdir(parents=True, exist_ok=True)
    (work / "taken").mkdir(exist_ok=True)
    given = tokenizer_file(adoption.tokenizer)
    write_atomically(work / "tokenizer.json", read_tokenizer(given))
    keep_boundaries(given.parent, work)
    taken = _take_all(shards, progress)
    _say(adoption, taken, progress)
    _finish(adoption, tokenizer, shards, taken)


def _settings(adoption: Adoption) -> Settings:
    """The run file that imports the same shards as text. Raises `UserError` for an invalid name or share."""
    source = {"name": adoption.name, "files": list_shards(adoption.folder), "column": adoption.column}
    section = {"sources": [source], "tokenizer": adoption.tokenizer, "validation_share": adoption.validation_share}
    table = {"prepare": section, "data": {"directory": adoption.into}}
    return settings_from_table(table, Path("adopt"))


def _take_all(shards: Sequence[_Shard], progress: Progress) -> list[Taken]:
    weights = [files.size(shard.file) for shard in shards]
    number = min(len(os.sched_getaffinity(0)), len(shards)) if sum(weights) > INLINE_BYTES else 1
    if finished := sum(shard.taken.exists() for shard in shards):
        progress.console.print(f"{shards[0].work.parent}: going on from {finished:,} taken shards", markup=False)
    with units.processes(number, progress) as team:
        team.run("adopting", _take, [(shard,) for shard in shards], weights)
    return [Taken.read(shard.taken) for shard in shards]


def _say(adoption: Adoption, taken: Sequence[Taken], progress: Progress) -> None:
    documents = sum(len(lengths) for one in taken for lengths in one.lengths.values())
    sums = {
        what: sum(getattr(one, what) for one in taken) for what in ("begins_added", "ends_added", "empty", "linked")
    }
    conclude(
        progress,
        f"{adoption.folder}: {counted_noun(documents, 'document')}; begin added to {sums['begins_added']:,}, end to "
        f"{sums['ends_added']:,}; {sums['empty']:,} empty ones left out; {sums['linked']:,} shards linked unchanged",
    )


# ---- a shard --------------------------------------------------------------------------------------------------


def _take(shard: _Shard) -> None:
    """Store a shard's documents by split, under the shard's own number, and last its `Taken`; nothing if it exists."""
    if is_whole(shard.taken):
        return
    content = b"".join(files.chunks(shard.file))
    parsed = _parse(shard.file, content)
    tokenizer = Tokenizer.load(shard.work / "tokenizer.json", fast=False)
    taken = Taken(hashlib.sha256(content).hexdigest())
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    validation_text = []
    for number, ids in enumerate(_read_ids(parsed, shard)):
        document = _with_ends(ids, tokenizer, f"{shard.file}: document {number}", taken)
        if len(document) <= 2:
            taken.empty += 1
            continue
        split = shard.split or SPLITS[_falls_to_validation(document, shard.adoption)]
        text = tokenizer.decode(document).encode()
        taken.text_bytes[split] = taken.text_bytes.get(split, 0) + len(text)
        validation_text += [text] if split == "validation" else []
        documents[split].append(document)
    for split, mine in documents.items():
        if mine:
            taken.lengths[split] = np.array([len(document) for document in mine], np.uint32)
            folder = shard.work / split
            unchanged = len(mine) == len(parsed.bounds) - 1 and not taken.begins_added + taken.ends_added
            ours = parsed.description["column_names"], parsed.description["column_encodings"]
            if unchanged and parsed.content is content and ours == (["tokens"], [f"ndarray:{tokenizer.dtype.name}"]):
                taken.entries[split] = _link(shard, parsed, folder)
                taken.linked += 1
            else:
                write_atomically(folder / mds.shard_name(shard.number), mds.encode_shard({"tokens": mine}))
                columns = {"tokens": taken.lengths[split]}
                taken.entries[split] = mds.shard_entry(shard.number, columns, tokenizer.dtype)
    taken.write(shard.taken, b"".join(validation_text))


def _read_ids(parsed: mds.ShardContent, shard: _Shard) -> list[np.ndarray]:
    """(n,) integer ids of every sample."""
    column, dtype = shard.adoption.column, shard.adoption.dtype
    if column not in parsed.description["column_names"]:
        raise UserError(f"{shard.file}: has no column {column!r}, which the first shard has")
    encoding = parsed.encoding(column)
    if encoding == "bytes" and not dtype:
        raise UserError(f"{shard.file}: column {column!r} holds bytes; name the type of its ids, as --dtype int64")
    if encoding != "bytes" and not encoding.startswith("ndarray"):
        raise UserError(f"{shard.file}: column {column!r} holds {encoding}; token ids are ndarray or bytes")
    try:
        values = list(parsed.values(column))
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


def _with_ends(ids: np.ndarray, tokenizer: Tokenizer, where: str, taken: Taken) -> np.ndarray:
    """The document as stored here. Counts added begin and end tokens in `taken`."""
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocabulary):
        raise UserError(
            f"{where}: holds token {ids.min() if ids.min() < 0 else ids.max()}, the tokenizer has "
            f"{tokenizer.vocabulary}; give the tokenizer that made these shards"
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


def _link(shard: _Shard, parsed: mds.ShardContent, folder: Path) -> dict[str, Any]:
    """Link the file into the folder, or write its bytes there; returns its index entry."""
    target = folder / mds.shard_name(shard.number)
    target.unlink(missing_ok=True)  # left by a killed process
    try:
        os.link(shard.file, target)
    except OSError:  # another disk, or a store
        write_atomically(target, parsed.content)
    raw = {"basename": target.name, "bytes": len(parsed.content), "hashes": {}}
    stored = {**parsed.description, "hashes": []}
    return {**stored, "samples": len(parsed.bounds) - 1, "raw_data": raw, "zip_data": None}


def _parse(file: str, content: bytes) -> mds.ShardContent:
    compression = next((name for ending, name in COMPRESSIONS.items() if file.endswith(ending)), "")
    try:
        if compression:
            content = pyarrow.CompressedInputStream(io.BytesIO(content), compression).read()
        return mds.ShardContent.parse(content)
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}; restore the file or leave it out") from None


# ---- the folder -----------------------------------------------------------------------------------------------


def _finish(adoption: Adoption, tokenizer: Tokenizer, shards: Sequence[_Shard], taken: Sequence[Taken]) -> None:
    """Write the result from all imported shards: numbers without gaps, lengths, indexes, validation text, manifest,
    picture."""
    work = shards[0].work
    result = work / "result"
    if result.exists():
        shutil.rmtree(result)
    counts = {split: _number_shards(work / split, result / split / adoption.name, split, taken) for split in SPLITS}
    for split in SPLITS:
        if not counts[split]["documents"]:
            raise UserError(
                f"{adoption.folder}: no document for the {split} split; name a --validation folder or change "
                f"--validation-share = {adoption.validation_share}"
            )
    for file in work.glob("tokenizer*.json"):
        _link_or_copy(file, result / file.name)
    (result / "text").mkdir()
    with open(result / "text" / "validation.txt", "wb") as text:
        for shard in shards:
            text.write(read_array(shard.taken, "validation_text").tobytes())
    kept, text_bytes = (sum(counts[split][what] for split in SPLITS) for what in ("documents", "text_bytes"))
    empty = sum(one.empty for one in taken)
    lengths = [one.lengths[split] for split in SPLITS for one in taken if split in one.lengths]
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=tokenizer.dtype.name,
        counts={adoption.name: counts},
        shards={adoption.name: {split: measure_shards(result, adoption.name, split) for split in SPLITS}},
        rows={adoption.name: {"read": kept + empty, "kept": kept, "empty": empty}},
        row_bytes={adoption.name: {"read": text_bytes, "kept": text_bytes, "empty": 0}},
        statistics=length_statistics(lengths, text_bytes),
        files=describe_files(result),
        recipe=_recipe(adoption, taken),
        corpus_sha256=hashlib.sha256("".join(one.sha256 for one in taken).encode()).hexdigest(),
        encoder="adopted",
        python=platform.python_version(),
    ).write(result)
    draw_lengths(lengths, result / PICTURE)


def _recipe(adoption: Adoption, taken: Sequence[Taken]) -> dict[str, Any]:
    asked = {name: getattr(adoption, name) for name in ("folder", "column", "dtype", "name", "validation")}
    added = {what: sum(getattr(one, what) for one in taken) for what in ("begins_added", "ends_added")}
    return {"adopted": asked | {"validation_share": adoption.validation_share} | added}


def _number_shards(source: Path, folder: Path, split: str, taken: Sequence[Taken]) -> dict[str, int]:
    """Put the shards of a split into a folder, numbered without gaps, with lengths and index. Returns the counts."""
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number, one in enumerate(taken):
        if split in one.entries:
            place = len(entries)
            _link_or_copy(source / mds.shard_name(number), folder / mds.shard_name(place))
            save_array(folder / f"lengths.{place:05}.npy", one.lengths[split])
            raw = one.entries[split]["raw_data"] | {"basename": mds.shard_name(place)}
            entries.append(one.entries[split] | {"raw_data": raw})
    write_atomically(folder / "index.json", mds.encode_index(entries))
    mine = [one for one in taken if split in one.lengths]
    return {
        "documents": sum(len(one.lengths[split]) for one in mine),
        "text_bytes": sum(one.text_bytes[split] for one in mine),
        "tokens": sum(int(one.lengths[split].sum(dtype=np.int64)) for one in mine),
    }


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
