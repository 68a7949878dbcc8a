"""A compressed file is read whole or refused with the true reason, whatever its name says."""

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import pyarrow
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import compression

LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(5000))
HALF = LINES.index(b"\n", len(LINES) // 2) + 1
SKIPPED = struct.pack("<II", 0x184D2A50, 5) + b"aside"  # a frame of zstd that readers pass over


def by_arrow(how: str, content: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, how) as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


PACK = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda content: by_arrow("zstd", content),
    "lz4": lambda content: by_arrow("lz4", content),
}
CHECKED = ("gzip", "bz2", "xz")  # pyarrow writes zstd and lz4 without a checksum, so it could find no wrong byte


def content_of(path: Path) -> bytes:
    how = compression.detect(str(path), compression.head_of(str(path)))
    with compression.opened(str(path), how) as stream:
        return stream.read()


@pytest.mark.parametrize("how", PACK)
def test_all_members_are_read_and_a_cut_or_damaged_file_is_never_a_shorter_one(tmp_path: Path, how: str) -> None:
    whole, first, second = (PACK[how](part) for part in (LINES, LINES[:HALF], LINES[HALF:]))
    file = tmp_path / "a"
    for content in (whole, first + second, first + PACK[how](b"") + second):
        file.write_bytes(content)
        assert content_of(file) == LINES
    wrong_byte = bytearray(whole)
    wrong_byte[len(whole) // 2] ^= 0x10
    other = f"its {how} data are followed by bytes that are none"
    for content, reason in (
        *((whole[:-cut], "") for cut in (1, 4, 20, len(whole) // 2)),
        *((first + second[:size], "") for size in (8, 30, len(second) - 1)),
        *([(bytes(wrong_byte), "")] if how in CHECKED else []),
        (whole + b"junk and more junk", other),
        (first + b"?" + second[1:], other),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            content_of(file)
        assert str(error.value).startswith(f"{file}: cannot be read: {reason}")


@pytest.mark.parametrize("how", ["gzip", "bz2", "xz"])
def test_zero_bytes_after_a_member_are_padding(tmp_path: Path, how: str) -> None:
    first, second = PACK[how](LINES[:HALF]), PACK[how](LINES[HALF:])
    (tmp_path / "a").write_bytes(first + b"\0" * 700_000 + second + b"\0" * 512)
    assert content_of(tmp_path / "a") == LINES


def test_zstd_passes_over_frames_to_skip_and_names_a_window_that_is_too_large(tmp_path: Path) -> None:
    first, second = PACK["zstd"](LINES[:HALF]), PACK["zstd"](LINES[HALF:])
    file = tmp_path / "a"
    file.write_bytes(SKIPPED + first + SKIPPED + second + SKIPPED)
    assert content_of(file) == LINES
    # `zstd --long=31`: no size, no checksum; a window of 2**31 bytes; a raw block, the last one.
    file.write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + (3 << 3 | 1).to_bytes(3, "little") + b"abc")
    with pytest.raises(UserError, match=r"a: its zstd window .* above 128 MiB.*recompress it: zstd -d --long=31"):
        content_of(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (b"7z\xbc\xaf\x27\x1crest", "a 7z archive"),
        (b"\xff\x06\0\0sNaPpYrest", "a snappy stream"),
        (b"\x02\x21\x4c\x18rest", "lz4's legacy format"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"a: is {what}, which is not read here; recompress it"):
        content_of(tmp_path / "a")
