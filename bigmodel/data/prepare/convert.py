"""Convert: write a prepared folder as token files of another system, the ways out that `adopt` has in.

    megatron   OUT/<split>/<source>.bin and .idx     data path: OUT/<split>/<source>
    nanogpt    OUT/train.bin, OUT/val.bin            all sources, by name
    llmc       OUT/train_<source>_00000.bin ...      a file per shard; modded-nanogpt reads them too
    olmo       OUT/<split>/<source>-00000.npy ...    a file per shard, its documents in .csv.gz beside it

In: a prepared folder. Out: these files and the tokenizer. A document is written as stored, `[bos] text [eos]`; where
begin and end are the same token, only the end is (in llmc the begin, as its writers have it).

Guarantees: the documents of a source stay in order, and `adopt` reads back the same ones. A shard is compared with the
manifest before its first use. The folder appears whole, by one rename; a killed conversion goes on from its shards.

Costs: a process holds a shard. Places in the files follow from the lengths, so any process writes any shard.
"""

import csv
import gzip
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import megatron
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.pipeline import conclude
from bigmodel.data.prepare.staging import claimed, folders_in, partial_of, put_in_place, stoppable
from bigmodel.data.prepare.token_files import SYSTEMS, encode_llmc_header, narrowest_type
from bigmodel.data.store.manifest import MANIFEST, SPLITS, TOKENIZER_FILES, Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun

TARGETS = ("megatron", "nanogpt", "llmc", "olmo")
FORMAT = 1  # raise it when the files of a conversion change
SHORT = {"train": "train", "validation": "val"}  # names of the splits in nanoGPT and modded-nanogpt
SMALL_IDS = 1 << 16  # what uint16 holds


@dataclass(frozen=True)
class Part:
    """A shard's documents in a file, `start` tokens behind its head. `done`: exists once they are written."""

    directory: Path
    to: str
    split: str
    source: str
    shard: int
    file: Path
    start: int
    tokens: int
    dtype: np.dtype
    done: Path

    @property
    def num_bytes(self) -> int:
        return self.tokens * self.dtype.itemsize


def convert(directory: Path, out: Path, to: str, progress: Progress) -> Path:
    """Make `out` and return it. Raises `UserError` for data that the format cannot hold."""
    out = out.absolute()
    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder, or delete this one")
    if to not in TARGETS:
        raise UserError(f"--to {to}: no such format; choose one of {', '.join(TARGETS)}")
    manifest = Manifest.read(directory)
    dtype = _dtype(to, manifest)
    _refuse_others(manifest)
    stores = {split: ShardStore(directory, split) for split in SPLITS}
    identity = hashlib.sha256(repr((FORMAT, to, units.versions())).encode() + (directory / MANIFEST).read_bytes())
    partial = partial_of(out)
    with claimed(partial), stoppable():
        work = partial / identity.hexdigest()[:16]
        for leftover in folders_in(partial):
            if leftover != work:
                shutil.rmtree(leftover)
        parts = list(_plan(stores, to, dtype, work))
        _write(parts, stores, work, progress)
        put_in_place(work / "result", out)
        shutil.rmtree(partial)
    documents = sum(store.num_documents for store in stores.values())
    tokens = sum(part.tokens for part in parts)
    conclude(
        progress,
        f"{out}: {counted_noun(documents, 'document')}, {tokens:,} tokens as {dtype.name}, for {SYSTEMS[to]}",
    )
    return out


def _dtype(to: str, manifest: Manifest) -> np.dtype:
    vocabulary = manifest.vocabulary
    if to == "nanogpt" and vocabulary > SMALL_IDS:
        raise UserError(
            f"--to nanogpt: the tokenizer has {vocabulary:,} tokens, and nanoGPT's uint16 ends at {SMALL_IDS - 1:,}; "
            "choose --to megatron, olmo or llmc, or a smaller tokenizer"
        )
    if to == "megatron":
        return megatron.dtype_of(vocabulary)
    return np.dtype(narrowest_type(vocabulary) if to == "olmo" else "<u2" if vocabulary <= SMALL_IDS else "<u4")


def _refuse_others(manifest: Manifest) -> None:
    """Raise `UserError` for documents of which the formats would lose a part."""
    for name, of in manifest.counts.items():
        counted = {what for counts in of.values() for what in counts}
        if "target_tokens" in counted:
            raise UserError(f"source {name!r}: holds pairs of texts, and these formats hold single ones; leave it out")
        if "trained_tokens" in counted:
            raise UserError(
                f"source {name!r}: holds chats or responses, and these formats cannot say which of their tokens are "
                "trained; leave it out"
            )


# ---- the plan -------------------------------------------------------------------------------------------------


