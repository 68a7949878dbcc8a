"""A tokenizer file of another kind is called by its name, with the command that converts it."""

import re
from pathlib import Path

import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.store.foreign_tokenizers import NotSentencePiece, SentencePiece
from bigmodel.data.store.tokenizer import Tokenizer


def field(number: int, value: int | bytes) -> bytes:
    """A field of a message of protocol buffers; numbers and sizes below 128."""
    if isinstance(value, int):
        tag = [number << 3] if number < 16 else [(number << 3 & 0x7F) | 0x80, number >> 4]
        return bytes([*tag, value])
    return bytes([number << 3 | 2, len(value)]) + value


def model(kind: int, byte_fallback: int = 0, removes_spaces: int = 1, table: bytes = b"") -> bytes:
    """A sentencepiece model of two pieces."""
    pieces = b"".join(field(1, field(1, piece) + b"\x15\x00\x00\x80\xbf") for piece in (b"<unk>", b"ab"))
    trainer = field(3, kind) + field(35, byte_fallback)
    normalizer = field(2, table) + field(4, removes_spaces)
    return pieces + field(2, trainer) + field(3, normalizer)


LLAMA, T5 = model(2, byte_fallback=1, removes_spaces=0), model(1, table=b"x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            LLAMA,
            "is a sentencepiece model (BPE), not a tokenizer.json; "
            "`pip install sentencepiece protobuf 'transformers<5'`, convert it",
        ),
        (LLAMA, "LlamaTokenizerFast as T; T(vocab_file='PATH', add_prefix_space=True).save_pretrained('FOLDER')"),
        (T5, "T5TokenizerFast as T; T(vocab_file='PATH', add_prefix_space=True, extra_ids=0).save_pretrained"),
        (model(2, removes_spaces=1), "(BPE), not a tokenizer.json; transformers has no conversion that keeps its ids"),
        (model(1, byte_fallback=1), "(Unigram), not a tokenizer.json; transformers has no conversion"),
        (model(1), "(Unigram), not a tokenizer.json; transformers has no conversion"),  # no table: keeps line ends
        (LLAMA + field(1, field(1, b"word") + field(3, 4)), "(BPE), not a tokenizer.json; transformers has no conver"),
        (LLAMA + field(2, field(3, 2) + field(24, 1)), "(BPE), not a tokenizer.json; transformers has no conversion"),
        (T5 + field(3, field(2, b"x") + field(5, 0)), "(Unigram), not a tokenizer.json; transformers has no conver"),
        (model(4), "(characters), not a tokenizer.json; transformers has no conversion"),
        (b"IQ== 0\nIg== 1\n", "is a list of ranks for tiktoken, not a tokenizer.json"),
        (LLAMA[:-3], "cannot be read as a tokenizer"),
        (b"\x00\xff\xfe", "cannot be read as a tokenizer"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message.replace("PATH", str(path)))):
        Tokenizer.load(path)
    if b"ab" in content and message.startswith("is"):
        with pytest.raises(UserError, match=re.escape(f"tokenizer.model {message.replace('PATH', str(path))}")):
            Tokenizer.load(tmp_path)


def test_a_folder_of_vocabulary_and_merges_is_told_the_command(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"are a BPE as GPT-2's; convert it with `python -c .*GPT2TokenizerFast as T"):
        Tokenizer.load(tmp_path)


def test_a_damaged_model_is_none() -> None:
    assert SentencePiece.parse(LLAMA).kind == "BPE"
    for end in range(len(LLAMA)):
        for content in (LLAMA[:end], LLAMA[:end] + b"\xff" + LLAMA[end + 1 :]):
            try:
                SentencePiece.parse(content)
            except NotSentencePiece:
                continue
