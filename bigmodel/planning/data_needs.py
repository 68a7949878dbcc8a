"""What a run needs of its data, and what the data are: tokens by source, passes, packing, loading, tokenization.

In: a `Context`, seconds of a step. Out: rows of the plan. Imports no torch.

Prepared data: the passes of each source follow from the manifest, the mix, `data.max_epochs`, `data.exclude` and the
curriculum, those of resampled classes also from their documents and mean lengths in the first shards; packing from the
first packing buffer of lane 0, planned as the run plans it. Not prepared: sizes of the files that are on this machine,
and what the run reads. Costs: seconds at most; a fraction of one without data.

Example: sources of 30 and 10 million tokens, each with half of the mix, give 40 million: 0.67 and 2 passes.
"""

import glob
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigmodel.config.settings import DataSettings, Settings, SourceSettings, UserError, packs_at, positions_before
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.classes import ClassNumbering, class_shares, counts_by_class
from bigmodel.data.plan.exclusion import Excluded, without
from bigmodel.data.plan.mixing import Stage, stages
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.planning.context import Context
from bigmodel.planning.part import Part, Row
from bigmodel.sizes import byte_size

# Tokens that one core reads, orders and packs in a second: benchmarks/stream_speed.json, a test compares.
LOADED_TOKENS_PER_CORE_SECOND = 23e6
# The same of shards of text, which are tokenized: benchmarks/stream_text.json, a test compares.
LOADED_TEXT_TOKENS_PER_CORE_SECOND = 1.5e6
# Text that one core cleans, tokenizes and writes in a second: benchmarks/prepare.json, a test compares.
PREPARED_BYTES_PER_CORE_SECOND = 5.2e6
# Bytes of English text in a token, of 32,000 and of 128,000 tokens: Llama Team 2024, section 3.2 (Llama 2's and 3's).
BYTES_PER_TOKEN = {32_000: 3.17, 128_000: 3.94}
USEFUL_PASSES = 4  # more repetition is worth little (Muennighoff et al. 2023)
SMALL_IDS = 2**16  # ids below it are stored in 2 bytes
MOST_PACKS, MOST_PACKS_OF_TWO_SIDES = 500, 150  # planned for the sample
MOST_FILES = 10_000  # of a source that are looked at
SAMPLED_SHARDS = 8  # of a source, for the share of documents that are not split


class Speed(Protocol):
    """Of `StepTime`: seconds of a step after the batch ramp."""

    @property
    def seconds(self) -> float: ...


class Packed(NamedTuple):
    """Planned packs: shares of both sides that are filled, and document tokens of one."""

    packs: int
    filled: float
    source_filled: float  # 0 without a source side
    tokens: float


class Source(NamedTuple):
    """`tokens`: of one pass. `given`: to the run."""

    name: str
    tokens: int
    given: float

    @property
    def passes(self) -> float:
        return self.given / self.tokens


def data_part(context: Context, step_time: Speed) -> Part:
    """Raises `UserError` for a mix or lanes that the prepared data do not fit."""
    settings = context.settings
    packs = positions_before(settings.training.steps, settings) // settings.data.sequence_length
    if context.manifest:
        rows, numbers = _prepared(settings, context.manifest, packs)
        stored = _stored_bytes_per_token(context.manifest)
    else:
        stored = 2.0 if context.vocabulary <= SMALL_IDS else 4.0
        rows, numbers = _not_prepared(context, packs, stored)
    loading, of_loading = _loading(context, step_time, numbers["read_tokens"] / packs, stored)
    return Part("Data", rows + loading, numbers | of_loading)


def given_by_source(mixes: Sequence[Stage], held: Sequence[float], wanted: float) -> list[float]:
    """Tokens that each source gives of the first `wanted`, where it ends after `held` (infinite: never); then the
    others share its part. Less in all, if all have ended."""
    given, left = [0.0] * len(held), list(held)
    ends = [*(stage.from_positions for stage in mixes[1:]), math.inf]
    for stage, end in zip(mixes, ends, strict=True):
        room = min(end, wanted) - sum(given)
        while room > 1e-6 * wanted:
            live = [number for number, share in enumerate(stage.shares) if share and left[number] > 0]
            if not live:
                break
            total = sum(stage.shares[number] for number in live)
            taken = min(room, min(left[number] / stage.shares[number] for number in live) * total)
            for number in live:
                part = taken * stage.shares[number] / total
                given[number] += part
                left[number] = 0.0 if part >= left[number] * (1 - 1e-12) else left[number] - part
            room -= taken
    return given


