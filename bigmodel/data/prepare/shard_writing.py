"""Shard writing: shards from the files of encoded parts, each shard by any process.

In: the tokens of all units, in files of parts. Out: the shards of every source and split, with length files and
indexes. Example, `shard_tokens = 10`, stored documents of 5, 4, 3 and 12 tokens: shards [5, 4], [3], [12].

Guarantees: shards are cut by the lengths of the documents of a source and split in reading order, and by nothing else:
neither the parts nor the processes change a byte. An existing shard is not written again.

Costs: a process holds the bytes of two shards and a part.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.corpus import Source
from bigmodel.data.prepare.encoding import TEXT_COLUMNS, TOKEN_COLUMNS, read_array, save_array
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import SPLITS, pass_name
from bigmodel.run_directory import write_atomically


@dataclass(frozen=True)
class _Shard:
    """One shard to write. `entry`: of index.json. `parts`: the origin of its documents, in order: (file of a part,
    first document, end)."""

    folder: str  # in the result: split/source
    split: str
    number: int
    columns: tuple[str, ...]
    parts: tuple[tuple[Path, int, int], ...]
    entry: dict[str, Any]
    as_text: bool = False
    has_spans: bool = False
    has_passes: bool = False


def assemble(
    team: Team,
    sources: Sequence[Source],
    encoded: Mapping[str, Sequence[Path]],
    shard_tokens: int,
    dtype: np.dtype | None,
    result: Path,
) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, list[np.ndarray]]]:
    """Write all shards and their indexes. Returns counts by source and split, and all documents' lengths by column.

    `encoded`: each source's files of parts, in order. `dtype`: of the tokens; None: the shards hold text, with the
    same documents as shards of tokens.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {source.name: {} for source in sources}
    shards: list[_Shard] = []
    all_lengths: dict[str, list[np.ndarray]] = {column: [] for column in TOKEN_COLUMNS}
    for source in sources:
        mine = encoded[source.name]
        columns = TOKEN_COLUMNS[: len(source.columns)]
        for split in SPLITS:
            lengths = {column: [read_array(part, f"{split}_{column}_lengths") for part in mine] for column in columns}
            sizes = lengths
            if dtype is None:
                sizes = {column: [read_array(part, f"{split}_{column}_sizes") for part in mine] for column in columns}
            planned = _plan_shards(source.name, split, mine, lengths, sizes, shard_tokens, dtype)
            has_passes = dtype is None and split == SPLITS[0]  # shards of text may have random segmentations
            has_spans = source.record is not None
            shards += [replace(shard, has_spans=has_spans, has_passes=has_passes) for shard in planned]
            for column, parts in lengths.items():
                all_lengths[column].append(np.concatenate(parts))
            counts[source.name][split] = {
                "documents": len(all_lengths["tokens"][-1]),
                **{
                    column.replace("tokens", "text_bytes"): sum(
                        int(read_array(part, f"{split}_{column}_bytes")) for part in mine
                    )
                    for column in columns
                },
                **{column: sum(int(part.sum(dtype=np.int64)) for part in lengths[column]) for column in columns},
            }
            if source.record:
                counts[source.name][split] |= _count_trained(split, mine)
    weights = [shard.entry["raw_data"]["bytes"] for shard in shards]
    team.run("writing shards", _write_shard, [(shard, result) for shard in shards], weights)
    for folder in dict.fromkeys(shard.folder for shard in shards):
        index = mds.encode_index([shard.entry for shard in shards if shard.folder == folder])
        write_atomically(result / folder / "index.json", index)
    return counts, all_lengths


def _count_trained(split: str, parts: Sequence[Path]) -> dict[str, int]:
    """The trained tokens of supervised documents, and the sum of their weights in units of 1/65,536."""
    spans = [read_array(part, f"{split}_spans").astype(np.int64) for part in parts]
    firsts, ends, weights = np.concatenate([*spans, np.zeros((0, 3), np.int64)]).T
    trained = {"trained_tokens": (ends - firsts).sum(), "trained_weight": ((ends - firsts) * weights).sum()}
    return {name: int(amount) for name, amount in trained.items()}


