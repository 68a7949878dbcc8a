#!/usr/bin/env bash
# broadcast() and all_reduce() of torch send memory, not elements: tensors of one shape and other strides get mixed up.
# Input: rank 0 broadcasts a transposed 2 x 3 tensor, rank 1 receives into a contiguous one of the same shape and dtype;
# then both are summed.
# Expected: rank 1 has the values of rank 0, as after all_gather(), or an error for other strides.
# Seen: rank 1 has them in the order of rank 0's memory; the sum adds other elements. No error and no warning. Weights
# that one rank alone loaded transposed, or in channels_last, arrive permuted.
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
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

STORE = Path("store").absolute().as_uri()


def send(rank: int) -> None:
    dist.init_process_group("gloo", init_method=STORE, rank=rank, world_size=2)
    values = torch.arange(6).reshape(2, 3).t()
    values = values if rank == 0 else torch.zeros(3, 2, dtype=torch.long)
    dist.broadcast(values, src=0)
    torch.save(values.tolist(), str(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(send, nprocs=2)
    sent, received = torch.load("0"), torch.load("1")
    print(f"torch {torch.__version__}")
    print(f"expected: {sent}")
    print(f"seen:     {received}")
    sys.exit(not (sent == [[0, 3], [1, 4], [2, 5]] and received == [[0, 1], [2, 3], [4, 5]]))
PYTHON
"$python" finding.py
