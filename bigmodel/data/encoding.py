"""Encoding: what a process does with one unit, from rows to tokens, each stage's result in a file of its own.

Takes a unit and the folder of the preparation. Gives the files `scan/00000.npz` (the rows, judged) and
`encoded/00000.npz`: by split and column the tokens end to end, the documents' lengths and their texts' bytes in all,
and the validation text. Where shards are to hold text: the texts end to end and their sizes instead of the tokens.

Guarantees: a file is a pure function of the unit, the settings and, for the second, of the duplicates and the
tokenizer; it is there whole or not at all; one that is there and whole is not made again.
"""

import hashlib
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from bigmodel.config import PrepareSettings, UserError
from bigmodel.data import cleaning, corpus
from bigmodel.data.cleaning import Scan
from bigmodel.data.corpus import Unit
from bigmodel.data.manifest import SPLITS
from bigmodel.data.tokenizer import Tokenizer
from bigmodel.rundir import write_atomically

TOKEN_COLUMNS = ("tokens", "target_tokens")  # in the shards: of a source's column, of its target column
TEXT_COLUMNS = {"tokens": "text", "target_tokens": "target_text"}  # what stands for them in shards of text
ENCODED_TOGETHER = 64  # documents


@dataclass(frozen=True)
class Work:
    """The folder of one preparation under way, named absolutely: any process may be handed it."""

    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def tokenizer(self) -> Path:
        return self.result / "tokenizer.json"

    @property
    def duplicates(self) -> Path:
        return self.folder / "duplicates.npy"

    @property
    def contaminated(self) -> Path:
        return self.folder / "contaminated.npy"

    def scan(self, unit: int) -> Path:
        return self.folder / "scan" / f"{unit:05}.npz"

    def encoded(self, unit: int) -> Path:
        return self.folder / "encoded" / f"{unit:05}.npz"

    def finished(self) -> int:
        """Units' files that are there."""
        return sum(1 for stage in ("scan", "encoded") for _ in (self.folder / stage).glob("*.npz"))


def scan_unit(number: int, unit: Unit, settings: PrepareSettings, work: Work) -> dict[str, str] | None:
    """Judge a unit's rows, unless that is done; returns the first malformed record."""
    path = work.scan(number)
    if not path.parent.exists():
        raise UserError(
            f"{path.parent}: is not there on {socket.gethostname()}; data.directory must be on a file system that "
            "every worker of prepare.scheduler sees under the same path"
        )
    if cleaning.is_whole(path):
        scan = Scan.read(path)
    else:
        contaminated = np.load(work.contaminated, mmap_mode="r") if settings.decontaminate else None
        scan = cleaning.scan_unit(unit, settings, contaminated)
        scan.write(path)
    return next(cleaning.list_malformed([unit.source], [scan]), None)


def read_rows(unit: Unit, rows: np.ndarray, settings: PrepareSettings) -> list[str]:
    wanted = set(rows.tolist())
    return [
        cleaning.clean(text, settings)
        for number, (texts, _) in enumerate(corpus.read_unit(unit))
        if number in wanted and isinstance(texts, tuple)
        for text in texts
        if text is not None
    ]


def encode_unit(number: int, unit: Unit, start: int, settings: PrepareSettings, fast: bool, work: Work) -> None:
    """Tokenize a unit's kept rows, unless that is done. `start`: the number of its first row among all."""
    path = work.encoded(number)
    if cleaning.is_whole(path):
        return
    scan = Scan.read(work.scan(number))
    cleaning.mark_rows(scan, start, np.load(work.duplicates, mmap_mode="r"))
    encoder = _tokenizer(work.tokenizer, hashlib.sha256(work.tokenizer.read_bytes()).hexdigest(), fast)
    columns = TOKEN_COLUMNS[: len(unit.columns)]
    stored: dict[str, list[np.ndarray]] = {f"{split}_{column}": [] for split in SPLITS for column in columns}
    lengths: dict[str, list[int]] = {name: [] for name in stored}
    sizes: dict[str, list[int]] = {name: [] for name in stored}
    as_text = settings.content == "text"
    validation_text = []
    kept = kept_rows(unit, scan, settings)
    while rows := list(islice(kept, ENCODED_TOGETHER)):
        encoded = iter(encoder.encode_documents([text for _, texts in rows for text in texts]))
        for row, texts in rows:
            split = SPLITS[int(scan.validation[row])]
            for column, text in zip(columns, texts, strict=True):
                name, tokens, content = f"{split}_{column}", next(encoded), text.encode()
                stored[name].append(np.frombuffer(content, np.uint8) if as_text else tokens)
                lengths[name].append(len(tokens))
                sizes[name].append(len(content))
            if split == "validation":
                validation_text += [text.encode() for text in texts]
    dtype = np.dtype(np.uint8) if as_text else encoder.dtype
    arrays = {name: np.concatenate([*parts, np.zeros(0, dtype)]) for name, parts in stored.items()}
    arrays |= {f"{name}_lengths": np.array(numbers, np.uint32) for name, numbers in lengths.items()}
    arrays |= {f"{name}_bytes": np.array(sum(numbers)) for name, numbers in sizes.items()}
    if as_text:
        arrays |= {f"{name}_sizes": np.array(numbers, np.uint32) for name, numbers in sizes.items()}
    arrays["validation_text"] = np.frombuffer(b"".join(validation_text), np.uint8)
    cleaning.write_arrays(path, **arrays)


def kept_rows(unit: Unit, scan: Scan, settings: PrepareSettings) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows that the scan kept, cleaned. Raises `UserError` if the unit is not what was scanned."""
    number = -1
    for number, (row, _) in enumerate(corpus.read_unit(unit)):
        if number >= len(scan.status) or scan.status[number] != cleaning.KEPT:
            continue
        texts = () if isinstance(row, corpus.Malformed) else cleaning.judge(row, settings)[1]
        if hashlib.sha256(cleaning.joined(texts)).digest()[:16] != scan.digests[number].tobytes():
            raise _changed(unit)
        yield number, texts
    if number + 1 != len(scan.status):
        raise _changed(unit)


def _changed(unit: Unit) -> UserError:
    return UserError(f"{unit.files[0]}: {corpus.CHANGED}")


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str, fast: bool) -> Tokenizer:
    """One tokenizer per process; the hash keeps a test's next tokenizer at the same path apart."""
    tokenizer = Tokenizer.load(path, fast=fast)
    assert tokenizer.sha256 == sha256, f"{path} changed"
    return tokenizer


def save_array(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getvalue())


def read_array(work: Work, unit: int, name: str) -> np.ndarray:
    with np.load(work.encoded(unit)) as arrays:
        return arrays[name]