def _plan(stores: dict[str, ShardStore], to: str, dtype: np.dtype, work: Path) -> Iterator[Part]:
    """Every shard's place in the files."""
    for split, store in stores.items():
        ends: dict[Path, int] = {}  # of the files, in tokens
        for source in store.sources:
            for shard in range(store.num_shards(source)):
                file = work / "result" / _name(to, split, source, shard)
                tokens = int(_lengths(store, source, shard).sum())
                done = work / "done" / f"{split}.{source}.{shard:05}"
                start = ends.get(file, 0)
                ends[file] = start + tokens
                yield Part(store.directory, to, split, source, shard, file, start, tokens, dtype, done)


def _name(to: str, split: str, source: str, shard: int) -> str:
    names = {
        "megatron": f"{split}/{source}.bin",
        "nanogpt": f"{SHORT[split]}.bin",
        "llmc": f"{SHORT[split]}_{source}_{shard:05}.bin",
        "olmo": f"{split}/{source}-{shard:05}.npy",
    }
    return names[to]


def _lengths(store: ShardStore, source: str, shard: int) -> np.ndarray:
    """(documents,) int64 written tokens of each document of a shard."""
    return store.lengths(source, shard).astype(np.int64) - (store.manifest.bos == store.manifest.eos)


# ---- writing --------------------------------------------------------------------------------------------------


def _write(parts: Sequence[Part], stores: dict[str, ShardStore], work: Path, progress: Progress) -> None:
    result = work / "result"
    (work / "done").mkdir(parents=True, exist_ok=True)
    if finished := sum(part.done.exists() for part in parts):
        progress.console.print(f"{work.parent}: going on from {finished:,} written shards", markup=False)
    for file, end in {part.file: part.start + part.tokens for part in parts}.items():
        _reserve(file, parts[0], end)
    weights = [part.num_bytes for part in parts]
    number = min(len(os.sched_getaffinity(0)), len(parts)) if sum(weights) > units.INLINE_BYTES else 1
    with units.processes(number, progress) as team:
        team.run("converting", write_part, [(part,) for part in parts], weights)
    if parts[0].to == "megatron":
        for split, store in stores.items():
            for source in store.sources:
                _write_index(result / split / f"{source}.idx", store, source, parts[0].dtype)
    for name in TOKENIZER_FILES:
        if (parts[0].directory / name).exists():
            shutil.copyfile(parts[0].directory / name, result / name)


def _reserve(file: Path, part: Part, tokens: int) -> None:
    """Make a file of its final size, with its head."""
    head = encode_llmc_header(part.dtype, tokens) if part.to == "llmc" else b""
    size = len(head) + tokens * part.dtype.itemsize
    if file.exists() and file.stat().st_size == size:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(head)
        stream.truncate(size)


def write_part(part: Part) -> None:
    """Write a shard's documents at their place; nothing if it is done."""
    if part.done.exists():
        return
    store = _store(part.directory, part.split)
    lengths = _lengths(store, part.source, part.shard)
    same = store.manifest.bos == store.manifest.eos
    kept = slice(0, -1) if same and part.to == "llmc" else slice(int(same), None)
    documents = [np.asarray(store.document(part.source, part.shard, row))[kept] for row in range(len(lengths))]
    content = np.concatenate(documents).astype(part.dtype).tobytes()
    assert len(content) == part.num_bytes, f"{part.file}: {len(content)} bytes, {part.num_bytes} are planned"
    with open(part.file, "r+b") as stream:
        stream.seek(
            part.file.stat().st_size - part.num_bytes if part.to == "llmc" else part.start * part.dtype.itemsize
        )
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if part.to == "olmo":
        write_atomically(part.file.with_suffix(".csv.gz"), _bounds_csv(part, lengths))
    write_atomically(part.done, b"")


@lru_cache(maxsize=2)
def _store(directory: Path, split: str) -> ShardStore:
    return ShardStore(directory, split)


def _bounds_csv(part: Part, lengths: np.ndarray) -> bytes:
    """dolma's columns: begin and end in ids, name of the document, its source file, its row there from 1 on."""
    content = io.StringIO()
    ends = list(accumulate(lengths.tolist()))
    source = f"{part.split}/{part.source}"
    csv.writer(content).writerows(
        (end - length, end, f"{source}/{part.shard:05}/{row}", source, row + 1)
        for row, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True))
    )
    return gzip.compress(content.getvalue().encode(), mtime=0)


def _write_index(file: Path, store: ShardStore, source: str, dtype: np.dtype) -> None:
    lengths = [_lengths(store, source, shard) for shard in range(store.num_shards(source))]
    with open(file, "wb") as stream:
        stream.writelines(megatron.encode_index(lengths, dtype))
