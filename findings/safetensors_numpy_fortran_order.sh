#!/usr/bin/env bash
# safetensors.numpy saves a Fortran-ordered array as other values, without an error.
# Input: a 2 x 3 NumPy array in Fortran order, as a transposed weight is.
# Expected: the same values after loading, as in safetensors 0.7.0, or a refusal, as by safetensors.torch.
# Seen: memory is written in its own order under the array's shape, so the values are permuted.
# Known upstream: https://github.com/safetensors/safetensors/issues/825
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet safetensors==0.8.0 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import numpy
import safetensors
from safetensors.numpy import load, save

weight = numpy.asfortranarray(numpy.arange(6).reshape(2, 3))
loaded = load(save({"weight": weight}))["weight"]
print(f"safetensors {safetensors.__version__}, numpy {numpy.__version__}")
print(f"expected: {weight.tolist()}")
print(f"seen:     {loaded.tolist()}")
sys.exit(loaded.tolist() != [[0, 3, 1], [4, 2, 5]])
PYTHON
"$python" finding.py
