#!/usr/bin/env bash
# MDSWriter stores an array of big-endian integers byte by byte and reads it back as little-endian: other values.
# Input: np.array([1, 2, 3], ">i4"), as memory maps of .npy, FITS or network data give it; the column `ndarray`.
# Expected: the values, by a swap or by a refusal of the dtype, as the writer refuses bool and complex.
# Seen: [16777216, 33554432, 50331648], without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 torchvision==0.28.0 mosaicml-streaming==0.13.0 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import numpy
import torch

try:
    import torchvision
except RuntimeError:  # the index's torchvision is a CUDA build: beside a CPU build of torch it lacks two operators
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import streaming
from streaming import MDSWriter, StreamingDataset

with MDSWriter(out="shards", columns={"tokens": "ndarray"}) as writer:
    writer.write({"tokens": numpy.array([1, 2, 3], ">i4")})
seen = StreamingDataset(local="shards", batch_size=1)[0]["tokens"].tolist()
print(f"mosaicml-streaming {streaming.__version__}, numpy {numpy.__version__}")
print("expected: [1, 2, 3]")
print(f"seen:     {seen}")
sys.exit(seen != [1 << 24, 2 << 24, 3 << 24])
PYTHON
"$python" finding.py
