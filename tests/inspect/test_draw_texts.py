"""The texts of a packed sequence in the terminal."""

from dataclasses import replace

import pytest

from bigmodel.generation.prompts import pack
from bigmodel.inspect.draw_texts import draw_texts, one_line


class Letters:
    """A tokenizer whose ids are code points."""

    vocabulary = 0x110000

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def drawn(texts: list[str], width: int = 40, padding: int = 0) -> list[str]:
    batch = pack([[ord(letter) for letter in text] for text in texts] + ([[0] * padding] if padding else []))
    labels = batch.tokens.clone()
    if padding:
        labels[-padding:] = -100
    return draw_texts(replace(batch, labels=labels), Letters(), width)


def test_each_document_has_its_border_and_its_text() -> None:
    assert drawn(["def f():\n    return 1\n", "import os"], padding=5) == [
        "┌ A, 22 tokens",
        "│ def f():↵    return 1↵",
        "├ B, 9 tokens",
        "│ import os",
        "└ 5 tokens of padding",
    ]


def test_long_documents_show_their_first_lines_and_the_last() -> None:
    lines = drawn(["a" * 100 + "end"], width=12)
    assert lines[1:-1] == ["│ aaaaaaaaaa", "│ aaaaaaaaaa", "│ ... 8 lines more ...", "│ end"]


def test_of_many_documents_the_first_are_shown() -> None:
    lines = drawn(["ab"] * 60)
    assert "├ and 44 more documents" in lines
    assert len(lines) == 34


@pytest.mark.parametrize("text", ["\x1b[31m", "\u202e", "\x00", "\x07"])
def test_control_characters_of_a_document_do_not_reach_the_terminal(text: str) -> None:
    assert all(letter.isprintable() for line in drawn([f"a{text}b"]) for letter in line)
    assert one_line("a\r\nb\tc") == "a↵b→c"


def test_wide_characters_count_two_columns() -> None:
    assert [len(line) for line in drawn(["\u6f22" * 12], width=18)[1:-1]] == [10, 6]
