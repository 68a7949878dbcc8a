#!/usr/bin/env bash
# torchrun with rendezvous over c10d ignores --node-rank; the node that comes first gets rank 0.
# Input: two agents, --nnodes 2, --node-rank 1 started two seconds before --node-rank 0.
# Expected: RANK 0 runs on the node with --node-rank 0, as with static rendezvous, or an error.
# Seen: RANK 0 runs on the node with --node-rank 1. Ranks of a pipeline or a sharded checkpoint change nodes with each
# start, although each host names its rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import os
import socket
import subprocess
import sys
import time

import torch

if "RANK" in os.environ:
    with open(f"node-{os.environ['NODE']}", "w") as file:
        file.write(os.environ["RANK"])
    sys.exit()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    endpoint = f"127.0.0.1:{free.getsockname()[1]}"
agents = []
for node in ("1", "0"):
    options = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "finding"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *rendezvous, __file__]
    agents.append(subprocess.Popen(command, env=os.environ | {"NODE": node}, stderr=subprocess.DEVNULL))
    time.sleep(2)
assert [agent.wait(60) for agent in agents] == [0, 0]
seen = {node: open(f"node-{node}").read() for node in ("0", "1")}
print(f"torch {torch.__version__}")
print("expected: {'0': '0', '1': '1'} (RANK by --node-rank)")
print(f"seen:     {seen}")
sys.exit(seen != {"0": "1", "1": "0"})
PYTHON
"$python" finding.py
