"""Preparing data: sources -> corpus -> cleaning -> tokenizer -> shards -> manifest.

In: the run file's `prepare` and `data.directory`. Out: the folder described in `bigmodel.data.store.shards`. Staging:

    <directory>.partial/<fingerprint of text, settings and versions>/
      scan/00000.npz ...           verdicts on a unit's rows   duplicates.npy   over all units
      encoded/00000-0000.npz ...   tokens of a part of a       result/          becomes <directory>
                                   unit (16 MB of text), by split

Guarantees: the same text, settings and versions give the same bytes, with any number of processes, machines and
interruptions: every file of a unit and every shard is a pure function of these, and is written atomically by any
process. Killed at any moment, the next run continues from the finished files. The folder appears whole, by one rename,
or not at all; an existing folder is never altered.

Costs: every core reads the text three times (hash, scan, tokenize); tokenizing takes a second per 10 MB and core.
The tokens are written twice and need twice their disk space until the end. The tokenizer is trained on at most 64 MB
of the train split.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bigmodel.config.settings import PrepareSettings, Settings, SourceSettings, UserError, without_secrets
from bigmodel.data.prepare import (
    cleaning,
    corpus,
    embedded,
    embedded_chats,
    encoding,
)
from bigmodel.data.prepare import (
    shard_writing as assembly,
)
from bigmodel.data.prepare import (
    work_items as units,
)
from bigmodel.data.prepare.cleaning import Part, Scan
from bigmodel.data.prepare.corpus import Source, Unit
from bigmodel.data.prepare.embedded_verbs import verb_sources, write_embedded_verbs
from bigmodel.data.prepare.encoding import Work, read_array
from bigmodel.data.prepare.indexes import compare_with_indexes
from bigmodel.data.prepare.labels import count_labels, labels_in_words
from bigmodel.data.prepare.scanning import count_rows, num_texts, scan_all, texts_in_words, write_malformed
from bigmodel.data.prepare.staging import (
    DISK_FULL,
    claimed,
    folders_in,
    foreign,
    partial_of,
    put_in_place,
    stoppable,
    writable,
)
from bigmodel.data.prepare.supervised import find_template, keep_template, write_template
from bigmodel.data.prepare.tokenless import count_tokenless
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store import mds
from bigmodel.data.store.chat_template import ChatTemplate
from bigmodel.data.store.manifest import (
    EXACT,
    MANIFEST,
    PROVEN,
    SPLITS,
    Manifest,
    describe_files,
    in_words,
    stored_amount,
)
from bigmodel.data.store.mds_index import absent_beside, in_lines
from bigmodel.data.store.shards import all_statistics, measure_shards
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer, named_boundaries, read_tokenizer, tokenizer_file, train
from bigmodel.data.store.word_tokenizer import train_words
from bigmodel.run_directory import read_json, write_atomically, write_json
from bigmodel.sizes import byte_size, counted_noun

UNIT_FORMAT = 4  # raise it when the files of a unit change, so that older files are not reused
TRAINING_BYTES = 64 << 20  # at most, of training text for the tokenizer
GATE_DOCUMENTS = 64  # for the comparison of the fast tokenizer with the exact one
GATE_CHARACTERS = 4_000  # of each: the exact path takes a second per MB
GATE_BYTES = 1 << 20  # of text to choose them from if no tokenizer is trained
WARNED_UNKNOWN_SHARE = 0.01  # of the tokens of a source
INLINE_BYTES = 8 << 20  # below this, starting processes costs more than it saves
SPARE_BYTES = 16 << 20  # left free on the disk
TASKS_A_PROCESS = 4  # at least, if a unit has enough parts: then all processes end together
READS_OF_A_UNIT = 8  # at most, while its parts are tokenized: half of each read only skips to the part
EMBEDDED = {  # in the recipe
    "text": "embedded", "pairs": "embedded pairs", "chats": "embedded chats", "verbs": "embedded verbs",
}  # fmt: skip
COLLECT = {  # by content of the embedded corpus: writes its files; their sources
    "text": (embedded.write_embedded_corpus, embedded.embedded_sources),
    "pairs": (embedded.write_embedded_pairs, embedded.pair_sources),
    "verbs": (write_embedded_verbs, verb_sources),
}
OF_WORDS = {"words", "lowercase", "min_frequency"}
NOT_IN_RECIPE = {"sources", "embedded", "tokenizer", "vocabulary", "workers", "scheduler", "malformed_share"} | {
    "dropped_characters_share",
    "bpe_dropout",
    "chat_template",
    "segmentation",  # only if set
    "tokenizer_model",
    *OF_WORDS,
}
NEW_IN_SOURCES = (
    "format",
    "prompt_column",
    "messages_column",
    "weight_column",
    "label_column",
    "tag",
    "split_by",
)  # in the recipe only if set


@dataclass(frozen=True)
class _Job:
    """What to prepare, checked before anything is written. `modules`: the embedded corpus; empty with own sources."""

    target: Path
    settings: PrepareSettings
    sources: list[Source]
    modules: list[tuple[str, bytes]]
    recipe: dict[str, Any]
    corpus_sha256: str
    read: Sequence[Source]  # the sources and the evaluation files
    identities: dict[str, str]  # of every file, taken before its content is read
    template: ChatTemplate | None  # of chats

    @property
    def partial(self) -> Path:
        return partial_of(self.target)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the bytes of the result."""
        everything = [UNIT_FORMAT, corpus.UNIT_BYTES, self.recipe, self.corpus_sha256, units.versions()]
        everything += [list(self.identities.values())]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def prepare(settings: Settings, progress: Progress | None = None) -> Path:
    """Make the folder `data.directory` and return it; does nothing if it exists with the same text and settings.
    `progress`: None: a live display of its own; `quiet()`: none.

    Raises `UserError` for unreadable or empty sources, a vocabulary too large for the text, a folder of other text or
    settings, another running preparation, and a full disk. SIGTERM acts as Ctrl-C: `KeyboardInterrupt`. Finished
    units always stay for the next run.
    """
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(live())
        job = _settle(settings, partial(_say, progress))
        made = _is_made(job)
        if made:
            conclude(progress, f"{job.target}: already prepared from this text and these settings; nothing to do")
        if not made or (job.partial.exists() and not foreign(job.partial)):
            with claimed(job.partial), stoppable():
                if not _is_made(job):  # another run may have finished meanwhile
                    _build_whole(job, progress)
                if job.partial.exists():
                    shutil.rmtree(job.partial)
        if not made:
            conclude(progress, _summary(job))
    return settings.data.directory


