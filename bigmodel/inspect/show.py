"""`bigmodel show data` and `show batch`: prepared data and its packing in numbers, a packed batch as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bigmodel.config.deepspeed_config import agree
from bigmodel.config.settings import DataSettings, Settings, UserError
from bigmodel.data.advice.lane_advice import lane_warning, repeat_warning
from bigmodel.data.advice.packing_advice import (
    Packed,
    Suggestion,
    all_positions,
    measure_packing,
    mix_shares,
    suggest,
    whole_share,
)
from bigmodel.data.advice.pair_advice import CutPairs, count_cut, suggest_sides
from bigmodel.data.advice.supervised_advice import Trained, count_trained
from bigmodel.data.load.batch import draw
from bigmodel.data.load.stream import Builder
from bigmodel.data.plan.mixing import mix_lag_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import order_now, order_of_segment
from bigmodel.data.prepare.lengths import draw_lengths
from bigmodel.data.store.manifest import SPLITS, Manifest, in_words, stored_amount
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.draw_masks import draw_masks, mask_text
from bigmodel.inspect.draw_texts import draw_texts
from bigmodel.inspect.show_augmentation import augmentation_text
from bigmodel.inspect.show_classes import classes_table, packs_of_run
from bigmodel.model.attention_masks import mask_matrices
from bigmodel.sizes import byte_size
from bigmodel.training.checkpoint.folder import newest_state


def show_batch(settings: Settings, step: int, png: Path | None) -> None:
    """Draw the first packed sequence of data step `step`, its texts and its masks.

    If the run has checkpoints, the plan is the one of that step. The plan is walked from the start of its segment, or
    from the newest checkpoint if that is before the step.
    """
    settings = agree(settings)
    store = ShardStore.of_run(settings.data, "train")
    order, data = order_before(store, settings, step, newest_state(settings.run.directory / "checkpoints"))
    batch = Builder(store, data, settings.run.seed).build([order.next_step()[0]], step, [0])
    console = Console(highlight=False, markup=False, emoji=False)
    for line in draw(batch):
        console.print(line, soft_wrap=True)
    for line in draw_texts(batch, store.tokenizer, console.width):
        console.print(line, soft_wrap=True)
    masks = mask_matrices(batch, settings.model)
    for mask in masks:
        for line in mask_text(batch, mask):
            console.print(line, soft_wrap=True)
    if png and not masks:
        raise UserError(
            f"--png {png}: model.kind = {settings.model.kind!r} has no attention mask to draw; leave --png out"
        )
    if png:
        draw_masks(batch, masks, png)
        console.print(f"picture: {png}", soft_wrap=True)


def order_before(
    store: ShardStore, settings: Settings, step: int, state: Mapping[str, Any] | None
) -> tuple[Order, DataSettings]:
    """The order whose next data step is `step`, and its settings. `state`: from the run's newest checkpoint.

    If the settings differ from the run's last plan, they are planned as for a new run.
    """
    data, order = settings.data, Order.of_run(store, settings)
    segments = state["segments"] if state else []
    if segments:
        last = len(segments) - 1
        planned = order_now(store, settings, segments)
        if planned.plan.identity == segments[last]["identity"]:
            number = sum(segment["first_step"] <= step for segment in segments) - 1
            data, order = order_of_segment(store, settings.data, segments, number)
            if number == last and state and state["cursor"]["step"] <= step:
                order.restore(state["cursor"])
    while order.step < step:
        order.next_step()
    return order, data


def show_data(settings: Settings, png: Path | None = None) -> None:
    """Print sources, lengths, mix, packing and suggestions; draw the lengths if `png` is given."""
    settings = agree(settings)
    data = settings.data
    store = ShardStore.of_run(data, "train")
    packed = measure_packing(store, data)  # first, because it refuses a wrong mix
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(sources_table(settings, store.manifest, packed))
    for source in store.manifest.sources:
        if dropped := store.manifest.dropped(source):
            console.print(f"dropped from {source}: {in_words(dropped)}", markup=False)
    console.print(lengths_text(store.manifest), markup=False)
    console.print(
        packing_text(settings, packed, whole_share(all_positions(store), data.max_document_length)), markup=False
    )
    if store.pair_sources:
        console.print(cut_text(count_cut(store, data), data.classes), markup=False)
        console.print(window_text(data, packed), markup=False)
    if data.resamples_classes:
        for source in packed.documents_by_source:
            console.print(classes_table(settings, store, source, packed))
    if store.supervised_sources:
        console.print(trained_text(count_trained(store, data), data), markup=False)
    if augmented := augmentation_text(settings, store):
        console.print(augmented, markup=False, soft_wrap=True)
    suggestions = suggest_sides(store, data) if data.source_sequence_length else suggest(store, store.manifest, data)
    console.print(suggestions_table(suggestions))
    for warning in filter(None, (lane_warning(store, settings), repeat_warning(store, settings))):
        console.print(warning, markup=False)
    if data.curriculum:
        lag = f"a stage of data.curriculum takes effect at most {mix_lag_tokens(data):,} tokens after its from_tokens"
        console.print(lag, markup=False)
    if png:
        lengths = [store.lengths(name, shard) for name in store.sources for shard in range(store.num_shards(name))]
        draw_lengths(lengths, png, data.max_document_length)
        console.print(f"picture: {png}", markup=False, soft_wrap=True)


def sources_table(settings: Settings, manifest: Manifest, packed: Packed) -> Table:
    """Sources and splits: documents, tokens and text (of both sides for pairs).

    For the train split also the share in training, the epochs of this run if all packed sequences are like `packed`,
    and the dropped rows.
    """
    title = f"{settings.data.directory}: vocabulary {manifest.vocabulary:,}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("source")
    table.add_column("split", no_wrap=True)
    for name in ("documents", "tokens", "text", "mix", "passes", "rows dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    num_packs = packs_of_run(settings)
    tokens_by_source = {name: manifest.counts[name]["train"]["tokens"] for name in manifest.sources}
    mixed = mix_shares(tokens_by_source, settings.data.mix, settings.data.mix_exponent)
    for source in manifest.sources:
        rows = manifest.rows[source]
        for split in SPLITS:
            counts = manifest.counts[source][split]
            tokens, text_bytes = (stored_amount(counts, what) for what in ("tokens", "text_bytes"))
            line = [f"{counts['documents']:,}", f"{tokens:,}", byte_size(text_bytes)]
            if split == SPLITS[0]:
                in_epoch = sum(positions for _, positions, _ in manifest.shards[source][split])
                passes = num_packs * packed.positions.get(source, 0.0) / max(1, in_epoch)
                line += [
                    f"{mixed[source]:.1%}",
                    f"{passes:,.2f}",
                    f"{rows['read'] - rows['kept']:,} of {rows['read']:,}",
                ]
            table.add_row(source, split, *line)
    return table


def lengths_text(manifest: Manifest) -> str:
    """Length statistics of documents and of targets of pairs: one line, then a bar with a count per power of two."""
    of_all = _lengths_text("document", manifest.statistics)
    targets = manifest.statistics.get("target")
    return "\n".join([of_all, _lengths_text("target of a pair", targets)]) if targets else of_all


def _lengths_text(what: str, statistics: dict[str, Any]) -> str:
    bins = sorted((int(top), count) for top, count in statistics["histogram"].items())
    most = max(count for _, count in bins)
    return "\n".join(
        [
            f"tokens per {what}: mean {statistics['mean_tokens']:,.0f}, median {statistics['median_tokens']:,.0f}, "
            f"90% below {statistics['p90_tokens']:,.0f}, longest {statistics['max_tokens']:,}; "
            f"{statistics['bytes_per_token']:.2f} bytes per token",
            *(f"up to {top:>9,} {'█' * max(1, round(count / most * 30)):<30} {count:,}" for top, count in bins),
        ]
    )


def packing_text(settings: Settings, packed: Packed, whole: float) -> str:
    data = settings.data
    sides = f"{packed.filled:.2%} of the tokens filled"
    size, split = f"{data.sequence_length:,} tokens", f"\n  {whole:.1%} of the tokens in documents not split or cut by "
    if data.source_sequence_length:
        sides = f"{packed.filled:.2%} of the target tokens and {packed.source_filled:.2%} of the source tokens filled"
        size = f"{data.sequence_length:,} target and {data.source_sequence_length:,} source tokens"
    return (
        f"packing, as planned for {packed.num_packs:,} packed sequences of {size}:\n"
        f"  {sides}, {packed.documents:.1f} documents per packed sequence\n"
        f"  {packed.document_limited:.1%} of the packed sequences closed by data.max_documents = {data.max_documents}"
        + ("" if data.source_sequence_length else f"{split}data.max_document_length = {data.max_document_length:,}")
    )


def cut_text(cut: CutPairs, classes: Sequence[str] = ()) -> str:
    if classes:
        share = cut.sources / cut.num_pairs
        return (
            f"  of {cut.num_pairs:,} labelled documents, {cut.sources:,} are cut ({share:.2%}): their end is left out"
        )
    return (
        f"  of {cut.num_pairs:,} pairs, {cut.sources:,} have their source cut ({cut.sources / cut.num_pairs:.2%}) and "
        f"{cut.targets:,} their target ({cut.targets / cut.num_pairs:.2%}): the end of the text is left out"
    )


def trained_text(trained: Trained, data: DataSettings) -> str:
    """How much of chats and responses is trained."""
    weight = f", with a mean weight of {trained.weight / max(1, trained.trained_tokens):.3f}"
    share = trained.trained_tokens / max(1, trained.tokens)
    return (
        f"  of {trained.documents:,} chats and responses {trained.trained_tokens:,} of {trained.tokens:,} tokens are "
        f"trained ({share:.1%}{weight if trained.weight != trained.trained_tokens else ''})\n"
        f"  with data.max_document_length = {data.max_document_length:,} the last turns of {trained.shortened:,} are "
        f"left out, the first answer of {trained.cut:,} is cut, {trained.left_out:,} have no answer within it"
    )


def window_text(data: DataSettings, packed: Packed) -> str:
    """How settings in tokens count pairs."""
    planned = data.packing_buffer * (data.sequence_length + data.source_sequence_length)
    together = planned / sum(packed.positions.values())
    return (
        "  of pairs, data.mix, data.curriculum and data.packing_buffer count the tokens of the source text alone: with "
        f"data.packing_buffer = {data.packing_buffer:,}\n  about {together:,.0f} packed sequences are planned together"
    )


def suggestions_table(suggestions: list[Suggestion]) -> Table:
    table = Table("setting", title="suggestions, from the lengths alone", title_justify="left")
    for name in ("now", "suggested"):
        table.add_column(name, justify="right")
    table.add_column("because")
    for one in suggestions:
        suggested = "as it is" if one.suggested == one.now else f"{one.suggested:,}"
        table.add_row(one.setting, f"{one.now:,}", suggested, one.reason)
    return table
