"""Cleaning: which rows are kept, with which text, and in which split.

In: the rows of a unit and the `prepare` settings. Out: a `Scan` of the unit; over all scans the duplicates, the counts
and a sample for the tokenizer. Example, with `min_characters = 3`:

    ("A cat.",)   kept           counts: read 4 = kept 1 + duplicate 1 + too_short 1 + null 1
    ("A cat.",)   duplicate
    ("Hi",)       too_short
    (None,)       null

Guarantees: every row is kept, or dropped for one named reason: kept + dropped = read, in documents and in bytes. A text
is kept once over all sources (exact after cleaning, by the first 128 bits of its SHA-256); the first in reading order
stays. Only its own key or text decides whether a document is for validation, so added data moves no document.

Costs: 34 bytes a row in memory, and 57 more during the search for duplicates, in one process. Decontamination hashes
every word. Near-duplicates are not found: run datatrove first and name its output as a source.
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
from bigmodel.data.prepare.records import contents, encoded, is_trained
from bigmodel.data.prepare.rows import Located, Malformed
from bigmodel.data.store.chat_template import ChatTemplate
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun

REASONS = ("kept", "null", "empty", "malformed", "too_short", "too_long", "contaminated", "duplicate", "without_target")
KEPT, NULL, EMPTY, MALFORMED, TOO_SHORT, TOO_LONG, CONTAMINATED, DUPLICATE, WITHOUT_TARGET = range(len(REASONS))
SEPARATOR = b"\xff"  # between the texts of a pair in its hash: never part of UTF-8
LISTED = 1000  # malformed records, at most
# C0 and C1 and delete, but not tab, line feed and carriage return.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
WORD = re.compile(r"\w+")
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, 2**64 over the golden ratio: spreads the words' hashes in a run of words


@dataclass(slots=True)
class Scan:
    """Verdicts on the rows of a unit: (n,) status, (n, 2) digest words, (n,) whether for validation, (n,) UTF-8 bytes
    as read and as kept; and the first malformed records."""

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
    """Rows [first, end) of a unit, tokenized into one file."""

    number: int
    first: int
    end: int


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Named arrays in one file, written atomically, with a checksum for each."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def is_whole(path: Path) -> bool:
    """Whether a file of arrays exists, with right checksums and loadable arrays. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as file, np.load(path) as arrays:
            return file.testzip() is None and all(arrays[name] is not None for name in arrays)
    except Exception:  # a damaged header raises many types: NotImplementedError, struct.error, SyntaxError ...
        return False


# ---- a row ----------------------------------------------------------------------------------------------------


def scan_unit(
    unit: Unit,
    settings: PrepareSettings,
    contaminated: np.ndarray | None = None,
    template: ChatTemplate | None = None,
) -> Scan:
    """Judge each row of a unit on its own; duplicates are found later, over all units. `contaminated`: the result of
    `evaluation_hashes`. `template`: of chats; a chat that it refuses is malformed."""
    status, digests, validation = bytearray(), bytearray(), bytearray()
    read_bytes, kept_bytes = array("q"), array("q")
    malformed: list[Malformed] = []
    has_labels, separators = unit.has_labels, len(unit.columns) - 1
    for row, key in corpus.read_unit(unit):
        if isinstance(row, Malformed):
            if len(malformed) < LISTED:
                malformed.append(row)
            verdict, content, num_bytes = MALFORMED, b"", row.num_bytes
        else:
            verdict, texts = judge(row, settings, contaminated, has_labels)
            if template and verdict == KEPT and (reason := _refused(texts[0], template)):
                verdict, texts = MALFORMED, ()
                if len(malformed) < LISTED and isinstance(row[0], Located):
                    malformed.append(replace(row[0].where, reason=reason))
            content = joined(texts)
            num_bytes = sum([len(text.encode()) for text in row if text is not None])
        is_labelled = has_labels and verdict == KEPT
        digest = digest_of(texts, has_label=True) if is_labelled else hashlib.sha256(content).digest()
        status.append(verdict)
        digests += digest[:16]
        if unit.split_by_target and verdict == KEPT:
            key = texts[-1]
        validation.append(is_validation(key, digest, settings.validation_share))
        read_bytes.append(num_bytes)
        kept_bytes.append(max(0, len(content) - separators) if verdict == KEPT else 0)
    words = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    sizes = np.frombuffer(read_bytes, np.int64), np.frombuffer(kept_bytes, np.int64)
    return Scan(np.frombuffer(status, np.uint8), words, np.frombuffer(validation, bool), *sizes, malformed)


