"""Verify: compares a prepared folder, local or in a store, with its manifest.

In: the folder's path or URL. Out: a sentence for every damage: a missing, extra, cut or altered file; a contradiction
between a shard, its lengths, its index and the manifest; a token outside the vocabulary; a document without the begin
or end token of the manifest; counts that do not add up.

With a share of the documents to tokenize again (`retokenize.py`), also other ids than the exact library gives.

Guarantees: reads every byte of every file; writes nothing, neither locally nor in a store.

Costs: about 0.1 GB/s a core, for shards of text the tokenizer's speed (10 MB/s); each process of this machine holds a
shard in memory.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import retokenize
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.encoding import TEXT_COLUMNS, TOKEN_COLUMNS
from bigmodel.data.store import files, mds
from bigmodel.data.store.manifest import (
    EXACT,
    MANIFEST,
    OTHER_CONTENT,
    PICTURE,
    SPLITS,
    TOKENIZER_FILES,
    Manifest,
    find_damage,
    find_wrong_size,
    path_of,
    stored_amount,
)
from bigmodel.data.store.remote import FETCHED, read_manifest, without_manifest
from bigmodel.data.store.shards import all_statistics, measure_shard
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.sizes import counted_noun

INLINE_BYTES = 64 << 20  # below this, starting processes costs more than it saves


@dataclass(frozen=True)
class _Shard:
    """A shard to check. `manifest` lists only the shard and its lengths, because it is sent to another process."""

    location: str
    folder: str  # split/source
    number: int
    columns: tuple[str, ...]
    entry: dict[str, Any]  # of index.json
    manifest: Manifest
    has_tokenizer: bool  # undamaged; without it the tokens of texts are not counted
    share: float = 0.0  # of the documents, to tokenize again


@dataclass(frozen=True)
class _Checked:
    """Problems of a shard, and the lengths of its documents by column. `compared`: documents tokenized again.
    `digests`: of all documents, if the texts must be read from the sources."""

    problems: list[str]
    lengths: dict[str, np.ndarray]
    compared: int = 0
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    trained: tuple[int, int] = (0, 0)  # tokens, and the sum of their weights


def verify(location: str, progress: Progress, partly: bool = False, share: float = 0.0) -> list[str]:
    """All differences between a prepared folder and its manifest; empty if it is whole.

    `partly`: files may be missing, as on a node that fetches them when needed. `share`: of the documents, to tokenize
    again; what was compared is printed. Raises `UserError` without a readable manifest.
    """
    manifest = _load_manifest(location)
    there = files.sizes(location)
    problems, whole = _compare_names(location, manifest, there, partly)
    shards = _find_shards(location, manifest, whole, share)
    of_shards = {name for shard in shards for name in shard.manifest.files}
    others = [name for name in manifest.files if name in whole and name not in of_shards]
    number = len(os.sched_getaffinity(0)) if sum(there[name] for name in whole) > INLINE_BYTES else 1
    with units.processes(number, progress) as team:
        checked = team.run(
            "checking shards", _check_shard, [(shard,) for shard in shards], [_weight(shard) for shard in shards]
        )
        tasks = [(location, name, manifest.files[name]) for name in others]
        damages = team.run("checking other files", find_damage, tasks, [there[name] for name in others])
    problems += [damage for damage in damages if damage]
    problems += [problem for shard in checked for problem in shard.problems]
    if share and shards and shards[0].has_tokenizer:
        problems += _conclude_retokenizing(location, manifest, share, checked, progress)
    if problems or partly:
        return sorted(problems)
    return _compare_counts(location, manifest, shards, checked)


def _load_manifest(location: str) -> Manifest:
    if not files.is_remote(location):
        return Manifest.read(Path(location))
    content = read_manifest(location)
    if content is None:
        raise UserError(without_manifest(location))
    return Manifest.parse(content, files.join(location, MANIFEST))


def _compare_names(
    location: str, manifest: Manifest, there: dict[str, int], partly: bool
) -> tuple[list[str], set[str]]:
    """Problems with names and sizes, and the files without problems."""
    problems = [
        f"{files.join(location, name)}: not in the manifest"
        for name in there
        if name not in manifest.files and name not in (MANIFEST, PICTURE, FETCHED)
    ]
    whole = set()
    for name, recorded in manifest.files.items():
        if name in there:
            damage = find_wrong_size(files.join(location, name), recorded, there[name])
        else:
            damage = "" if partly else f"{files.join(location, name)}: missing"
        if damage:
            problems.append(damage)
        elif name in there:
            whole.add(name)
    return problems, whole


# ---- shards ---------------------------------------------------------------------------------------------------


def _find_shards(location: str, manifest: Manifest, whole: set[str], share: float) -> list[_Shard]:
    """The shards in the indexes that, with their lengths and index, exist in the right size."""
    shards = []
    has_tokenizer = all(
        name in whole and not find_damage(location, name, manifest.files[name])
        for name in TOKENIZER_FILES
        if name in manifest.files
    )
    for split in SPLITS:
        for source in manifest.sources:
            folder = f"{split}/{source}"
            columns = tuple(column for column in TOKEN_COLUMNS if column in manifest.counts[source][split])
            for number, entry in enumerate(_read_index(location, f"{folder}/index.json", manifest, whole)):
                names = [f"{folder}/{entry['raw_data']['basename']}"]
                names += [f"{folder}/{lengths_name(column, number)}" for column in columns]
                is_supervised = "trained_tokens" in manifest.counts[source][split]
                names += [f"{folder}/{spans_name(number)}"] if is_supervised else []
                if whole.issuperset(names):
                    mine = replace(manifest, files={name: manifest.files[name] for name in names})
                    again = 0.0 if is_supervised else share  # a rendered chat does not tell the chat
                    shards.append(_Shard(location, folder, number, columns, entry, mine, has_tokenizer, again))
    return shards


def lengths_name(column: str, number: int) -> str:
    return f"{column.removesuffix('tokens')}lengths.{number:05}.npy"


def spans_name(number: int) -> str:
    return f"spans.{number:05}.npy"


def _read_index(location: str, name: str, manifest: Manifest, whole: set[str]) -> list[dict[str, Any]]:
    """The entries of an index; none if it is missing or damaged, which is reported with the other files."""
    if name not in whole or find_damage(location, name, manifest.files[name]):
        return []
    return json.loads(_read(location, name))["shards"]


def _weight(shard: _Shard) -> int:
    return sum(recorded["bytes"] for recorded in shard.manifest.files.values())


def _check_shard(shard: _Shard) -> _Checked:
    """Read a shard and its lengths, each once."""
    content, problems = {}, []
    for name, recorded in shard.manifest.files.items():
        location = files.join(shard.location, name)
        try:
            content[name] = b"".join(files.chunks(location))
        except UserError as error:
            problems.append(str(error))
            continue
        if hashlib.sha256(content[name]).hexdigest() != recorded["sha256"]:
            problems.append(f"{location}: {OTHER_CONTENT}")
    if problems:
        return _Checked(problems, {})
    name, *lengths_names = content
    lengths = {
        column: np.load(io.BytesIO(content[other])) for column, other in zip(shard.columns, lengths_names, strict=False)
    }
    spans_file = f"{shard.folder}/{spans_name(shard.number)}"
    spans = np.load(io.BytesIO(content[spans_file])).astype(np.int64) if spans_file in content else None
    checked = _Checked([], lengths)
    try:
        parsed = mds.ShardContent.parse(content[name])
        problems = list(_check_content(shard, parsed, lengths, spans))
        if shard.share and shard.has_tokenizer and not problems:
            checked = _retokenize(shard, parsed, lengths)
    except ValueError as error:
        problems = [str(error)]
    problems += checked.problems
    if spans is not None:
        sizes = spans[:, 2] - spans[:, 1]
        checked = replace(checked, trained=(int(sizes.sum()), int((sizes * spans[:, 3]).sum())))
    return replace(checked, problems=[f"{files.join(shard.location, name)}: {problem}" for problem in problems])


def _check_content(
    shard: _Shard, content: mds.ShardContent, lengths: dict[str, np.ndarray], spans: np.ndarray | None
) -> Iterator[str]:
    """Problems inside a shard whose size and SHA-256 are right."""
    samples, manifest = len(content.bounds) - 1, shard.manifest
    if samples != shard.entry["samples"] or len(content.content) != shard.entry["raw_data"]["bytes"]:
        yield f"index.json says {shard.entry['samples']} documents in {shard.entry['raw_data']['bytes']} bytes"
    for column in shard.columns:
        if TEXT_COLUMNS[column] in content.description["column_names"]:
            yield from _check_texts(shard, content, column, lengths[column])
            continue
        if column not in content.description["column_names"]:
            yield f"has no column {column!r}"
            continue
        if content.encoding(column) != f"ndarray:{manifest.dtype}":
            yield f"{column!r} is stored as {content.encoding(column)}, the manifest says {manifest.dtype}"
            continue
        documents = [mds.decode_array(value, np.dtype(manifest.dtype)) for value in content.values(column)]
        found = np.array([len(document) for document in documents], np.int64)
        if not np.array_equal(found, lengths[column]):
            yield f"the documents' lengths are not those of {lengths_name(column, shard.number)}"
        yield from _check_tokens(np.concatenate(documents), found, manifest, has_ends=spans is None)
        if spans is not None and not _are_spans(spans, found):
            yield f"{spans_name(shard.number)} does not fit the documents"


def _are_spans(spans: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether spans lie in order inside documents of these lengths, with weights of 1 to 65,536 units."""
    rows, firsts, ends, weights = spans.T
    if (rows >= len(lengths)).any() or (np.diff(rows) < 0).any():
        return False
    inside = (firsts >= 1) & (firsts < ends) & (ends <= lengths[rows]) & (weights >= 1) & (weights <= 1 << 16)
    return bool(inside.all() and ((np.diff(rows) > 0) | (firsts[1:] >= ends[:-1])).all())


