"""The index file of Megatron-LM's token files, x.idx beside x.bin.

    MMIDIDX\\0\\0 | version 1: uint64 | code of the type: uint8 | sequences n: uint64 | entries of documents d: uint64
    lengths of the sequences: n int32 | their first bytes in x.bin: n int64
    first sequence of each document, and the end of the last one: d int64 | if multimodal, mode of each sequence: n int8

Most writers put one sequence in a document; with --split-sentences a document is a sequence per sentence.

In: an index. Out: the type of the ids; begin and end of each document; the bytes of an index for documents.

Guarantees: what an index states agrees with itself and with the size of its .bin.

Source: megatron.core.datasets.indexed_dataset, megatron-core 0.16.1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.store import files

MAGIC = b"MMIDIDX\0\0"
HEAD_BYTES = 34
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SMALL_VOCABULARY = 65_500  # below it Megatron-LM stores uint16, else int32
RESTORE = "restore the .bin and .idx that belong together"


@dataclass(frozen=True)
class Head:
    dtype: np.dtype
    sequences: int
    entries: int


def beside(file: str, ending: str) -> str:
    """The file of the same name with another ending; a URL's settings stay at its end."""
    path, mark, settings = file.partition("?") if files.is_remote(file) else (file, "", "")
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0]}{ending}{mark}{settings}"


def read_head(index: str, content: bytes) -> Head:
    """Of an index. Raises `UserError` for other files, other versions, and types that are no integers."""
    if not content.startswith(MAGIC) or len(content) < HEAD_BYTES:
        raise UserError(f"{index}: is no index of Megatron-LM, its beginning differs; {RESTORE}")
    version, code = int.from_bytes(content[9:17], "little"), content[17]
    if version != 1:
        raise UserError(f"{index}: version {version} of Megatron-LM's index, 1 is read; write it again")
    if np.dtype(TYPES.get(code, "<f8")).kind == "f":
        what = f"ids of {np.dtype(TYPES[code]).name}" if code in TYPES else f"an unknown type of ids, code {code}"
        raise UserError(f"{index}: states {what}; ids are integers: {RESTORE}")
    sequences, entries = np.frombuffer(content, "<u8", 2, 18).tolist()
    return Head(np.dtype(TYPES[code]), sequences, entries)


def read_bounds(index: str, data: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents,) first ids of the documents of `data`, which has `tokens` ids, and their ends."""
    content = _content(index)
    head = read_head(index, content[:HEAD_BYTES].tobytes())
    plain = HEAD_BYTES + 12 * head.sequences + 8 * head.entries
    if len(content) not in (plain, plain + head.sequences):
        raise UserError(
            f"{index}: has {len(content):,} bytes, but {head.sequences:,} sequences and {head.entries:,} entries of "
            f"documents take {plain:,}; it is cut or damaged: {RESTORE}"
        )
    if len(content) > plain and content[plain:].any():
        raise UserError(
            f"{index}: has sequences of a mode other than 0, so it is multimodal data, and only text can be adopted"
        )
    parts = np.cumsum([HEAD_BYTES, 4 * head.sequences, 8 * head.sequences, 8 * head.entries])
    kinds = ("<i4", "<i8", "<i8")
    lengths, pointers, documents = (
        content[start:end].view(kind) for start, end, kind in zip(parts, parts[1:], kinds, strict=False)
    )
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or ends[-1] != tokens or (pointers != ends[:-1] * head.dtype.itemsize).any():
        raise UserError(
            f"{index}: states {ends[-1]:,} ids of {head.dtype.name} end to end, {data} has {tokens:,}, or they lie "
            f"elsewhere in it; {RESTORE}"
        )
    if not _are_documents(documents, head.sequences):
        raise UserError(
            f"{index}: its documents do not hold its {head.sequences:,} sequences each once; write it again, with "
            "end_document after each document"
        )
    bounds = ends[documents]
    return bounds[:-1], bounds[1:]


def _content(index: str) -> np.ndarray:
    """(bytes,) uint8; of a local file a map."""
    if files.is_remote(index):
        return np.frombuffer(b"".join(files.chunks(index)), np.uint8)
    with files.readable(index):
        return np.memmap(index, np.uint8, "r")


def _are_documents(documents: np.ndarray, sequences: int) -> bool:
    whole = len(documents) > 0 and documents[0] == 0 and documents[-1] == sequences
    return bool(whole and (np.diff(documents) >= 0).all())


def dtype_of(vocabulary: int) -> np.dtype:
    """The type that Megatron-LM stores ids by."""
    return np.dtype("<u2" if vocabulary < SMALL_VOCABULARY else "<i4")


def encode_index(lengths: Sequence[np.ndarray], dtype: np.dtype) -> Iterator[bytes]:
    """The content of an index of documents of one sequence each; `lengths`: tokens of each, in parts."""
    number = sum(map(len, lengths))
    code = next(code for code, name in TYPES.items() if np.dtype(name) == dtype)
    yield MAGIC + (1).to_bytes(8, "little") + bytes([code])
    yield np.array([number, number + 1], "<u8").tobytes()
    yield from (part.astype("<i4").tobytes() for part in lengths)
    at = 0
    for part in lengths:
        ends = at + np.cumsum(part, dtype=np.int64) * dtype.itemsize
        yield np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes() if len(part) else b""
        at = int(ends[-1]) if len(part) else at
    yield np.arange(number + 1, dtype="<i8").tobytes()
