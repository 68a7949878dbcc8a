"""Preparing data: sources -> corpus -> cleaning -> tokenizer -> shards -> manifest.

Takes the run file's `prepare` and `data.directory`. Gives the folder that `bigmodel.data.shards` describes.

    <directory>.partial/<fingerprint of text, settings and versions>/
      scan/00000.npz ...      a unit's rows, judged          duplicates.npy   over all units
      encoded/00000.npz ...   a unit's tokens, by split      result/          what becomes <directory>

Guarantees: the same text, settings and versions give the same bytes, whatever the number of processes, machines and
interruptions: every file of a unit and every shard is a pure function of those, and is written whole by whoever does
it. Killed at any moment, the next run goes on from the finished ones. The folder appears whole, by one rename, or not
at all; an existing folder is never altered.

Costs: the text is read three times (hash, scan, tokenize), by every core; tokenizing takes a second per 10 MB and
core. The tokens are written twice, so until the end they take twice their room. The tokenizer is trained on at most
64 MB of the train split.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from bigmodel.config import PrepareSettings, Settings, SourceSettings, UserError
from bigmodel.data import cleaning, corpus, embedded, mds, units
from bigmodel.data.cleaning import Scan
from bigmodel.data.corpus import Source, Unit
from bigmodel.data.shards import (
    MANIFEST,
    SPLITS,
    Manifest,
    check_shards,
    describe_files,
    find_damage,
    length_statistics,
)
from bigmodel.data.tokenizer import Tokenizer, named_boundaries, tokenizer_file, train
from bigmodel.data.units import Team
from bigmodel.rundir import fsync_directory, read_json, write_atomically, write_json

UNIT_FORMAT = 1  # raise it when the files of a unit change, so that older ones are not taken
TRAINING_BYTES = 64 << 20  # text the tokenizer is trained on, at most
GATE_DOCUMENTS = 64  # real documents on which the fast tokenizer is compared with the exact one
ENCODED_TOGETHER = 64  # documents
INLINE_BYTES = 8 << 20  # below this, starting processes costs more than it saves
SPARE_BYTES = 16 << 20  # left free on the disk
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_IN_RECIPE = {"sources", "tokenizer", "vocabulary", "workers", "scheduler", "malformed_share"}


@dataclass(frozen=True)
class _Job:
    """What to prepare, settled before anything is written. `modules` is the embedded corpus, empty for own sources."""

    target: Path
    settings: PrepareSettings
    sources: list[Source]
    modules: list[tuple[str, bytes]]
    recipe: dict[str, Any]
    corpus_sha256: str

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def fingerprint(self) -> str:
        """Of everything that the bytes of the result depend on."""
        versions = [version(name) for name in ("numpy", "pyarrow", "tiktoken", "tokenizers")]
        everything = [UNIT_FORMAT, corpus.UNIT_BYTES, self.recipe, self.corpus_sha256, platform.python_version()]
        everything += [unicodedata.unidata_version, versions]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Work:
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


def prepare(settings: Settings, progress: Progress | None = None) -> Path:
    """Make the folder `data.directory` and return it; does nothing if it is already made from the same text and
    settings. `progress`: where to show what happens; none: a live display of its own; `quiet()` shows nothing.

    Raises `UserError` for sources that cannot be read or are empty, a vocabulary the text cannot fill, a folder
    made from something else, another preparation under way, and a disk that is or becomes full. SIGTERM is taken
    as Ctrl-C: `KeyboardInterrupt`. Whatever ends it, finished units are kept for the next run.
    """
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(live())
        job = _settle(settings)
        made = _is_made(job)
        if made:
            progress.console.print(f"{job.target}: already prepared from this text and these settings; nothing to do")
        if not made or job.partial.exists():
            with _claimed(job.partial), _stoppable():
                if not _is_made(job):  # another run may have finished between
                    _build_whole(job, progress)
                shutil.rmtree(job.partial)
        if not made:
            manifest = Manifest.read(job.target)
            documents, tokens = (
                sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "tokens")
            )
            progress.console.print(f"{job.target}: {documents:,} documents, {tokens:,} tokens prepared")
    return settings.data.directory


def live() -> Progress:
    """A progress display with amount, rate and time left, for a terminal."""
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*bar, TransferSpeedColumn(), TimeRemainingColumn())


def quiet() -> Progress:
    """A progress display that shows nothing."""
    return Progress(console=Console(quiet=True), disable=True)


# ---- what is asked for, and is it there -----------------------------------------------------------------------


def _settle(settings: Settings) -> _Job:
    wanted = settings.prepare
    if wanted.shard_tokens > mds.LARGEST_SHARD_TOKENS:
        raise UserError(
            f"prepare.shard_tokens = {wanted.shard_tokens}: a shard file is at most 4 GiB; "
            f"set it to {mds.LARGEST_SHARD_TOKENS} or less"
        )
    sources = [corpus.find_source(source) for source in wanted.sources]
    modules = [] if sources else embedded.standard_library()
    recipe = wanted.model_dump(mode="json", exclude=NOT_IN_RECIPE) | {
        "sources": [source.model_dump() for source in wanted.sources] or "embedded",
        "vocabulary": None if wanted.tokenizer else wanted.vocabulary,
        "tokenizer": _describe_tokenizer(wanted.tokenizer) if wanted.tokenizer else None,
    }
    if wanted.decontaminate:
        against = SourceSettings(name="evaluation", **wanted.decontaminate.model_dump(include={"files", "column"}))
        recipe["evaluation_sha256"] = corpus.corpus_hash([corpus.find_source(against, "prepare.decontaminate")])
    corpus_sha256 = corpus.corpus_hash(sources) if sources else embedded.embedded_hash(modules)
    return _Job(settings.data.directory.absolute(), wanted, sources, modules, recipe, corpus_sha256)


def _describe_tokenizer(path: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(path, fast=False)
    return {"sha256": tokenizer.sha256, "bos": tokenizer.bos, "eos": tokenizer.eos}


def _is_made(job: _Job) -> bool:
    """Whether the target is there and is what was asked for. Raises `UserError` if it is something else."""
    if not job.target.exists() or (job.target.is_dir() and not any(job.target.iterdir())):
        return False
    manifest = Manifest.read(job.target)
    differences = [
        f"prepare.{name} was {manifest.recipe.get(name)!r}, is {value!r}"
        for name, value in job.recipe.items()
        if manifest.recipe.get(name) != value
    ]
    if not differences and manifest.corpus_sha256 != job.corpus_sha256:
        what = "the source files have" if job.sources else "Python's standard library has"
        differences = [f"{what} other content now"]
    if differences:
        raise UserError(
            f"data.directory = {job.target}: already prepared otherwise ({'; '.join(differences)}); "
            "choose another data.directory, or delete this one"
        )
    return True


# ---- the folder under way -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Hold the folder `partial` against other processes; the lock ends with this one, kill -9 included."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}; choose another data.directory") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError  # another run removed it between our open and our lock
        yield
    except BlockingIOError:
        raise UserError(f"{partial}: another process is preparing this data now; wait for it or stop it") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does. Signals belong to the main thread: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work_folder(job: _Job, progress: Progress) -> _Work:
    """The folder for this text and these settings, with what an earlier run finished; others' are deleted."""
    work = _Work(job.partial / job.fingerprint)
    for leftover in job.partial.iterdir():
        if leftover != work.folder:
            progress.console.print(f"{leftover}: left by other text, settings or versions; deleted, starting over")
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for folder in (work.folder / "scan", work.folder / "encoded", work.result):
        folder.mkdir(parents=True, exist_ok=True)
    if work.finished():
        progress.console.print(f"{job.partial}: going on from {work.finished():,} finished units")
    return work