def live() -> Progress:
    """A progress display with amount, rate and time left, for a terminal."""
    bar = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    console = Console(highlight=False, markup=False, emoji=False)
    return Progress(*bar, TransferSpeedColumn(), TimeRemainingColumn(), console=console)


def quiet() -> Progress:
    """A progress display that shows nothing."""
    return Progress(console=Console(markup=False, emoji=False, quiet=True), disable=True)


def conclude(progress: Progress, line: str) -> None:
    """End the progress bars, each on its own line also in a file, and print a line below them."""
    progress.live.stop()
    if progress.tasks and not progress.disable and not progress.console.is_interactive:
        progress.console.print()  # without a terminal the bars end without a line break
    progress.disable = True  # the end of the display prints no further line
    _say(progress, line)


def _say(progress: Progress, line: str) -> None:
    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(job: _Job) -> str:
    """Amounts prepared, rows dropped by reason, and sources with one file per document."""
    manifest = Manifest.read(job.target)
    splits = [of_split for of_source in manifest.counts.values() for of_split in of_source.values()]
    documents = sum(of_split["documents"] for of_split in splits)
    tokens = sum(stored_amount(of_split, "tokens") for of_split in splits)
    lines = [f"{job.target}: {counted_noun(documents, 'document')}, {tokens:,} tokens prepared"]
    lines += [f"  {source.name}: {texts_in_words(source)}" for source in job.sources if num_texts(source)]
    dropped = {name: manifest.dropped(name) for name in manifest.sources}
    lines += [f"  {name}: dropped {in_words(counts)}" for name, counts in dropped.items() if counts]
    lines += [f"  {name}: {labels_in_words(of_source)}" for name, of_source in manifest.labels.items()]
    is_of_words = job.settings.tokenizer is None and job.settings.tokenizer_model == "word"
    for name, counts in manifest.without_token.items():
        if some := {what: count for what, count in counts.items() if count}:
            lines.append(f"  {name}: text without a token: {in_words(some)}")
        of_source = sum(stored_amount(of_split, "tokens") for of_split in manifest.counts[name].values())
        share = counts["unknown_tokens"] / max(1, of_source)
        if is_of_words:
            lines.append(
                f"  {name}: {share:.2%} of the tokens are the unknown token; fewer with a larger prepare.vocabulary or "
                "a smaller prepare.min_frequency"
            )
        elif share > WARNED_UNKNOWN_SHARE:
            lines.append(
                f"  warning: {share:.1%} of the tokens of {name} are the unknown token, their text is lost; "
                "prepare.tokenizer does not suit it"
            )
    return "\n".join(lines)


