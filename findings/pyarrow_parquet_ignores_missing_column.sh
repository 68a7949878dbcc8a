#!/usr/bin/env bash
# ParquetFile.iter_batches(columns=[...]) ignores a column that the file lacks; pyarrow.parquet.read_table() refuses it.
# Input: a file with the column `text`, read with columns=["txet"].
# Expected: an error that names the column, as from read_table().
# Seen: batches without columns, with the right number of rows; the filter of a loop over them sees nothing.
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
import sys

import pyarrow
from pyarrow import parquet

parquet.write_table(pyarrow.table({"text": ["a", "b"]}), "file.parquet")
batches = list(parquet.ParquetFile("file.parquet").iter_batches(columns=["txet"]))
try:
    parquet.read_table("file.parquet", columns=["txet"])
    read_table = "accepted"
except pyarrow.ArrowInvalid:
    read_table = "refused"
seen = [(batch.num_rows, batch.num_columns) for batch in batches]
print(f"pyarrow {pyarrow.__version__}")
print("expected: an error from both")
print(f"seen:     iter_batches gives (rows, columns) {seen}; read_table: {read_table}")
sys.exit(not (seen == [(2, 0)] and read_table == "refused"))
PYTHON
"$python" finding.py
