"""Token files of Megatron-LM, nanoGPT, llm.c and OLMo-core: their documents, as their own writers made them.

`theirs/make.py` made the files in `theirs/` by megatron-core and dolma. nanoGPT and llm.c are scripts, not packages:
their files are written here by numpy, as they do.
"""

import csv
import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import adopt_tokens, megatron
from bigmodel.data.prepare.adopt_shard import Adoption, Portion
from bigmodel.data.prepare.adopt_tokens import check_types, cut_pieces, find_documents
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.token_files import encode_llmc_header, named_files, read_bounds, read_ids, recognize
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store.tokenizer import Tokenizer

THEIRS = Path(__file__).parent / "theirs"
TEXTS = [f"Document {number}:" + " time and people" * (1 + number * number % 7) for number in range(12)]
TOKENIZER = Tokenizer.load(THEIRS / "tokenizer.json")
IDS = [TOKENIZER.encode(text).tolist() for text in TEXTS]
BOS, EOS = 0, 1


def documents(location: str | Path, work: Path, tokenizer: Tokenizer = TOKENIZER, dtype: str = "") -> list[list[int]]:
    """The documents that the files at a location have, begin and end tokens included where they have them."""
    found = recognize(named_files(str(location)), dtype, tokenizer.vocabulary)
    check_types(found, Adoption(str(location), work, THEIRS, dtype=dtype), tokenizer.vocabulary)
    bounds, texts = find_documents(found, tokenizer, Team(None, quiet()), work)
    ids = np.concatenate([read_ids(file, 0, file.tokens) for file in found]).tolist()
    cut = [ids[start:end] for start, end in bounds.tolist()]
    assert texts.tolist() == [len([one for one in mine if one not in (BOS, EOS)]) for mine in cut]
    return cut


@pytest.mark.parametrize("name", ["uint8.bin", "uint16.idx", "int32", "int64.bin"])
def test_megatron_files_of_each_type_hold_the_documents_of_their_writer(name: str, tmp_path: Path) -> None:
    assert documents(THEIRS / name, tmp_path) == [[*ids, EOS] for ids in IDS]


def test_sequences_of_a_megatron_document_are_one_document_and_empty_ones_stay(tmp_path: Path) -> None:
    assert documents(THEIRS / "sentences.bin", tmp_path) == [*IDS[:6], [], *IDS[6:]]
    assert documents(THEIRS / "modes.bin", tmp_path / "modes") == [[*ids, EOS] for ids in IDS[:2]]


def test_pieces_are_cut_at_the_same_documents_whatever_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt_tokens, "PIECE_TOKENS", 122)
    cut = {}
    for name in ("uint16", "sentences"):
        work = tmp_path / name
        found = recognize(named_files(str(THEIRS / name)), "", 258)
        bounds, texts = find_documents(found, TOKENIZER, Team(None, quiet()), work)
        pieces = cut_pieces(found, bounds, texts, Portion(0, "", work, Adoption(name, work, THEIRS)))
        lengths = [texts[piece.first : piece.last] for piece in pieces]
        cut[name] = [one[one > 0].tolist() for one in lengths]
    assert cut["uint16"] == cut["sentences"]
    assert [sum(piece) + 2 * len(piece) <= 122 for piece in cut["uint16"]].count(False) == 0
    assert max(sum(piece) + 2 * len(piece) for piece in cut["uint16"]) == 122


def test_an_index_is_written_as_megatron_writes_it() -> None:
    lengths = np.array([len(ids) + 1 for ids in IDS])
    for name in ("uint8", "uint16", "int32", "int64"):
        written = b"".join(megatron.encode_index([lengths[:5], lengths[5:5], lengths[5:]], np.dtype(name)))
        assert written == (THEIRS / f"{name}.idx").read_bytes()


@pytest.mark.parametrize(("name", "begin"), [("dolma", [BOS]), ("dolma_end", [])])
def test_files_of_dolma_hold_its_documents_with_and_without_their_csv(
    name: str, begin: list[int], tmp_path: Path
) -> None:
    with gzip.open(THEIRS / f"{name}-0-00000.csv.gz", "rt") as stream:
        numbers = [int(row[2]) for row in csv.reader(stream)]
    expected = [[*begin, *IDS[number], EOS] for number in numbers]
    assert documents(THEIRS / f"{name}-0-*.npy", tmp_path / "with") == expected
    shutil.copy(THEIRS / f"{name}-0-00000.npy", tmp_path / "alone.npy")
    assert documents(tmp_path / "alone.npy", tmp_path / "without") == expected


