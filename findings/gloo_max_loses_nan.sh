#!/usr/bin/env bash
# gloo's MAX and MIN lose a NaN in most elements of a vector, and keep it in the others.
# Input: four ranks; one rank holds NaN in every element, the others 1.
# Expected: NaN in all elements, as from torch.maximum() and torch.amax(), or in none.
# Seen: NaN in two of eight elements; which ones depends on the rank. A check of a step by MAX over one element sees the
# NaN of rank 0 and no other.
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

RANKS, STORE = 4, Path("store").absolute().as_uri()


def maxima(rank: int) -> None:
    dist.init_process_group("gloo", init_method=STORE, rank=rank, world_size=RANKS)
    found = []
    for bad_rank in range(RANKS):
        for length in (8, 1):
            values = torch.full((length,), float("nan") if rank == bad_rank else 1.0)
            dist.all_reduce(values, dist.ReduceOp.MAX)
            found.append(int(values.isnan().sum()))
    if rank == 0:
        torch.save(found, "found")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(maxima, nprocs=RANKS)
    found = torch.load("found")
    print(f"torch {torch.__version__}")
    print("expected: 8 of 8 elements are NaN, and 1 of 1")
    for bad_rank in range(RANKS):
        print(f"seen:     rank {bad_rank} holds NaN: {found[2 * bad_rank]} of 8, {found[2 * bad_rank + 1]} of 1")
    sys.exit(found != [2, 1, 2, 0, 2, 0, 2, 0])
PYTHON
"$python" finding.py
