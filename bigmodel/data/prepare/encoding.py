"""Encoding: one process turns one unit from rows into tokens; each stage writes a file.

In: a unit and the staging folder. Out: `scan/00000.npz` (verdicts on the rows) and, for every 16 MB of kept text,
`encoded/00000-0000.npz`: by split and column the tokens end to end, the documents' lengths and the total bytes of their
texts; of supervised sources also the spans that are trained; the validation text; what has no token. For shards of
text: the texts end to end and their sizes, instead of the tokens; with random segmentations the documents' lengths in
each pass.

Guarantees: a file is a pure function of the unit and the settings; an encoded file also of the duplicates and the
tokenizer. It is written atomically, and not again if it exists undamaged.

Costs: a process holds 34 bytes for each row of its unit, and the tokens of 16 MB of text or of one longer document.
"""

import hashlib
import io
import json
import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from bigmodel.config.settings import PrepareSettings, UserError
from bigmodel.data.prepare import cleaning, corpus
from bigmodel.data.prepare.cleaning import Part, Scan
from bigmodel.data.prepare.corpus import Unit
from bigmodel.data.prepare.records import contents
from bigmodel.data.prepare.rows import Malformed
from bigmodel.data.prepare.supervised import Encoded, encode_record, read_template
from bigmodel.data.prepare.tokenless import Tokenless
from bigmodel.data.store.chat_template import ChatTemplate
from bigmodel.data.store.manifest import SPLITS
from bigmodel.data.store.segmentation import Segmenter
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.run_directory import write_atomically

TOKEN_COLUMNS = ("tokens", "target_tokens")  # names in the shards, of a source's column and its target column
TEXT_COLUMNS = {"tokens": "text", "target_tokens": "target_text"}  # the same in shards of text
ENCODED_TOGETHER = 64  # documents


@dataclass(frozen=True)
class Work:
    """The staging folder of one preparation; an absolute path, so that it is valid in any process."""

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
    def template(self) -> Path:
        return self.folder / "template.json"

    @property
    def contaminated(self) -> Path:
        return self.folder / "contaminated.npy"

    def scan(self, unit: int) -> Path:
        return self.folder / "scan" / f"{unit:05}.npz"

    def encoded(self, unit: int, part: int) -> Path:
        return self.folder / "encoded" / f"{unit:05}-{part:04}.npz"

    def finished(self) -> int:
        """Number of finished files of units."""
        return sum(1 for stage in ("scan", "encoded") for _ in (self.folder / stage).glob("*.npz"))


def scan_unit(number: int, unit: Unit, settings: PrepareSettings, work: Work) -> None:
    """Judge a unit's rows, unless its file exists."""
    path = work.scan(number)
    if not path.parent.exists():
        raise UserError(
            f"{path.parent}: does not exist on {socket.gethostname()}; data.directory must be on a file system that "
            "every worker of prepare.scheduler has under the same path"
        )
    if not cleaning.is_whole(path):
        contaminated = np.load(work.contaminated, mmap_mode="r") if settings.decontaminate else None
        template = read_template(work.template) if unit.record and unit.record.kind == "chat" else None
        cleaning.scan_unit(unit, settings, contaminated, template).write(path)


def read_rows(unit: Unit, rows: np.ndarray, settings: PrepareSettings) -> list[str]:
    wanted = set(rows.tolist())
    return [
        cleaning.clean(text, settings)
        for number, (texts, _) in enumerate(islice(corpus.read_unit(unit), max(wanted, default=-1) + 1))
        if number in wanted and isinstance(texts, tuple)
        for whole in texts
        if whole is not None
        for text in (contents(json.loads(whole)) if unit.record else [whole])
    ]


