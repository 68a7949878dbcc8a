"""Token files of other systems for `adopt`: where their documents begin and end, and portions of them.

In: the files of `token_files`. Out: the documents of all files of a split, end to end in one numbering of tokens; and
pieces of them, each taken by any process.

Begin and end tokens are found in one pass over the ids. Files of nanoGPT, llm.c, and OLMo-core without .csv.gz are one
stream: a document is what lies between two such tokens, also across files. Example, begin 0, end 1:

    files     [0 7 8 1 0 9] [9 1 0 5 1]
    documents [0 7 8 1] [0 9 9 1] [0 5 1]

Guarantees: ids are those of the tokenizer, and of the type that they are read by, before a document is taken. A piece
is cut by the text tokens of its documents, plus 2 each, and by nothing else: the same documents give the same shards
from any kind of files. A pass over a range that is done is not repeated after a kill.

Costs: 32 bytes of memory a document; a process holds a range of 32 M ids, or a piece. The pass reads about 0.5 GB/s and
core.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.adopt_shard import Adoption, Portion, Taken, sort_documents, write_documents
from bigmodel.data.prepare.cleaning import is_whole, write_arrays
from bigmodel.data.prepare.encoding import save_array
from bigmodel.data.prepare.id_types import TELLING_BYTES, TYPES, check_type, fitting_types
from bigmodel.data.prepare.token_files import TokenFile, read_bounds, read_ids
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store.mds import LARGEST_SHARD_TOKENS
from bigmodel.data.store.tokenizer import Tokenizer

RANGE_TOKENS = 1 << 25  # of one pass
PIECE_TOKENS = 32_000_000  # as prepare.shard_tokens
SAMPLE_BYTES = 1 << 20  # of a file show the type of its ids


@dataclass(frozen=True)
class Range:
    """Ids of a file that one process looks through. `found`: the file that it writes."""

    file: TokenFile
    first: int
    last: int
    found: Path


@dataclass(frozen=True)
class Piece(Portion):
    """Neighbouring documents, rows [first, last) of the array in `documents`. `parts`: the files that hold them, with
    the number of each one's first token in the split."""

    documents: Path
    first: int
    last: int
    parts: tuple[tuple[TokenFile, int], ...]


# ---- finding documents ----------------------------------------------------------------------------------------


