"""Preparing data: sources -> corpus -> tokenizer -> shards -> manifest.

Takes the run file's `prepare` and `data.directory`. Gives the folder that `bigmodel.data.shards` describes.

Guarantees: the same text, settings and Python give the same bytes, whatever the number of processes. The folder
appears whole, by one rename of `<directory>.partial`, or not at all: an error or a full disk removes what was
written, and after kill -9 the next run starts over. An existing folder is never altered.

Costs: the text is read three times (hash, scan, tokenize), by every core; tokenizing takes a second per 10 MB and
core. The tokenizer is trained on at most 64 MB of the train split.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from bigmodel.config import PrepareSettings, Settings, UserError
from bigmodel.data import corpus
from bigmodel.data.corpus import Scan, Source, Unit
from bigmodel.data.shards import (
    LARGEST_SHARD_TOKENS,
    MANIFEST,
    SPLITS,
    Manifest,
    ShardWriter,
    check_shards,
    describe_files,
    find_damage,
    length_statistics,
)
from bigmodel.data.tokenizer import Tokenizer, train
from bigmodel.rundir import fsync_directory

TRAINING_BYTES = 64 << 20  # text the tokenizer is trained on, at most
GATE_DOCUMENTS = 64  # real documents on which the fast tokenizer is compared with the exact one
INLINE_BYTES = 8 << 20  # below this, starting processes costs more than it saves
SPARE_BYTES = 16 << 20  # left free on the disk


@dataclass(frozen=True)
class _Job:
    """What to prepare, settled before anything is written. `modules` is the embedded corpus, empty for own sources."""

    target: Path
    settings: PrepareSettings
    sources: list[Source]
    modules: list[tuple[str, bytes]]
    recipe: dict[str, Any]
    corpus_sha256: str


@dataclass
class _Encoded:
    """Documents of a unit by split: stored tokens end to end, their lengths, UTF-8 bytes; validation text."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    text_bytes: dict[str, int]
    validation_text: bytes


def prepare(settings: Settings, progress: Progress | None = None) -> Path:
    """Make the folder `data.directory` and return it; does nothing if it is already made from the same text and
    settings. `progress`: where to show what happens; none: a live display of its own; `quiet()` shows nothing.

    Raises `UserError` for sources that cannot be read or are empty, a vocabulary the text cannot fill, a folder
    made from something else, another preparation under way, and a disk that is or becomes full.
    """
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(live())
        job = _settle(settings)
        if _is_made(job):
            progress.console.print(f"{job.target}: already prepared from this text and these settings; nothing to do")
            return job.target
        partial = job.target.with_name(job.target.name + ".partial")
        with _claimed(partial):
            _build_whole(job, partial, progress)
        manifest = Manifest.read(job.target)
        documents, tokens = (sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "tokens"))
        progress.console.print(f"{job.target}: {documents:,} documents, {tokens:,} tokens prepared")
    return job.target


def live() -> Progress:
    """A progress display with amount, rate and time left, for a terminal."""
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*bar, TransferSpeedColumn(), TimeRemainingColumn())


def quiet() -> Progress:
    """A progress display that shows nothing."""
    return Progress(console=Console(quiet=True), disable=True)


def _settle(settings: Settings) -> _Job:
    wanted = settings.prepare
    if wanted.shard_tokens > LARGEST_SHARD_TOKENS:
        raise UserError(
            f"prepare.shard_tokens = {wanted.shard_tokens}: a shard file is at most 4 GiB; "
            f"set it to {LARGEST_SHARD_TOKENS} or less"
        )
    tokenizer_sha256 = Tokenizer.load(wanted.tokenizer).sha256 if wanted.tokenizer else None
    sources = [corpus.find_source(source) for source in wanted.sources]
    modules = [] if sources else corpus.standard_library()
    recipe = {
        "sources": [source.model_dump() for source in wanted.sources] or "embedded",
        "vocabulary": None if wanted.tokenizer else wanted.vocabulary,
        "tokenizer": tokenizer_sha256,
        "validation_share": wanted.validation_share,
        "shard_tokens": wanted.shard_tokens,
    }
    corpus_sha256 = corpus.corpus_hash(sources) if sources else corpus.embedded_hash(modules)
    return _Job(settings.data.directory, wanted, sources, modules, recipe, corpus_sha256)


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


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Hold an empty folder `partial` against other processes; the lock ends with this one, kill -9 included.

    What a killed run left in it is deleted first; what is left of it at the end is deleted too.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}; choose another data.directory") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError  # another run renamed it between our open and our lock
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError:
        raise UserError(f"{partial}: another process is preparing this data now; wait for it or stop it") from None
    finally:
        os.close(descriptor)


