#!/usr/bin/env bash
# deepspeed.initialize imports the backend of torch.compile, for a run that compiles nothing: about two seconds of each
# rank's start.
# Input: one weight, torch's SGD, ZeRO-1 in bf16, no compile setting.
# Expected: torch._inductor.compile_fx, the compiler, is not imported.
# Seen: it is, with 160 other modules of torch._inductor, through a function with the decorator @torch.compile in
# deepspeed.runtime.zero.muon, which is imported to compare the optimizer's type with Muon's. Needs g++: DeepSpeed
# builds its communication operator once.
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
from deepspeed.utils import logger

logger.setLevel("ERROR")
deepspeed.init_distributed("gloo")
model = torch.nn.Linear(1, 1, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


def inductor() -> tuple[bool, int]:
    modules = [name for name in sys.modules if name.startswith("torch._inductor")]
    return "torch._inductor.compile_fx" in modules, len(modules)


before = inductor()
deepspeed.initialize(model=model, optimizer=optimizer, config=config)
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
after = inductor()
print("expected: the compiler is imported neither before nor after")
print(f"seen:     before {before[0]}, {before[1]} modules; after {after[0]}, {after[1]} modules")
sys.exit(before[0] or not after[0])
PYTHON
"$python" finding.py