def test_documents_of_a_stream_lie_between_end_tokens_also_across_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt_tokens, "RANGE_TOKENS", 100)
    stream = np.array([one for ids in IDS for one in [*ids, EOS]], np.uint16)
    np.memmap(tmp_path / "train.bin", np.uint16, "w+", shape=stream.shape)[:] = stream
    assert documents(tmp_path / "train.bin", tmp_path / "1") == [[*ids, EOS] for ids in IDS]
    (tmp_path / "llmc").mkdir()
    begins = np.array([one for ids in IDS for one in [BOS, *ids]])
    for dtype in (np.uint16, np.uint32):
        for number, part in enumerate(np.array_split(begins.astype(dtype), 5)):
            content = encode_llmc_header(part.dtype, len(part)) + part.tobytes()
            (tmp_path / "llmc" / f"web_train_{number:06}.bin").write_bytes(content)
        assert documents(tmp_path / "llmc", tmp_path / np.dtype(dtype).name) == [[BOS, *ids] for ids in IDS]


def test_the_header_is_that_of_llm_c() -> None:
    header = np.frombuffer(encode_llmc_header(np.dtype("uint16"), 700), "<i4")
    assert header[:4].tolist() == [20240520, 1, 700, 0]
    assert (len(header), np.frombuffer(encode_llmc_header(np.dtype("uint32"), 5), "<i4")[0]) == (256, 20240801)


# ---- what is refused --------------------------------------------------------------------------------------------


def broken(folder: Path, name: str, at: int, new: bytes) -> Path:
    """A copy of files in `theirs/`, with other bytes from a place in the first of them on."""
    for file in THEIRS.glob(f"{name.partition('.')[0]}.*"):
        shutil.copy(file, folder / file.name)
    content = bytearray((folder / name).read_bytes())
    content[at : at + len(new) if new else len(content)] = new
    (folder / name).write_bytes(content)
    return folder


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("name", "at", "new", "message"),
    [
        ("uint16.idx", 0, b"XX", r"uint16.idx: is no index of Megatron-LM, its beginning differs; restore"),
        ("uint16.idx", 20, b"", r"uint16.idx: is no index of Megatron-LM"),
        ("uint16.idx", 9, number(2, 8), r"version 2 of Megatron-LM's index, 1 is read; write it again"),
        ("uint16.idx", 17, number(7, 1), r"states ids of float32; ids are integers"),
        ("uint16.idx", 17, number(99, 1), r"states an unknown type of ids, code 99"),
        ("uint16.idx", 200, b"", r"has 200 bytes, but 12 sequences and 13 entries of documents take 282; it is cut"),
        ("uint16.idx", 18, number(1 << 60, 8), r"has 282 bytes, but 1,152,921,504,606,846,976 sequences"),
        ("uint16.idx", 34, number(3, 4), r"states \d+ ids of uint16 end to end, .*uint16.bin has 706, or they lie"),
        ("uint16.idx", 34 + 48, number(8, 8), r"or they lie elsewhere in it; restore the .bin and .idx that belong"),
        ("uint16.idx", 34 + 144, number(5, 8), r"its documents do not hold its 12 sequences each once; write it again"),
        ("uint16.idx", 17, number(4, 1), r"uint16.idx: states 706 ids of int32 end to end, .*uint16.bin has 353"),
        (
            "int32.bin",
            1001,
            b"",
            r"has 1,001 bytes, no whole number of ids of int32, which .*int32.idx states; it is cut",
        ),
        ("uint16.bin", 1000, b"", r"states 706 ids of uint16 end to end, .*uint16.bin has 500"),
        ("uint16.bin", 0, b"", r"uint16.bin: is empty; restore it or leave it out"),
        ("images.bin", 0, b"\x05", r"images.idx: has sequences of a mode other than 0, so it is multimodal data"),
        ("uint16.bin", 10, number(258, 2), r"holds token 258 at place 5, the tokenizer has 258; give the tokenizer"),
        ("int32.bin", 8, number(2**32 - 1, 4), r"holds token -1 at place 2, the tokenizer has 258"),
        (
            "dolma-0-00000.npy",
            1000,
            b"",
            r"dolma-0-00000.csv.gz: its rows do not cover the 500 ids of .*: row|they end",
        ),
        ("dolma-0-00000.npy", 1001, b"", r"has 1,001 bytes, no whole number of ids of uint16; it is cut"),
        ("dolma-0-00000.npy", 0, b"\x93NUMPY", r"begins with NumPy's header, .* raw ids; write it again by numpy.load"),
        (
            "dolma-0-00000.csv.gz",
            40,
            b"",
            r"dolma-0-00000.csv.gz: cannot be read: its gzip data end too early; restore",
        ),
        ("dolma-0-00000.csv.gz", 0, b"begin,end\n", r"csv.gz: line 1: has no begin and end of a document; restore"),
    ],
)
def test_broken_files_are_one_message(name: str, at: int, new: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        documents(broken(tmp_path, name, at, new), tmp_path / "work")


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ("", "they end at 0"),
        ("0,300\n300,800\n", "they end at 800"),
        ("0,300\n310,706\n", "row 2 is 310 to 706"),
        ("0,300\n300,200\n200,706\n", "row 2 is 300 to 200"),
    ],
)
def test_a_csv_that_does_not_cover_its_file_is_an_error(rows: str, where: str, tmp_path: Path) -> None:
    broken(tmp_path, "dolma_end-0-00000.npy", 0, b"%")
    (tmp_path / "dolma_end-0-00000.csv.gz").write_bytes(gzip.compress(rows.encode()))
    (file,) = recognize(named_files(str(tmp_path)), "", 258)
    with pytest.raises(
        UserError, match=rf"csv.gz: its rows do not cover the 706 ids of .* end to end: {where}; restore both"
    ):
        read_bounds(file)


