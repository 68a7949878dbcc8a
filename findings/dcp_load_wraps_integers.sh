#!/usr/bin/env bash
# torch.distributed.checkpoint casts to the dtype of the tensor it loads into; integers wrap around without a word.
# Input: a saved int64 counter of tokens, 2**40 + 5, and a tensor of int32 to load it into.
# Expected: an error that names both dtypes, as for another shape.
# Seen: 5. Floats become integers, fp32 masters become bf16 in the same silence.
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
import warnings

import torch
import torch.distributed.checkpoint as checkpoint

warnings.simplefilter("ignore")  # of a checkpoint without a process group
checkpoint.save({"tokens": torch.tensor([2**40 + 5]), "rate": torch.tensor([1.9])}, checkpoint_id="saved")
state = {"tokens": torch.zeros(1, dtype=torch.int32), "rate": torch.zeros(1, dtype=torch.uint8)}
checkpoint.load(state, checkpoint_id="saved")
seen = {name: value.item() for name, value in state.items()}
try:
    checkpoint.load({"tokens": torch.zeros(2)}, checkpoint_id="saved")
    shape = "accepted"
except checkpoint.api.CheckpointException:
    shape = "refused"
print(f"torch {torch.__version__}")
print("expected: another dtype is refused, as another shape is")
print(f"seen:     {seen}; another shape: {shape}")
sys.exit(not (seen == {"tokens": 5, "rate": 1} and shape == "refused"))
PYTHON
"$python" finding.py