def joined(texts: tuple[str, ...]) -> bytes:
    """The bytes of a row's texts for its hash."""
    return SEPARATOR.join([text.encode() for text in texts])


def digest_of(texts: tuple[str, ...], has_label: bool) -> bytes:
    """SHA-256 of a row's texts; its class does not count, so that equal texts are duplicates and in one split."""
    return hashlib.sha256(joined(texts[:-1] if has_label else texts)).digest()


def judge(
    row: tuple[str | None, ...],
    settings: PrepareSettings,
    contaminated: np.ndarray | None = None,
    has_label: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """A row's verdict and, if kept, its cleaned texts; a class stays as it is."""
    if has_label:
        verdict, texts = judge(row[:-1], settings, contaminated)
        return verdict, (*texts, row[-1] or "") if verdict == KEPT else ()
    if None in row:
        return NULL, ()
    if isinstance(row[0], Located):
        return _judge_record(row[0], settings, contaminated)
    texts = tuple([clean(text, settings) for text in row if text is not None])
    for text in texts:
        if not text or text.isspace():
            return EMPTY, ()
    lengths = [len(text) for text in texts]
    if min(lengths) < settings.min_characters:
        return TOO_SHORT, ()
    if settings.max_characters and max(lengths) > settings.max_characters:
        return TOO_LONG, ()
    if _is_contaminated(texts, settings, contaminated):
        return CONTAMINATED, ()
    return KEPT, texts


def _is_contaminated(texts: Iterable[str], settings: PrepareSettings, contaminated: np.ndarray | None) -> bool:
    if contaminated is None or not settings.decontaminate:
        return False
    length = settings.decontaminate.ngram
    return any(shares_a_run(text, length, contaminated) for text in texts)


def _judge_record(text: str, settings: PrepareSettings, contaminated: np.ndarray | None) -> tuple[int, tuple[str, ...]]:
    """The same for a record of a supervised source: its contents are cleaned, their characters count together."""
    table = json.loads(text)
    for part in [*table.get("messages", ()), table]:
        for name in ("content", "prompt", "response"):
            if isinstance(part.get(name), str):
                part[name] = clean(part[name], settings)
    texts = contents(table)
    if not any(one.strip() for one in texts) or not table.get("response", "?").strip():
        return EMPTY, ()
    if not is_trained(table):
        return WITHOUT_TARGET, ()
    characters = sum(map(len, texts))
    if characters < settings.min_characters:
        return TOO_SHORT, ()
    if settings.max_characters and characters > settings.max_characters:
        return TOO_LONG, ()
    if _is_contaminated(texts, settings, contaminated):
        return CONTAMINATED, ()
    return KEPT, (encoded(table),)


def _refused(text: str, template: ChatTemplate) -> str:
    """Why a template refuses a chat; empty: it does not."""
    try:
        template.mark(json.loads(text)["messages"])
    except UserError as error:
        return str(error)
    return ""


def clean(text: str, settings: PrepareSettings) -> str:
    if settings.remove_control_characters:
        text = CONTROL.sub("", text)
    return unicodedata.normalize("NFC", text) if settings.unicode_nfc else text


def is_validation(key: str | None, text_digest: bytes, validation_share: float) -> bool:
    """Whether a document is for validation: 64 bits of a hash, as a fraction, are below the share."""
    digest = text_digest if key is None else hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[16:24], "little") < validation_share * 2**64


# ---- decontamination ------------------------------------------------------------------------------------------


def evaluation_hashes(settings: DecontaminationSettings) -> np.ndarray:
    """Sorted hashes of every run of `ngram` words in the evaluation files. A text of fewer words has none.

    Raises `UserError` for the errors of `corpus.find_source`, malformed records, and a file without any such run,
    which would have no effect.
    """
    named = SourceSettings(name="evaluation", files=settings.files, column=settings.column)
    source = corpus.find_source(named, "prepare.decontaminate")
    malformed: list[Malformed] = []
    found = [
        _file_hashes(replace(source, files=(file,), formats=(form,)), settings.ngram, malformed)
        for file, form in zip(source.files, source.formats, strict=True)
    ]
    if malformed:
        raise UserError(
            f"prepare.decontaminate: its files hold {counted_noun(len(malformed), 'malformed record')}; correct or "
            f"drop them\n{corpus.in_lines(malformed)}"
        )
    for file, hashes in zip(source.files, found, strict=True):
        if not len(hashes):
            raise UserError(
                f"prepare.decontaminate.ngram = {settings.ngram}: {file} has no text of that many words, so the file "
                "would have no effect; lower it, or leave the file out"
            )
    return np.unique(np.concatenate(found))


