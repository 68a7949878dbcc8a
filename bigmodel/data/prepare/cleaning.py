"""Cleaning: which rows are kept, as what text, and on which side of the validation split.

Takes the rows of a unit and the `prepare` settings. Gives a `Scan` of the unit, and over all scans the duplicates,
the counts and a sample.

Guarantees: a row is kept or dropped for one named reason, so kept + dropped = read, in documents and in bytes; a text
is kept once over all sources (exact after cleaning, by the first 128 bits of its SHA-256; the first one in reading
order stays); whether a document is for validation depends on its own key or text alone, so adding data moves nothing.

Costs: 34 bytes a row in memory, and 57 more while duplicates are looked for, in one process. Decontamination hashes
every word. Finding texts that are nearly equal is not done here: run datatrove first and name its
output as a source.
"""

import hashlib
import io
import json
import re
import unicodedata
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import DecontaminationSettings, PrepareSettings, SourceSettings, UserError
from bigmodel.data.prepare import corpus
from bigmodel.data.prepare.corpus import Source, Unit
from bigmodel.data.prepare.formats import Malformed
from bigmodel.run_directory import write_atomically

REASONS = ("kept", "null", "empty", "malformed", "too_short", "too_long", "contaminated", "duplicate")
KEPT, NULL, EMPTY, MALFORMED, TOO_SHORT, TOO_LONG, CONTAMINATED, DUPLICATE = range(len(REASONS))
SEPARATOR = b"\xff"  # between the texts of a pair where they are hashed: occurs in no UTF-8
LISTED = 1000  # malformed records named, at most
# C0 and C1 and delete, but not tab, line feed and carriage return.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
WORD = re.compile(r"\w+")
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, 2**64 over the golden ratio: spreads the words' hashes in a run of words


@dataclass(slots=True)
class Scan:
    """One entry per row of a unit: (n,) status, (n, 2) digest words, (n,) for validation?, (n,) UTF-8 bytes as read
    and as kept; and the first malformed records."""

    status: np.ndarray
    digests: np.ndarray
    validation: np.ndarray
    read_bytes: np.ndarray
    kept_bytes: np.ndarray
    malformed: list[Malformed]

    def write(self, path: Path) -> None:
        listed = json.dumps([asdict(record) for record in self.malformed]).encode()
        write_arrays(
            path,
            status=self.status,
            digests=self.digests,
            validation=self.validation,
            read_bytes=self.read_bytes,
            kept_bytes=self.kept_bytes,
            malformed=np.frombuffer(listed, np.uint8),
        )

    @classmethod
    def read(cls, path: Path) -> "Scan":
        with np.load(path) as arrays:
            listed = [Malformed(**record) for record in json.loads(arrays["malformed"].tobytes())]
            names = ("status", "digests", "validation", "read_bytes", "kept_bytes")
            return cls(**{name: arrays[name] for name in names}, malformed=listed)


class Part(NamedTuple):
    """A stretch of a unit's rows, [first, end), that is tokenized into one file."""

    number: int
    first: int
    end: int


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Named arrays in one file, whole or not there at all, with a checksum for each."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def is_whole(path: Path) -> bool:
    """Whether a file of arrays is there, every checksum is right and every array can be loaded. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as file, np.load(path) as arrays:
            return file.testzip() is None and all(arrays[name] is not None for name in arrays)
    except Exception:  # damage in a header has many faces: NotImplementedError, struct.error, SyntaxError ...
        return False


# ---- a row ----------------------------------------------------------------------------------------------------


def scan_unit(unit: Unit, settings: PrepareSettings, contaminated: np.ndarray | None = None) -> Scan:
    """Judge every row of a unit by itself (duplicates are found later, over all units). `contaminated`: hashes of
    `evaluation_hashes`."""
    status, digests, validation = bytearray(), bytearray(), bytearray()
    read_bytes, kept_bytes = array("q"), array("q")
    malformed: list[Malformed] = []
    for row, key in corpus.read_unit(unit):
        if isinstance(row, Malformed):
            if len(malformed) < LISTED:
                malformed.append(row)
            verdict, content, num_bytes = MALFORMED, b"", row.num_bytes
        else:
            verdict, texts = judge(row, settings, contaminated)
            content = joined(texts)
            num_bytes = sum(len(text.encode()) for text in row if text is not None)
        digest = hashlib.sha256(content).digest()
        status.append(verdict)
        digests += digest[:16]
        validation.append(is_validation(key, digest, settings.validation_share))
        read_bytes.append(num_bytes)
        kept_bytes.append(max(0, len(content) - len(unit.columns) + 1) if verdict == KEPT else 0)
    words = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    sizes = np.frombuffer(read_bytes, np.int64), np.frombuffer(kept_bytes, np.int64)
    return Scan(np.frombuffer(status, np.uint8), words, np.frombuffer(validation, bool), *sizes, malformed)


def joined(texts: tuple[str, ...]) -> bytes:
    """A row's texts as they are hashed."""
    return SEPARATOR.join(text.encode() for text in texts)