def packed_sample(settings: Settings) -> Packed:
    """The first packing buffer of lane 0, as the run plans it, or a part of it. Raises `UserError`."""
    most = MOST_PACKS_OF_TWO_SIDES if settings.data.source_sequence_length else MOST_PACKS
    buffer = min(settings.data.packing_buffer, most)
    data = settings.data.model_copy(update={"max_epochs": {}, "packing_buffer": buffer})
    lane = Order(ShardStore(data.directory, "train"), data, data.lanes, settings.run.seed, lanes=[0]).lane(0)
    planned = lane.plan(lane.beginning())
    table = PackTable(*planned.tables(0, planned.num_packs))
    packs, sides = planned.num_packs, (data.sequence_length, data.source_sequence_length)
    filled, of_source = int(table.num_tokens().sum()), int(table.source_positions().sum())
    tokens = int(table.chunks[:, 4].sum()) / packs
    return Packed(packs, filled / (packs * sides[0]), of_source / (packs * sides[1]) if sides[1] else 0.0, tokens)


def whole_share(data: DataSettings, manifest: Manifest) -> float:
    """Share of the tokens in documents that are not split, in the first shards of each source; of several objectives,
    the mean by their shares."""
    examples, whole, total = Examples(data, 0), 0.0, 0
    for source in manifest.sources:
        for shard in range(min(SAMPLED_SHARDS, len(manifest.shards[source]["train"]))):
            path = data.directory / "train" / source / f"lengths.{shard:05}.npy"
            positions = np.maximum(np.load(path, mmap_mode="r").astype(np.int64) - 1, 0)
            for objective, longest in zip(examples.objectives, examples.longest.tolist(), strict=True):
                whole += objective.share * int(positions[positions <= longest].sum())
            total += int(positions.sum())
    return whole / max(1, total)


def read_tokens_per_pack(data: DataSettings) -> float:
    """Document tokens of a full packed sequence before lengths are known: of the longest documents."""
    if not data.source_sequence_length:
        return float(data.sequence_length)
    examples = Examples(data, 0)
    lengths, shares = examples.longest, np.array([one.share for one in examples.objectives])
    sources = examples.measure(np.arange(len(lengths)), lengths, np.ones_like(lengths))[:, 3]
    if not sources.any():
        return float(data.sequence_length)
    return data.source_sequence_length * float(lengths @ shares) / float(sources @ shares)


def files_of(patterns: Sequence[str]) -> tuple[int, int]:
    """Number and bytes of the files on this machine that the patterns of a source name; of the first ones of many."""
    found: set[str] = set()
    for pattern in patterns:
        if "://" not in pattern:
            named = [pattern] if Path(pattern).is_file() else glob.iglob(pattern, recursive=True)
            found.update(itertools.islice(named, MOST_FILES))
    return len(found), sum(os.path.getsize(path) for path in found if os.path.isfile(path))


def bytes_per_token(vocabulary: int) -> float:
    """Of English text, by the nearest of two known vocabularies."""
    return BYTES_PER_TOKEN[min(BYTES_PER_TOKEN, key=lambda tokens: abs(math.log(tokens / vocabulary)))]


