#!/usr/bin/env bash
# gloo's sum of the same four values differs between equal elements of one vector.
# Input: four ranks; one rank holds 256 in every element, the others 1; bfloat16.
# Expected: one order of summation, so equal elements get equal sums (256 or 260), as a tree or a ring over ranks in a
# fixed order gives.
# Seen: [260, 260, 256, 256, 256, 256, 260, 260]. The vector is cut by ranks and each part is summed from another rank
# on: an all-reduce at another world size or bucket layout is another sum.
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


def sums(rank: int, big_rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"{STORE}{big_rank}", rank=rank, world_size=RANKS)
    values = torch.full((8,), 256.0 if rank == big_rank else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(values)
    torch.save(values.tolist(), f"{big_rank}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    for big_rank in (0, 1):
        torch.multiprocessing.spawn(sums, (big_rank,), RANKS)
    seen = [torch.load(f"{big_rank}.0") for big_rank in (0, 1)]
    assert all(torch.load(f"0.{rank}") == seen[0] for rank in range(RANKS))  # all ranks get the same vector
    print(f"torch {torch.__version__}")
    print("expected: eight equal sums, whichever rank holds 256")
    for big_rank, values in enumerate(seen):
        print(f"seen:     rank {big_rank} holds 256: {[int(value) for value in values]}")
    sys.exit(seen != [[260, 260, 256, 256, 256, 256, 260, 260], [260, 260, 260, 260, 256, 256, 256, 256]])
PYTHON
"$python" finding.py