def _build_whole(job: _Job, progress: Progress) -> None:
    work = _work_folder(job, progress)
    try:
        _build(job, work, progress)
        _sync(work.result)
        os.rename(work.result, job.target)
        fsync_directory(job.target.parent)
    except OSError as error:
        if error.errno not in DISK_FULL and "No space left" not in str(error):
            raise
        raise UserError(
            f"{job.partial}: the disk became full; {work.finished():,} finished units are kept. Free space and run the "
            "same command to go on, or delete that folder and choose a data.directory on another disk"
        ) from None
    except UserError as error:
        if not work.finished():
            raise
        raise UserError(
            f"{error}\n{work.finished():,} finished units are kept in {job.partial}; the same command goes on from them"
        ) from None


def _sync(directory: Path) -> None:
    """Make every file and folder below survive a power cut, before the rename says that they are whole."""
    for folder, _, names in os.walk(directory):
        for path in [*(Path(folder) / name for name in names), Path(folder)]:
            fsync_directory(path)  # opens read-only and syncs: right for files as well


# ---- the stages -----------------------------------------------------------------------------------------------


def _build(job: _Job, work: _Work, progress: Progress) -> None:
    sources = job.sources
    left_out: dict[str, dict[str, dict[str, int]]] = {}
    if not sources:
        sources, left_out = _collect_embedded(job.modules, work, progress)
    all_units = [unit for source in sources for unit in corpus.plan_units(source)]
    with _team(job.settings, all_units, progress) as team:
        scans = _scan(team, all_units, job.settings, work)
        rows, row_bytes = _count_rows(sources, all_units, scans, left_out)
        tokenizer = _make_tokenizer(job.settings, team, all_units, scans, work)
        if not tokenizer.is_fast:
            progress.console.print(f"tokenizing with the slower library: {tokenizer.slow_reason}")
        _check_space(job, work, scans, tokenizer.dtype)
        _encode(team, all_units, scans, job.settings, tokenizer.is_fast, work)
        counts, lengths = _assemble(team, sources, all_units, scans, job.settings.shard_tokens, tokenizer.dtype, work)
    _write_lists(all_units, scans, work)
    for name, splits in counts.items():
        stored = sum(split["text_bytes"] for split in splits.values())
        assert stored == row_bytes[name]["kept"], f"{name}: stored {stored} bytes of {row_bytes[name]}"
        documents = sum(split["documents"] for split in splits.values())
        assert documents == rows[name]["kept"], f"{name}: stored {documents} documents of {rows[name]}"
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=tokenizer.dtype.name,
        counts=counts,
        rows=rows,
        row_bytes=row_bytes,
        statistics=length_statistics(lengths, sum(bytes_["kept"] for bytes_ in row_bytes.values())),
        files=describe_files(work.result),
        recipe=job.recipe,
        corpus_sha256=job.corpus_sha256,
        encoder="tiktoken" if tokenizer.is_fast else "tokenizers",
        python=platform.python_version(),
    ).write(work.result)