# ---- the request ----------------------------------------------------------------------------------------------


def _settle(settings: Settings, say: Callable[[str], None]) -> _Job:
    wanted = settings.prepare
    target = settings.data.directory.resolve()  # the target of a link is made, the link stays
    if target.is_mount() and not (target / MANIFEST).exists():
        raise UserError(
            f"data.directory = {target}: is a mount point, which a rename cannot replace; choose a folder inside it"
        )
    if wanted.shard_tokens > mds.LARGEST_SHARD_TOKENS:
        raise UserError(
            f"prepare.shard_tokens = {wanted.shard_tokens}: a shard file is at most 4 GiB; "
            f"set it to {mds.LARGEST_SHARD_TOKENS} or less"
        )
    sources = [corpus.find_source(source, say=say) for source in wanted.sources]
    read = list(sources)
    modules = [] if sources or wanted.embedded == "chats" else embedded.standard_library()
    template = find_template(wanted)
    recipe = wanted.model_dump(mode="json", exclude=NOT_IN_RECIPE) | {
        "sources": [_describe_source(source) for source in wanted.sources] or EMBEDDED[wanted.embedded],
        "vocabulary": None if wanted.tokenizer else wanted.vocabulary,
        "tokenizer": _describe_tokenizer(wanted),
    }
    if wanted.segmentation:
        recipe["segmentation"] = wanted.segmentation.model_dump(mode="json")
    if template:
        recipe["chat_template"] = hashlib.sha256(template.text.encode()).hexdigest()
    if wanted.decontaminate:
        against = SourceSettings(name="evaluation", **wanted.decontaminate.model_dump(include={"files", "column"}))
        read.append(corpus.find_source(against, "prepare.decontaminate", say))
    identities = corpus.identities(read)
    if wanted.decontaminate:
        recipe["evaluation_sha256"] = corpus.corpus_hash(read[-1:])
    recipe = json.loads(without_secrets(json.dumps(recipe)))
    corpus_sha256 = corpus.corpus_hash(sources) if sources else embedded.embedded_hash(modules)
    if not sources and wanted.embedded == "chats":
        corpus_sha256 = embedded_chats.embedded_hash()
    return _Job(target, wanted, sources, modules, recipe, corpus_sha256, read, identities, template)


def _check_unchanged(job: _Job) -> None:
    for file, identity in corpus.identities(job.read).items():
        if identity != job.identities[file]:
            raise UserError(f"{file}: {corpus.CHANGED}")


def _describe_source(source: SourceSettings) -> dict[str, Any]:
    """Its settings in the recipe; those that came later are left out at their default, as in earlier recipes."""
    fields = SourceSettings.model_fields
    return source.model_dump(exclude={name for name in NEW_IN_SOURCES if getattr(source, name) == fields[name].default})


def _describe_tokenizer(wanted: PrepareSettings) -> dict[str, Any] | None:
    """In the recipe; None: a BPE is trained."""
    path = wanted.tokenizer
    if path is None:
        return wanted.model_dump(include=OF_WORDS) if wanted.tokenizer_model == "word" else None
    tokenizer = Tokenizer.load(path, fast=False)
    if tokenizer.dropout and wanted.bpe_dropout != "off":
        raise UserError(
            f"prepare.tokenizer = {path}: its BPE has dropout = {tokenizer.dropout}: it leaves out merges at random, "
            'so that each time the ids are others; set prepare.bpe_dropout = "off" to use all merges'
        )
    return {"sha256": tokenizer.sha256, "bos": tokenizer.bos, "eos": tokenizer.eos}


