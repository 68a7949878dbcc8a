#!/usr/bin/env bash
# Megatron's IndexedDatasetBuilder stores a token id that its dtype cannot hold as another id, without an error.
# Input: IndexedDatasetBuilder(dtype=numpy.uint16), which halves the file of a small vocabulary, and a document with the
# id 70000, as after a change to a larger vocabulary.
# Expected: an error, as numpy.array([70000], dtype=numpy.uint16) raises OverflowError since numpy 2.
# Seen: 4464, which is 70000 - 65536, from add_item() and from add_document(): the document comes as a tensor, and the
# conversion of a tensor wraps. The index is complete, and training reads another word there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet megatron-core==0.16.1 torch==2.13.0 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys
import warnings

import numpy
import torch

warnings.simplefilter("ignore")
import megatron.core
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

document = torch.tensor([1, 70000, 2])
builder = IndexedDatasetBuilder("data.bin", dtype=numpy.uint16)
builder.add_item(document)
builder.end_document()
builder.add_document(document, [3])
builder.finalize("data.idx")
seen = [ids.tolist() for ids in IndexedDataset("data")]
try:
    numpy.array(document.tolist(), dtype=numpy.uint16)
    plain = "no error"
except OverflowError as error:
    plain = f"OverflowError: {error}"
print(f"megatron-core {megatron.core.__version__}, torch {torch.__version__}, numpy {numpy.__version__}")
print(f"expected: an error; numpy of a list: {plain}")
print(f"seen:     {seen}")
sys.exit(seen != [[1, 4464, 2]] * 2 or "OverflowError" not in plain)
PYTHON
"$python" finding.py