def _prepared(settings: Settings, manifest: Manifest, packs: int) -> tuple[list[Row], dict[str, Any]]:
    data = settings.data
    try:
        packed: Packed | None = packed_sample(settings)
        whole = whole_share(data, manifest)
        tokens = held_tokens(data)
    except (UserError, FileNotFoundError):
        if not data.remote:
            raise
        packed, whole = None, 0.0  # the lengths are in the store
        tokens = {name: sum(one[1] for one in manifest.shards[name]["train"]) for name in manifest.sources}
    wanted = packs * (packed.tokens if packed else read_tokens_per_pack(data))
    sources = _sources(data, tokens, wanted)
    given, available = sum(source.given for source in sources), sum(source.tokens for source in sources)
    where = f"in {data.directory}, one pass" + (", data.exclude left out" if data.exclude else "")
    rows = [_budget_row(settings, wanted), Row("tokens prepared", count(available), where)]
    for source in sources:
        share, passes = source.given / max(1.0, given), f"{source.passes:,.2f} passes"
        note = f"{share:.1%} of what is read, {count(source.tokens)} in a pass"
        if source.passes > USEFUL_PASSES:
            note += f"; more than {USEFUL_PASSES} are worth little (Muennighoff et al. 2023)"
        rows.append(Row(f"source {source.name}", passes, note))
        if data.resamples_classes and packed:
            rows += _class_rows(data, source)
    if given < 0.999 * wanted:
        step = int(settings.training.steps * given / wanted)
        rows.append(Row("data end", f"step {step:,}", f"data.max_epochs leaves {count(wanted - given)} too few"))
    numbers: dict[str, Any] = {
        "read_tokens": wanted,
        "available_tokens": available,
        "sources": {one.name: {"tokens": one.tokens, "passes": one.passes} for one in sources},
        "missing_tokens": max(0.0, wanted - given),
    }
    if not packed:
        return [*rows, Row("packing", "not known", "the lengths are in data.remote")], numbers
    filled = f"{packed.filled:.2%}"
    if data.source_sequence_length:
        filled = f"{packed.filled:.1%}, {packed.source_filled:.1%}"
    rows.append(Row("filled", filled, f"of {packed.packs:,} packed sequences of lane 0, planned as in the run"))
    if not any({"target_tokens", "trained_tokens"} & {*counts["train"]} for counts in manifest.counts.values()):
        longest = int(Examples(data, 0).longest.max())
        note = f"of the tokens; a longer text than {longest:,} is split (data.max_document_length)"
        rows.append(Row("documents not split", f"{whole:.1%}", note))
        numbers["whole_share"] = whole
    return rows, numbers | {"filled_share": packed.filled, "source_filled_share": packed.source_filled}


def held_tokens(data: DataSettings) -> dict[str, int]:
    """Of each source in one pass, without data.exclude. Raises `UserError` for a list of other data."""
    store, excluded = ShardStore(data.directory, "train"), Excluded.read(data.exclude)
    excluded.check(store)
    lengths = without(store, excluded)
    return {name: int(lengths.shard_sizes(name)[:, 1].sum()) for name in store.sources}


def class_passes(data: DataSettings, source: Source) -> dict[str, tuple[float, float, int]]:
    """Of a source with resampled classes, by class: its share of the documents, its passes, its documents."""
    store = ShardStore(data.directory, "train")
    counts = counts_by_class(store, source.name, data.classes)
    shares, numbering = class_shares(data, counts, source.name), ClassNumbering(store, data.classes)
    sums = np.zeros((2, len(counts)))  # documents and tokens of each class
    for shard in range(min(SAMPLED_SHARDS, store.num_shards(source.name))):
        numbers, tokens = numbering.of_shard(source.name, shard), num_tokens(store.lengths(source.name, shard))
        sums += [np.bincount(numbers, weights, len(counts)) for weights in (np.ones_like(tokens), tokens)]
    means = sums[1] / np.maximum(sums[0], 1)
    documents = source.given / sum(share * means[number] for number, share in shares.items())
    return {
        data.classes[number]: (share, share * documents / counts[number], counts[number])
        for number, share in shares.items()
    }


def _class_rows(data: DataSettings, source: Source) -> list[Row]:
    return [
        Row(f"class {name}", f"{passes:,.2f} passes", f"{share:.1%} of its documents; {documents:,} in a pass")
        for name, (share, passes, documents) in class_passes(data, source).items()
    ]


def _sources(data: DataSettings, tokens: Mapping[str, int], wanted: float) -> list[Source]:
    """Those of the mix with their tokens in one pass, and what they give."""
    named = {*data.mix, *(name for stage in data.curriculum for name in stage.mix)} if data.mix else {*tokens}
    names = [name for name, number in tokens.items() if number and name in named]
    mixes = stages(data.model_copy(update={"lanes": 1}), names, [tokens[name] for name in names])
    held = [(data.max_epochs.get(name, 0) or math.inf) * tokens[name] for name in names]
    given = given_by_source(mixes, held, wanted)
    return [Source(name, tokens[name], amount) for name, amount in zip(names, given, strict=True)]