def _check_texts(shard: _Shard, content: mds.ShardContent, column: str, lengths: np.ndarray) -> Iterator[str]:
    """Problems of texts: not UTF-8, or other numbers of tokens than in the length file."""
    try:
        texts = [value.decode() for value in content.values(TEXT_COLUMNS[column])]
    except UnicodeDecodeError as error:
        yield f"{TEXT_COLUMNS[column]!r} is not UTF-8: {error}"
        return
    if not shard.has_tokenizer:  # reported with the other files
        return
    tokenizer = _same_tokenizer(shard.location, shard.manifest.tokenizer_sha256, shard.manifest.encoder)
    found = np.array([len(document) for document in tokenizer.encode_documents(texts)], np.int64)
    if not np.array_equal(found, lengths):
        yield f"the documents' lengths in tokens are not those of {lengths_name(column, shard.number)}"


def _retokenize(shard: _Shard, content: mds.ShardContent, lengths: dict[str, np.ndarray]) -> _Checked:
    """Compare the ids of a share of an undamaged shard's documents, or only take the digests of all."""
    manifest, dtype = shard.manifest, np.dtype(shard.manifest.dtype)
    exact = _same_tokenizer(shard.location, manifest.tokenizer_sha256, EXACT)
    problems: list[str] = []
    digests: list[int] = []
    compared = 0
    for column in shard.columns:
        rows = retokenize.choose(len(content.bounds) - 1, shard.share, f"{shard.folder}/{shard.number}")
        if TEXT_COLUMNS[column] in content.description["column_names"]:
            values = list(content.values(TEXT_COLUMNS[column]))
            texts = [values[row].decode() for row in rows]
            path = _same_tokenizer(shard.location, manifest.tokenizer_sha256, manifest.encoder)
            documents = path.encode_documents(texts)
        else:
            stored = [mds.decode_array(value, dtype) for value in content.values(column)]
            if not exact.gives_back_text:
                digests += [retokenize.digest(column, document) for document in stored]
                continue
            documents = [stored[row] for row in rows]
            texts = [exact.decode_all(document[1:-1]) for document in documents]
        compared += len(rows)
        problems += retokenize.find_differences(exact, rows, documents, texts)
    return _Checked(problems, lengths, compared, np.array(digests, np.uint64))


