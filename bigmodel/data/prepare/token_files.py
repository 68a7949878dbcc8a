"""Token files of other systems: ids end to end in a file, and what bounds their documents.

    Megatron-LM             x.bin, raw ids, with x.idx: type of the ids, length of each sequence, sequences per document
    nanoGPT                 x.bin, raw uint16; a document ends with its end token
    llm.c, modded-nanogpt   x.bin, 256 int32 (magic number, version, number of ids), then uint16 or uint32; an end token
                            lies between documents, and a document may go on in the next file
    OLMo-core, dolma        x.npy, raw ids without NumPy's header; x.csv.gz has begin and end of each document, else its
                            end token does

In: a folder, file, pattern or URL. Out: its `TokenFile`s; their ids, range by range; begin and end of the documents.

Guarantees: sizes, headers and indexes agree with each other; a file that is cut, or that belongs to another one, raises
`UserError`.

Sources: megatron.core.datasets.indexed_dataset (0.16.1), nanoGPT's data/openwebtext/prepare.py, llm.c's
dev/data/data_common.py, dolma.tokenizer.memmap_writer (1.2.1), olmo_core.data.utils (3.0.0).
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import compression, megatron
from bigmodel.data.store import files
from bigmodel.data.store.manifest import MANIFEST
from bigmodel.data.store.mds_index import INDEX

ENDINGS = (".bin", ".npy")
NUMPY_MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1024  # of llm.c: 256 int32
MAGIC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # of llm.c: version and type of the ids
EVALUATION_MAGIC = 20240522  # of llm.c: multiple-choice questions, no text
SYSTEMS = {
    "megatron": "Megatron-LM",
    "nanogpt": "nanoGPT",
    "llmc": "llm.c",
    "olmo": "OLMo-core",
    "olmo_csv": "OLMo-core with .csv.gz",
}
UNSIGNED = ("<u1", "<u2", "<u4", "<u8")


@dataclass(frozen=True)
class TokenFile:
    """`kind`: a key of `SYSTEMS`. `start`: byte of the first id. `bounds`: file that bounds the documents; empty: begin
    and end tokens do."""

    location: str
    kind: str
    dtype: str
    start: int
    tokens: int
    bounds: str = ""

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


# ---- finding --------------------------------------------------------------------------------------------------


def named_files(location: str) -> list[str]:
    """The token files that a folder, file, pattern, URL or Megatron's prefix names, sorted; none for MDS shards and for
    prepared folders."""
    if files.is_folder(location):
        names = files.sizes(location)
        return (
            []
            if {INDEX, MANIFEST} & names.keys()
            else [files.inside(location, name) for name in names if _is_tokens(name)]
        )
    found = files.find(location) or ([] if "?" in location else files.find(f"{location}.bin"))
    data = [megatron.beside(one, ".bin") if files.without_settings(one).endswith(".idx") else one for one in found]
    return [one for one in dict.fromkeys(data) if _is_tokens(one)]


def _is_tokens(name: str) -> bool:
    return files.without_settings(name).endswith(ENDINGS)


def recognize(found: Sequence[str], dtype: str, vocabulary: int) -> list[TokenFile]:
    """Each file's kind and type of ids. `dtype`: given by the user, or empty. Raises `UserError` for files that are
    none, for several kinds, and for names of label masks."""
    masks = [one for one in found if "mask" in files.without_settings(one).rpartition("/")[2]]
    if masks:
        raise UserError(
            f"{masks[0]}: is named as a mask of labels, which adopted documents cannot have: all their tokens are "
            "trained; name the files of ids by a pattern, or prepare chats from their messages"
        )
    known = [_recognize(one, dtype, vocabulary) for one in found]
    of_kind = {file.kind: file.location for file in known}
    if len(of_kind) > 1:
        listed = "; ".join(f"{SYSTEMS[kind]}: {one}" for kind, one in sorted(of_kind.items()))
        raise UserError(f"files of several kinds ({listed}); name those of one kind by a pattern")
    return known


def _recognize(file: str, dtype: str, vocabulary: int) -> TokenFile:
    size, head = files.size(file), _head(file)
    if not size:
        raise UserError(f"{file}: is empty; restore it or leave it out")
    if files.without_settings(file).endswith(".npy"):
        return _of_olmo(file, head, size, dtype, vocabulary)
    index = megatron.beside(file, ".idx")
    if files.find(index):
        if dtype:
            raise UserError(f"--dtype {dtype}: {index} states the type of its ids; leave it out")
        return TokenFile(file, "megatron", *_of_megatron(file, index, size), bounds=index)
    first = int.from_bytes(head[:4], "little")
    if first == EVALUATION_MAGIC:
        raise UserError(f"{file}: holds multiple-choice questions of llm.c, no text; leave it out")
    if first in MAGIC:
        return _of_llmc(file, head, size, dtype)
    return TokenFile(file, "nanogpt", dtype or "<u2", 0, _whole(file, size, np.dtype(dtype or "<u2")))


def _head(file: str) -> bytes:
    with files.readable(file), files.open_file(file) as stream:
        return stream.read(HEADER_BYTES)


def _whole(file: str, size: int, dtype: np.dtype) -> int:
    """Number of ids. Raises `UserError` for a size that is no whole number of them."""
    if size % dtype.itemsize:
        raise UserError(
            f"{file}: has {size:,} bytes, no whole number of ids of {dtype.name}; it is cut, so restore it, or name "
            "the type of its ids by --dtype"
        )
    return size // dtype.itemsize


def _of_megatron(file: str, index: str, size: int) -> tuple[str, int, int]:
    with files.readable(index), files.open_file(index) as stream:
        head = megatron.read_head(index, stream.read(megatron.HEAD_BYTES))
    if size % head.dtype.itemsize:
        raise UserError(
            f"{file}: has {size:,} bytes, no whole number of ids of {head.dtype.name}, which {index} states; it is "
            "cut, or not the file of this index: restore both"
        )
    return head.dtype.str, 0, size // head.dtype.itemsize


def _of_llmc(file: str, head: bytes, size: int, dtype: str) -> TokenFile:
    first, version, count = np.frombuffer(head, "<i4", 3).tolist() if len(head) >= 12 else (0, 0, 0)
    expected, stored = MAGIC.get(first, (0, "<u2"))
    if version != expected:
        raise UserError(f"{file}: version {version} of llm.c's token files, {expected} is read; write it again")
    if dtype and np.dtype(dtype) != np.dtype(stored):
        raise UserError(f"--dtype {dtype}: {file} states ids of {np.dtype(stored).name}; leave it out")
    there = (size - HEADER_BYTES) // np.dtype(stored).itemsize
    if (size - HEADER_BYTES) != count * np.dtype(stored).itemsize:
        raise UserError(f"{file}: its header states {count:,} ids, the file has {max(0, there):,}; restore it")
    return TokenFile(file, "llmc", stored, HEADER_BYTES, count)


def encode_llmc_header(dtype: np.dtype, tokens: int) -> bytes:
    """The first bytes of a file of llm.c; `dtype`: uint16 or uint32."""
    magic, version = next((magic, version) for magic, (version, name) in MAGIC.items() if np.dtype(name) == dtype)
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = magic, version, tokens
    return header.tobytes()


def _of_olmo(file: str, head: bytes, size: int, dtype: str, vocabulary: int) -> TokenFile:
    if head.startswith(NUMPY_MAGIC):
        raise UserError(
            f"{file}: begins with NumPy's header, and OLMo-core's .npy are raw ids; write it again by "
            "numpy.load(FILE).tofile(NEW)"
        )
    stored = np.dtype(dtype or narrowest_type(vocabulary))
    bounds = megatron.beside(file, ".csv.gz")
    has_bounds = bool(files.find(bounds))
    kind = "olmo_csv" if has_bounds else "olmo"
    return TokenFile(file, kind, stored.str, 0, _whole(file, size, stored), bounds if has_bounds else "")


def narrowest_type(vocabulary: int) -> str:
    """The type that OLMo-core takes for files of a tokenizer of this size."""
    return next(name for name in UNSIGNED if vocabulary - 1 <= np.iinfo(name).max)


# ---- reading --------------------------------------------------------------------------------------------------


def read_ids(file: TokenFile, first: int, last: int) -> np.ndarray:
    """(last - first,) ids of a file, in its own type."""
    with files.readable(file.location), files.open_file(file.location) as stream:
        stream.seek(file.start + first * file.itemsize)
        content = stream.read((last - first) * file.itemsize)
    if len(content) != (last - first) * file.itemsize:
        raise UserError(f"{file.location}: became shorter while it was read; restore it and run again")
    return np.frombuffer(content, file.dtype)


def read_bounds(file: TokenFile) -> tuple[np.ndarray, np.ndarray]:
    """(documents,) first ids of a file's documents, and their ends, as its `bounds` state them. Raises `UserError` if
    they do not cover the file."""
    if file.kind == "megatron":
        return megatron.read_bounds(file.bounds, file.location, file.tokens)
    starts, ends = _read_csv(file.bounds)
    before = np.concatenate([[0], ends])[:-1]  # the end of the row before each
    wrong = np.flatnonzero((starts != before) | (ends < starts))
    last = int(ends[-1]) if len(ends) else 0
    if len(wrong) or last != file.tokens:
        row = int(wrong[0]) if len(wrong) else len(ends)
        where = f"row {row + 1:,} is {starts[row]:,} to {ends[row]:,}" if len(wrong) else f"they end at {last:,}"
        raise UserError(
            f"{file.bounds}: its rows do not cover the {file.tokens:,} ids of {file.location} end to end: {where}; "
            "restore both, or name the type of the ids by --dtype"
        )
    return starts, ends


def _read_csv(file: str) -> tuple[np.ndarray, np.ndarray]:
    """The first two columns of a compressed CSV without header."""
    with compression.opened(file, compression.detect(file, compression.head_of(file))) as stream:
        bounds = np.fromiter(_rows(file, stream), np.dtype((np.int64, 2)))
    return bounds[:, 0], bounds[:, 1]


def _rows(file: str, stream: IO[bytes]) -> Iterator[tuple[int, int]]:
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8", newline=""))
    try:
        for row in rows:
            yield int(row[0]), int(row[1])
    except (ValueError, IndexError, csv.Error):
        raise UserError(
            f"{file}: line {max(1, rows.line_num):,}: has no begin and end of a document; restore the file"
        ) from None
