"""Our shards are those of mosaicml-streaming, byte for byte."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.data.store import mds
from tools.torchvision_operators import define_missing_torchvision_operators

COLUMNS = {"one": ["tokens"], "two": ["tokens", "target_tokens"]}
TEXTS = ["a", "", "été <|eos|>\n", "漢字" * 40_000]
LENGTHS = [1, 2, 255, 256, 700, 65_535, 65_536, 70_000, 3]


def write_shards(folder: Path, columns: dict[str, str], samples: Sequence[dict[str, Any]], **options: Any) -> str:
    """Write samples as MDSWriter's shards of at most 4,000 bytes with their index.json; returns the folder."""
    define_missing_torchvision_operators()
    from streaming import MDSWriter

    with MDSWriter(columns=columns, out=str(folder), **{"size_limit": 4000} | options) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    define_missing_torchvision_operators()
    from streaming import MDSWriter

    folder = tmp_path_factory.mktemp("mds")
    for dtype in ("uint16", "uint32"):
        for name, columns in COLUMNS.items():
            encodings = dict.fromkeys(columns, f"ndarray:{dtype}")
            writer = MDSWriter(columns=encodings, out=str(folder / dtype / name), size_limit=None)
            for length in LENGTHS:
                writer.write({column: np.arange(length + place).astype(dtype) for place, column in enumerate(columns)})
            writer.finish()
    writer = MDSWriter(columns={"target_text": "str", "text": "str"}, out=str(folder / "text"), size_limit=None)
    for text in TEXTS:
        writer.write({"text": text, "target_text": text.upper()})
    writer.finish()
    return folder


@pytest.mark.parametrize("dtype", [np.dtype(np.uint16), np.dtype(np.uint32)])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_shard_and_its_index_are_the_bytes_that_mdswriter_writes(reference: Path, dtype: np.dtype, name: str) -> None:
    folder = reference / dtype.name / name
    documents = {
        column: [np.arange(length + place).astype(dtype) for length in LENGTHS]
        for place, column in enumerate(COLUMNS[name])
    }
    content = mds.encode_shard(documents)
    assert content == (folder / "shard.00000.mds").read_bytes()
    entry = mds.shard_entry(0, {name: np.array([len(a) for a in arrays]) for name, arrays in documents.items()}, dtype)
    assert entry["raw_data"]["bytes"] == len(content)
    assert mds.encode_index([entry]) == (folder / "index.json").read_bytes()


def test_a_shard_of_text_and_its_index_are_the_bytes_that_mdswriter_writes(reference: Path) -> None:
    documents = {"text": [text.encode() for text in TEXTS], "target_text": [text.upper().encode() for text in TEXTS]}
    content = mds.encode_shard(documents)
    assert content == (reference / "text" / "shard.00000.mds").read_bytes()
    entry = mds.shard_entry(0, {name: np.array([len(t) for t in texts]) for name, texts in documents.items()}, None)
    assert entry["raw_data"]["bytes"] == len(content)
    assert mds.encode_index([entry]) == (reference / "text" / "index.json").read_bytes()


def test_a_shard_of_the_most_tokens_and_the_shortest_documents_fits_its_offsets() -> None:
    shortest = 3  # begin, one token, end
    tokens = mds.LARGEST_SHARD_TOKENS
    overhead = 4 + 4 + 1 + 1  # offset, size, code, length
    assert tokens * 4 + tokens // shortest * overhead + 1000 < mds.LARGEST_SHARD_BYTES
    assert json.loads(mds.encode_index([])) == {"shards": [], "version": 2}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_token_shard_gives_the_samples_that_mdswriter_wrote(reference: Path, dtype: str, name: str) -> None:
    shard = mds.TokenShard(reference / dtype / name / "shard.00000.mds")
    for row, length in enumerate(LENGTHS):
        sample = shard[row]
        assert list(sample) == sorted(COLUMNS[name])
        for place, column in enumerate(COLUMNS[name]):
            found = sample[column]
            assert found.dtype == np.dtype(dtype)
            assert found.flags.aligned
            assert not found.flags.writeable
            assert np.array_equal(found, np.arange(length + place).astype(dtype))
    with pytest.raises(IndexError):
        shard[len(LENGTHS)]


def test_a_token_shard_that_changed_after_it_was_opened_is_missed(reference: Path, tmp_path: Path) -> None:
    content = (reference / "uint16" / "two" / "shard.00000.mds").read_bytes()
    path = tmp_path / "shard.00000.mds"
    path.write_bytes(content)
    shard = mds.TokenShard(path)
    path.write_bytes(content[:-1])
    assert len(shard[0]["tokens"]) == 1
    with pytest.raises(ValueError, match="a sample is not an array of one axis"):
        shard[len(LENGTHS) - 1]
    start = int.from_bytes(content[4:8], "little")
    path.write_bytes(content[:start] + bytes([3]) + content[start + 1 :])  # the first column a byte short
    with pytest.raises(ValueError, match="a sample"):
        shard[0]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        shard[0]


def test_a_shard_of_text_is_no_token_shard(reference: Path) -> None:
    with pytest.raises(ValueError, match=r"its columns are \['str', 'str'\], not arrays"):
        mds.TokenShard(reference / "text" / "shard.00000.mds")