def _conclude_retokenizing(
    location: str, manifest: Manifest, share: float, checked: list[_Checked], progress: Progress
) -> list[str]:
    """Compare with the sources if ids and texts do not suffice, print what was compared, and return the problems."""
    stored = np.concatenate([one.digests for one in checked])
    compared = sum(one.compared for one in checked)
    problems: list[str] = []
    how = "by their stored text" if manifest.recipe.get("content") == "text" else "by the text that their ids stand for"
    if len(stored):
        exact = _tokenizer(location, EXACT)
        try:
            compared, problems = retokenize.compare_with_sources(manifest, exact, share, TOKEN_COLUMNS, stored)
            how = "read again from the sources"
        except UserError as error:
            return [
                f"{location}: no text was tokenized again: the ids do not give back their text, and it cannot be read "
                f"again: {error}; start this where `bigmodel prepare` ran, or leave out --retokenize"
            ]
    number = sum(len(one) for shard in checked for one in shard.lengths.values())
    supervised = sum(len(one) for shard in checked if any(shard.trained) for one in shard.lengths.values())
    left_out = f", {supervised:,} of them chats or responses, which are not compared" if supervised else ""
    progress.console.print(
        f"{location}: the library tokenized {counted_noun(compared, 'text')} again, {how}; {number:,} are stored"
        f"{left_out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return problems


def _check_tokens(tokens: np.ndarray, lengths: np.ndarray, manifest: Manifest, has_ends: bool) -> Iterator[str]:
    """Problems of tokens. `tokens`: the documents end to end; `lengths`: of each document; `has_ends`: they begin and
    end with the tokenizer's tokens for it."""
    if len(tokens) and tokens.max() >= manifest.vocabulary:
        yield f"holds token {tokens.max()}, the vocabulary has {manifest.vocabulary}"
    if not has_ends:
        return
    ends = np.cumsum(lengths)
    wrong = lengths < 2
    whole = np.flatnonzero(~wrong)
    wrong[whole] = (tokens[(ends - lengths)[whole]] != manifest.bos) | (tokens[ends[whole] - 1] != manifest.eos)
    if wrong.any():
        yield (
            f"document {np.argmax(wrong)} does not begin with token {manifest.bos} and end with token {manifest.eos}"
        )


# ---- counts ---------------------------------------------------------------------------------------------------


def _compare_counts(location: str, manifest: Manifest, shards: list[_Shard], checked: list[_Checked]) -> list[str]:
    """Numbers of the manifest that contradict the shards or each other; for a folder of undamaged files."""
    name = files.join(location, MANIFEST)
    found = [*_count_documents(manifest, shards, checked), *_count_rows(manifest)]
    text = manifest.files.get("text/validation.txt", {}).get("bytes")
    said = sum(stored_amount(counts["validation"], "text_bytes") for counts in manifest.counts.values())
    if text != said:
        found.append(f"validation text of {said} bytes, the file has {text}")
    lengths = {column: [one.lengths[column] for one in checked if column in one.lengths] for column in TOKEN_COLUMNS}
    if all_statistics(lengths, manifest.counts) != manifest.statistics:
        found.append("the statistics are not those of the documents' lengths")
    found += _compare_tokenizer(location, manifest)
    return [f"{name}: {problem}" for problem in found]


def _count_documents(manifest: Manifest, shards: list[_Shard], checked: list[_Checked]) -> Iterator[str]:
    for source in manifest.sources:
        for split, said in manifest.counts[source].items():
            mine = [one for shard, one in zip(shards, checked, strict=True) if shard.folder == f"{split}/{source}"]
            if manifest.shards[source][split] != [measure_shard(one.lengths["tokens"]) for one in mine]:
                yield f"{split}/{source}: the sizes of shards by the manifest are not those of their lengths"
            counted = {"documents": sum(len(one.lengths["tokens"]) for one in mine)}
            for column in (column for column in TOKEN_COLUMNS if column in said):
                counted[column] = sum(int(one.lengths[column].sum(dtype=np.int64)) for one in mine)
            if "trained_tokens" in said:
                trained = [sum(one.trained[place] for one in mine) for place in (0, 1)]
                counted |= dict(zip(("trained_tokens", "trained_weight"), trained, strict=True))
            for what, number in counted.items():
                if said[what] != number:
                    yield f"{split}/{source}: {said[what]} {what} by the manifest, {number} in the shards"


def _count_rows(manifest: Manifest) -> Iterator[str]:
    """Violations of kept + dropped = read and kept = stored, in documents and in bytes."""
    for what, table in (("documents", manifest.rows), ("text_bytes", manifest.row_bytes)):
        for source in manifest.sources:
            rows = table[source]
            accounted = sum(count for reason, count in rows.items() if reason != "read")
            stored = sum(stored_amount(manifest.counts[source][split], what) for split in SPLITS)
            if accounted != rows["read"]:
                yield f"{source}: read {rows['read']} {what}, kept and dropped {accounted}"
            if stored != rows["kept"]:
                yield f"{source}: kept {rows['kept']} {what}, stored {stored}"


@lru_cache(maxsize=2)
def _same_tokenizer(location: str, sha256: str, encoder: str) -> Tokenizer:
    return _tokenizer(location, encoder)


def _tokenizer(location: str, encoder: str) -> Tokenizer:
    """A folder's tokenizer, on the path of the manifest's `encoder`."""
    there = files.sizes(location)
    named = json.loads(_read(location, "tokenizer_config.json")) if "tokenizer_config.json" in there else None
    boundaries = (named["bos_token"], named["eos_token"]) if named else None
    fast, proven = path_of(encoder)
    return Tokenizer(_read(location, "tokenizer.json").decode(), boundaries=boundaries, fast=fast, proven=proven)


def _compare_tokenizer(location: str, manifest: Manifest) -> Iterator[str]:
    if manifest.files["tokenizer.json"]["sha256"] != manifest.tokenizer_sha256:
        yield "tokenizer_sha256 is not that of tokenizer.json"
        return
    tokenizer = _tokenizer(location, EXACT)
    for what in ("vocabulary", "bos", "eos"):
        if getattr(tokenizer, what) != getattr(manifest, what):
            yield f"{what} = {getattr(manifest, what)}, tokenizer.json has {getattr(tokenizer, what)}"


def _read(location: str, name: str) -> bytes:
    return b"".join(files.chunks(files.join(location, name)))
