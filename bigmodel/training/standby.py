"""A standby: a trainer that has done its imports and waits to become a rank (`bigmodel.launcher.standby` makes it).

In: the descriptor of a socket. Out: this process as the launcher would have started it anew: variables, standard output
and error. Without an order, because the launcher has ended, the process ends.
"""

import gc
import json
import os
import socket
from contextlib import suppress
from importlib import import_module

import bigmodel.training.loop  # noqa: F401 - the imports of a trainer
from bigmodel.data.store.shards import import_mds
from bigmodel.metrics.rank_record import begin_now
from bigmodel.rank_log import redirect
from bigmodel.training.imports import import_engine

LONGEST_ORDER = 1 << 16
# What torch and DeepSpeed import when an optimizer and an engine are built: 4 of the 5 seconds after the order.
IMPORTED_LATER = (
    "torch._inductor.compile_fx",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)


def become_rank(descriptor: int) -> None:
    """Import, wait for the order, and do it. Ends this process if there is none."""
    import_engine()
    import_mds()
    for module in IMPORTED_LATER:
        with suppress(ImportError):  # another version's
            import_module(module)
    gc.freeze()  # DeepSpeed collects garbage again and again while it starts, and would look at all of this
    with socket.socket(fileno=descriptor) as orders:
        order, descriptors, *_ = socket.recv_fds(orders, LONGEST_ORDER, 2)
    if not order:
        os._exit(0)
    redirect(descriptors)
    os.environ.update(json.loads(order))
    begin_now()