def _is_made(job: _Job) -> bool:
    """Whether the target exists with this text and these settings. Raises `UserError` if it holds other data."""
    if not job.target.exists() or (job.target.is_dir() and not any(job.target.iterdir())):
        return False
    manifest = Manifest.read(job.target)
    unsaid = {"content": PrepareSettings().content}  # missing in manifests of earlier versions, which did this
    made = manifest.recipe if "adopted" in manifest.recipe else unsaid | manifest.recipe
    differences = [
        f"prepare.{name} was {made.get(name)!r}, is {value!r}"
        for name, value in ({"segmentation": None} | job.recipe).items()
        if made.get(name) != value
    ]
    if not differences and manifest.corpus_sha256 != job.corpus_sha256:
        what = "the source files have" if job.sources else "Python's standard library has"
        differences = [f"{what} other content now"]
    if differences:
        raise UserError(
            f"data.directory = {job.target}: already prepared from other text or settings ({'; '.join(differences)}); "
            "choose another data.directory, or delete this one"
        )
    return True


# ---- the staging folder ---------------------------------------------------------------------------------------


def _work_folder(job: _Job, progress: Progress) -> Work:
    """The staging folder of this text and these settings, with the finished units of earlier runs; deletes others."""
    work = Work(job.partial / job.fingerprint)
    leftovers = folders_in(job.partial)
    with writable(job.partial):
        for leftover in leftovers:
            if leftover != work.folder:
                _say(progress, f"{leftover}: made from other text, settings or versions; deleted, starting over")
                shutil.rmtree(leftover)
        for folder in (work.folder / "scan", work.folder / "encoded", work.result):
            folder.mkdir(parents=True, exist_ok=True)
    if work.finished():
        _say(progress, f"{job.partial}: going on from {counted_noun(work.finished(), 'finished work item')}")
    return work


def _build_whole(job: _Job, progress: Progress) -> None:
    work = _work_folder(job, progress)
    try:
        _build(job, work, progress)
        _check_unchanged(job)
        put_in_place(work.result, job.target)
    except OSError as error:
        if error.errno not in DISK_FULL and "No space left" not in str(error):
            raise
        raise UserError(
            f"{job.partial}: the disk became full; {counted_noun(work.finished(), 'finished work item')} kept. Free "
            "space and run the same command to go on, or delete that folder and choose a data.directory on another disk"
        ) from None
    except units.Interrupted as error:
        if not work.finished():
            raise
        raise UserError(
            f"{error}\n{counted_noun(work.finished(), 'finished work item')} kept in {job.partial}; the same command "
            "goes on from them"
        ) from None


# ---- the stages -----------------------------------------------------------------------------------------------


def _build(job: _Job, work: Work, progress: Progress) -> None:
    sources = job.sources
    left_out: dict[str, dict[str, dict[str, int]]] = {}
    if not sources:
        sources, left_out = _collect_embedded(job.modules, job.settings.embedded, work, progress)
    if job.template:
        write_template(job.template, work.template)
    all_units = [unit for source in sources for unit in corpus.plan_units(source)]
    with _team(job.settings, all_units, progress) as team:
        listed = corpus.listed_shards(sources)
        if absent := absent_beside(listed):
            _say(progress, f"not read, because it is missing, though index.json lists it: {in_lines(absent)}")
        compare_with_indexes(listed, team, progress)
        scans = scan_all(team, all_units, job.settings, work)
        rows, row_bytes = count_rows(sources, all_units, scans, left_out, job.settings.validation_share)
        tokenizer = _make_tokenizer(job, team, all_units, scans, work)
        if not tokenizer.is_fast:
            _say(progress, f"tokenizing with the slower library: {tokenizer.slow_reason}")
        encoding.segmenter_of(tokenizer, job.settings)
        if tokenizer.dropout:
            _say(progress, f"the tokenizer's BPE dropout of {tokenizer.dropout} is off: all merges are used")
        _check_unchanged(job)
        parts = [cleaning.cut(scan, corpus.UNIT_BYTES) for scan in scans]
        _check_space(job, work, scans, parts, tokenizer.dtype)
        _encode(team, all_units, scans, parts, job.settings, tokenizer.is_fast, work)
        encoded: dict[str, list[Path]] = {source.name: [] for source in sources}
        for number, unit in enumerate(all_units):
            encoded[unit.source] += [work.encoded(number, part.number) for part in parts[number]]
        without_token = count_tokenless(encoded, job.settings)
        labels = count_labels(sources, encoded)
        dtype = None if job.settings.content == "text" else tokenizer.dtype
        counts, lengths = assembly.assemble(team, sources, encoded, job.settings.shard_tokens, dtype, work.result)
    _write_lists(all_units, scans, encoded, work)
    for name, splits in counts.items():
        for what, kept in (("documents", rows), ("text_bytes", row_bytes)):
            stored = sum(stored_amount(split, what) for split in splits.values())
            assert stored == kept[name]["kept"], f"{name}: stored {stored} {what} of {kept[name]}"
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=tokenizer.dtype.name,
        counts=counts,
        shards={name: {split: measure_shards(work.result, name, split) for split in SPLITS} for name in counts},
        rows=rows,
        row_bytes=row_bytes,
        statistics=all_statistics(lengths, counts),
        files=describe_files(work.result),
        recipe=job.recipe,
        corpus_sha256=job.corpus_sha256,
        encoder=PROVEN if tokenizer.is_fast else EXACT,
        without_token=without_token,
        labels=labels,
        python=platform.python_version(),
    ).write(work.result)


