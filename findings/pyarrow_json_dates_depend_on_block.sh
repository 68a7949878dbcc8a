#!/usr/bin/env bash
# Whether pyarrow.json reads a text as text depends on the other texts in its block, and open_json() fails behind it.
# Input: JSON Lines whose `text` is a date in the first lines and a word later.
# Expected: strings in both; JSON has no dates.
# Seen: a file of dates gives timestamps (the text is lost: "2024-01-01" becomes a datetime); with a word in it the
# column is a string; open_json() decides by the first block and raises at the word.
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

dates = b'{"text": "2024-01-01"}\n' * 10
word = b'{"text": "hello"}\n'
small = json.ReadOptions(block_size=64)
seen = [str(json.read_json(io.BytesIO(lines), read_options=small)["text"].type) for lines in (dates, dates + word)]
try:
    for _batch in json.open_json(io.BytesIO(dates + word), read_options=small):
        pass
    seen.append("string")
except pyarrow.ArrowInvalid as error:
    seen.append(str(error))
print(f"pyarrow {pyarrow.__version__}")
print("expected: ['string', 'string', 'string']")
print(f"seen:     {seen}")
sys.exit(not (seen[:2] == ["timestamp[s]", "string"] and "couldn't parse" in seen[2]))
PYTHON
"$python" finding.py