def test_headers_of_llm_c_must_be_true(tmp_path: Path) -> None:
    ids = np.arange(2, 100, dtype=np.uint16).tobytes()
    header = encode_llmc_header(np.dtype("uint16"), 98)
    for content, message in (
        (header + ids[:-2], "its header states 98 ids, the file has 97; restore it"),
        (header[:4] + number(3, 4) + header[8:] + ids, "version 3 of llm.c's token files, 1 is read"),
        (header[:10], "version 1 of llm.c|its header states"),
        (number(20240522, 4) + header[4:] + ids, "holds multiple-choice questions of llm.c, no text; leave it out"),
    ):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=rf"a.bin: {message}"):
            recognize([str(tmp_path / "a.bin")], "", 258)
    (tmp_path / "a.bin").write_bytes(header + ids)
    with pytest.raises(UserError, match=r"--dtype int32: .*a.bin states ids of uint16; leave it out"):
        recognize([str(tmp_path / "a.bin")], "int32", 258)


def test_ids_of_another_type_or_tokenizer_are_refused_with_the_remedy(tmp_path: Path) -> None:
    wide = np.array([one for ids in IDS for one in [*ids, EOS]], np.uint32)
    wide.tofile(tmp_path / "a.npy")
    with pytest.raises(
        UserError,
        match=r"^without --dtype read as uint16: the samples of .*a.npy also fit uint32.*; set --dtype uint32",
    ):
        documents(tmp_path, tmp_path / "work")
    with pytest.raises(
        UserError, match=r"^--dtype uint16: the samples of .*a.npy also fit uint32.*; set --dtype uint32"
    ):
        documents(tmp_path, tmp_path / "work", dtype="uint16")
    assert documents(tmp_path, tmp_path / "wide", dtype="uint32") == [[*ids, EOS] for ids in IDS]
    wide[wide != EOS].astype(np.uint16).tofile(tmp_path / "a.npy")
    with pytest.raises(
        UserError, match=r"no begin or end token of the tokenizer is in its ids, so its documents cannot"
    ):
        documents(tmp_path, tmp_path / "none")
    wide[:-1].astype(np.uint16).tofile(tmp_path / "a.npy")
    with pytest.raises(
        UserError, match=r"a.npy: its last id is not the tokenizer's end token, and it has no .csv.gz; it"
    ):
        documents(tmp_path, tmp_path / "cut")
    with pytest.raises(UserError, match=r"--dtype int32: .*uint16.idx states the type of its ids; leave it out"):
        documents(THEIRS / "uint16.bin", tmp_path / "stated", dtype="int32")


def test_files_of_several_kinds_and_masks_of_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(number(EOS, 2))
    (tmp_path / "b.npy").write_bytes(number(EOS, 2))
    with pytest.raises(
        UserError, match=r"files of several kinds \(nanoGPT: .*a.bin; OLMo-core: .*b.npy\); name those of"
    ):
        documents(tmp_path, tmp_path)
    (tmp_path / "labels_mask.npy").write_bytes(b"\0")
    with pytest.raises(
        UserError, match=r"labels_mask.npy: is named as a mask of labels, which adopted documents cannot"
    ):
        documents(tmp_path, tmp_path)
