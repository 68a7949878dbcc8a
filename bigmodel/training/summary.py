"""The summary at the end of a run: the model against simple baselines, and the paths of all results.

Writes summary.json, sample.txt, loss.png and time.png into the run directory. The baselines: a smoothed bigram model,
counted on exactly the tokens that the run trained on, and `xz -9` of the validation text.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigmodel.config.settings import Settings, UserError, packs_at
from bigmodel.data.load.stream import reader
from bigmodel.data.objectives.causal import causal
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import Segment, order_of_segment
from bigmodel.data.store.shards import ShardStore
from bigmodel.evaluation.baselines import Bigram, Pair, token_pairs, xz_bits_per_byte
from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.inspect.report import loss_curve, terminal_curve
from bigmodel.inspect.step_time import draw_times
from bigmodel.run_directory import write_atomically, write_json

XZ_BYTES = 200_000_000  # no xz baseline above this: xz compresses 2 MB/s
BIGRAM_TOKENS = 100_000_000  # no bigram baseline above this: counting would take minutes


def summarize(
    settings: Settings,
    evaluation: Evaluation,
    sample: str,
    segments: Sequence[Segment],
    wrong_sources: Evaluation | None = None,
) -> dict[str, Any]:
    """Compute the baselines and write the files; returns the content of summary.json.

    `wrong_sources`: evaluation of an encoder-decoder with the sources exchanged between documents.
    """
    directory = settings.run.directory
    summary = {
        "steps": settings.training.steps,
        "nats_per_token": evaluation.nats_per_token,
        "validation_targets": evaluation.num_labels,
        "bits_per_byte": evaluation.bits_per_byte,
        "bigram_bits_per_byte": bigram_bits_per_byte(settings, segments),
        "xz_bits_per_byte": xz_of_validation_text(settings),
    }
    if wrong_sources:
        summary["nats_per_token_with_wrong_sources"] = wrong_sources.nats_per_token
        summary["bits_per_byte_with_wrong_sources"] = wrong_sources.bits_per_byte
    write_json(directory / "summary.json", summary)
    write_atomically(directory / "sample.txt", sample + "\n")
    loss_curve(directory)
    draw_times(directory)
    return summary


def xz_of_validation_text(settings: Settings) -> float | None:
    store = ShardStore.of_run(settings.data, "validation")
    if (
        store.pair_sources or store.supervised_sources or not Examples(settings.data, 0).is_plain
    ):  # the labels are not the validation text
        return None
    return xz_bits_per_byte(store.file("text/validation.txt")) if store.text_bytes <= XZ_BYTES else None


def bigram_bits_per_byte(settings: Settings, segments: Sequence[Segment]) -> float | None:
    """Bits per byte of the bigram model on the validation split; of text pairs, only the target texts count.

    None for runs above BIGRAM_TOKENS, if the data of an earlier segment is gone, and for objectives other than causal.
    """
    training = settings.training
    packs = sum(packs_at(step, training.global_batch_size, training.batch_ramp) for step in range(training.steps))
    if packs * settings.data.sequence_length > BIGRAM_TOKENS:
        return None
    train = ShardStore.of_run(settings.data, "train")
    validation = ShardStore.of_run(settings.data, "validation")
    if train.supervised_sources or validation.supervised_sources:
        return None
    try:
        orders = [order_of_segment(train, settings.data, segments, number)[1] for number in range(len(segments))]
    except UserError:
        return None
    if len(train.pair_sources) < len(train.sources) and not Examples(settings.data, 0).is_plain:
        return None
    bigram = Bigram(train.manifest.vocabulary).fit(_trained_on(orders, training.steps, train))
    nats, count = bigram.score(token_pairs(validation))
    assert count == validation.num_labels, f"{count} pairs scored, {validation.num_labels} in the manifest"
    return nats / math.log(2) / validation.text_bytes


def show_summary(settings: Settings, summary: dict[str, Any]) -> None:
    """Print the loss curve, the baselines, the sample and the paths of all results."""
    directory = settings.run.directory
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(terminal_curve(directory, console.width), markup=False)
    table = Table("bits per byte of predicted text", "", title="lower is better", title_justify="left")
    names = {"bits_per_byte": "this model", "bigram_bits_per_byte": "bigram, same tokens", "xz_bits_per_byte": "xz -9"}
    if "bits_per_byte_with_wrong_sources" in summary:
        names["bits_per_byte_with_wrong_sources"] = "this model, each target with the source of another document"
    for name, words in names.items():
        table.add_row(words, "not counted" if summary[name] is None else f"{summary[name]:.3f}")
    console.print(table)
    console.print("a sample", style="bold")
    console.print((directory / "sample.txt").read_text(), markup=False)
    for name, what in (
        ("loss.png", "loss curve"),
        ("time.png", "where the time went"),
        ("checkpoints", "weights and optimizer state"),
        ("metrics.jsonl", "every step"),
        ("summary.json", "these numbers"),
        ("deepspeed.json", "the DeepSpeed settings in force"),
    ):
        console.print(Text.assemble(f"{directory / name}  ", (what, "dim")), soft_wrap=True)


def _trained_on(orders: Sequence[Order], steps: int, store: ShardStore) -> Iterator[Pair]:
    """(inputs, labels) of every chunk of every step, replayed from the plans of the run's segments."""
    ends, read = [*(order.first_step for order in orders[1:]), steps], reader(store)
    for order, end in zip(orders, ends, strict=True):
        while order.step < end:
            for chunk in chain.from_iterable(order.next_step()):
                document = read(chunk)
                if isinstance(document, np.ndarray):
                    yield causal(document, chunk.start, chunk.length)
                else:
                    assert not isinstance(document, Supervised), "a supervised document is not predicted as a whole"
                    yield causal(document.target, 0, chunk.num_labels)
