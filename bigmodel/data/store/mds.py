"""The bytes of an MDS shard, the format of mosaicml-streaming.

    number of samples n: uint32 | offsets of the samples and of the end: (n + 1) uint32 | columns: JSON | samples
    a sample: size of each column: uint32 | each column
    a column, `ndarray:<dtype>` of one axis: 4 + code: 1 byte | length: 1, 2 or 4 bytes by the code 0, 1, 2 | values
    a column, `str`: UTF-8

In: the documents of a whole shard. Out: the content of its file and its entry in index.json.

Guarantees: the bytes equal those of MDSWriter (tested). Written here so that a shard is a pure function of its
documents: any process writes it alone and in one go, and none imports streaming, which takes seconds.
"""

import bz2
import contextlib
import gzip
import io
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import snappy

Value = np.ndarray | bytes  # an array of one axis, or a text as UTF-8

LARGEST_SHARD_BYTES = 2**32 - 1  # samples are addressed by uint32 byte offsets
LARGEST_SHARD_TOKENS = 500_000_000  # at 4 bytes, plus the overhead of the shortest documents: below the bound above
ARRAYS = "ndarray:"  # of one axis and the dtype that follows
COLUMN_FACTS = ("names", "encodings", "sizes")
COMPRESSIONS = {".br": "brotli", ".bz2": "bz2", ".gz": "gzip", ".snappy": "snappy", ".zst": "zstd", ".zstd": "zstd"}
BEGINNINGS = {b"BZh": "bz2", b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SETTINGS: dict[str, Any] = {"compression": None, "format": "mds", "hashes": [], "size_limit": None, "version": 2}


def encode_shard(columns: Mapping[str, Sequence[Value]]) -> bytes:
    """Content of a shard file. Each column has one value per sample: non-empty arrays of one axis and one dtype, or
    texts as UTF-8."""
    names = sorted(columns)
    samples = [_encode_sample(values) for values in zip(*(columns[name] for name in names), strict=True)]
    config = json.dumps(_configuration({name: _encoding(columns[name][0]) for name in names}), sort_keys=True).encode()
    start = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = list(accumulate(map(len, samples), initial=start))
    assert offsets[-1] <= LARGEST_SHARD_BYTES, f"a shard of {offsets[-1]} bytes"
    head = np.array([len(samples), *offsets], "<u4").tobytes()
    return b"".join([head, config, *samples])


def shard_entry(number: int, columns: Mapping[str, np.ndarray], dtype: np.dtype | None) -> dict[str, Any]:
    """Entry of shard `number` in index.json; `columns`: lengths of each column's arrays. `dtype` None: columns of text,
    lengths in bytes."""
    configuration = _configuration(dict.fromkeys(sorted(columns), f"ndarray:{dtype.name}" if dtype else "str"))
    samples = len(next(iter(columns.values())))
    size = 4 + 4 * (samples + 1) + len(json.dumps(configuration, sort_keys=True).encode())
    for lengths in columns.values():
        counts = lengths.astype(np.int64)
        size += 4 * len(counts) + int(counts.sum()) * (dtype.itemsize if dtype else 1)
        if dtype:
            size += int((1 + np.where(counts < 1 << 8, 1, np.where(counts < 1 << 16, 2, 4))).sum())
    raw = {"basename": shard_name(number), "bytes": size, "hashes": {}}
    return {**configuration, "samples": samples, "raw_data": raw, "zip_data": None}


def encode_index(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps({"shards": list(entries), "version": 2}, sort_keys=True).encode()


def shard_name(number: int) -> str:
    return f"shard.{number:05}.mds"


def _configuration(encodings: dict[str, str]) -> dict[str, Any]:
    return {
        **SETTINGS,
        "column_names": list(encodings),
        "column_encodings": list(encodings.values()),
        "column_sizes": [None] * len(encodings),
    }


def _encoding(value: Value) -> str:
    return "str" if isinstance(value, bytes) else f"ndarray:{value.dtype.name}"


def _encode_sample(values: tuple[Value, ...]) -> bytes:
    encoded = [value if isinstance(value, bytes) else _encode_array(value) for value in values]
    return b"".join([*(len(part).to_bytes(4, "little") for part in encoded), *encoded])


def _encode_array(array: np.ndarray) -> bytes:
    length = len(array)
    code = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return bytes([4 + code]) + length.to_bytes(1 << code, "little") + array.tobytes()


# ---- compression ------------------------------------------------------------------------------------------------


def compression(file: str) -> str:
    """How a shard is compressed, by its name; empty if it is not."""
    return next((one for ending, one in COMPRESSIONS.items() if file.endswith(ending)), "")


def decompress(how: str, content: bytes) -> bytes:
    """The shard in the content of a file. Raises `ValueError` with the reason why it cannot be decompressed."""
    if not content:
        raise ValueError("the file is empty")
    whole: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        "bz2": bz2.decompress,
        "gzip": gzip.decompress,
        "snappy": snappy.decompress,
    }
    try:
        if how in whole:  # the first two allow zeros behind the data, as their programs do
            return whole[how](content)
        return pyarrow.CompressedInputStream(io.BytesIO(content), how).read()
    except (OSError, EOFError, ValueError, zlib.error, snappy.UncompressError) as error:
        raise ValueError(_reason(how, content, error)) from None


def describe(file: str, open_file: Callable[[], IO[bytes]]) -> dict[str, Any]:
    """The description of a shard's columns, from the start of its file. Raises `ValueError` with the reason if it has
    none; only then, and of a shard compressed by snappy, the file is read whole."""
    how = compression(file)
    if how != "snappy":
        with contextlib.suppress(OSError, ValueError), open_file() as stream:
            return read_head(pyarrow.CompressedInputStream(stream, how) if how else stream)[1]
    with open_file() as stream:
        return ShardContent.of_file(file, stream.read()).description


def _reason(how: str, content: bytes, error: Exception) -> str:
    if other := _other_compression(how, content):
        return other
    if "too much memory" in str(error):
        # Not compressed again: its index.json states the bytes of this file, and those of the plain one.
        return "its zstd window is above 128 MiB, the most that is read; decompress it: zstd -d --rm --long=31 FILE"
    if isinstance(error, EOFError) or "runcated" in str(error) or "end-of-stream" in str(error):
        return f"it is cut: its {how} data has no end"
    return f"its {how} data is damaged{f' ({error})' if str(error) else ''}"


def _other_compression(how: str, content: bytes) -> str:
    found = next((one for start, one in BEGINNINGS.items() if content.startswith(start)), how)
    return "" if found == how else f"its content is compressed by {found}, its name ends otherwise; rename it"


# ---- reading a whole shard ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardContent:
    """The checked bytes of a shard, its description of the columns, and the bounds of its samples."""

    content: bytes
    bounds: list[int]  # of the samples, in bytes
    description: dict[str, Any]  # column_names, column_encodings, column_sizes ...

    @classmethod
    def parse(cls, content: bytes) -> "ShardContent":
        """Accepts any decompressed shard of MDSWriter. Raises `ValueError` with the reason for other bytes."""
        try:
            bounds, description = read_head(io.BytesIO(content))
        except ValueError as error:
            raise ValueError(_other_compression("", content) or str(error)) from None
        if bounds[-1] != len(content) or sorted(bounds) != bounds:
            raise ValueError("its samples do not fill it")
        return cls(content, bounds, description)

    @classmethod
    def of_file(cls, file: str, content: bytes) -> "ShardContent":
        """As `parse`, of the content of a file as stored; its name says how it is compressed."""
        return cls.parse(decompress(compression(file), content))

    def encoding(self, column: str) -> str:
        return self.description["column_encodings"][self.description["column_names"].index(column)]

    def values(self, column: str) -> Iterator[bytes]:
        """A column's bytes as stored, sample by sample. Raises `ValueError` if a sample's columns do not fill it."""
        place = self.description["column_names"].index(column)
        starts, ends = np.array(self.bounds[:-1], np.int64), np.array(self.bounds[1:], np.int64)
        sizes = np.zeros((len(starts), len(self.description["column_sizes"])), np.int64)
        for number, size in enumerate(self.description["column_sizes"]):
            if size:
                sizes[:, number] = size
                continue
            if (starts + 4 > ends).any():
                raise ValueError("a sample's columns do not fill it")
            sizes[:, number] = self._integers(starts)
            starts += 4
        if (starts + sizes.sum(axis=1) != ends).any():
            raise ValueError("a sample's columns do not fill it")
        starts += sizes[:, :place].sum(axis=1)
        for start, end in zip(starts.tolist(), (starts + sizes[:, place]).tolist(), strict=True):
            yield self.content[start:end]

    def _integers(self, places: np.ndarray) -> np.ndarray:
        """The uint32 at each of these places."""
        return np.frombuffer(self.content, np.uint8)[places[:, None] + np.arange(4)].view("<u4")[:, 0]


def read_head(stream: IO[bytes]) -> tuple[list[int], dict[str, Any]]:
    """Bounds and description of a shard, without its samples. Raises `ValueError` if it is no shard."""
    try:
        count = int.from_bytes(stream.read(4), "little")
        bounds = np.frombuffer(stream.read(4 * (count + 1)), "<u4", count + 1).tolist()
        description = json.loads(stream.read(bounds[0] - 4 * (count + 2)))
        lists = [description[f"column_{what}"] for what in COLUMN_FACTS]
    except (ValueError, TypeError, LookupError):
        raise ValueError("its head is not that of an MDS shard") from None
    if not lists[0] or len({len(one) for one in lists}) > 1:
        raise ValueError("its head names no columns")
    return bounds, description


def read_entry(path: Path) -> dict[str, Any]:
    """Entry of an uncompressed shard in index.json, from the shard itself. Raises `ValueError` if it is no shard."""
    with open(path, "rb") as stream:
        bounds, description = read_head(stream)
    raw = {"basename": path.name, "bytes": bounds[-1], "hashes": {}}
    return {**description, **SETTINGS, "samples": len(bounds) - 1, "raw_data": raw, "zip_data": None}


class TokenShard:
    """Random access to an uncompressed shard whose columns are arrays of one axis. 4 bytes of memory a sample.

    A sample costs one open and one read: no file stays open, so one that is deleted is missed at once.
    """

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` if the file is no shard, or has a column of another encoding: see `has_tokens_only`."""
        with open(path, "rb") as stream:
            bounds, description = read_head(stream)
        if not has_tokens_only(description):
            raise ValueError(f"its columns are {description['column_encodings']}, not arrays of one axis")
        self._path, self._bounds = str(path), array("I", bounds)
        dtypes = (np.dtype(encoding.removeprefix(ARRAYS)) for encoding in description["column_encodings"])
        self._columns = list(zip(description["column_names"], dtypes, strict=True))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The read-only arrays of a sample, by column. Raises `IndexError` for a row that the shard lacks, `ValueError`
        for bytes that are no sample, and `OSError`."""
        start, end = self._bounds[row], self._bounds[row + 1]
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            content = os.pread(descriptor, end - start, start)
        finally:
            os.close(descriptor)
        sample, sizes, at = {}, 0, 4 * len(self._columns)
        for name, dtype in self._columns:
            size = int.from_bytes(content[sizes : sizes + 4], "little")
            sample[name] = decode_array(content[at : at + size], dtype)
            sizes, at = sizes + 4, at + size
        if at != len(content):
            raise ValueError("a sample's columns do not fill it")
        return sample


def has_tokens_only(description: Mapping[str, Any]) -> bool:
    """Whether all columns are arrays of one axis and a known type, as `encode_shard` writes them."""
    known = {f"{ARRAYS}{name}" for name in ("uint16", "uint32")}
    return known.issuperset(description["column_encodings"]) and not any(description["column_sizes"])


def decode_array(value: bytes, dtype: np.dtype) -> np.ndarray:
    """Inverse of `encode_shard` for one array. Raises `ValueError` if the bytes are no array of one axis."""
    code = value[0] - 4 if value else -1
    head = 1 + (1 << code) if code in (0, 1, 2) else 0
    if not head or int.from_bytes(value[1:head], "little") * dtype.itemsize != len(value) - head:
        raise ValueError("a sample is not an array of one axis")
    return np.frombuffer(value[head:], dtype)  # a copy, whose values are aligned