def _collect_embedded(
    modules: list[tuple[str, bytes]], work: _Work, progress: Progress
) -> tuple[list[Source], dict[str, dict[str, dict[str, int]]]]:
    """The embedded corpus as two files of the result, and what was left out of them."""
    folder, record = work.result / "corpus", work.folder / "left_out.json"
    if not record.exists():  # written last
        task = progress.add_task("collecting Python's own text", total=None)
        write_json(record, embedded.write_embedded_corpus(folder, modules))
        progress.update(task, total=1, completed=1)
    return embedded.embedded_sources(folder), read_json(record)


def _team(
    settings: PrepareSettings, all_units: Sequence[Unit], progress: Progress
) -> contextlib.AbstractContextManager[Team]:
    if settings.scheduler:
        return units.cluster(settings.scheduler, progress)
    number = min(settings.workers or len(os.sched_getaffinity(0)), len(all_units))
    small = sum(unit.num_bytes for unit in all_units) < INLINE_BYTES
    return units.processes(1 if small else number, progress)


def _scan(team: Team, all_units: Sequence[Unit], settings: PrepareSettings, work: _Work) -> list[Scan]:
    if settings.decontaminate:
        _save(work.contaminated, cleaning.evaluation_hashes(settings.decontaminate))

    def look(malformed: dict[str, str] | None) -> None:
        if malformed and not settings.malformed_share:
            raise UserError(_in_one_line(malformed) + "; mend or drop it, or set prepare.malformed_share above 0")

    weights = [unit.num_bytes for unit in all_units]
    team.run("reading", _scan_unit, [(n, unit, settings, work) for n, unit in enumerate(all_units)], weights, look)
    scans = [Scan.read(work.scan(number)) for number in range(len(all_units))]
    _check_malformed(all_units, scans, settings.malformed_share, work)
    _save(work.duplicates, cleaning.mark_duplicates(scans) if settings.deduplicate else np.zeros(0, np.int64))
    return scans


def _in_one_line(malformed: dict[str, str]) -> str:
    return f"{malformed['file']}: {malformed['place']}: {malformed['reason']}"


