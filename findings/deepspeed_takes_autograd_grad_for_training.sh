#!/usr/bin/env bash
# torch.autograd.grad of a DeepSpeed engine's output counts as a training backward: it raises, or fails inside ZeRO.
# Input: one linear layer, fp32, ZeRO 0, 1 and 2, one process; autograd.grad of engine(batch).sum() by the weights.
# Expected: gradients as from the bare module: torch.autograd.grad writes no .grad and is no step of training.
# Seen: RuntimeError at ZeRO 0 (it names tensor.backward(), which nobody called), IndexError at ZeRO 1 and 2.
# The engine hooks its output; engine.module(batch) gives the gradients at every stage.
# Needs g++: DeepSpeed builds its communication operator once.
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


def gradient(stage: int, bare: bool) -> str:
    model = torch.nn.Linear(2, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    forward = engine.module if bare else engine
    try:
        (found,) = torch.autograd.grad(forward(torch.ones(1, 2)).sum(), list(engine.module.parameters()))
    except (RuntimeError, IndexError) as error:
        return type(error).__name__
    return str(found.tolist())


seen = [(gradient(stage, bare=False), gradient(stage, bare=True)) for stage in (0, 1, 2)]
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
print("expected: [[1.0, 1.0]] from the engine as from the module, at each stage")
for stage, (engine, module) in enumerate(seen):
    print(f"seen at ZeRO {stage}: engine {engine}, module {module}")
sys.exit(seen != [(engine, "[[1.0, 1.0]]") for engine in ("RuntimeError", "IndexError", "IndexError")])
PYTHON
"$python" finding.py
