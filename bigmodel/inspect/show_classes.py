"""The classes of a source whose documents are resampled, in `bigmodel show data`: how often each is repeated."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bigmodel.config.settings import Settings, packs_at
from bigmodel.data.advice.packing_advice import Packed
from bigmodel.data.plan.classes import class_shares, counts_by_class
from bigmodel.data.store.shards import ShardStore

SHOWN = 50


def classes_table(settings: Settings, store: ShardStore, source: str, packed: Packed) -> Table:
    """Documents of each class, its share of them and of those trained, and its passes in this run if all packed
    sequences are like `packed`. Raises `UserError` as the plan does."""
    data = settings.data
    counts = counts_by_class(store, source, data.classes)
    shares = class_shares(data, counts, source)
    trained = packs_of_run(settings) * packed.documents_by_source[source]
    table = Table(title=f"classes of {source}, {data.resampling}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("class")
    for name in ("documents", "share", "trained share", "passes"):
        table.add_column(name, justify="right")
    for number, share in list(shares.items())[:SHOWN]:
        table.add_row(
            Text(data.classes[number]),
            f"{counts[number]:,}",
            f"{counts[number] / sum(counts):.1%}",
            f"{share:.1%}",
            f"{trained * share / counts[number]:,.2f}",
        )
    if len(shares) > SHOWN:
        table.add_row(f"and {len(shares) - SHOWN:,} more")
    return table


def packs_of_run(settings: Settings) -> int:
    """Packed sequences in all steps."""
    training = settings.training
    return sum(packs_at(step, training.global_batch_size, training.batch_ramp) for step in range(training.steps))