def check_types(found: Sequence[TokenFile], adoption: Adoption, vocabulary: int) -> None:
    """Raise `UserError` if the ids of a file whose type no header states were written by another type."""
    for file in found:
        if file.kind in ("megatron", "llmc"):
            continue
        number = min(file.tokens, SAMPLE_BYTES // file.itemsize // 8 * 8)
        content = read_ids(file, 0, number).tobytes()
        if len(content) < TELLING_BYTES:
            continue
        size = file.tokens * file.itemsize
        head = content[: len(content) // 8 * 8]
        fitting = {one for one in fitting_types([head], vocabulary) if size % np.dtype(one).itemsize == 0}
        if fitting != TYPES:
            given = adoption.dtype or np.dtype(file.dtype).name
            check_type(given, fitting, vocabulary, file.location, asked=bool(adoption.dtype))


def find_documents(
    found: Sequence[TokenFile], tokenizer: Tokenizer, team: Team, work: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(documents, 2) first token and end of each, begin and end tokens included where they are there, and (documents,)
    text tokens. Tokens are numbered through all files. `work`: a folder for finished ranges."""
    work.mkdir(parents=True, exist_ok=True)
    stated = [read_bounds(file) for file in found if file.bounds]
    ranges = [
        Range(file, first, min(first + RANGE_TOKENS, file.tokens), work / f"{number:05}-{first}.npz")
        for number, file in enumerate(found)
        for first in range(0, file.tokens, RANGE_TOKENS)
    ]
    limits = tokenizer.bos, tokenizer.eos, tokenizer.vocabulary
    weights = [(one.last - one.first) * one.file.itemsize for one in ranges]
    team.run("finding documents", look_through, [(one, *limits) for one in ranges], weights)
    begins, ends = _found(found, ranges)
    starts = np.cumsum([0, *(file.tokens for file in found)])
    if stated:
        pairs = zip(starts, stated, strict=False)
        bounds = np.concatenate([at + np.stack(one, axis=1) for at, one in pairs])
        return bounds, _count_text(bounds, begins, ends)
    _check_borders(found, starts, begins, ends)
    bounds = _between(np.union1d(begins, ends), int(starts[-1]))
    texts = bounds[:, 1] - bounds[:, 0]
    return bounds + np.stack([-_contains(begins, bounds[:, 0] - 1), _contains(ends, bounds[:, 1])], axis=1), texts


def look_through(one: Range, bos: int, eos: int, vocabulary: int) -> None:
    """Write where the begin and end tokens of a range are. Raises `UserError` for ids that the tokenizer lacks."""
    if is_whole(one.found):
        return
    ids = read_ids(one.file, one.first, one.last)
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        place = int(wrong.argmax())
        raise UserError(
            f"{one.file.location}: holds token {ids[place]} at place {one.first + place:,}, the tokenizer has "
            f"{vocabulary:,}; give the tokenizer that made these ids, or their type by --dtype"
        )
    write_arrays(one.found, begins=np.flatnonzero(ids == bos), ends=np.flatnonzero(ids == eos))


def _found(found: Sequence[TokenFile], ranges: Sequence[Range]) -> tuple[np.ndarray, np.ndarray]:
    """Places of all begin and of all end tokens, rising."""
    starts = dict(zip(found, np.cumsum([0, *(file.tokens for file in found)]).tolist(), strict=False))
    begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for one in ranges:
        with np.load(one.found) as arrays:
            begins.append(arrays["begins"] + starts[one.file] + one.first)
            ends.append(arrays["ends"] + starts[one.file] + one.first)
    return np.concatenate(begins), np.concatenate(ends)


def _check_borders(found: Sequence[TokenFile], starts: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
    """Raise `UserError` if nothing bounds documents, or a file of OLMo-core ends inside one."""
    if not len(begins) + len(ends):
        raise UserError(
            f"{found[0].location}: no begin or end token of the tokenizer is in its ids, so its documents cannot be "
            "told apart; give the tokenizer that made them, or prepare from the text"
        )
    closed = _contains(ends, starts[1:] - 1)
    if found[0].kind == "olmo" and not closed.all():
        raise UserError(
            f"{found[int(closed.argmin())].location}: its last id is not the tokenizer's end token, and it has no "
            ".csv.gz; it is cut, so restore it, or give the tokenizer that made it"
        )


def _between(borders: np.ndarray, end: int) -> np.ndarray:
    """(n, 2) begin and end of what lies between borders, where that is something.

    >>> _between(np.array([0, 3, 4]), 6).tolist()
    [[1, 3], [5, 6]]
    """
    bounds = np.stack([np.concatenate([[0], borders + 1]), np.concatenate([borders, [end]])], axis=1)
    return bounds[bounds[:, 1] > bounds[:, 0]]


def _count_text(bounds: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) tokens of documents without their begin and end tokens."""
    length = bounds[:, 1] - bounds[:, 0]
    has_end = _contains(ends, bounds[:, 1] - 1) & (length > 0)
    has_begin = _contains(begins, bounds[:, 0]) & (length - has_end > 0)
    return length - has_begin - has_end


def _contains(rising: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(n,) 1 for each wanted number that is among the rising ones, else 0."""
    if not len(rising):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(rising, wanted), len(rising) - 1)
    return (rising[places] == wanted).astype(np.int64)


# ---- pieces ---------------------------------------------------------------------------------------------------


def cut_pieces(found: Sequence[TokenFile], bounds: np.ndarray, texts: np.ndarray, portion: Portion) -> list[Piece]:
    """The pieces of a split, numbered from that of `portion` on. Writes the documents that they name."""
    documents = portion.work / f"documents.{portion.number:05}.npy"
    save_array(documents, bounds)
    sizes = np.where(texts > 0, texts + 2, 0)
    if len(sizes) and sizes.max() > LARGEST_SHARD_TOKENS:
        raise UserError(
            f"{found[0].location}: a document of {sizes.max():,} tokens does not fit a shard file of 4 GiB; give the "
            "tokenizer whose begin or end token divides the documents, or split them"
        )
    sums = np.cumsum(sizes)
    starts = np.cumsum([0, *(file.tokens for file in found)])
    pieces: list[Piece] = []
    first = 0
    while first < len(sizes):
        room = PIECE_TOKENS + (int(sums[first - 1]) if first else 0)
        last = max(first + 1, int(np.searchsorted(sums, room, side="right")))
        parts = _parts(found, starts, int(bounds[first, 0]), int(bounds[last - 1, 1]))
        number = portion.number + len(pieces)
        pieces.append(Piece(number, portion.split, portion.work, portion.adoption, documents, first, last, parts))
        first = last
    return pieces


def _parts(found: Sequence[TokenFile], starts: np.ndarray, first: int, last: int) -> tuple[tuple[TokenFile, int], ...]:
    """The files that hold the tokens [first, last), each with the number of its own first token."""
    one, end = int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, last))
    return tuple(zip(found[one:end], starts[one:end].tolist(), strict=True))


def take_piece(piece: Piece) -> None:
    """Store a piece's documents by split, under its own number, and last its `Taken`; nothing if it exists."""
    if is_whole(piece.taken):
        return
    tokenizer = Tokenizer.load(piece.work / "tokenizer.json", fast=False)
    taken = Taken("")
    documents, validation_text = sort_documents(piece, _documents(piece), tokenizer, taken)
    for split, mine in documents.items():
        write_documents(piece, split, mine, taken)
    taken.sha256 = _digest(documents)
    taken.write(piece.taken, validation_text)


def _documents(piece: Piece) -> Iterator[tuple[str, np.ndarray]]:
    """(place, ids) of each document as stored in the files."""
    bounds = np.load(piece.documents, mmap_mode="r")[piece.first : piece.last]
    begin, end = int(bounds[0, 0]), int(bounds[-1, 1])
    ids = np.concatenate(
        [
            read_ids(file, max(begin - at, 0), min(end - at, file.tokens)).astype(np.int64, copy=False)
            for file, at in piece.parts
        ]
    )
    for first, last in bounds.tolist():
        file, at = next(part for part in reversed(piece.parts) if part[1] <= first)
        yield f"{file.location}: the document at token {first - at:,}", ids[first - begin : last - begin]


def _digest(documents: dict[str, list[np.ndarray]]) -> str:
    """SHA-256 of documents by split: equal from any kind of files."""
    total = hashlib.sha256(json.dumps({split: len(mine) for split, mine in documents.items()}).encode())
    for document in (one for mine in documents.values() for one in mine):
        total.update(len(document).to_bytes(8, "little") + document.astype("<u4").tobytes())
    return total.hexdigest()
