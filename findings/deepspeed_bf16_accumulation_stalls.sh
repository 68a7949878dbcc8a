#!/usr/bin/env bash
# DeepSpeed accumulates micro-batches in bfloat16 by default; with 1,024 of them a gradient of 1 becomes 0.25.
# Input: one weight, gradient 1 in each micro-batch, gradient_accumulation_steps 1024, bf16 enabled, ZeRO-2.
# Expected: an update of 1 at rate 1; DeepSpeed keeps fp32 masters of bfloat16 weights.
# Seen: 0.25. Each micro-batch adds 1/1024; from 0.25 on half a unit in the last place is lost by rounding to even.
# data_types.grad_accum_dtype "fp32" gives 1. Needs g++: DeepSpeed builds its communication operator once.
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

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # ninja, to build the operator
import deepspeed
import torch
from deepspeed.utils import logger, safe_get_full_fp32_param

MICRO_BATCHES = 1024
logger.setLevel("ERROR")
deepspeed.init_distributed("gloo")


def update(data_types: dict) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "data_types": data_types,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    weight = next(engine.module.parameters())
    before = safe_get_full_fp32_param(weight).item()
    for _ in range(MICRO_BATCHES):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        engine.step()
    return round(before - safe_get_full_fp32_param(weight).item(), 3)


seen = update({}), update({"grad_accum_dtype": "fp32"})
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
print("expected: an update of 1.0")
print(f"seen:     {seen[0]}; with grad_accum_dtype fp32 {seen[1]}")
sys.exit(seen != (0.25, 1.0))
PYTHON
"$python" finding.py
