"""Pictures of what enters the model: a packed batch with its documents and the attention it allows."""

from pathlib import Path

from rich.console import Console

from bigmodel.config import Settings
from bigmodel.data.batch import build_batch, draw, draw_png, make_keys
from bigmodel.data.order import Order
from bigmodel.data.shards import ShardStore
from bigmodel.data.stream import reader
from kernels.visibility import causal, dense


def show_batch(settings: Settings, step: int, png: Path) -> None:
    """Draw the first pack of data step `step`. Walks the plan from step 0: at a late step this takes a while."""
    store = ShardStore(settings.data.directory, "train")
    order = Order.of_run(store, settings)
    for _ in range(step):
        order.next_step()
    keys = make_keys(settings.run.seed, step, [0], settings.data.pack_tokens)
    batch = build_batch([order.next_step()[0]], reader(store), settings.data, keys)
    console = Console(highlight=False)
    for line in draw(batch):
        console.print(line, soft_wrap=True)
    visibility = causal(batch.offsets)
    draw_png(batch, dense(visibility, len(batch.tokens), len(batch.tokens)).numpy(), png)
    console.print(f"picture: {png}")
