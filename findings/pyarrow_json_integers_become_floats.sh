#!/usr/bin/env bash
# pyarrow.json turns a column of integers into doubles when one of them needs 64 unsigned bits; other ids change.
# Input: JSON Lines with ids from 0 to 2**64 - 1, as hashes are.
# Expected: uint64, or an error that names the value, as for an explicit int64 column.
# Seen: double. 2**53 + 1, in another line, is rounded to 2**53, so two ids become equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet pyarrow==26.0.1
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import io
import sys

import pyarrow
from pyarrow import json

lines = b'{"id": 9007199254740992}\n{"id": 9007199254740993}\n{"id": 18446744073709551615}\n'
table = json.read_json(io.BytesIO(lines))
ids = [int(one) for one in table["id"].to_pylist()]
print(f"pyarrow {pyarrow.__version__}")
print("expected: three different ids, or an error")
print(f"seen:     {table['id'].type}, {ids}")
sys.exit(not (table["id"].type == pyarrow.float64() and ids[0] == ids[1] == 2**53 and ids[2] == 2**64))
PYTHON
"$python" finding.py
