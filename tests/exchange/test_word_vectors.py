"""Files of word vectors: gensim and we read and write the same ones; damage is named with its line."""

import gzip
import hashlib
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.user_error import UserError
from bigmodel.exchange.word_vectors import open_vectors

WORDS = ["the", ",", "café", "New_York", "<unk>", "3"]
VECTORS = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
GLOVE = "the 0.1 0.2\ncat -1 2e-1\n"


class Every:
    """Every word is wanted."""

    def __contains__(self, word: object) -> bool:
        return True


def read(path: Path, wanted: Any = None) -> tuple[str, list[str], np.ndarray]:
    with open_vectors(str(path)) as file:
        rows = list(file.read(wanted or Every()))
    return file.form, [word.decode() for word, _ in rows], np.array([vector for _, vector in rows])


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def binary(words: list[str], vectors: np.ndarray, end: bytes = b"") -> bytes:
    """As the C program writes it, with end = a line end; as gensim does without."""
    rows = (word.encode() + b" " + row.tobytes() + end for word, row in zip(words, vectors, strict=True))
    return f"{len(words)} {vectors.shape[1]}\n".encode() + b"".join(rows)


@pytest.mark.parametrize("form", ["text", "binary", "GloVe"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_gensim_writes_is_read_exactly(form: str, ending: str, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim is not installed: pip install gensim")
    keyed = models.KeyedVectors(5)
    keyed.add_vectors(WORDS, VECTORS)
    path = tmp_path / f"vectors{ending}"
    keyed.save_word2vec_format(str(path), binary=form == "binary", write_header=form != "GloVe")
    told, words, vectors = read(path)
    assert told == ("GloVe" if form == "GloVe" else f"Word2Vec, {form}")
    assert words == WORDS
    assert np.array_equal(vectors, VECTORS)


@pytest.mark.parametrize("form", ["text", "binary", "C", "GloVe"])
def test_gensim_reads_the_same_as_we(form: str, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim is not installed: pip install gensim")
    lines = "".join(f"{word} {' '.join(f'{x:.4f}' for x in row)} \n" for word, row in zip(WORDS, VECTORS, strict=True))
    content = {
        "text": f"6 5\n{lines}".encode(), "GloVe": lines.replace(" \n", "\n").encode(),
        "binary": binary(WORDS, VECTORS), "C": binary(WORDS, VECTORS, b"\n"),
    }[form]  # fmt: skip
    path = write(tmp_path / "vectors", content)
    theirs = models.KeyedVectors.load_word2vec_format(
        str(path), binary=form in ("binary", "C"), no_header=form == "GloVe"
    )
    _, words, vectors = read(path)
    assert words == theirs.index_to_key
    assert np.array_equal(vectors, theirs.vectors)


def test_only_wanted_words_are_read_and_the_hash_is_that_of_the_uncompressed_content(tmp_path: Path) -> None:
    content = "the 0.1 0.2\ncat rubbish 2\nthe 3 4\n"
    path = write(tmp_path / "vectors.gz", gzip.compress(content.encode()))
    with open_vectors(str(path)) as file:
        rows = list(file.read({b"the"}))
    assert [(word, vector.tolist()) for word, vector in rows] == [
        (b"the", np.array([0.1, 0.2], np.float32).tolist()), (b"the", [3.0, 4.0]),
    ]  # fmt: skip
    assert (file.count, file.sha256) == (3, hashlib.sha256(content.encode()).hexdigest())


def test_words_with_spaces_windows_line_ends_blank_lines_and_other_encodings_are_read(tmp_path: Path) -> None:
    glove = b", 0.5 0.25\r\n. . . 1 2\r\nat name@domain.com 3 4\r\n\r\ncaf\xe9 5 6"
    with open_vectors(str(write(tmp_path / "glove.txt", glove))) as file:
        rows = dict(file.read(Every()))
    assert {word: vector.tolist() for word, vector in rows.items()} == {
        b",": [0.5, 0.25], b". . .": [1, 2], b"at name@domain.com": [3, 4], b"caf\xe9": [5, 6],
    }  # fmt: skip


@pytest.mark.parametrize("first", ["2 2\n", ""])
@pytest.mark.parametrize("word", ["t\x01e", "\x0cthe", "\x7f"])
def test_a_word_with_control_characters_leaves_a_text_a_text(first: str, word: str, tmp_path: Path) -> None:
    form, words, _ = read(write(tmp_path / "vectors.txt", first + GLOVE.replace("the", word)))
    assert (form, words[1]) == ("Word2Vec, text" if first else "GloVe", "cat")
    assert word.strip() == words[0].strip()


@pytest.mark.parametrize("first", ["2 2\n", ""])
def test_a_byte_order_mark_is_no_part_of_the_first_word(first: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / "vectors.txt", f"\ufeff{first}{GLOVE}"))[1] == ["the", "cat"]


def test_a_file_larger_than_a_block_is_read_in_blocks(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(9000)]
    vectors = np.random.default_rng(2).standard_normal((9000, 50)).astype(np.float32)
    for form, content in (
        ("binary", binary(words, vectors)),
        ("text", "9000 50\n" + "".join(f"{w} {' '.join(map(str, v.tolist()))}\n" for w, v in zip(words, vectors))),  # noqa: B905
    ):
        path = write(tmp_path / form, content)
        assert path.stat().st_size > 1 << 20
        last = words[-1].encode()
        with open_vectors(str(path)) as file:
            rows = list(file.read({b"w0", last}))
        assert [word for word, _ in rows] == [b"w0", last]
        assert np.array_equal(rows[1][1], vectors[-1])
        assert file.count == 9000


def test_the_memory_for_a_file_is_a_few_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.write(b"9000 600\n")
        for number in range(9000):
            file.write(b"w%d " % number + bytes(2400))
    tracemalloc.start()
    try:
        with open_vectors(str(path)) as vectors:
            assert len(list(vectors.read({b"w8999"}))) == 1
        assert tracemalloc.get_traced_memory()[1] < 6 << 20 < path.stat().st_size / 3
    finally:
        tracemalloc.stop()


WHOLE = binary(WORDS, VECTORS)
DAMAGED: dict[str, tuple[bytes | str, str]] = {
    "fewer numbers": (GLOVE + "dog 0.1\n", r"line 3 has 1 numbers, and a vector has 2"),
    "more numbers": (GLOVE + "dog 0.1 0.2 0.3\n", r"line 3 has 3 numbers, and a vector has 2"),
    "cut text": ("3 2\n" + GLOVE, r"first line says 3 vectors, and there are 2: it is cut"),
    "longer text": ("1 2\n" + GLOVE, r"first line says 1 vectors, and there are 2"),
    "other channels": ("2 3\n" + GLOVE, r"line 2 has 2 numbers, and a vector has 3"),
    "no number": (GLOVE + "dog 0.1 x,2\n", r"line 3 has no number where one should be: 'x,2'"),
    "not a number": (GLOVE + "dog nan 1\n", r"line 3 has a number that is not finite"),
    "infinite": ("1 2\ndog 1 -inf\n", r"line 2 has a number that is not finite"),
    "beyond fp32": (GLOVE + "dog 1e39 1\n", r"line 3 has a number that is not finite in fp32"),
    "cut binary": (WHOLE[:-3], r"vector 6 ends inside its vector: the file is cut"),
    "cut at a vector's end": (WHOLE[: -21 - len("3")], r"first line says 6 vectors, and there are 5"),
    "longer binary": (WHOLE + b"more 1234", r"has more than the 6 vectors of 5 channels"),
    "NaN in binary": (b"1 2\na " + struct.pack("<ff", 1, float("nan")), r"vector 1 has a number that is not finite"),
    "no vectors": ("a text of some words\n", r"is no file of word vectors: its first line must be"),
    "rubbish": (b"\x00\x01\x02", r"is no file of word vectors"),
    "empty": ("", r"is no file of word vectors"),
    "no channels": ("5 0\na\n", r"vectors of 0 channels"),
    "binary without spaces": (b"2 2\n" + b"\x01" * 70_000, r"has no word where one should be"),
    "a line without end": (b"1 2\n" + b"a" * 70_000, r"line 2 is too long for a word and its vector"),
    "cut gzip": (gzip.compress(GLOVE.encode() * 99)[:-9], r"its gzip data end too early"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    content, words = DAMAGED[case]
    path = write(tmp_path / "vectors.txt", content)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"glove\.txt"):
        read(tmp_path / "glove.txt")