def _build_whole(job: _Job, partial: Path, progress: Progress) -> None:
    try:
        _build(job, partial, progress)
        _sync(partial)
        os.rename(partial, job.target)
        fsync_directory(job.target.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        raise UserError(
            f"{partial}: the disk became full; what was written is removed. Free space, or choose a data.directory "
            "on another disk"
        ) from None


def _build(job: _Job, directory: Path, progress: Progress) -> None:
    sources = job.sources
    left_out: dict[str, dict[str, int]] = {}
    if not sources:
        task = progress.add_task("collecting Python's own text", total=None)
        sources, left_out = corpus.write_embedded_corpus(directory / "corpus", job.modules)
        progress.update(task, total=1, completed=1)
    units = [unit for source in sources for unit in corpus.plan_units(source)]
    with _workers(job.settings.workers, units) as workers:
        scans = _scan(workers, units, job.settings.validation_share, progress)
        rows = _count_rows(sources, units, scans, left_out)
        path = directory / "tokenizer.json"
        sample = _make_tokenizer(job.settings, path, workers, units, scans, progress)
        tokenizer = Tokenizer.load(path, sample[:GATE_DOCUMENTS])
        if not tokenizer.is_fast:
            progress.console.print(f"tokenizing with the slower library: {tokenizer.slow_reason}")
        _check_space(directory, scans, tokenizer.dtype)
        counts, lengths = _encode(workers, units, scans, tokenizer, job.settings.shard_tokens, directory, progress)
    text_bytes = sum(split["text_bytes"] for source in counts.values() for split in source.values())
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=tokenizer.dtype.name,
        counts=counts,
        rows=rows,
        statistics=length_statistics(lengths, text_bytes),
        files=describe_files(directory),
        recipe=job.recipe,
        corpus_sha256=job.corpus_sha256,
        encoder="tiktoken" if tokenizer.is_fast else "tokenizers",
        python=platform.python_version(),
    ).write(directory)


def _sync(directory: Path) -> None:
    """Make every file and folder below survive a power cut, before the rename says that they are whole."""
    for folder, _, names in os.walk(directory):
        for path in [*(Path(folder) / name for name in names), Path(folder)]:
            fsync_directory(path)  # opens read-only and syncs: right for files as well


# ---- the stages -----------------------------------------------------------------------------------------------


def _scan(workers: "_Workers", units: list[Unit], share: float, progress: Progress) -> list[Scan]:
    task = progress.add_task("reading", total=sum(unit.num_bytes for unit in units))
    scans = []
    for unit, scan in zip(units, workers.map(corpus.scan_unit, [(unit, share) for unit in units]), strict=True):
        scans.append(scan)
        progress.advance(task, unit.num_bytes)
    corpus.mark_duplicates(scans)
    return scans