def encode_parts(
    number: int, unit: Unit, parts: Sequence[Part], start: int, settings: PrepareSettings, fast: bool, work: Work
) -> None:
    """Tokenize the kept rows of neighbouring parts of a unit, except finished parts. `start`: number of the unit's
    first row, counted over all units."""
    missing = [part for part in parts if not cleaning.is_whole(work.encoded(number, part.number))]
    if not missing:
        return
    scan = Scan.read(work.scan(number))
    cleaning.mark_rows(scan, start, np.load(work.duplicates, mmap_mode="r"))
    encoder = _tokenizer(
        work.tokenizer, hashlib.sha256(work.tokenizer.read_bytes()).hexdigest(), fast, given_name(settings)
    )
    ends, as_text = [part.end for part in parts], settings.content == "text"
    segmenter = segmenter_of(encoder, settings)
    rows = kept_rows(unit, scan, settings, missing[0].first, missing[-1].end)
    for place, mine in groupby(rows, lambda row: bisect_right(ends, row[0])):
        if parts[place] in missing:
            path = work.encoded(number, parts[place].number)
            if unit.record:
                arrays = _encode_records(mine, scan, encoder, read_template(work.template))
            else:
                arrays = _encode(mine, scan, encoder, unit, as_text, segmenter)
            cleaning.write_arrays(path, **arrays)


def _encode(
    rows: Iterator[tuple[int, tuple[str, ...]]],
    scan: Scan,
    encoder: Tokenizer,
    unit: Unit,
    as_text: bool,
    segmenter: Segmenter | None = None,
) -> dict[str, np.ndarray]:
    columns = TOKEN_COLUMNS[: len(unit.columns)]
    stored: dict[str, list[np.ndarray]] = {f"{split}_{column}": [] for split in SPLITS for column in columns}
    lengths: dict[str, list[int]] = {name: [] for name in stored}
    sizes: dict[str, list[int]] = {name: [] for name in stored}
    drawn: dict[str, list[list[int]]] = {  # by pass
        f"train_{column}": [[] for _ in range(segmenter.passes)]
        for column in columns[: len(columns) - unit.has_labels]
        if segmenter
    }
    validation_text, tokenless = [], Tokenless()
    labels: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    while together := list(islice(rows, ENCODED_TOGETHER)):
        documents = encoder.encode_documents([text for _, texts in together for text in texts])
        tokenless.unknown += encoder.count_unknown(documents)
        encoded = iter(documents)
        for row, texts in together:
            split = SPLITS[int(scan.validation[row])]
            labels[split].update(texts[-1:] if unit.has_labels else ())
            for column, text in zip(columns, texts, strict=True):
                name, tokens, content = f"{split}_{column}", next(encoded), text.encode()
                stored[name].append(np.frombuffer(content, np.uint8) if as_text else tokens)
                tokenless.characters += len(text)
                if encoder.drops_text:
                    tokenless.dropped.update(encoder.find_dropped(text))
                lengths[name].append(len(tokens))
                sizes[name].append(len(content))
                if name in drawn and segmenter:
                    for of_pass, length in zip(drawn[name], segmenter.lengths(text), strict=True):
                        of_pass.append(length)
            if split == "validation":
                validation_text += [text.encode() for text in texts]
    dtype = np.dtype(np.uint8) if as_text else encoder.dtype
    arrays = {name: np.concatenate([*parts, np.zeros(0, dtype)]) for name, parts in stored.items()}
    arrays |= {f"{name}_lengths": np.array(numbers, np.uint32) for name, numbers in lengths.items()}
    arrays |= {f"{name}_bytes": np.array(sum(numbers)) for name, numbers in sizes.items()}
    arrays |= {f"{name}_lengths_of_passes": np.array(of_passes, np.uint32) for name, of_passes in drawn.items()}
    if as_text:
        arrays |= {f"{name}_sizes": np.array(numbers, np.uint32) for name, numbers in sizes.items()}
    if unit.has_labels:
        arrays["labels"] = np.frombuffer(json.dumps(labels).encode(), np.uint8)
    return arrays | tokenless.arrays() | {"validation_text": np.frombuffer(b"".join(validation_text), np.uint8)}


