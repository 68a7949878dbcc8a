#!/usr/bin/env bash
# DeepSpeed's WarmupCosineLR with a linear warm-up never reaches the peak rate, with its default of a logarithm it does.
# Input: a base rate of 1, total_num_steps 14, warmup_num_steps 4; the rate of each update.
# Expected: 1.0 between warm-up and decay.
# Seen: 0, 0, 0.25, 0.5, 0.75, 0.976, 0.905: the warm-up ends one step below the peak, and the cosine begins one
# step behind it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR


def rates(warmup_type: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosineLR(optimizer, total_num_steps=14, warmup_num_steps=4, warmup_type=warmup_type)
    found = []
    for _ in range(14):
        found.append(round(optimizer.param_groups[0]["lr"], 3))  # of this update, before it
        schedule.step()
    return found


linear, log = rates("linear"), rates("log")
print(f"deepspeed {deepspeed.__version__}")
print("expected: the highest rate is 1.0")
print(f"seen:     linear {max(linear)} in {linear[:7]}; log {max(log)}")
sys.exit(not (max(linear) == 0.976 and max(log) == 1.0))
PYTHON
"$python" finding.py