def _count_rows(
    sources: Sequence[Source], units: Sequence[Unit], scans: Sequence[Scan], left_out: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Per source: rows read, kept, dropped by reason. Raises `UserError` for a source or split without documents."""
    rows = {}
    for source in sources:
        mine = [scan for unit, scan in zip(units, scans, strict=True) if unit.source == source.name]
        counts = corpus.count_reasons(mine)
        if not counts["kept"]:
            raise UserError(
                f"prepare.sources {source.name!r}: has no documents ({_in_words(counts)}); "
                "name files that hold text, or leave the source out"
            )
        early = left_out.get(source.name, {})
        counts = {**counts, **early, "read": counts["read"] + sum(early.values())}
        accounted = sum(count for reason, count in counts.items() if reason != "read")
        assert accounted == counts["read"], f"{source.name}: {counts} does not add up"
        rows[source.name] = counts
    kept = np.concatenate([scan.validation[scan.status == corpus.KEPT] for scan in scans])
    for split, number in (("train", np.count_nonzero(~kept)), ("validation", np.count_nonzero(kept))):
        if not number:
            raise UserError(
                f"prepare.validation_share: none of the {len(kept)} documents fell to the {split} split; "
                f"{'lower' if split == 'train' else 'raise'} it, or add documents"
            )
    return rows


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count or reason == "read")


def _make_tokenizer(
    settings: PrepareSettings,
    path: Path,
    workers: "_Workers",
    units: list[Unit],
    scans: list[Scan],
    progress: Progress,
) -> list[str]:
    """Put tokenizer.json in place and return a sample of the train split."""
    task = progress.add_task("making the tokenizer", total=None)
    rows = corpus.choose_sample(scans, TRAINING_BYTES)
    tasks = [(unit, chosen) for unit, chosen in zip(units, rows, strict=True) if len(chosen)]
    sample = [text for texts in workers.map(_read_rows, tasks) for text in texts]
    if settings.tokenizer:
        shutil.copyfile(settings.tokenizer, path)
    else:
        path.write_text(train(sample, settings.vocabulary), encoding="utf-8", newline="")
    progress.update(task, total=1, completed=1)
    return sample


def _check_space(directory: Path, scans: Sequence[Scan], dtype: np.dtype) -> None:
    """Refuse before writing what would not fit: text at two bytes a token is a high estimate of the shards."""
    kept = [scan.status == corpus.KEPT for scan in scans]
    text = sum(int(scan.sizes[mask].sum()) for scan, mask in zip(scans, kept, strict=True))
    validation = sum(int(scan.sizes[mask & scan.validation].sum()) for scan, mask in zip(scans, kept, strict=True))
    documents = sum(int(mask.sum()) for mask in kept)
    needed = text * dtype.itemsize // 2 + validation + 32 * documents + SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"data.directory = {directory.parent}: needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; "
            "free space, or choose a data.directory on another disk"
        )


def _encode(
    workers: "_Workers",
    units: list[Unit],
    scans: list[Scan],
    tokenizer: Tokenizer,
    shard_tokens: int,
    directory: Path,
    progress: Progress,
) -> tuple[dict[str, dict[str, dict[str, int]]], list[np.ndarray]]:
    """Tokenize all units and write them in order. Returns counts by source and split, and all lengths."""
    task = progress.add_task("tokenizing", total=sum(unit.num_bytes for unit in units))
    path = str(directory / "tokenizer.json")
    tasks = [
        (unit, scan.status == corpus.KEPT, scan.validation, path, tokenizer.is_fast)
        for unit, scan in zip(units, scans, strict=True)
    ]
    output = _Output(directory, tokenizer.dtype, shard_tokens)
    try:
        for unit, encoded in zip(units, workers.map(_encode_unit, tasks), strict=True):
            output.write(unit.source, encoded)
            progress.advance(task, unit.num_bytes)
        return output.close()
    except BaseException:
        output.abandon()
        raise


class _Output:
    """The shard writers of the source at hand, and the validation text. Sources come one after another."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._dtype, self._shard_tokens = directory, dtype, shard_tokens
        (directory / "text").mkdir()
        self._text = open(directory / "text" / "validation.txt", "wb")  # noqa: SIM115 - closed below
        self._source = ""
        self._writers: dict[str, ShardWriter] = {}
        self._counts: dict[str, dict[str, dict[str, int]]] = {}
        self._lengths: list[np.ndarray] = []

    def write(self, source: str, encoded: _Encoded) -> None:
        if source != self._source:
            self._finish_source()
            self._source = source
            self._counts[source] = {split: {"documents": 0, "tokens": 0, "text_bytes": 0} for split in SPLITS}
        for split in SPLITS:
            counts, lengths = self._counts[source][split], encoded.lengths[split]
            counts["documents"] += len(lengths)
            counts["tokens"] += len(encoded.tokens[split])
            counts["text_bytes"] += encoded.text_bytes[split]
            self._write_split(split, np.split(encoded.tokens[split], np.cumsum(lengths)[:-1]) if len(lengths) else [])
        self._text.write(encoded.validation_text)

    def _write_split(self, split: str, documents: list[np.ndarray]) -> None:
        if documents and split not in self._writers:
            folder = self._directory / split / self._source
            self._writers[split] = ShardWriter(folder, self._dtype, self._shard_tokens)
        for document in documents:
            self._writers[split].write(document)

    def _finish_source(self) -> None:
        for writer in self._writers.values():
            self._lengths.append(writer.close())
        self._writers = {}

    def close(self) -> tuple[dict[str, dict[str, dict[str, int]]], list[np.ndarray]]:
        self._finish_source()
        self._text.close()
        return self._counts, self._lengths

    def abandon(self) -> None:
        for writer in self._writers.values():
            writer.abandon()
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._text.close()


# ---- what a process does --------------------------------------------------------------------------------------


def _read_rows(unit: Unit, rows: np.ndarray) -> list[str]:
    wanted = set(rows.tolist())
    return [
        text for number, (text, _) in enumerate(corpus.read_unit(unit)) if number in wanted and isinstance(text, str)
    ]


def _encode_unit(unit: Unit, kept: np.ndarray, validation: np.ndarray, tokenizer: str, fast: bool) -> _Encoded:
    encoder = _tokenizer(tokenizer, hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest(), fast)
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    validation_text = []
    number = -1
    for number, (text, _) in enumerate(corpus.read_unit(unit)):
        if number >= len(kept) or not kept[number]:
            continue
        if not isinstance(text, str):
            raise _changed(unit)
        content = text.encode("utf-8")
        split = "validation" if validation[number] else "train"
        documents[split].append(encoder.encode_document(text))
        text_bytes[split] += len(content)
        if validation[number]:
            validation_text.append(content)
    if number + 1 != len(kept):
        raise _changed(unit)
    return _Encoded(
        {split: np.concatenate([*parts, np.zeros(0, encoder.dtype)]) for split, parts in documents.items()},
        {split: np.array([len(part) for part in parts], np.uint32) for split, parts in documents.items()},
        text_bytes,
        b"".join(validation_text),
    )


def _changed(unit: Unit) -> UserError:
    return UserError(f"{unit.files[0]}: changed while it was prepared; prepare again when nothing writes to it")


@lru_cache(maxsize=1)
def _tokenizer(path: str, sha256: str, fast: bool) -> Tokenizer:
    """One tokenizer per process; the hash keeps a test's next tokenizer at the same path apart."""
    tokenizer = Tokenizer.load(Path(path))
    assert tokenizer.sha256 == sha256, f"{path} changed"
    if not fast:
        tokenizer.use_exact()
    return tokenizer


class _Workers:
    """Runs a function over tasks and gives the results in the order of the tasks. No pool: in this process."""

    def __init__(self, pool: ProcessPoolExecutor | None, in_flight: int) -> None:
        self._pool, self._in_flight = pool, in_flight

    def map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """At most `in_flight` results wait, so a slow consumer bounds memory."""
        if self._pool is None:
            yield from (function(*task) for task in tasks)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(function, *task))
                if len(waiting) >= self._in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process was killed, most likely for want of memory; lower prepare.workers"
            ) from None


@contextlib.contextmanager
def _workers(setting: int, units: Sequence[Unit]) -> Iterator[_Workers]:
    """Processes are spawned, not forked: the caller may hold torch and its threads."""
    number = min(setting or len(os.sched_getaffinity(0)), len(units))
    if number <= 1 or sum(unit.num_bytes for unit in units) < INLINE_BYTES:
        yield _Workers(None, 0)
        return
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_start_process)
    try:
        yield _Workers(pool, 2 * number)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Leave Ctrl-C to the parent, keep the tokenizer library to one thread, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None, "a tokenizing process has a parent"

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
