#!/usr/bin/env bash
# An exception inside `with MDSWriter` still writes index.json, so a part of the data looks like all of it.
# Input: a loop over ten samples that raises at the sixth, for instance in a tokenizer.
# Expected: no index.json: it is written last, and StreamingDataset refuses a folder without it.
# Seen: an index of five samples, which StreamingDataset serves as the whole.
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
import contextlib
import sys

import torch

try:
    import torchvision
except RuntimeError:  # the index's torchvision is a CUDA build: beside a CPU build of torch it lacks two operators
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import streaming
from streaming import MDSWriter, StreamingDataset

with contextlib.suppress(ValueError), MDSWriter(out="shards", columns={"number": "int"}) as writer:
    for number in range(10):
        if number == 5:
            raise ValueError("no text in this document")
        writer.write({"number": number})
seen = [sample["number"] for sample in StreamingDataset(local="shards", batch_size=1)]
print(f"mosaicml-streaming {streaming.__version__}")
print("expected: no data set")
print(f"seen:     a data set of {seen}")
sys.exit(seen != [0, 1, 2, 3, 4])
PYTHON
"$python" finding.py