def _check_malformed(all_units: Sequence[Unit], scans: Sequence[Scan], allowed: float, work: _Work) -> None:
    """Raise `UserError` for the first source with more malformed records than allowed, with a list of them."""
    for source in dict.fromkeys(unit.source for unit in all_units):
        mine = [scan for unit, scan in zip(all_units, scans, strict=True) if unit.source == source]
        malformed = sum(int((scan.status == cleaning.MALFORMED).sum()) for scan in mine)
        read = sum(len(scan.status) for scan in mine)
        if malformed > allowed * read:
            first = next(cleaning.list_malformed([source] * len(mine), mine))
            raise UserError(
                f"prepare.sources {source!r}: {malformed:,} of {read:,} records are malformed, which is above "
                f"prepare.malformed_share = {allowed}; the first is {_in_one_line(first)}; mend them or raise the share"
            )


def _count_rows(
    sources: Sequence[Source],
    all_units: Sequence[Unit],
    scans: Sequence[Scan],
    left_out: dict[str, dict[str, dict[str, int]]],
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Per source, in documents and in bytes: read, kept, dropped by reason. Raises `UserError` for a source or split
    without documents."""
    rows, row_bytes = {}, {}
    for source in sources:
        mine = [scan for unit, scan in zip(all_units, scans, strict=True) if unit.source == source.name]
        counted = cleaning.count_reasons(mine)
        if not counted[0]["kept"]:
            raise UserError(
                f"prepare.sources {source.name!r}: has no documents ({_in_words(counted[0])}); "
                "name files that hold text, or leave the source out"
            )
        for counts, what in zip(counted, ("documents", "bytes"), strict=True):
            early = {reason: numbers[what] for reason, numbers in left_out.get(source.name, {}).items()}
            counts |= early | {"read": counts["read"] + sum(early.values())}
            accounted = sum(count for reason, count in counts.items() if reason != "read")
            assert accounted == counts["read"], f"{source.name}: {counts} does not add up"
        rows[source.name], row_bytes[source.name] = counted
    kept = np.concatenate([scan.validation[scan.status == cleaning.KEPT] for scan in scans])
    for split, number in (("train", np.count_nonzero(~kept)), ("validation", np.count_nonzero(kept))):
        if not number:
            raise UserError(
                f"prepare.validation_share: none of the {len(kept)} documents fell to the {split} split; "
                f"{'lower' if split == 'train' else 'raise'} it, or add documents"
            )
    return rows, row_bytes


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count or reason == "read")


def _make_tokenizer(
    settings: PrepareSettings, team: Team, all_units: Sequence[Unit], scans: Sequence[Scan], work: _Work
) -> Tokenizer:
    """Put tokenizer.json in place, after the documents on which its fast path is compared."""
    gate = work.folder / "gate.json"
    if not work.tokenizer.exists():
        sample = _read_sample(team, all_units, scans, settings)
        write_json(gate, sample[:GATE_DOCUMENTS])
        if settings.tokenizer:
            given = tokenizer_file(settings.tokenizer)
            _keep_boundaries(given.parent, work.result)
            write_atomically(work.tokenizer, given.read_bytes())
        else:
            write_atomically(work.tokenizer, train(sample, settings.vocabulary))
    return Tokenizer.load(work.tokenizer, read_json(gate))


def _keep_boundaries(given: Path, result: Path) -> None:
    """What a Hugging Face folder says of begin and end goes with its tokenizer.json."""
    named = named_boundaries(given)
    if named:
        write_json(result / "tokenizer_config.json", dict(zip(("bos_token", "eos_token"), named, strict=True)))


def _read_sample(team: Team, all_units: Sequence[Unit], scans: Sequence[Scan], settings: PrepareSettings) -> list[str]:
    rows = cleaning.choose_sample(scans, TRAINING_BYTES)
    chosen = [(unit, mine, settings) for unit, mine in zip(all_units, rows, strict=True) if len(mine)]
    weights = [unit.num_bytes for unit, *_ in chosen]
    return [text for texts in team.run("sampling for the tokenizer", _read_rows, chosen, weights) for text in texts]


def _check_space(job: _Job, work: _Work, scans: Sequence[Scan], dtype: np.dtype) -> None:
    """Refuse before writing what would not fit: text at two bytes a token is a high estimate of the tokens, which
    are written twice, once by unit and once by shard."""
    text = sum(int(scan.kept_bytes.sum()) for scan in scans)
    validation = sum(int(scan.kept_bytes[scan.validation].sum()) for scan in scans)
    documents = sum(int((scan.status == cleaning.KEPT).sum()) for scan in scans)
    needed = 2 * (text * dtype.itemsize // 2 + validation + 32 * documents) + SPARE_BYTES
    written = sum(file.stat().st_size for file in work.folder.rglob("*") if file.is_file() and "scan" not in file.parts)
    free = shutil.disk_usage(work.folder).free
    if free < needed - written:
        raise UserError(
            f"data.directory = {job.target}: needs about {(needed - written) / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are "
            "free; free space, or choose a data.directory on another disk"
        )


def _encode(
    team: Team,
    all_units: Sequence[Unit],
    scans: Sequence[Scan],
    settings: PrepareSettings,
    fast: bool,
    work: _Work,
) -> None:
    starts = cleaning.first_rows(scans)
    tasks = [
        (number, unit, start, settings, fast, work)
        for number, (unit, start) in enumerate(zip(all_units, starts, strict=True))
    ]
    team.run("tokenizing", _encode_unit, tasks, [unit.num_bytes for unit in all_units])


# ---- shards from units ----------------------------------------------------------------------------------------

TOKEN_COLUMNS = ("tokens", "target_tokens")  # in the shards: of a source's column, of its target column


@dataclass(frozen=True)
class _Shard:
    """One shard: what index.json says of it, and of which units' documents it is made, in order: (unit, first
    document, end)."""

    folder: str  # below the result: split/source
    split: str
    number: int
    columns: tuple[str, ...]
    parts: tuple[tuple[int, int, int], ...]
    entry: dict[str, Any]


def _assemble(
    team: Team,
    sources: Sequence[Source],
    all_units: Sequence[Unit],
    scans: Sequence[Scan],
    shard_tokens: int,
    dtype: np.dtype,
    work: _Work,
) -> tuple[dict[str, dict[str, dict[str, int]]], list[np.ndarray]]:
    """Write all shards and their indexes. Returns counts by source and split, and all documents' lengths."""
    counts: dict[str, dict[str, dict[str, int]]] = {source.name: {} for source in sources}
    shards: list[_Shard] = []
    all_lengths: list[np.ndarray] = []
    for source in sources:
        mine = [number for number, unit in enumerate(all_units) if unit.source == source.name]
        columns = TOKEN_COLUMNS[: len(source.columns)]
        for split in SPLITS:
            lengths = {
                column: [_read_array(work, unit, f"{split}_{column}_lengths") for unit in mine] for column in columns
            }
            shards += _plan_shards(source.name, split, mine, lengths, shard_tokens, dtype)
            all_lengths.append(np.concatenate(lengths["tokens"]))
            chosen = [(scans[unit], scans[unit].validation == (split == "validation")) for unit in mine]
            counts[source.name][split] = {
                "documents": len(all_lengths[-1]),
                "text_bytes": sum(int(scan.kept_bytes[rows].sum()) for scan, rows in chosen),
                **{column: sum(int(part.sum(dtype=np.int64)) for part in lengths[column]) for column in columns},
            }
    weights = [shard.entry["raw_data"]["bytes"] for shard in shards]
    team.run("writing shards", _write_shard, [(shard, work) for shard in shards], weights)
    for folder in dict.fromkeys(shard.folder for shard in shards):
        index = mds.encode_index([shard.entry for shard in shards if shard.folder == folder])
        write_atomically(work.result / folder / "index.json", index)
    return counts, all_lengths


