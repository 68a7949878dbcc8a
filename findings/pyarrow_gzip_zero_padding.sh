#!/usr/bin/env bash
# pyarrow reads a gzip file of several members, but fails at zero bytes behind the last one.
# Input: a gzip file padded with zeros to a block of 512 bytes, as tapes and block devices leave it.
# Expected: the padding is ignored, as by gzip 1.12 ("decompression OK, trailing zero bytes ignored") and by Python's.
# Seen: OSError "unknown compression method", after all data were read; nothing in it says padding.
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
import gzip
import sys

import pyarrow


def read(data: bytes) -> bytes:
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "gzip").read()


member = gzip.compress(b"text\n" * 100)
padded = member + bytes(-len(member) % 512)
assert gzip.decompress(padded) == gzip.decompress(member)
assert len(read(member + member)) == 1000
try:
    seen = f"{len(read(padded))} bytes"
except OSError as error:
    seen = str(error)
print(f"pyarrow {pyarrow.__version__}")
print("expected: 500 bytes")
print(f"seen:     {seen}")
sys.exit("unknown compression method" not in seen)
PYTHON
"$python" finding.py