def _collect_embedded(
    modules: list[tuple[str, bytes]], content: str, work: Work, progress: Progress
) -> tuple[list[Source], dict[str, dict[str, dict[str, int]]]]:
    """The embedded corpus as files of the result, and the counts of what was left out."""
    if content == "chats":
        return [embedded_chats.write_embedded_chats(work.result / "corpus")], {}
    write, sources_in = COLLECT[content]
    folder, record = work.result / "corpus", work.folder / "left_out.json"
    if not record.exists():  # written last
        task = progress.add_task("collecting Python's own text", total=None)
        write_json(record, write(folder, modules))
        progress.update(task, total=1, completed=1)
    return sources_in(folder), read_json(record)


def _team(
    settings: PrepareSettings, all_units: Sequence[Unit], progress: Progress
) -> contextlib.AbstractContextManager[Team]:
    if settings.scheduler:
        return units.cluster(settings.scheduler, progress)
    number = min(settings.workers or len(os.sched_getaffinity(0)), len(all_units))
    small = sum(unit.num_bytes for unit in all_units) < INLINE_BYTES
    return units.processes(1 if small else number, progress)


def _make_tokenizer(job: _Job, team: Team, all_units: Sequence[Unit], scans: Sequence[Scan], work: Work) -> Tokenizer:
    """Write tokenizer.json, and the documents for the comparison of its fast path if it has one."""
    settings, gate = job.settings, work.folder / "gate.json"
    if not work.tokenizer.exists():
        if settings.tokenizer:
            given = tokenizer_file(settings.tokenizer)
            content = read_tokenizer(given)
            if hashlib.sha256(content).hexdigest() != job.recipe["tokenizer"]["sha256"]:
                raise UserError(f"{given}: {corpus.CHANGED}")
            keep_boundaries(given.parent, work.result)
            if job.template:
                keep_template(job.template, settings.tokenizer, work.result)
            write_atomically(work.tokenizer, content)
        else:
            if job.template:
                keep_template(job.template, None, work.result)
            sample = read_sample(team, all_units, scans, settings)
            _write_gate(gate, sample)
            write_atomically(work.tokenizer, _train(sample, settings))
    tokenizer = Tokenizer.load(work.tokenizer, name=encoding.given_name(settings))
    if tokenizer.is_fast:
        if not gate.exists():
            _write_gate(gate, read_sample(team, all_units, scans, settings))
        tokenizer.compare(read_json(gate))
    return tokenizer


def _write_gate(path: Path, sample: Sequence[str]) -> None:
    write_json(path, [text[:GATE_CHARACTERS] for text in sample[:GATE_DOCUMENTS]])


def _train(sample: Sequence[str], settings: PrepareSettings) -> str:
    if settings.tokenizer_model == "bpe":
        return train(sample, settings.vocabulary)
    cut = settings.words, settings.lowercase, settings.min_frequency
    return train_words(sample, settings.vocabulary, *cut, (BOS, EOS))


