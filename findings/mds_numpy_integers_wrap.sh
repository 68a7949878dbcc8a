#!/usr/bin/env bash
# MDSWriter refuses a Python int that its column cannot hold, and lets a NumPy integer of the same value wrap around.
# Input: columns of int16 and uint32; the values 40000 and -1, once as int, once as NumPy scalars.
# Expected: OverflowError both times.
# Seen: OverflowError for ints; np.int32(40000) is stored as -25536, np.int64(-1) as 4294967295. Token ids and lengths
# mostly are NumPy scalars.
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


def stored(folder: str, length: object, token: object) -> object:
    try:
        with MDSWriter(out=folder, columns={"length": "int16", "token": "uint32"}) as writer:
            writer.write({"length": length, "token": token})
    except OverflowError:
        return "OverflowError"
    sample = StreamingDataset(local=folder, batch_size=1)[0]
    return int(sample["length"]), int(sample["token"])


seen = stored("int", 40000, 7), stored("numpy", numpy.int32(40000), numpy.int64(-1))
print(f"mosaicml-streaming {streaming.__version__}, numpy {numpy.__version__}")
print("expected: OverflowError for both")
print(f"seen:     int {seen[0]}, numpy {seen[1]}")
sys.exit(seen != ("OverflowError", (-25536, 4294967295)))
PYTHON
"$python" finding.py