def _plan_shards(
    source: str,
    split: str,
    unit_numbers: Sequence[int],
    lengths: dict[str, list[np.ndarray]],
    shard_tokens: int,
    dtype: np.dtype,
) -> list[_Shard]:
    """Cut the documents of all units, end to end, into shards: each closes before the document that would bring it
    above `shard_tokens`."""
    joined = {column: np.concatenate(parts) for column, parts in lengths.items()}
    tokens = sum(part.astype(np.int64) for part in joined.values())
    if len(tokens) and tokens.max() > mds.LARGEST_SHARD_TOKENS:
        raise UserError(
            f"prepare.sources {source!r}: a document of {tokens.max():,} tokens does not fit a shard file of 4 GiB; "
            "split it, or drop it with prepare.max_characters"
        )
    ends = np.cumsum(tokens)
    bounds = np.cumsum([0, *(len(part) for part in lengths["tokens"])])
    shards: list[_Shard] = []
    first = 0
    while first < len(tokens):
        room = shard_tokens + (int(ends[first - 1]) if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, room, side="right")))
        parts = tuple(
            (unit, max(first, start) - start, min(last, end) - start)
            for unit, start, end in zip(unit_numbers, bounds.tolist(), bounds[1:].tolist(), strict=False)
            if start < last and end > first
        )
        entry = mds.shard_entry(len(shards), {name: part[first:last] for name, part in joined.items()}, dtype)
        shards.append(_Shard(f"{split}/{source}", split, len(shards), tuple(joined), parts, entry))
        first = last
    return shards