def judge(
    row: tuple[str | None, ...], settings: PrepareSettings, contaminated: np.ndarray | None = None
) -> tuple[int, tuple[str, ...]]:
    """A row's verdict and, if it is kept, its cleaned texts."""
    if any(text is None for text in row):
        return NULL, ()
    texts = tuple(clean(text, settings) for text in row if text is not None)
    if not all(text.strip() for text in texts):
        return EMPTY, ()
    if any(len(text) < settings.min_characters for text in texts):
        return TOO_SHORT, ()
    if settings.max_characters and any(len(text) > settings.max_characters for text in texts):
        return TOO_LONG, ()
    if contaminated is not None and settings.decontaminate:
        for text in texts:
            if shares_a_run(text, settings.decontaminate.ngram, contaminated):
                return CONTAMINATED, ()
    return KEPT, texts


def clean(text: str, settings: PrepareSettings) -> str:
    if settings.remove_control_characters:
        text = CONTROL.sub("", text)
    return unicodedata.normalize("NFC", text) if settings.unicode_nfc else text


def is_validation(key: str | None, text_digest: bytes, validation_share: float) -> bool:
    """Whether a document is kept for validation: 64 bits of a hash, as a fraction, fall below the share."""
    digest = text_digest if key is None else hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[16:24], "little") < validation_share * 2**64


# ---- decontamination ------------------------------------------------------------------------------------------


def evaluation_hashes(settings: DecontaminationSettings) -> np.ndarray:
    """Sorted hashes of every run of `ngram` words in the evaluation files. A text of fewer words has none.

    Raises `UserError` as a source of documents does, for a malformed record, and for a file without any such run:
    nothing would be compared with it.
    """
    named = SourceSettings(name="evaluation", files=settings.files, column=settings.column)
    source = corpus.find_source(named, "prepare.decontaminate")
    found = [_file_hashes(replace(source, files=(file,)), settings.ngram) for file in source.files]
    return np.unique(np.concatenate(found))


def _file_hashes(source: Source, length: int) -> np.ndarray:
    found = [np.zeros(0, np.uint64)]
    for unit in corpus.plan_units(source):
        for row, _ in corpus.read_unit(unit):
            if isinstance(row, Malformed):
                (named,) = corpus.with_line_numbers([row])
                raise UserError(f"prepare.decontaminate: {row.file}: {named.place}: {row.reason}; mend or drop it")
            found += [run_hashes(text, length) for text in row if text is not None]
    hashes = np.concatenate(found)
    if not len(hashes):
        raise UserError(
            f"prepare.decontaminate.ngram = {length}: {source.files[0]} has no text of so many words, so nothing would "
            "be compared with it; lower it, or leave the file out"
        )
    return hashes


def run_hashes(text: str, length: int) -> np.ndarray:
    """(words - length + 1,) uint64: a hash of each run of words, without case, punctuation, control characters and
    forms of one character; the same anywhere, whatever cleaning did to the text."""
    words = WORD.findall(unicodedata.normalize("NFKC", CONTROL.sub("", text)).lower())
    if len(words) < length:
        return np.zeros(0, np.uint64)
    hashes = np.array([_hash_word(word) for word in words], np.uint64)
    runs = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        runs = runs * np.uint64(MULTIPLIER) + hashes[place : place + len(runs)]
    return runs


def shares_a_run(text: str, length: int, contaminated: np.ndarray) -> bool:
    """Whether a run of words in the text is among the sorted hashes `contaminated`."""
    runs = run_hashes(text, length)
    places = np.searchsorted(contaminated, runs)
    inside = places < len(contaminated)
    return bool((contaminated[places[inside]] == runs[inside]).any())


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# ---- over all rows --------------------------------------------------------------------------------------------