def _not_prepared(context: Context, packs: int, stored: float) -> tuple[list[Row], dict[str, Any]]:
    settings, wanted = context.settings, packs * read_tokens_per_pack(context.settings.data)
    rows, each = [_budget_row(settings, wanted)], bytes_per_token(context.vocabulary)
    if not settings.prepare.sources:
        return [*rows, Row("sources", "embedded corpus", "not prepared yet")], {"read_tokens": wanted}
    files = [files_of(source.files) for source in settings.prepare.sources]
    rows += [
        _row_of_files(source, settings.data, wanted, size / each)
        for source, (_, size) in zip(settings.prepare.sources, files, strict=True)
    ]
    text = max(wanted * each, sum(size for _, size in files))
    seconds = text / PREPARED_BYTES_PER_CORE_SECOND
    speed = f"{byte_size(PREPARED_BYTES_PER_CORE_SECOND)} a second and core (benchmarks/prepare.json)"
    rows += [
        Row("text", byte_size(wanted * each), f"if no token is read twice; {each} bytes in a token, English"),
        Row("shards", byte_size(wanted * stored), f"the same, in {stored:.0f} bytes a token"),
        Row("tokenization", f"{seconds / 3600:,.0f} core hours", speed),
    ]
    numbers: dict[str, Any] = {"read_tokens": wanted, "text_bytes": wanted * each, "shard_bytes": wanted * stored}
    numbers["tokenization_core_seconds"] = seconds
    numbers["file_bytes"] = {one.name: size for one, (_, size) in zip(settings.prepare.sources, files, strict=True)}
    return rows, numbers


def _row_of_files(source: SourceSettings, data: DataSettings, wanted: float, found: float) -> Row:
    """`wanted`: tokens of the run; `found`: tokens in the source's files on this machine, if they are plain text."""
    note = f"{source.files[0]}: not on this machine"
    if found:
        note = f"its files hold {count(found)}, compressed ones more"
    if source.name not in data.mix:
        return Row(f"source {source.name}", "by its size", note)
    share, passes = data.mix[source.name] / sum(data.mix.values()), data.max_epochs.get(source.name, 0)
    note = f"{share:.0%} of what is read; {note}"
    if passes:
        note += f"; {count(share * wanted / passes)} of them different (data.max_epochs)"
    return Row(f"source {source.name}", count(share * wanted), note)


def _budget_row(settings: Settings, wanted: float) -> Row:
    return Row("tokens read", count(wanted), f"of documents, in {settings.training.steps:,} steps")


def _stored_bytes_per_token(manifest: Manifest) -> float:
    """All that is stored over the tokens that mix and passes count: of pairs, those of the source texts."""
    tokens = sum(counts[split]["tokens"] for counts in manifest.counts.values() for split in counts)
    size = sum(entry["bytes"] for path, entry in manifest.files.items() if ".mds" in path)
    return size / max(1, tokens)


def _loading(context: Context, step_time: Speed, read: float, stored: float) -> tuple[list[Row], dict[str, float]]:
    """`read`: document tokens of a packed sequence; `stored`: bytes of a token in shards."""
    training, nodes = context.settings.training, context.cluster.nodes
    packs = packs_at(training.steps - 1, training.global_batch_size, training.batch_ramp)
    of_node = packs * read / step_time.seconds / nodes
    recipe = context.manifest.recipe if context.manifest else {"content": context.settings.prepare.content}
    of_core, source = LOADED_TOKENS_PER_CORE_SECOND, "stream_speed.json"
    if recipe.get("content") == "text":
        of_core, source = LOADED_TEXT_TOKENS_PER_CORE_SECOND, "tokenized while loading, stream_text.json"
    cores = of_node / of_core
    busy = f"{cores:.2g} cores" if cores >= 1 else f"{cores:.1%} of a core" if cores >= 0.001 else "next to no core"
    note = f"{count(of_node)} tokens of {stored:.1f} bytes a second, {busy} ({source})"
    every = of_node * stored * nodes
    rows = [
        Row("loading, a node", f"{byte_size(of_node * stored)}/s", note),
        Row("loading, all nodes", f"{byte_size(every)}/s", "from the store, if no node keeps shards"),
    ]
    numbers = {
        "node_loading_bytes_per_second": of_node * stored,
        "loading_bytes_per_second": of_node * stored * nodes,
        "node_loading_cores": cores,
        "stored_bytes_per_token": stored,
    }
    return rows, numbers


def count(number: float) -> str:
    """
    >>> [count(number) for number in (950, 12_345, 5e6, 964.69e9, 1.4e12)]
    ['950', '12,345', '5.0 million', '964.7 billion', '1.40 trillion']
    """
    if number < 1e6:
        return f"{number:,.0f}"
    if number < 1e9:
        return f"{number / 1e6:,.1f} million"
    return f"{number / 1e9:,.1f} billion" if number < 1e12 else f"{number / 1e12:,.2f} trillion"