def _read_array(work: _Work, unit: int, name: str) -> np.ndarray:
    with np.load(work.encoded(unit)) as arrays:
        return arrays[name]


def _write_lists(all_units: Sequence[Unit], scans: Sequence[Scan], work: _Work) -> None:
    """The validation text end to end, and the malformed records if there are any."""
    (work.result / "text").mkdir(exist_ok=True)
    with open(work.result / "text" / "validation.txt", "wb") as file:
        for number in range(len(all_units)):
            file.write(_read_array(work, number, "validation_text").tobytes())
    lines = [json.dumps(record) for record in cleaning.list_malformed([unit.source for unit in all_units], scans)]
    if lines:
        write_atomically(work.result / "malformed.jsonl", "".join(f"{line}\n" for line in lines))
    for part in work.result.rglob(".*.part"):  # of a process that was killed while it wrote
        part.unlink()


# ---- what a process does --------------------------------------------------------------------------------------


def _scan_unit(number: int, unit: Unit, settings: PrepareSettings, work: _Work) -> dict[str, str] | None:
    """Judge a unit's rows, unless that is done; returns the first malformed record."""
    path = work.scan(number)
    if cleaning.is_whole(path):
        scan = Scan.read(path)
    else:
        contaminated = np.load(work.contaminated, mmap_mode="r") if settings.decontaminate else None
        scan = cleaning.scan_unit(unit, settings, contaminated)
        scan.write(path)
    return next(cleaning.list_malformed([unit.source], [scan]), None)


def _read_rows(unit: Unit, rows: np.ndarray, settings: PrepareSettings) -> list[str]:
    wanted = set(rows.tolist())
    return [
        cleaning.clean(text, settings)
        for number, (texts, _) in enumerate(corpus.read_unit(unit))
        if number in wanted and isinstance(texts, tuple)
        for text in texts
        if text is not None
    ]


def _encode_unit(number: int, unit: Unit, start: int, settings: PrepareSettings, fast: bool, work: _Work) -> None:
    """Tokenize a unit's kept rows, unless that is done. `start`: the number of its first row among all."""
    path = work.encoded(number)
    if cleaning.is_whole(path):
        return
    scan = Scan.read(work.scan(number))
    cleaning.mark_rows(scan, start, np.load(work.duplicates, mmap_mode="r"))
    encoder = _tokenizer(work.tokenizer, hashlib.sha256(work.tokenizer.read_bytes()).hexdigest(), fast)
    columns = TOKEN_COLUMNS[: len(unit.columns)]
    stored: dict[str, list[np.ndarray]] = {f"{split}_{column}": [] for split in SPLITS for column in columns}
    validation_text = []
    kept = _kept_rows(unit, scan, settings)
    while rows := list(islice(kept, ENCODED_TOGETHER)):
        encoded = iter(encoder.encode_documents([text for _, texts in rows for text in texts]))
        for row, texts in rows:
            split = SPLITS[int(scan.validation[row])]
            for column in columns:
                stored[f"{split}_{column}"].append(next(encoded))
            if split == "validation":
                validation_text += [text.encode() for text in texts]
    arrays = {name: np.concatenate([*parts, np.zeros(0, encoder.dtype)]) for name, parts in stored.items()}
    arrays |= {f"{name}_lengths": np.array([len(p) for p in parts], np.uint32) for name, parts in stored.items()}
    arrays["validation_text"] = np.frombuffer(b"".join(validation_text), np.uint8)
    cleaning.write_arrays(path, **arrays)


