"""torchrun: the command of each node, with static rendezvous.

With torchrun's usual c10d rendezvous the node of rank 0 is a matter of luck and --node-rank is ignored; here node k is
node k, and rank 0 listens where the cluster file says. Each rank is `bigmodel launch exec`. Pure but for `become`.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bigmodel.launcher.topology import Topology


def node_command(topology: Topology, node: int, exec_words: Sequence[str]) -> list[str]:
    """What to run on one node. `exec_words`: `exec RUN.toml ...`."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(topology.hosts)}",
        f"--node-rank={node}",
        f"--nproc-per-node={len(topology.ranks_of(node))}",
        f"--master-addr={topology.main_address}",
        f"--master-port={topology.main_port}",
        "--rdzv-backend=static",
        "--module",
        "bigmodel",
        "launch",
        *exec_words,
    ]


def become(command: Sequence[str]) -> NoReturn:
    """Be torchrun from here on."""
    sys.stdout.flush()
    os.execv(command[0], list(command))