def _file_hashes(source: Source, length: int, malformed: list[Malformed]) -> np.ndarray:
    """Hashes of a file's runs of words; its malformed records are added to the list."""
    found = [np.zeros(0, np.uint64)]
    for unit in corpus.plan_units(source):
        for row, _ in corpus.read_unit(unit):
            if isinstance(row, Malformed):
                malformed.append(row)
            else:
                found += [run_hashes(text, length) for text in row if text is not None]
    return np.concatenate(found)


def run_hashes(text: str, length: int) -> np.ndarray:
    """(words - length + 1,) uint64 hashes of the runs of words. Case, punctuation, control characters and variant
    forms of a character do not count, so hashes before and after cleaning are equal."""
    words = WORD.findall(unicodedata.normalize("NFKC", CONTROL.sub("", text)).lower())
    if len(words) < length:
        return np.zeros(0, np.uint64)
    hashes = np.array([_hash_word(word) for word in words], np.uint64)
    runs = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        runs = runs * np.uint64(MULTIPLIER) + hashes[place : place + len(runs)]
    return runs


def shares_a_run(text: str, length: int, contaminated: np.ndarray) -> bool:
    """Whether the hash of any run of words in the text is in the sorted `contaminated`."""
    runs = run_hashes(text, length)
    places = np.searchsorted(contaminated, runs)
    inside = places < len(contaminated)
    return bool((contaminated[places[inside]] == runs[inside]).any())


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# ---- over all rows --------------------------------------------------------------------------------------------


def mark_duplicates(scans: Sequence[Scan]) -> np.ndarray:
    """Set DUPLICATE on every kept row with the digest of an earlier kept row, over all scans in order.

    Returns the sorted numbers of these rows, counted over all scans.
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
    """Number of each scan's first row, counted over all scans."""
    starts = [0]
    for scan in scans:
        starts.append(starts[-1] + len(scan.status))
    return starts[:-1]


def cut(scan: Scan, part_bytes: int) -> list[Part]:
    """All kept rows of a unit in parts, each of at most `part_bytes` of kept text or of one row."""
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
    """Set DUPLICATE on the rows of a scan that are in the sorted `duplicates`. `start`: number of its first row."""
    first, last = np.searchsorted(duplicates, [start, start + len(scan.status)])
    mine = duplicates[first:last] - start
    scan.status[mine] = DUPLICATE
    scan.kept_bytes[mine] = 0


def count_reasons(scans: Iterable[Scan]) -> tuple[dict[str, int], dict[str, int]]:
    """Documents and UTF-8 bytes: read, kept, and dropped by reason. Every row is either kept or dropped.

    `cleaned`: bytes that cleaning removed from kept documents (below 0 where the composed form of a character is
    longer), so kept + cleaned + dropped = read.
    """
    documents, read, kept = np.zeros((3, len(REASONS)), np.int64)
    for scan in scans:
        documents += np.bincount(scan.status, minlength=len(REASONS))
        sums = np.bincount(scan.status, scan.read_bytes, minlength=len(REASONS))  # float64: exact below 9 PB
        read += sums.astype(np.int64)
        kept[KEPT] += scan.kept_bytes.sum()
    in_documents = {"read": int(documents.sum())} | dict(zip(REASONS, documents.tolist(), strict=True))
    in_bytes = {"read": int(read.sum())} | dict(zip(REASONS, read.tolist(), strict=True))
    if not documents[WITHOUT_TARGET]:  # of supervised sources only
        for counts in (in_documents, in_bytes):
            del counts[REASONS[WITHOUT_TARGET]]
    in_bytes |= {"kept": int(kept[KEPT]), "cleaned": int(read[KEPT] - kept[KEPT])}
    return in_documents, in_bytes


def list_malformed(sources: Iterable[str], scans: Iterable[Scan]) -> Iterator[dict[str, str]]:
    """Source, file, place and reason of malformed records, in reading order, at most `LISTED`."""
    found = ((source, record) for source, scan in zip(sources, scans, strict=True) for record in scan.malformed)
    listed = list(islice(found, LISTED))
    named = corpus.with_line_numbers([record for _, record in listed])
    for (source, _), record in zip(listed, named, strict=True):
        yield {"source": source, "file": record.file, "place": record.place, "reason": record.reason}


def choose_sample(scans: Sequence[Scan], limit_bytes: int) -> list[np.ndarray]:
    """Rows of each unit's train split, together at most `limit_bytes` of text and at least one document. A larger
    corpus is sampled by digest: the same documents in any order of files. Documents above a sixteenth of the limit are
    left out if there are smaller ones, because one of them would exclude all later documents."""
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