def _kept_rows(unit: Unit, scan: Scan, settings: PrepareSettings) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows that the scan kept, cleaned. Raises `UserError` if the unit is not what was scanned."""
    number = -1
    for number, (row, _) in enumerate(corpus.read_unit(unit)):
        if number >= len(scan.status) or scan.status[number] != cleaning.KEPT:
            continue
        texts = () if isinstance(row, corpus.Malformed) else cleaning.judge(row, settings)[1]
        if sum(len(text.encode()) for text in texts) != scan.kept_bytes[number]:
            raise _changed(unit)
        yield number, texts
    if number + 1 != len(scan.status):
        raise _changed(unit)


def _changed(unit: Unit) -> UserError:
    return UserError(f"{unit.files[0]}: changed while it was prepared; prepare again when nothing writes to it")


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str, fast: bool) -> Tokenizer:
    """One tokenizer per process; the hash keeps a test's next tokenizer at the same path apart."""
    tokenizer = Tokenizer.load(path, fast=fast)
    assert tokenizer.sha256 == sha256, f"{path} changed"
    return tokenizer


def _write_shard(shard: _Shard, work: _Work) -> None:
    """Write a shard and its lengths from the units' files, unless that is done: the shard comes last."""
    folder = work.result / shard.folder
    path = folder / shard.entry["raw_data"]["basename"]
    if path.exists() and path.stat().st_size == shard.entry["raw_data"]["bytes"]:
        return
    documents: dict[str, list[np.ndarray]] = {column: [] for column in shard.columns}
    for unit, first, last in shard.parts:
        with np.load(work.encoded(unit)) as arrays:
            for column in shard.columns:
                bounds = np.cumsum([0, *arrays[f"{shard.split}_{column}_lengths"]])[first : last + 1].tolist()
                tokens = arrays[f"{shard.split}_{column}"]
                documents[column] += [tokens[start:end] for start, end in pairwise(bounds)]
    folder.mkdir(parents=True, exist_ok=True)
    for column, arrays_ in documents.items():
        name = f"{column.removesuffix('tokens')}lengths.{shard.number:05}.npy"
        _save(folder / name, np.array([len(array) for array in arrays_], np.uint32))
    write_atomically(path, mds.encode_shard(documents))


def _save(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getvalue())


# ---- looking at prepared data ---------------------------------------------------------------------------------


def verify(directory: Path) -> list[str]:
    """Every way in which a prepared folder differs from its manifest; empty if it is whole.

    Raises `UserError` where there is no readable manifest. Reads every byte, about 1 GB/s a thread.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    with ThreadPoolExecutor() as pool:
        damages = pool.map(lambda name: find_damage(directory, name, manifest.files[name]), sorted(manifest.files))
        problems = [damage for damage in damages if damage]
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    problems += [
        f"{directory / name}: not in the manifest" for name in sorted(found - set(manifest.files) - {MANIFEST})
    ]
    if problems:
        return problems
    try:
        return check_shards(directory, manifest)
    except UserError as error:
        return [str(error)]


def summary(directory: Path) -> Table:
    """Sources and splits with their documents, tokens and text, then the lengths, as a table to print."""
    manifest = Manifest.read(directory)
    statistics = manifest.statistics
    table = Table(
        title=f"{directory}: vocabulary {manifest.vocabulary:,}, {statistics['bytes_per_token']:.2f} bytes per token",
        caption=(
            f"document length in tokens: mean {statistics['mean_tokens']:,.0f}, "
            f"median {statistics['median_tokens']:,.0f}, "
            f"90% below {statistics['p90_tokens']:,.0f}, longest {statistics['max_tokens']:,}\n"
            + _histogram(statistics["histogram"])
        ),
        caption_justify="left",
    )
    table.add_column("source")
    table.add_column("split")
    for name in ("documents", "tokens", "text MB", "rows dropped"):
        table.add_column(name, justify="right")
    for source in manifest.sources:
        rows = manifest.rows[source]
        for split in SPLITS:
            counts = manifest.counts[source][split]
            dropped = f"{rows['read'] - rows['kept']:,} of {rows['read']:,}" if split == SPLITS[0] else ""
            megabytes = f"{counts['text_bytes'] / 1e6:,.2f}"
            table.add_row(source, split, f"{counts['documents']:,}", f"{counts['tokens']:,}", megabytes, dropped)
    return table


def _histogram(bins: dict[str, int]) -> str:
    """A line per power of two: up to so many tokens, a bar, how many documents."""
    most = max(bins.values())
    return "\n".join(
        f"up to {top:>9,} {'█' * max(1, round(count / most * 30)):<30} {count:,}"
        for top, count in sorted((int(top), count) for top, count in bins.items())
    )
