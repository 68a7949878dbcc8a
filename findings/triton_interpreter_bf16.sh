#!/usr/bin/env bash
# Triton's interpreter casts float32 to bfloat16 by cutting bits off, and its bfloat16 arithmetic is wrong in silence.
# Input: a kernel that casts 1.005859375 to bfloat16, and one that adds 1 and 1 in bfloat16, with TRITON_INTERPRET=1.
# Expected: 1.0078125 (the nearest, as on a GPU and in torch), and an error for the addition: the documents say that the
# interpreter does not support operations on bfloat16 and name a cast to float32 as the remedy.
# Seen: 1.0 and 1.7e38, without an error. With the remedy a kernel still stores results that are a bit too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 triton==3.7.1 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, target):
    tl.store(target, tl.load(source).to(tl.bfloat16))


@triton.jit
def add(source, target):
    tl.store(target, tl.load(source) + tl.load(source))


value, rounded, two = torch.tensor([1.005859375]), *torch.zeros(2, 1, dtype=torch.bfloat16)
cast[(1,)](value, rounded)
add[(1,)](torch.ones(1, dtype=torch.bfloat16), two)
print(f"triton {triton.__version__}, torch {torch.__version__}")
print(f"expected: cast {value.to(torch.bfloat16).item()}, 1 + 1 = 2.0")
print(f"seen:     cast {rounded.item()}, 1 + 1 = {two.item()}")
sys.exit(not (rounded.item() == 1.0 and two.item() > 1e38))
PYTHON
"$python" finding.py
