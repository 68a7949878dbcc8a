"""torchrun: the command of each node, with static rendezvous.

torchrun's default c10d rendezvous ignores --node-rank and places rank 0 on any node. With static rendezvous, node k is
node k, and rank 0 listens at the cluster file's address. Each rank runs `bigmodel launch exec`. Pure, except `become`.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bigmodel.launcher.topology import Topology


def node_command(topology: Topology, node: int, exec_words: Sequence[str]) -> list[str]:
    """The command of one node. exec_words: `exec RUN.toml ...`."""
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
    """Replace this process by torchrun."""
    sys.stdout.flush()
    os.execv(command[0], list(command))