def keep_boundaries(given: Path, result: Path) -> None:
    """Copy the names of begin and end tokens from a Hugging Face folder beside its tokenizer.json."""
    named = named_boundaries(given)
    if named:
        write_json(result / "tokenizer_config.json", dict(zip(("bos_token", "eos_token"), named, strict=True)))


def read_sample(team: Team, all_units: Sequence[Unit], scans: Sequence[Scan], settings: PrepareSettings) -> list[str]:
    rows = cleaning.choose_sample(scans, GATE_BYTES if settings.tokenizer else TRAINING_BYTES)
    chosen = [(unit, mine, settings) for unit, mine in zip(all_units, rows, strict=True) if len(mine)]
    weights = [unit.num_bytes for unit, *_ in chosen]
    texts = team.run("sampling for the tokenizer", encoding.read_rows, chosen, weights)
    return [text for part in texts for text in part]


def _check_space(job: _Job, work: Work, scans: Sequence[Scan], parts: Sequence[list[Part]], dtype: np.dtype) -> None:
    """Raise before writing if the tokens would not fit on the disk: they are written twice, in parts and in shards. The
    size of the encoded parts predicts that of the others; without any, a token is assumed for two bytes of text."""
    a_byte = 1.0 if job.settings.content == "text" else dtype.itemsize / 2
    amounts = []
    for number, (scan, of_unit) in enumerate(zip(scans, parts, strict=True)):
        rows = scan.kept_bytes * (a_byte + scan.validation) + 32 * (scan.status == cleaning.KEPT)
        for part in of_unit:
            amounts.append((int(rows[part.first : part.end].sum()), _written(work.encoded(number, part.number))))
    expected, encoded = np.array(amounts, np.int64).reshape(-1, 2).T
    done = encoded > 0
    rate = encoded.sum() / max(1, expected[done].sum()) if done.any() else 1.0
    to_encode = int(expected[~done].sum() * rate)
    in_shards = sum(_written(file) for split in SPLITS for file in (work.result / split).rglob("*"))
    needed = to_encode + max(0, int(encoded.sum()) + to_encode - in_shards) + SPARE_BYTES
    free = shutil.disk_usage(work.folder).free
    if free < needed:
        raise units.Interrupted(
            f"data.directory = {job.target}: needs about {byte_size(needed)}, {byte_size(free)} are free; free "
            "space, or choose a data.directory on another disk"
        )


def _written(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _encode(
    team: Team,
    all_units: Sequence[Unit],
    scans: Sequence[Scan],
    parts: Sequence[list[Part]],
    settings: PrepareSettings,
    fast: bool,
    work: Work,
) -> None:
    """A task is a unit or, with few units for the processes, some parts of one: each task reads its file from the
    start."""

    def look(_: None) -> None:
        if shutil.disk_usage(work.folder).free < SPARE_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")

    most = max(1, min(READS_OF_A_UNIT, TASKS_A_PROCESS * team.size // max(1, len(all_units))))
    tasks, weights = [], []
    for number, (unit, start) in enumerate(zip(all_units, cleaning.first_rows(scans), strict=True)):
        step = -(-len(parts[number]) // most) or 1
        for first in range(0, len(parts[number]), step):
            mine = parts[number][first : first + step]
            tasks.append((number, unit, mine, start, settings, fast, work))
            weights.append(unit.num_bytes * len(mine) // len(parts[number]))
    team.run("tokenizing", encoding.encode_parts, tasks, weights, look)


def _write_lists(all_units: Sequence[Unit], scans: Sequence[Scan], encoded: dict[str, list[Path]], work: Work) -> None:
    """Write the validation text end to end, and the list of malformed records if there are any."""
    (work.result / "text").mkdir(exist_ok=True)
    with open(work.result / "text" / "validation.txt", "wb") as file:
        for path in (path for of_source in encoded.values() for path in of_source):
            file.write(read_array(path, "validation_text").tobytes())
    malformed = cleaning.list_malformed([unit.source for unit in all_units], scans)
    records = (record | {"file": corpus.base_name(record["file"])} for record in malformed)
    write_malformed(work.result / "malformed.jsonl", records)
    for part in work.result.rglob(".*.part*"):  # left by a process killed while writing
        part.unlink()
