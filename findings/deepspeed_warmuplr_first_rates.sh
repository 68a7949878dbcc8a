#!/usr/bin/env bash
# DeepSpeed's WarmupLR makes the first two updates at rate 0; the third has 30% of the peak.
# Input: warmup_min_lr 0, warmup_max_lr 1, warmup_num_steps 10; the rate of each update.
# Expected: 0.1, 0.2, ... 1.0, or 0, 0.1, ...: a linear warm-up with at most one update at 0.
# Seen: 0, 0, 0.301, 0.477, ...: log(step) / log(10), with both step 0 and step 1 at 0. The first updates change no
# weight but fill Adam's moments. warmup_type "linear" has two zeros as well.
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
from deepspeed.runtime.lr_schedules import WarmupLR


def rates(warmup_type: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupLR(optimizer, 0.0, 1.0, warmup_num_steps=10, warmup_type=warmup_type)
    found = []
    for _ in range(5):
        found.append(round(optimizer.param_groups[0]["lr"], 3))  # of this update, before it
        schedule.step()
    return found


seen = rates("log"), rates("linear")
print(f"deepspeed {deepspeed.__version__}")
print("expected: at most one rate of 0, then a tenth of the peak")
print(f"seen:     log (the default) {seen[0]}; linear {seen[1]}")
sys.exit(seen != ([0.0, 0.0, 0.301, 0.477, 0.602], [0.0, 0.0, 0.1, 0.2, 0.3]))
PYTHON
"$python" finding.py
