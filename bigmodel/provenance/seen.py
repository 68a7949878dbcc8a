"""`bigmodel seen`: at which steps a document was trained on, which documents a step used, where a text stands."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from bigmodel.config.settings import UserError
from bigmodel.data.store import mds
from bigmodel.data.store.shards import ShardStore
from bigmodel.printed import one_line
from bigmodel.provenance.digests import read_digests, verify, write_digests
from bigmodel.provenance.export import export
from bigmodel.provenance.search import Hit, find, forms_of, sides
from bigmodel.provenance.trained import DIGESTS, Run, TrainedSteps
from bigmodel.sizes import counted_noun

MOST_SHOWN = 20  # steps, or documents with the text
PREVIEW_TOKENS = 24
WITHOUT_SHARDS = "--step, --document, --export, --digest and --verify need only manifest and length files"
Place = tuple[str, int, int]  # source, shard, row
Say = Callable[[str], None]


def show_step(run: Run, step: int, say: Say) -> None:
    """The documents of a training step, with their text where the shards are there."""
    for trained in run.walk(step, step):  # one: the chunks of a step are planned together
        sources, chunks = trained.store.sources, trained.chunks.tolist()
        places = [(sources[source], shard, row) for source, shard, row, *_ in chunks]
        say(
            f"step {step}: {counted_noun(len(chunks), 'chunk')} of {counted_noun(len(set(places)), 'document')} in "
            f"{counted_noun(int(trained.packs.max()) + 1, 'packed sequence')}{_not_applied(run, step)}"
        )
        try:
            texts = [_preview(trained.store, place, chunk[3]) for place, chunk in zip(places, chunks, strict=True)]
        except UserError as error:
            say(f"  without texts: {error}")
            texts = [""] * len(chunks)
        names = [_name(*place) for place in places]
        wide = max(map(len, names))
        tokens = [f"{chunk[3]} to {last}" for chunk, last in zip(chunks, trained.last_tokens, strict=True)]
        for pack, name, at, text in zip(trained.packs, names, tokens, texts, strict=True):
            say(_cut(f"  pack {pack}  {name:<{wide}}  tokens {at:<{max(map(len, tokens))}}  {text}"))


def _preview(store: ShardStore, place: Place, start: int) -> str:
    ids = sides(store.document(*place))[0][1]
    piece = ids[start : start + PREVIEW_TOKENS]  # `decode` leaves the first and last out
    return one_line(store.decode(np.concatenate([piece, piece[-1:]]) if start == 0 else np.pad(piece, 1)))


def show_document(run: Run, asked: str, say: Say) -> None:
    """The steps that trained on a document, with their tokens."""
    stores = _stores(run, say)
    store, place = _look_up(stores, asked)
    with _bar("steps", run.reached) as moved:
        found = steps_with(run, store, [place], moved)
    _say_steps(run, f"{_name(*place)}: ", found, say)


def show_text(run: Run, text: str, say: Say) -> bool:
    """The documents with a text, and the steps that trained on its tokens; whether there is one. The data of all
    segments is searched; a shard that several have, once."""
    stores = _stores(run, say)
    forms_of(stores[0], text)  # a wrong text is refused before the search
    try:
        found = _search(stores, text)
    except UserError as error:
        raise UserError(f"{error}; {WITHOUT_SHARDS}") from None
    if not found.occurrences:
        say(f"not in the training data: {counted_noun(found.searched, 'document')} searched")
        return False
    trained: dict[ShardStore, list[TrainedSteps]] = {}
    for store, documents in found.first.items():
        with _bar("steps", run.reached) as moved:
            trained[store] = steps_with(run, store, list(documents), moved)
    shown_of = [
        (hits, _covering(hits, store, trained[store]))
        for store, documents in found.first.items()
        for hits in documents.values()
    ]
    applied = {step for _, parts in shown_of for part in parts for step in part.steps.tolist()} - set(
        run.without_update
    )
    say(
        f"{counted_noun(found.occurrences, 'occurrence')} in {counted_noun(found.documents, 'document')}, "
        + (f"the first {MOST_SHOWN} " if found.documents > MOST_SHOWN else "")
        + (
            f"trained in {counted_noun(len(applied), 'step')}"
            if applied
            else f"not trained on up to step {run.reached}"
        )
    )
    for hits, parts in shown_of:
        _say_hits(run, hits, parts, say)
    if found.documents > MOST_SHOWN:
        say(f"and {counted_noun(found.documents - MOST_SHOWN, 'document')} more; a longer text is in fewer")
    return True


@dataclass
class _Found:
    """The occurrences in the first documents by the data that holds them, and counts of all."""

    first: dict[ShardStore, dict[Place, list[Hit]]]
    occurrences: int = 0
    documents: int = 0
    searched: int = 0  # documents


def _search(stores: Sequence[ShardStore], text: str) -> _Found:
    found, before = _Found({}), None
    with _bar("documents", sum(store.num_documents for store in stores)) as moved:

        def advance(documents: int) -> None:
            found.searched += documents
            moved(found.searched)

        for number, store in enumerate(stores):
            known = partial(_is_known, store, stores[:number])
            for hit in find(store, text, advance, known):
                found.documents += before != (store, hit.place)
                found.occurrences, before = found.occurrences + 1, (store, hit.place)
                if found.documents <= MOST_SHOWN:
                    found.first.setdefault(store, {}).setdefault(hit.place, []).append(hit)
    return found


def _covering(hits: Sequence[Hit], store: ShardStore, trained: Sequence[TrainedSteps]) -> list[TrainedSteps]:
    """The chunks of one document whose tokens cover one of its occurrences."""
    mine = [part.where(_are(part, [hits[0].place])) for part in trained]
    if store.passes or any(hit.side for hit in hits):  # a pair is one chunk; a pass has tokens of its own
        return mine
    first, last = np.array([(hit.first_token, hit.last_token) for hit in hits]).T
    return [
        part.where(((part.chunks[:, 3, None] <= last) & (part.last_tokens[:, None] >= first)).any(axis=1))
        for part in mine
    ]


def _say_hits(run: Run, hits: Sequence[Hit], covering: Sequence[TrainedSteps], say: Say) -> None:
    """A document with the text: its first occurrence, and the steps that trained on one of them."""
    hit, more = hits[0], len(hits) - 1
    side = "target, " if hit.side else ""
    others = f", and {counted_noun(more, 'occurrence')} more" if more else ""
    say(f"{_name(*hit.place)}, {side}tokens {hit.first_token} to {hit.last_token}{others}")
    say(_cut(f"  {hit.shown}"))
    _say_steps(run, "  ", covering, say)


def _stores(run: Run, say: Say) -> list[ShardStore]:
    """The data of all segments, the newest first. Says which is gone; raises `UserError` if all is."""
    if len(run.gone) == len(run.segments):
        raise UserError(run.gone[0])
    for problem in run.gone.values():
        say(f"left out: {problem}")
    numbers = [number for number in reversed(range(len(run.segments))) if number not in run.gone]
    return list(dict.fromkeys(run.store(number) for number in numbers))


def _name(source: str, shard: int, row: int) -> str:
    return f"{source}:{mds.shard_name(shard)}:{row}"


def _look_up(stores: Sequence[ShardStore], asked: str) -> tuple[ShardStore, Place]:
    """The document in the newest data that has it. Raises the `UserError` of the newest if none has."""
    errors = []
    for store in stores:
        try:
            return store, place_of(store, asked)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def place_of(store: ShardStore, asked: str) -> Place:
    """Source, shard and row of SOURCE:NUMBER, counted from 0 over the source, or of SOURCE:FILE:ROW. Raises `UserError`
    for a document that does not exist."""
    source, *rest = asked.split(":")
    if source not in store.sources:
        raise UserError(f"--document {asked}: no source {source!r}; the data has {', '.join(store.sources)}")
    numbers = [part.removeprefix("shard.").removesuffix(".mds") for part in rest]
    if len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--document {asked}: give SOURCE:NUMBER or SOURCE:FILE:ROW, as {source}:17")
    documents = store.shard_sizes(source)[:, 0]
    if len(numbers) == 1:
        number, ends = int(numbers[0]), np.cumsum(documents)
        if number >= ends[-1]:
            raise UserError(f"--document {asked}: {source} has the documents 0 to {ends[-1] - 1}")
        shard = int(np.searchsorted(ends, number, side="right"))
        return source, shard, number - int(ends[shard] - documents[shard])
    shard, row = map(int, numbers)
    if shard >= len(documents):
        files = f"{mds.shard_name(0)} to {mds.shard_name(len(documents) - 1)}"
        raise UserError(f"--document {asked}: {source} has the files {files}")
    if row >= documents[shard]:
        raise UserError(f"--document {asked}: {mds.shard_name(shard)} has the rows 0 to {documents[shard] - 1}")
    return source, shard, row


def steps_with(
    run: Run, store: ShardStore, places: Sequence[Place], moved: Callable[[int], None] = lambda step: None
) -> list[TrainedSteps]:
    """The chunks of these documents of `store` in the whole run. In a segment with other data a document is the same
    if its shard file is. Leaves out segments whose data is gone."""
    found = []
    for trained in run.walk(leaves_out=True):
        same = [place for place in places if _is_same(store, trained.store, *place[:2])]
        rows = _are(trained, same)
        if rows.any():
            found.append(trained.where(rows))
        moved(int(trained.steps[-1]))
    return found


def _is_same(store: ShardStore, other: ShardStore, source: str, shard: int) -> bool:
    """Whether a shard of `store` is in the other data too."""
    name = f"{store.split}/{source}/{mds.shard_name(shard)}"
    return store is other or store.manifest.files[name] == other.manifest.files.get(name)


def _is_known(store: ShardStore, others: Sequence[ShardStore], source: str, shard: int) -> bool:
    return any(_is_same(store, other, source, shard) for other in others)


def _are(trained: TrainedSteps, places: Sequence[Place]) -> np.ndarray:
    """(n,) whether a chunk is of one of the documents."""
    sources = trained.store.sources
    wanted = np.array([(sources.index(name), shard, row) for name, shard, row in places if name in sources])
    columns = trained.chunks[:, :3]
    if not len(wanted):
        return np.zeros(len(columns), dtype=bool)
    spans = np.maximum(columns.max(axis=0), wanted.max(axis=0)) + 1
    return np.isin(*(np.ravel_multi_index(tuple(table.T), tuple(spans)) for table in (columns, wanted)))


def _say_steps(run: Run, head: str, found: Sequence[TrainedSteps], say: Say) -> None:
    rows = [
        (step, pack, epoch, first, last)
        for part in found
        for step, pack, (first, epoch), last in zip(
            part.steps.tolist(), part.packs.tolist(), part.chunks[:, [3, 5]].tolist(), part.last_tokens, strict=True
        )
    ]
    applied = [row for row in rows if row[0] not in run.without_update]
    if applied:
        times = max(Counter(first for *_, first, _ in applied).values())
        steps = counted_noun(len({row[0] for row in applied}), "step")
        say(f"{head}trained in {steps}, each token at most {counted_noun(times, 'time')}")
    else:
        say(f"{head}not trained on up to step {run.reached}")
    for step, pack, epoch, first, last in rows[:MOST_SHOWN]:
        say(f"  step {step}, pack {pack}, epoch {epoch}: tokens {first} to {last}{_not_applied(run, step)}")
    if len(rows) > MOST_SHOWN:
        say(f"  and {len(rows) - MOST_SHOWN:,} more; `--export` has all")


def _cut(line: str) -> str:
    """As wide as the terminal."""
    text = Text(line.rstrip())
    text.truncate(shutil.get_terminal_size((120, 24)).columns, overflow="ellipsis")
    return text.plain


def _not_applied(run: Run, step: int) -> str:
    reason = run.without_update.get(step)
    return f", without an update: {reason.replace('_', ' ')}" if reason else ""


def write(run: Run, out: Path, say: Say) -> None:
    with _bar("steps", run.reached) as moved:
        rows = export(run, out, moved)
    say(f"{out}: {counted_noun(rows, 'row')}, steps 1 to {run.reached}")


def sign(run: Run, say: Say) -> None:
    with _bar("steps", run.reached) as moved:
        blocks = write_digests(run, moved)
    say(f"{run.directory / DIGESTS}: {counted_noun(len(blocks), 'block')} up to step {run.reached}: {blocks[-1].chain}")


def sign_off(run: Run, file: Path, say: Say) -> bool:
    """Whether the digests of a file are those of the run."""
    _, blocks = read_digests(file)
    with _bar("steps", run.reached) as moved:
        problems = verify(run, file, moved)
    for problem in problems:
        say(problem)
    if not problems:
        say(f"{file}: {run.directory} was trained on this data in this order, steps 1 to {blocks[-1].last}")
    return not problems


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
