"""`bigmodel seen`: at which steps a document was trained on, which documents a step used, where a text stands."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bigmodel.config.settings import UserError
from bigmodel.data.store import mds
from bigmodel.data.store.shards import ShardStore
from bigmodel.provenance.digests import verify, write_digests
from bigmodel.provenance.export import export
from bigmodel.provenance.search import Hit, find, shown, sides
from bigmodel.provenance.trained import DIGESTS, Run, TrainedSteps
from bigmodel.sizes import counted_noun

MOST_SHOWN = 20  # steps or documents with the text
PREVIEW_TOKENS = 24
WITHOUT_SHARDS = "--step, --document, --export, --digest and --verify need only manifest and length files"
Place = tuple[str, int, int]  # source, shard, row


def show_step(run: Run, step: int, say: Callable[[str], None]) -> None:
    """The documents of a training step, with their text where the shards are there."""
    readable = True
    for trained in run.walk(step, step):
        reason = run.without_update.get(step)
        not_applied = f", without an update: {reason.replace('_', ' ')}" if reason else ""
        packs = counted_noun(int(trained.packs.max()) + 1, "packed sequence")
        say(f"step {step}: {counted_noun(len(trained.packs), 'document')} in {packs}{not_applied}")
        for pack, chunk, last in zip(trained.packs, trained.chunks.tolist(), trained.last_tokens, strict=True):
            name = trained.store.sources[chunk[0]]
            text = ""
            if readable:
                try:
                    text = _preview(trained.store, (name, chunk[1], chunk[2]), chunk[3])
                except UserError as error:
                    readable = False
                    say(f"  without texts: {error}")
            say(f"  pack {pack}: {name}:{mds.shard_name(chunk[1])}:{chunk[2]} tokens {chunk[3]} to {last}{text}")


def _preview(store: ShardStore, place: Place, start: int) -> str:
    ids = sides(store.document(*place))[0][1]
    piece = ids[start : start + PREVIEW_TOKENS]  # `decode` leaves the first and last out
    return f"  {shown(store.decode(np.concatenate([piece, piece[-1:]]) if start == 0 else np.pad(piece, 1)))}"


def show_document(run: Run, asked: str, say: Callable[[str], None]) -> None:
    """The steps that trained on a document, with their tokens."""
    store = run.store(len(run.segments) - 1)
    place = place_of(store, asked)
    with _bar("steps", run.reached) as moved:
        found = steps_with(run, store, [place], moved)
    _say_steps(run, f"{place[0]}:{mds.shard_name(place[1])}:{place[2]}", found, say)


def show_text(run: Run, text: str, say: Callable[[str], None]) -> bool:
    """The documents with a text, and the steps that trained on its tokens; whether there is one. The data of the run's
    last segment is searched."""
    store = run.store(len(run.segments) - 1)
    try:
        with _bar("documents", store.num_documents) as moved:
            done = iter(range(1, store.num_documents + 1))
            hits = list(find(store, text, lambda count: moved(next(done))))
    except UserError as error:
        raise UserError(f"--text needs the shards: {error}; {WITHOUT_SHARDS}") from None
    documents = list(dict.fromkeys((hit.source, hit.shard, hit.row) for hit in hits))
    if not hits:
        say(f"not in the training data: {counted_noun(store.num_documents, 'document')} searched")
        return False
    say(f"{counted_noun(len(hits), 'occurrence')} in {counted_noun(len(documents), 'document')}")
    with _bar("steps", run.reached) as moved:
        found = steps_with(run, store, documents, moved)
    for hit in hits[:MOST_SHOWN]:
        _say_hit(run, hit, store, found, say)
    if len(hits) > MOST_SHOWN:
        say(f"and {len(hits) - MOST_SHOWN:,} more")
    return True


def _say_hit(run: Run, hit: Hit, store: ShardStore, found: Sequence[TrainedSteps], say: Callable[[str], None]) -> None:
    name = f"{hit.source}:{mds.shard_name(hit.shard)}:{hit.row}"
    side = "target, " if hit.side else ""
    say(f"{name}, {side}tokens {hit.first_token} to {hit.last_token}: {hit.shown}")
    mine = [part.where(_are(part, [(hit.source, hit.shard, hit.row)])) for part in found]
    if not hit.side:
        mine = [
            part.where((part.chunks[:, 3] <= hit.last_token) & (part.last_tokens >= hit.first_token)) for part in mine
        ]
    _say_steps(run, "  it", mine, say)


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
        raise UserError(f"--document {asked}: {source} has the files {mds.shard_name(0)} to {len(documents) - 1:05}")
    if row >= documents[shard]:
        raise UserError(f"--document {asked}: {mds.shard_name(shard)} has the rows 0 to {documents[shard] - 1}")
    return source, shard, row


def steps_with(
    run: Run, store: ShardStore, places: Sequence[Place], moved: Callable[[int], None] = lambda step: None
) -> list[TrainedSteps]:
    """The chunks of these documents of `store` in the whole run. In a segment with other data a document is the same
    if its shard file is."""
    found = []
    for trained in run.walk():
        same = [place for place in places if _is_same(store, trained.store, place)]
        rows = _are(trained, same)
        if rows.any():
            found.append(trained.where(rows))
        moved(int(trained.steps[-1]))
    return found


def _is_same(store: ShardStore, other: ShardStore, place: Place) -> bool:
    name = f"{store.split}/{place[0]}/{mds.shard_name(place[1])}"
    return store is other or store.manifest.files[name] == other.manifest.files.get(name)


def _are(trained: TrainedSteps, places: Sequence[Place]) -> np.ndarray:
    """(n,) whether a chunk is of one of the documents."""
    sources = trained.store.sources
    wanted = np.array([(sources.index(name), shard, row) for name, shard, row in places if name in sources])
    columns = trained.chunks[:, :3]
    if not len(wanted):
        return np.zeros(len(columns), dtype=bool)
    spans = np.maximum(columns.max(axis=0), wanted.max(axis=0)) + 1
    return np.isin(*(np.ravel_multi_index(tuple(table.T), tuple(spans)) for table in (columns, wanted)))


def _say_steps(run: Run, name: str, found: Sequence[TrainedSteps], say: Callable[[str], None]) -> None:
    rows = [
        (step, epoch, pack, first, last)
        for part in found
        for step, pack, (first, epoch), last in zip(
            part.steps.tolist(), part.packs.tolist(), part.chunks[:, [3, 5]].tolist(), part.last_tokens, strict=True
        )
    ]
    if not rows:
        say(f"{name}: not trained on up to step {run.reached}")
        return
    applied = [row for row in rows if row[0] not in run.without_update]
    times = len({row[1] for row in applied})
    say(f"{name}: {counted_noun(len({row[0] for row in applied}), 'step')}, {counted_noun(times, 'epoch')}")
    for step, epoch, pack, first, last in rows[:MOST_SHOWN]:
        reason = run.without_update.get(step)
        why = f", without an update: {reason.replace('_', ' ')}" if reason else ""
        say(f"  step {step}, pack {pack}, epoch {epoch}: tokens {first} to {last}{why}")
    if len(rows) > MOST_SHOWN:
        say(f"  and {len(rows) - MOST_SHOWN:,} more")


def write(run: Run, out: Path, say: Callable[[str], None]) -> None:
    with _bar("steps", run.reached) as moved:
        rows = export(run, out, moved)
    say(f"{out}: {counted_noun(rows, 'row')}, steps 1 to {run.reached}")


def sign(run: Run, say: Callable[[str], None]) -> None:
    with _bar("steps", run.reached) as moved:
        blocks = write_digests(run, moved)
    say(f"{run.directory / DIGESTS}: {counted_noun(len(blocks), 'block')} up to step {run.reached}: {blocks[-1].chain}")


def sign_off(run: Run, file: Path, say: Callable[[str], None]) -> bool:
    """Whether the digests of a file are those of the run."""
    with _bar("steps", run.reached) as moved:
        problems = verify(run, file, moved)
    for problem in problems:
        say(problem)
    if not problems:
        say(f"{file}: the order of the data is that of {run.directory}")
    return not problems


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
