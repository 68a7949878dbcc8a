"""The texts of a packed sequence for the terminal: a document after the other, each with a border.

In: a batch of one packed sequence and its tokenizer. Out: lines of text. For example, a width of 40:

    ┌ A, 128 tokens
    │ def area(width, height):↵    return wid
    │ th * height↵
    ├ B, 31 tokens
    │ import os↵
    └ 353 tokens of padding

Text of documents is not ours: control characters become U+FFFD, line breaks ↵. A long document shows its first lines
and its last one, a sequence of many documents the first `MOST_DOCUMENTS`.
"""

from itertools import pairwise

from rich.cells import chop_cells

from bigmodel.data.load.batch import Batch, SourceSide, letter_of, real_documents
from bigmodel.generation.text import Decoder, readable
from bigmodel.sizes import counted_noun

MOST_DOCUMENTS = 16
FIRST_LINES = 2  # of a document; the last one follows


def draw_texts(batch: Batch, tokenizer: Decoder, width: int) -> list[str]:
    """Lines of at most `width` columns; of pairs, the source of each document above its target."""
    sides: list[tuple[str, Batch | SourceSide]] = [("", batch)]
    if batch.source:
        sides = [("source: ", batch.source), ("target: ", batch)]
    is_real = real_documents(batch)
    spans = [list(pairwise(side.cu_seqlens.tolist())) for _, side in sides]
    shown = [number for number, real in enumerate(is_real) if real]
    lines: list[str] = []
    for number in shown[:MOST_DOCUMENTS]:
        lengths = [end - first for first, end in (places[number] for places in spans)]
        counts = " and ".join(
            f"{counted_noun(length, f'{name[:-2]} token'.strip())}"
            for length, (name, _) in zip(lengths, sides, strict=True)
        )
        lines.append(f"{'├' if lines else '┌'} {letter_of(number)}, {counts}")
        for (name, side), places in zip(sides, spans, strict=True):
            first, end = places[number]
            text = name + one_line(readable(tokenizer, side.tokens[first:end].tolist()))
            lines += [f"│ {part}" for part in _shortened(chop_cells(text, max(8, width - 2)))]
    if len(shown) > MOST_DOCUMENTS:
        lines.append(f"├ and {counted_noun(len(shown) - MOST_DOCUMENTS, 'more document')}")
    padding = sum(
        end - first for places in spans for (first, end), real in zip(places, is_real, strict=True) if not real
    )
    return [*lines, f"└ {counted_noun(padding, 'token')} of padding"]


def one_line(text: str) -> str:
    """Text of a document, line breaks as ↵, other control characters as U+FFFD."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "→")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _shortened(lines: list[str]) -> list[str]:
    """The first lines and the last one."""
    left_out = len(lines) - FIRST_LINES - 1
    return lines if left_out <= 1 else [*lines[:FIRST_LINES], f"... {left_out} lines more ...", lines[-1]]