def _encode_records(
    rows: Iterator[tuple[int, tuple[str, ...]]], scan: Scan, encoder: Tokenizer, template: ChatTemplate | None
) -> dict[str, np.ndarray]:
    """The arrays of a supervised source: those of one column of tokens, and the spans of all documents end to end with
    their number in each."""
    encoded: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    tokenless = Tokenless()
    for row, (text,) in rows:
        split = SPLITS[int(scan.validation[row])]
        one = encode_record(text, template, encoder)
        encoded[split].append(one)
        texts[split].append(text.encode())
        said = "".join(contents(json.loads(text)))
        tokenless.characters += len(said)
        tokenless.unknown += encoder.count_unknown([one.tokens])
        tokenless.dropped.update(encoder.find_dropped(said))
    arrays = {"validation_text": np.frombuffer(b"".join(texts["validation"]), np.uint8)}
    for split, documents in encoded.items():
        name, nothing = f"{split}_tokens", np.zeros(0, encoder.dtype)
        arrays[name] = np.concatenate([*(one.tokens for one in documents), nothing])
        arrays[f"{name}_lengths"] = np.array([len(one.tokens) for one in documents], np.uint32)
        arrays[f"{name}_bytes"] = np.array(sum(map(len, texts[split])))
        spans = np.concatenate([*(one.spans for one in documents), np.zeros((0, 3), np.int64)])
        arrays[f"{split}_spans"] = spans.astype(np.uint32)
        arrays[f"{split}_num_spans"] = np.array([len(one.spans) for one in documents], np.int64)
    return arrays | tokenless.arrays()


def segmenter_of(encoder: Tokenizer, settings: PrepareSettings) -> Segmenter | None:
    """Raises `UserError` for a tokenizer that the kind of segmentation does not fit."""
    return Segmenter(encoder, settings.segmentation.model_dump()) if settings.segmentation else None


def kept_rows(
    unit: Unit, scan: Scan, settings: PrepareSettings, first: int = 0, end: int | None = None
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The cleaned rows that the scan kept, of those in [first, end), by default all. Raises `UserError` if the unit
    changed after the scan."""
    end = len(scan.status) if end is None else end
    read, has_labels = 0, unit.has_labels
    is_wanted = (scan.status == cleaning.KEPT).tolist()
    digests = scan.digests.tobytes()
    for number, (row, _) in enumerate(corpus.read_unit(unit)):
        if number >= end and end < len(is_wanted):
            return
        read = number + 1
        if not (first <= number < min(end, len(is_wanted)) and is_wanted[number]):
            continue
        texts = () if isinstance(row, Malformed) else cleaning.judge(row, settings, has_label=has_labels)[1]
        if cleaning.digest_of(texts, has_labels)[:16] != digests[16 * number : 16 * number + 16]:
            raise _changed(unit)
        yield number, texts
    if read != len(is_wanted):
        raise _changed(unit)


def _changed(unit: Unit) -> UserError:
    names = list(dict.fromkeys(piece.file for piece in unit.pieces))
    return UserError(f"{names[0]}{f' or one of {len(names) - 1} after it' if names[1:] else ''}: {corpus.CHANGED}")


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str, fast: bool, name: str) -> Tokenizer:
    """One tokenizer per process; the hash separates another tokenizer at the same path (in tests)."""
    tokenizer = Tokenizer.load(path, fast=fast, name=name)
    assert tokenizer.sha256 == sha256, f"{path} changed"
    return tokenizer


def given_name(settings: PrepareSettings) -> str:
    """Of the tokenizer, in errors about texts: the user's file, of which the staging folder has a copy."""
    return f"prepare.tokenizer = {settings.tokenizer}" if settings.tokenizer else ""


def save_array(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getvalue())


def read_array(path: Path, name: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays[name]