def _plan_shards(
    source: str,
    split: str,
    encoded: Sequence[Path],
    lengths: dict[str, list[np.ndarray]],
    sizes: dict[str, list[np.ndarray]],
    shard_tokens: int,
    dtype: np.dtype | None,
) -> list[_Shard]:
    """Cut the documents of all parts, end to end, into shards: each closes before the document that would bring it
    above `shard_tokens`. `sizes`: stored values of each document: tokens, or bytes of text."""
    joined = {column: np.concatenate(parts) for column, parts in lengths.items()}
    stored = {column: np.concatenate(parts) for column, parts in sizes.items()}
    tokens = sum(part.astype(np.int64) for part in joined.values())
    if len(tokens) and tokens.max() > mds.LARGEST_SHARD_TOKENS:
        raise UserError(
            f"prepare.sources {source!r}: a document of {tokens.max():,} tokens does not fit a shard file of 4 GiB; "
            "split it, or drop it with prepare.max_characters"
        )
    ends = np.cumsum(tokens)
    bounds = [0, *accumulate(len(part) for part in lengths["tokens"])]  # of the parts, in documents
    shards: list[_Shard] = []
    first = 0
    while first < len(tokens):
        room = shard_tokens + (int(ends[first - 1]) if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, room, side="right")))
        parts = []
        for place in range(bisect_right(bounds, first) - 1, bisect_left(bounds, last)):
            start, end = bounds[place], bounds[place + 1]
            if end > start:
                parts.append((encoded[place], max(first, start) - start, min(last, end) - start))
        as_text = dtype is None
        mine = {TEXT_COLUMNS[name] if as_text else name: part[first:last] for name, part in stored.items()}
        entry = mds.shard_entry(len(shards), mine, dtype)
        shards.append(_Shard(f"{split}/{source}", split, len(shards), tuple(joined), tuple(parts), entry, as_text))
        first = last
    return shards


def _write_shard(shard: _Shard, result: Path) -> None:
    """Write a shard and its lengths from the parts' files, the shard last; nothing if it exists in its size."""
    folder = result / shard.folder
    path = folder / shard.entry["raw_data"]["basename"]
    if path.exists() and path.stat().st_size == shard.entry["raw_data"]["bytes"]:
        return
    documents: dict[str, list[mds.Value]] = {column: [] for column in shard.columns}
    lengths: dict[str, list[np.ndarray]] = {column: [] for column in shard.columns}
    for part, first, last in shard.parts:
        with np.load(part) as arrays:
            for column in shard.columns:
                name = f"{shard.split}_{column}"
                lengths[column].append(arrays[f"{name}_lengths"][first:last])
                sizes = arrays[f"{name}_sizes" if shard.as_text else f"{name}_lengths"]
                values, bounds = arrays[name], np.cumsum([0, *sizes])[first : last + 1].tolist()
                parts = [values[start:end] for start, end in pairwise(bounds)]
                documents[column] += [part.tobytes() for part in parts] if shard.as_text else parts
    folder.mkdir(parents=True, exist_ok=True)
    if shard.has_spans:
        save_array(folder / f"spans.{shard.number:05}.npy", _spans_of_shard(shard))
    for column, mine in lengths.items():
        name = f"{column.removesuffix('tokens')}lengths.{shard.number:05}.npy"
        save_array(folder / name, np.concatenate(mine).astype(np.uint32))
    if shard.has_passes:
        _write_lengths_of_passes(shard, folder)
    columns = {TEXT_COLUMNS[column] if shard.as_text else column: values for column, values in documents.items()}
    write_atomically(path, mds.encode_shard(columns))


def _write_lengths_of_passes(shard: _Shard, folder: Path) -> None:
    """A length file for each pass, of the columns with random segmentations."""
    for column in shard.columns:
        name, found = f"{shard.split}_{column}_lengths_of_passes", []
        for part, first, last in shard.parts:
            with np.load(part) as arrays:
                found += [arrays[name][:, first:last]] if name in arrays else []
        for number, lengths in enumerate(np.concatenate(found, axis=1) if found else ()):
            save_array(folder / pass_name(number, f"{column.removesuffix('tokens')}lengths", shard.number), lengths)


def _spans_of_shard(shard: _Shard) -> np.ndarray:
    """(k, 4) uint32: row in the shard, first token, end, weight in units of 1/65,536."""
    found, row = [np.zeros((0, 4), np.uint32)], 0
    for part, first, last in shard.parts:
        with np.load(part) as arrays:
            numbers = arrays[f"{shard.split}_num_spans"]
            start, end = int(numbers[:first].sum()), int(numbers[:last].sum())
            rows = np.repeat(np.arange(row, row + last - first), numbers[first:last])
            found.append(np.column_stack([rows, arrays[f"{shard.split}_spans"][start:end]]).astype(np.uint32))
        row += last - first
    return np.concatenate(found)