def mark_duplicates(scans: Sequence[Scan]) -> np.ndarray:
    """Set DUPLICATE, over all scans in order, on every kept row whose digest a kept row before it has.

    Returns the numbers of those rows, counted over all scans, sorted.
    """
    if not scans:
        return np.zeros(0, np.int64)
    status = np.concatenate([scan.status for scan in scans])
    digests = np.concatenate([scan.digests for scan in scans])
    rows = np.flatnonzero(status == KEPT)
    order = np.lexsort((digests[rows, 1], digests[rows, 0]))  # stable: equal digests stay in reading order
    ordered = digests[rows[order]]
    repeats = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
    duplicates = np.sort(rows[order[repeats]])
    for scan, start in zip(scans, first_rows(scans), strict=True):
        mark_rows(scan, start, duplicates)
    return duplicates


def first_rows(scans: Iterable[Scan]) -> list[int]:
    """Of each scan, the number of its first row, counted over all scans."""
    starts = [0]
    for scan in scans:
        starts.append(starts[-1] + len(scan.status))
    return starts[:-1]


def cut(scan: Scan, part_bytes: int) -> list[Part]:
    """Parts of a unit, each with at most so many bytes of kept text or with one kept row; together they hold all."""
    kept = np.flatnonzero(scan.status == KEPT)
    ends = np.cumsum(scan.kept_bytes[kept])
    parts: list[Part] = []
    first = 0
    while first < len(kept):
        room = part_bytes + (int(ends[first - 1]) if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, room, side="right")))
        parts.append(Part(len(parts), int(kept[first]), int(kept[last - 1]) + 1))
        first = last
    return parts


def mark_rows(scan: Scan, start: int, duplicates: np.ndarray) -> None:
    """Set DUPLICATE on the rows of a scan, whose first has number `start`, that are in the sorted `duplicates`."""
    first, last = np.searchsorted(duplicates, [start, start + len(scan.status)])
    mine = duplicates[first:last] - start
    scan.status[mine] = DUPLICATE
    scan.kept_bytes[mine] = 0


def count_reasons(scans: Iterable[Scan]) -> tuple[dict[str, int], dict[str, int]]:
    """Documents and bytes: read, kept, and dropped by reason. Every row is in exactly one of the last two.

    Bytes are UTF-8; those that cleaning took out of kept documents are `cleaned` (below 0 where the composed form of
    a character is longer), so that kept + cleaned + dropped = read.
    """
    documents, read, kept = np.zeros((3, len(REASONS)), np.int64)
    for scan in scans:
        documents += np.bincount(scan.status, minlength=len(REASONS))
        sums = np.bincount(scan.status, scan.read_bytes, minlength=len(REASONS))  # float64: exact below 9 PB
        read += sums.astype(np.int64)
        kept[KEPT] += scan.kept_bytes.sum()
    in_documents = {"read": int(documents.sum())} | dict(zip(REASONS, documents.tolist(), strict=True))
    in_bytes = {"read": int(read.sum())} | dict(zip(REASONS, read.tolist(), strict=True))
    in_bytes |= {"kept": int(kept[KEPT]), "cleaned": int(read[KEPT] - kept[KEPT])}
    return in_documents, in_bytes


def list_malformed(sources: Iterable[str], scans: Iterable[Scan]) -> Iterator[dict[str, str]]:
    """Source, file, place and reason of malformed records, in reading order; `LISTED` at most."""
    found = ((source, record) for source, scan in zip(sources, scans, strict=True) for record in scan.malformed)
    listed = list(islice(found, LISTED))
    named = corpus.with_line_numbers([record for _, record in listed])
    for (source, _), record in zip(listed, named, strict=True):
        yield {"source": source, "file": record.file, "place": record.place, "reason": record.reason}


def choose_sample(scans: Sequence[Scan], limit_bytes: int) -> list[np.ndarray]:
    """Rows of each unit, of the train split only, that together hold at most `limit_bytes` of text (at least one
    document). A larger corpus is sampled by digest: the same documents whatever their order. Documents above a
    sixteenth of the limit are left out where there are others: one would crowd out all that come after it."""
    rows = [np.flatnonzero((scan.status == KEPT) & ~scan.validation) for scan in scans]
    digests = np.concatenate([scan.digests[chosen, 0] for scan, chosen in zip(scans, rows, strict=True)])
    sizes = np.concatenate([scan.kept_bytes[chosen] for scan, chosen in zip(scans, rows, strict=True)])
    order = np.argsort(digests, kind="stable")
    if (small := sizes[order] <= limit_bytes // 16).any():
        order = order[small]
    taken = np.zeros(len(digests), bool)
    taken[order[np.cumsum(sizes[order]) <= limit_bytes]] = True
    taken[order[:1]] = True
    parts = np.split(taken, np.cumsum([len(chosen) for chosen in rows])[:-1])
    return [chosen[part] for chosen, part in zip(rows, parts, strict=True)]
