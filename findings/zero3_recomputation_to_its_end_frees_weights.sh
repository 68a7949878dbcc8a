#!/usr/bin/env bash
# Under ZeRO-3 a checkpointed block must not be recomputed to its end: the recomputation frees a weight that the backward
# has just gathered.
# Input: two residual blocks of two matrices each, non-reentrant activation checkpointing, DeepSpeed's ZeRO-3 on one
# rank; once with torch's early stop of the recomputation, its default, once without (set_checkpoint_early_stop(False),
# as for blocks whose forward has side effects).
# Expected: the same gradients; early stop only saves work.
# Seen: without it the backward raises an error about tensors of sizes 0 and 48, only where nothing after the last matrix
# is kept for the backward; with dropout after it, it does not. DeepSpeed gathers the last matrix before its backward,
# whose first look at a kept tensor begins the recomputation, and the end of the matrix's second forward frees it. Needs
# g++: DeepSpeed builds its communication operator once.
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
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # ninja, to build the operator
import deepspeed
import torch
from deepspeed.utils import logger
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

logger.setLevel("ERROR")
deepspeed.init_distributed("gloo")
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class Block(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.up, self.down, self.share = nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.down(torch.relu(self.up(x))), self.share)


class Model(nn.Module):
    def __init__(self, share: float, stops_early: bool) -> None:
        super().__init__()
        self.embed, self.stops_early = nn.Linear(16, 16), stops_early
        self.blocks = nn.ModuleList(Block(share) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        with set_checkpoint_early_stop(self.stops_early):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        return x.square().sum()


def outcome(share: float, stops_early: bool) -> str:
    model = Model(share, stops_early)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    try:
        engine.backward(engine(torch.ones(2, 16)))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return "gradients"


print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
found = {(share, stops): outcome(share, stops) for share in (0.0, 0.1) for stops in (True, False)}
print("expected: gradients in all four cases")
for (share, stops), words in found.items():
    print(f"seen:     dropout {share}, early stop {'on' if stops else 'off'}: {words}")
fails = {case for case, words in found.items() if words != "gradients"}
sys.exit(fails != {(0.0, False)} or "size of tensor a (0)" not in found[0.0, False])
PYTHON
"$python" finding.py
