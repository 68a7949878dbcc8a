"""Adopt: import shards of mosaicml-streaming or token files of other systems as a prepared folder.

In: a folder of MDS shards (compressed or not, local or in a store) with a column of token ids or of text, or files of
`token_files`, and the tokenizer that made the ids. Out: the folder described in `bigmodel.data.store.shards`, as
`prepare` makes it from text.

A column of text goes to `prepare`, with the shards as its source. The rest of this file imports token ids; what is said
of shards holds for the pieces of token files (`adopt_tokens`), which are never linked.

A sample is one document. A missing begin or end token is added, and the number of additions is printed. A document with
one of them in its middle is an error: such a sample is several documents, and their tokens would attend to each other.

Guarantees: what index.json says of the shards is true: all that differs is one error, before a document is taken.
Every document but empty ones is kept, in stored order, with unchanged ids. An uncompressed shard whose documents are
all stored as here and go to one split is linked (copied between disks); any other is rewritten. The folder appears
whole, by one rename. Killed, the next run continues from the imported shards in `<into>.partial`, if shards, index,
tokenizer and versions are the same.

Costs: shards are read once to be compared and once, or twice with --dtype, to be taken; taking them is about 1 MB of
text a second and core, because documents are decoded to count the bytes of their text.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.adopt_shard import Adoption, Portion, Shard, Taken, fitting_types_of, take_shard
from bigmodel.data.prepare.adopt_tokens import Piece, check_types, cut_pieces, find_documents, take_piece
from bigmodel.data.prepare.corpus import base_name
from bigmodel.data.prepare.encoding import read_array, save_array
from bigmodel.data.prepare.id_types import TELLING_BYTES, better_type, check_type, id_type
from bigmodel.data.prepare.indexes import compare_with_indexes
from bigmodel.data.prepare.pipeline import conclude, keep_boundaries, prepare
from bigmodel.data.prepare.staging import claimed, folders_in, partial_of, put_in_place, stoppable
from bigmodel.data.prepare.token_files import TokenFile, named_files, recognize
from bigmodel.data.store import files, mds
from bigmodel.data.store.manifest import SPLITS, Manifest, describe_files
from bigmodel.data.store.mds_index import INDEX, in_lines, list_shards, unlisted
from bigmodel.data.store.shards import length_statistics, measure_shards
from bigmodel.data.store.tokenizer import Tokenizer, read_tokenizer, tokenizer_file
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun

TOKEN_COLUMNS = ("tokens", "input_ids")  # likely names, in order
SPANS = "spans.*.npy"  # beside shards of chats and responses
FORMAT = 2  # raise it when the files of a taken shard change
HELD_OUT = re.compile(r"(?i)(^|[^a-z])(val|valid|validation|test|eval)([^a-z]|$)")  # in names of files


def find_column(adoption: Adoption) -> tuple[str, str]:
    """Name and encoding of the requested column, or of the likely one, by the index."""
    entry = list_shards(adoption.folder)[0].entry
    names, encodings = entry.column_names, entry.column_encodings
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


def adopt(adoption: Adoption, progress: Progress) -> Path:
    """Make `adoption.into` and return it. Raises `UserError` for shards, columns and documents that do not fit."""
    into = adoption.into.absolute()
    if into.exists():
        raise UserError(f"--into {into}: exists already; choose another folder, or delete this one")
    if token_files := _token_files(adoption):
        return _import(adoption, into, progress, _staged_files(adoption, token_files), _take_files(token_files))
    column, encoding = find_column(adoption)
    for folder in filter(None, (adoption.folder, adoption.validation)):
        if any(fnmatch(name, SPANS) for name in files.sizes(folder)):
            raise UserError(
                f"{folder}: holds chats or responses that `bigmodel prepare` made, and {SPANS} says which of their "
                "tokens are trained, which adopting would lose; set data.directory to the prepared folder itself"
            )
    if adoption.dtype and encoding != "bytes" and encoding.split(":")[1:2] != [id_type(adoption.dtype).name]:
        raise UserError(
            f"--dtype {adoption.dtype}: column {column!r} holds {encoding}, and only bytes do not say their type; "
            "leave it out"
        )
    for folder in filter(None, (adoption.folder, adoption.validation)):
        if left := unlisted(folder):
            message = f"{folder}: left out, because index.json does not list it: {in_lines(left)}"
            progress.console.print(message, markup=False)
    adoption = replace(adoption, column=column)
    settings = _settings(adoption, [shard.file for shard in list_shards(adoption.folder)])
    if encoding == "str" and adoption.validation:
        raise UserError(
            f"--validation {adoption.validation}: documents of text shards go to validation by their hash; "
            "leave it out, and set --validation-share"
        )
    if encoding == "str":
        return _prepare_text(settings, progress)
    return _import(adoption, into, progress, lambda partial: _staged_shards(adoption, partial), _take_shards)


# Takes the staging folder's parent; gives the staging folder, and what stands in it under that name.
Staged = Callable[[Path], tuple[Path, Any]]
# Takes what is staged; gives the portions, each one taken.
Take = Callable[[Path, Any, Adoption, Tokenizer, Progress], Sequence[Portion]]


def _import(adoption: Adoption, into: Path, progress: Progress, staged: Staged, take: Take) -> Path:
    partial = partial_of(into)
    with claimed(partial), stoppable():
        work, what = staged(partial)
        for leftover in folders_in(partial):
            if leftover != work:
                shutil.rmtree(leftover)
        tokenizer = _begin(adoption, work)
        portions = take(work, what, adoption, tokenizer, progress)
        if not portions:
            raise UserError(
                f"{adoption.folder}: holds no document, only begin and end tokens of the tokenizer; name other files, "
                "or the tokenizer that made them"
            )
        taken = [Taken.read(portion.taken) for portion in portions]
        _say(adoption, taken, progress)
        _finish(adoption, tokenizer, portions, taken)
        if staged(partial) != (work, what):
            raise UserError(
                f"{adoption.folder}: its shards or the tokenizer changed while they were adopted; run again"
            )
        put_in_place(work / "result", into)
        shutil.rmtree(partial)
    return into


def _prepare_text(settings: Settings, progress: Progress) -> Path:
    try:
        return prepare(settings, progress)
    except UserError as error:
        if "prepare." not in str(error):
            raise
        raise UserError(
            f"{error}; `bigmodel adopt` has no such settings for text: state them in a run file with these .mds files "
            "as prepare.sources, and start `bigmodel prepare`"
        ) from None


def _staged_shards(adoption: Adoption, partial: Path) -> tuple[Path, list[Shard]]:
    first = SPLITS[0] if adoption.validation else ""
    folders = [(adoption.folder, first)] + ([(adoption.validation, SPLITS[1])] if adoption.validation else [])
    listed = [(shard, split) for folder, split in folders for shard in list_shards(folder)]
    places = [(shard.file, split) for shard, split in listed]
    read = [file for file, _ in places] + [files.join(folder, INDEX) for folder, _ in folders]
    work = _staging(adoption, partial, places, read)
    return work, [Shard(number, split, work, adoption, shard) for number, (shard, split) in enumerate(listed)]


def _staging(adoption: Adoption, partial: Path, places: Any, read: Sequence[str]) -> Path:
    """The staging folder for these files, tokenizer and versions. `read`: files whose change makes it another one."""
    given = tokenizer_file(adoption.tokenizer)
    names = [given.parent / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    identities = [files.identity(file) for file in read]
    identities += [files.identity(str(name)) for name in [given, *names] if name.exists()]
    everything = [FORMAT, repr(adoption), places, identities, units.versions()]
    return partial / hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def _begin(adoption: Adoption, work: Path) -> Tokenizer:
    """The tokenizer; makes the staging folder."""
    tokenizer = Tokenizer.load(adoption.tokenizer, fast=False)
    for folder in (*SPLITS, "taken"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    given = tokenizer_file(adoption.tokenizer)
    write_atomically(work / "tokenizer.json", read_tokenizer(given))
    keep_boundaries(given.parent, work)
    return tokenizer


def _settings(adoption: Adoption, names: Sequence[str]) -> Settings:
    """The run file that imports the same files as text. Raises `UserError` for an invalid name or share."""
    source = {"name": adoption.name, "files": list(names), "column": adoption.column}
    section = {"sources": [source], "tokenizer": adoption.tokenizer, "validation_share": adoption.validation_share}
    table = {"prepare": section, "data": {"directory": adoption.into}}
    return settings_from_table(table, Path("adopt"))


def _take_shards(
    work: Path, shards: Sequence[Shard], adoption: Adoption, tokenizer: Tokenizer, progress: Progress
) -> Sequence[Shard]:
    weights = [files.size(shard.file) for shard in shards]
    _say_finished(shards, progress)
    with units.processes(_workers(len(shards), sum(weights)), progress) as team:
        compared = work / "compared"
        if not compared.exists():
            compare_with_indexes([shard.listed for shard in shards], team, progress)
            _check_dtype(shards, tokenizer.vocabulary, team, weights)
            compared.touch()
        team.run("adopting", take_shard, [(shard,) for shard in shards], weights)
    return shards


def _say_finished(portions: Sequence[Portion], progress: Progress) -> None:
    if finished := sum(portion.taken.exists() for portion in portions):
        progress.console.print(f"{portions[0].work.parent}: going on from {finished:,} taken shards", markup=False)


def _workers(tasks: int, num_bytes: int) -> int:
    return min(len(os.sched_getaffinity(0)), tasks) if num_bytes > units.INLINE_BYTES else 1


def _check_dtype(shards: Sequence[Shard], vocabulary: int, team: units.Team, weights: Sequence[int]) -> None:
    """Raise `UserError` if the ids in columns of bytes were not written by --dtype: those of any shard, or of all."""
    adoption = shards[0].adoption
    given, column = adoption.dtype, adoption.column
    if not given or not any(shard.listed.entry.encoding(column) == "bytes" for shard in shards):
        return
    found = team.run("comparing types", fitting_types_of, [(shard, vocabulary) for shard in shards], weights)
    told = [(shard.file, types) for shard, (types, size) in zip(shards, found, strict=True) if size >= TELLING_BYTES]
    files_of = {better_type(given, types, vocabulary) or given: file for file, types in told}
    if len(files_of) > 1:
        listed = "; ".join(f"{name}: {file}" for name, file in sorted(files_of.items()))
        raise UserError(
            f"--dtype {given}: the shards hold ids of different types ({listed}); write them again with one type"
        )
    for types in [*(types for _, types in told), set.intersection(*(types for types, _ in found))]:
        check_type(given, types, vocabulary, adoption.folder)


# ---- token files ----------------------------------------------------------------------------------------------


def _token_files(adoption: Adoption) -> dict[str, list[TokenFile]]:
    """The token files by split (empty: of each document by its hash); none if MDS shards are named. Raises `UserError`
    for options and names that do not fit."""
    folders = {SPLITS[0] if adoption.validation else "": adoption.folder}
    folders |= {SPLITS[1]: adoption.validation} if adoption.validation else {}
    named = {split: named_files(folder) for split, folder in folders.items()}
    if not named[next(iter(named))]:
        return {}
    if adoption.column:
        raise UserError(
            f"--column {adoption.column}: {adoption.folder} holds files of ids, without columns; leave it out"
        )
    if missing := [folders[split] for split, mine in named.items() if not mine]:
        raise UserError(f"--validation {missing[0]}: no .bin or .npy file; name files of the same kind as the others")
    if not adoption.validation and (held_out := [one for one in named[""] if HELD_OUT.search(base_name(one))]):
        raise UserError(
            f"{adoption.folder}: {held_out[0]} is named as held out, and would be trained; name the files for training "
            "by a pattern, and these by --validation"
        )
    if adoption.dtype:
        id_type(adoption.dtype)
    _settings(adoption, [adoption.folder])
    vocabulary = Tokenizer.load(adoption.tokenizer, fast=False).vocabulary
    return {split: recognize(mine, adoption.dtype, vocabulary) for split, mine in named.items()}


def _staged_files(adoption: Adoption, found: dict[str, list[TokenFile]]) -> Staged:
    def staged(partial: Path) -> tuple[Path, list[str]]:
        read = [name for mine in found.values() for file in mine for name in (file.location, file.bounds) if name]
        return _staging(adoption, partial, [[split, repr(mine)] for split, mine in found.items()], read), read

    return staged


def _take_files(found: dict[str, list[TokenFile]]) -> Take:
    def take(work: Path, _: Any, adoption: Adoption, tokenizer: Tokenizer, progress: Progress) -> list[Piece]:
        num_bytes = sum(file.tokens * file.itemsize for mine in found.values() for file in mine)
        pieces: list[Piece] = []
        with units.processes(_workers(len(os.sched_getaffinity(0)), num_bytes), progress) as team:
            for split, mine in found.items():
                check_types(mine, adoption, tokenizer.vocabulary)
                bounds, texts = find_documents(mine, tokenizer, team, work / f"found.{split}")
                pieces += cut_pieces(mine, bounds, texts, Portion(len(pieces), split, work, adoption))
            _say_finished(pieces, progress)
            team.run(
                "adopting", take_piece, [(piece,) for piece in pieces], [piece.last - piece.first for piece in pieces]
            )
        return pieces

    return take


# ---- the folder -----------------------------------------------------------------------------------------------


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


def _finish(adoption: Adoption, tokenizer: Tokenizer, portions: Sequence[Portion], taken: Sequence[Taken]) -> None:
    """Write the result from all imported portions: numbers without gaps, lengths, indexes, validation text,
    manifest."""
    work = portions[0].work
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
        for portion in portions:
            text.write(read_array(portion.taken, "validation_text").tobytes())
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
        without_token={adoption.name: {"unknown_tokens": sum(one.unknown for one in taken), "dropped_characters": 0}},
        encoder="adopted",
        python=platform.python_version(),
    ).write(result)


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
