"""A standby: a trainer that has done its imports and waits to become a rank (`bigmodel.launcher.standby` makes it).

In: the descriptor of a socket. Out: this process as the launcher would have started it anew: variables, standard output
and error. Without an order, because the launcher has ended, the process ends.
"""

import json
import os
import socket

import bigmodel.training.loop  # noqa: F401 - the imports of a trainer
from bigmodel.data.store.shards import import_mds
from bigmodel.metrics.rank_record import begin_now
from bigmodel.rank_log import redirect
from bigmodel.training.zero.engine import import_deepspeed

LONGEST_ORDER = 1 << 16


def become_rank(descriptor: int) -> None:
    """Import, wait for the order, and do it. Ends this process if there is none."""
    import_deepspeed()
    import_mds()
    with socket.socket(fileno=descriptor) as orders:
        order, descriptors, *_ = socket.recv_fds(orders, LONGEST_ORDER, 2)
    if not order:
        os._exit(0)
    redirect(descriptors)
    os.environ.update(json.loads(order))
    begin_now()
